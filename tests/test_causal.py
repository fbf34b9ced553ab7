"""Masks that hide every key behind its query: fused attention skips what lies beyond, and gives the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import models
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp


class Masked(nn.Module):
    """Self-attention under a mask that is made of the input."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask = mask
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x, keep))
        return self.head(mixed.transpose(1, 2).flatten(2)).mean(1)


def count(x: Tensor, start: int = 0) -> Tensor:
    return torch.arange(x.shape[1]) + start


def before(x: Tensor, start: int = 0) -> Tensor:
    """``[queries, keys]``: whether a key comes before a query, or is its own."""
    return count(x)[None, :] <= count(x, start)[:, None]


def added(keep: Tensor, hidden: float = -math.inf) -> Tensor:
    return torch.where(keep, 0.0, hidden)


ENDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda x, keep: before(x)[None, None],
    "causal and padding": lambda x, keep: before(x)[None, None] & keep[:, None, None, :],
    "queries first": lambda x, keep: (count(x)[:, None] >= count(x)[None, :]).logical_and(
        keep[:, None, None]
    ),
    "before alone": lambda x, keep: (count(x)[None, :] < count(x)[:, None]) & keep[:, None, None],
    "window": lambda x, keep: before(x) & (count(x)[None, :] > count(x, -3)[:, None]),
    "tril": lambda x, keep: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "added": lambda x, keep: added(before(x)[None, None] & keep[:, None, None]),
    "expanded": lambda x, keep: before(x)[None, None].expand(x.shape[0], 1, -1, -1),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "padding": lambda x, keep: keep[:, None, None, :],
    "one key ahead": lambda x, keep: before(x, 1),
    "prefix": lambda x, keep: before(x) | (count(x) < 3)[None, :],
    "backwards": lambda x, keep: before(x).T,
    "tril, one ahead": lambda x, keep: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(1),
    "low but finite": lambda x, keep: added(before(x), -1e4),
    "of the input": lambda x, keep: keep.long().cumsum(-1)[:, None, None] <= count(x)[:, None],
}


def explained(
    mask: Callable[[Tensor, Tensor], Tensor], composite: str = "attnlrp"
) -> tuple[fxlrp.Explanation, list[bool]]:
    """The explanation, and of each fused call whether it was told."""
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 5:] = False
    explainer = fxlrp.lrp_compile(Masked(mask).eval(), composite, backend="eager")
    return explainer(x, keep, target=1), told(explainer)


def told(explainer: fxlrp.Explainer) -> list[bool]:
    calls = [n for n in explainer.relevance_graph.graph.nodes if "flash_attention" in str(n.target)]
    return [any(a is True for a in n.args) for n in calls]


@pytest.mark.parametrize("name", ENDING)
def test_it_is_told_and_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a spelling is not seen through, or the kernel leaves out more than the mask hides."""
    found, fired = explained(ENDING[name])
    assert len(fired) == 2 and all(fired)
    monkeypatch.setattr("fxlrp.compiler.pipeline.skip_beyond", lambda graph: 0)
    expected, fired = explained(ENDING[name])
    assert not any(fired)
    assert torch.equal(found.relevance, expected.relevance)
    assert torch.equal(found.value, expected.value)


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_left_alone(name: str) -> None:
    """Breaks if a mask that shows some key ahead, or is not proven to show none, is taken for causal."""
    assert explained(OTHERS[name])[1] == [False, False]


@pytest.mark.parametrize(("side", "composite"), [("left", "attnlrp"), ("right", "cp")])
def test_decoders_with_padding(side: str, composite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the transformers library makes masks, padded on either side; the last layer asks for one row."""
    ids, mask = models.token_batch(1, (7, 4), side)
    pair = []
    for skips in (True, False):
        with monkeypatch.context() as patch:
            if not skips:
                patch.setattr("fxlrp.compiler.pipeline.skip_beyond", lambda graph: 0)
            explainer = fxlrp.lrp_compile(models.tiny_llama(), composite, backend="eager")
            pair.append(explainer(input_ids=ids, attention_mask=mask).relevance)
        assert any(told(explainer)) == skips
    assert torch.equal(*pair)


def test_encoders_with_padding() -> None:
    """Does not fire: every position sees every other."""
    ids, mask = models.token_batch(1, (7, 4), "right")
    explainer = fxlrp.lrp_compile(models.tiny_bert(), backend="eager")
    explainer(input_ids=ids, attention_mask=mask)
    assert told(explainer) and not any(told(explainer))
