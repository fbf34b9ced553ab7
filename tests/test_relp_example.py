"""The core of examples/relp_patching.py on a tiny random model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor

import fxlrp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import relp_patching as example


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny_llama(0)


def pairs(length: int) -> example.Pairs:
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(1, 41, (2, 3, length), generator=generator)
    return example.Pairs(clean, corrupted, torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]))


def test_patching_all_that_a_token_has_restores_the_clean_run(llama: Any) -> None:
    """Would break: a patch of another value, place or run. Of one token the residual stream is everything."""
    one = pairs(1)
    found = example.patched(llama, one)
    parts = example.Sites.of(llama).parts()
    with torch.no_grad():
        change = one.metric(llama(one.clean).logits) - one.metric(llama(one.corrupted).logits)
    torch.testing.assert_close(found[:, parts["residual"], 0], change)
    assert found.shape == (3, 1 + 2 * 4 + 2, 1)
    assert bool((found[:, parts["heads"]].abs() > 1e-6).any())


def test_a_head_is_patched_at_one_position_only(llama: Any) -> None:
    """Would break: a patch that leaks to other positions: the last layer's heads reach the metric alone."""
    several = pairs(4)
    found = example.patched(llama, several)
    last = example.Sites.of(llama).parts()["heads"].stop - 4
    assert found[:, last : last + 4, :3].abs().max() < 1e-9
    assert found[:, last : last + 4, 3].abs().min() > 1e-9


def test_the_estimates_are_differences_times_gradients(llama: Any) -> None:
    """Would break: coefficients of the clean run, or of other nodes than those that are patched."""
    several, sites = pairs(4), example.Sites.of(llama)
    kept: dict[str, dict[str, Tensor]] = {"clean": {}, "corrupted": {}}

    def run(name: str) -> Tensor:
        def keep(at: str, value: Tensor) -> Tensor:
            kept[name][at] = value
            return value

        with example.edited(llama, sites, keep):
            embedding = llama.model.embed_tokens(getattr(several, name)).detach().requires_grad_()
            return several.metric(llama(inputs_embeds=embedding).logits)

    run("clean")
    at = list(kept["clean"])
    gradients = torch.autograd.grad(run("corrupted").sum(), [kept["corrupted"][name] for name in at])
    product = {
        name: (kept["clean"][name] - kept["corrupted"][name]) * g
        for name, g in zip(at, gradients, strict=True)
    }
    expected = torch.stack(
        [
            product[name]
            .unflatten(-1, (sites.heads if name in sites.mixed else 1, -1))[..., share, :]
            .sum((2, 3))
            for name, share in sites.components()
        ],
        1,
    )
    (found,) = example.estimated(fxlrp.lrp_compile(llama, "gradient"), [several])
    torch.testing.assert_close(found, expected.detach())


def test_relp_is_not_the_gradient(llama: Any) -> None:
    """Would break: a composite whose rules do not reach the model's norms and products."""
    several = pairs(4)
    explainer = fxlrp.lrp_compile(llama)
    found = {
        name: example.estimated(explainer.with_composite(composite), [several])[0]
        for name, composite in example.METHODS.items()
    }
    for name in ("relp", "relp, frozen attention", "attnlrp"):
        assert not torch.allclose(found[name], found["gradient"], rtol=1e-2)
    text = example.table([found["relp"]], {"relp": [found["relp"]]}, example.Sites.of(llama).parts())
    assert text.split()[-4:] == ["1.000"] * 4
