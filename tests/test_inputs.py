"""Which inputs are explained: by default what counts as content, else those that are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp


class Biased(nn.Module):
    """A graph Transformer's layer: nodes with types, attention biased by looked-up distances of pairs."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.kind, self.degree = nn.Embedding(20, 8), nn.Embedding(5, 8)
        self.distance = nn.Embedding(6, 2)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, kinds: Tensor, degrees: Tensor, distances: Tensor, scale: Tensor) -> Tensor:
        x = self.kind(kinds) + self.degree(degrees)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        bias = self.distance(distances).permute(0, 3, 1, 2)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            mixed = ((q @ k.mT) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
        return self.head((scale * mixed.transpose(1, 2).flatten(2)).mean(1))


@pytest.fixture(params=[True, False], ids=["fused", "eager"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return Biased(request.param).eval().requires_grad_(False).double()


def graph(batch: int = 2, nodes: int = 5) -> dict[str, Tensor]:
    return {
        "kinds": torch.randint(20, (batch, nodes)),
        "degrees": torch.randint(5, (batch, nodes)),
        "distances": torch.randint(6, (batch, nodes, nodes)),
        "scale": torch.rand(batch, nodes, 1).double(),
    }


def test_by_default_content_is_explained(model: nn.Module) -> None:
    """Breaks if degrees, which are added to kinds, or the mask of attention count as content."""
    explanation = fxlrp.lrp_compile(model)(**graph())
    assert set(explanation.relevance) == {"kinds", "scale"}
    assert explanation.ledger.residual < 1e-12


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
def test_named_inputs(model: nn.Module, composite: str) -> None:
    """Breaks if a named input is left out, or the pairs' bias gets no relevance through attention's mask."""
    names = ("kinds", "degrees", "distances")
    explainer = fxlrp.lrp_compile(model, composite, inputs=names)
    inputs = graph()
    explanation = explainer(**inputs, target=1)
    assert set(explanation.relevance) == set(names)
    assert explanation.relevance["distances"].shape == (2, 5, 5)
    assert bool(explanation.relevance["distances"].any())
    assert explanation.ledger.residual < 1e-12
    graph_before = explainer.relevance_graph
    assert set(explainer(**graph(3, 7), target=1).relevance) == set(names)
    assert explainer.relevance_graph is graph_before
    if composite == "gradient":
        for name, table in (("kinds", model.kind), ("degrees", model.degree), ("distances", model.distance)):
            assert torch.allclose(explanation.relevance[name], _by_autograd(model, table, inputs), atol=1e-12)


def _by_autograd(model: nn.Module, table: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Gradient x Input of one embedding's lookup."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = table.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            model(**inputs)[:, 1].sum().backward()
    finally:
        handle.remove()
    return (kept[0] * kept[0].grad).sum(-1).detach()


def test_one_name(model: nn.Module) -> None:
    """One input: its relevance alone, as a tensor; the others hold theirs as constants."""
    explanation = fxlrp.lrp_compile(model, inputs="scale")(**graph())
    assert isinstance(explanation.relevance, Tensor)
    assert explanation.ledger.residual < 1e-12


def test_unknown_name(model: nn.Module) -> None:
    with pytest.raises(fxlrp.InputError, match=r"no tensor input 'ids'.*'kinds', 'degrees'"):
        fxlrp.lrp_compile(model, inputs=("ids",))(**graph())


def test_name_that_the_composite_freezes(model: nn.Module) -> None:
    """Would break: a named input that is missing from the result without a word."""
    with pytest.raises(fxlrp.NoPathError, match=r"the input 'distances'.*composite.*'kinds'"):
        fxlrp.lrp_compile(model, "cp", inputs=("kinds", "distances"))(**graph())


def test_name_that_is_one_of_python() -> None:
    """Would break: names compared with those of nodes, which fx changes where they are builtins."""
    linear = nn.Linear(4, 3)
    explanation = fxlrp.lrp_compile(nn.Sequential(linear), inputs="input")(torch.rand(2, 4))
    assert explanation.relevance.shape == (2, 4)


def test_name_without_a_path() -> None:
    class Ignores(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum(-1, keepdim=True) + 0 * y.detach()

    with pytest.raises(fxlrp.NoPathError, match=r"the input 'y'.*'x'"):
        fxlrp.lrp_compile(Ignores(), inputs=("x", "y"))(torch.rand(2, 3), torch.rand(2, 3))
