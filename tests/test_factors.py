"""Factors that additions take: where they do, where they do not, and that nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxlrp
from fxlrp.compiler.factors import merged

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor, Tensor], Tensor]

_LIBRARY = torch.library.Library("fxlrp_test_factors", "DEF")
_LIBRARY.define("normalize(Tensor x) -> Tensor")
_LIBRARY.impl("normalize", lambda x: x / x.norm(), "CompositeExplicitAutograd")


def traced(function: Function, dtype: torch.dtype = torch.float64) -> tuple[fx.GraphModule, list[Tensor]]:
    """A function as coefficients are computed, with operands for it."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    module = make_fx(function)(*given)
    for node in module.graph.nodes:
        node.meta["relevance_of"] = "a node"
    return module, given


def products(module: fx.GraphModule) -> int:
    """How many nodes multiply by a number."""
    nodes = (n for n in module.graph.nodes if n.target is aten.mul.Tensor)
    return sum(not isinstance(n.args[1], fx.Node) for n in nodes)


def repeated(step: Callable[[Tensor, Tensor], Tensor], times: int) -> Function:
    def run(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        for _ in range(times):
            b = step(b, c)
        return a + b

    return run


#: By name, a function and how many of its multiplications by a number are left.
TAKEN: dict[str, tuple[Function, int]] = {
    "first operand": (lambda a, b, c: 0.5 * a + b, 0),
    "second operand": (lambda a, b, c: a + 0.5 * b, 0),
    "both": (lambda a, b, c: (0.5 * a + 0.25 * b) @ c + a, 0),
    "both, the sum is returned": (lambda a, b, c: 0.5 * a + 0.25 * b, 1),
    "both by the same": (lambda a, b, c: (0.5 * a + 0.5 * b) * c + a, 0),
    "through a product": (lambda a, b, c: a + (0.5 * b) @ c, 0),
    "through a weight": (lambda a, b, c: a + nn.functional.linear(0.5 * b, c), 0),
    "through views": (lambda a, b, c: a + (0.5 * b).t()[:, :1].unsqueeze(0).expand(3, 4, 4)[1], 0),
    "through parts": (lambda a, b, c: a + torch.cat([(0.5 * b)[:, :2], -(0.5 * c)[:, :2]], 1), 0),
    "most parts": (lambda a, b, c: a + torch.cat([(0.5 * b)[:2], (0.25 * c)[:1], (0.5 * c)[:1]]), 1),
    "two readers": (lambda a, b, c: (lambda x: (a + x) * (c + x @ b))(0.5 * b), 0),
    "factors of a factor": (lambda a, b, c: a + 0.5 * (0.25 * b), 0),
    "factors of a factor that stays": (lambda a, b, c: torch.exp(0.5 * (0.25 * b)), 1),
    "factors that cancel": (lambda a, b, c: 2.0 * a + 0.5 * b + (2.0 * a) @ (0.5 * b), 0),
    "on top of alpha": (lambda a, b, c: torch.add(a, 0.5 * b, alpha=3), 0),
    "sum over a dimension": (lambda a, b, c: a + (0.5 * b).sum(-1, keepdim=True), 0),
    "a dividend": (lambda a, b, c: a + (0.5 * b) / c.exp(), 0),
    "many on the left": (repeated(lambda x, c: (0.25 * x) @ c, 40), 40 // 9),
    "many on the right": (repeated(lambda x, c: x @ (0.25 * c), 40), 1),
}

KEPT: dict[str, Function] = {
    "returned": lambda a, b, c: 0.5 * a,
    "returned beside": lambda a, b, c: (lambda x: torch.stack([x, a + x]))(0.5 * b),
    "into something that is not linear": lambda a, b, c: a + torch.exp(0.5 * b),
    "one reader is not linear": lambda a, b, c: (lambda x: (a + x) * torch.exp(x))(0.5 * b),
    "squared": lambda a, b, c: (lambda x: a + x * x)(0.5 * b),
    "twice in a product": lambda a, b, c: (lambda x: a + x @ x)(0.5 * b),
    "added to itself": lambda a, b, c: (lambda x: x + x)(0.5 * b),
    "joined to itself": lambda a, b, c: a + (lambda x: torch.cat([x, x]))(0.5 * b)[2:6],
    "a divisor": lambda a, b, c: a + b / (0.5 * c),
    "beside a bias": lambda a, b, c: a + nn.functional.linear(0.5 * b, c, c[0]),
    "beside a number": lambda a, b, c: (0.5 * b + 1) @ c + a,
    "of another type": lambda a, b, c: a + (0.5 * b).float().double(),
    "beside parts of another type": lambda a, b, c: a + torch.cat([0.5 * b[:2], c[:2].float()]),
    "a number that rounds": lambda a, b, c: a + 0.3 * b,
    "huge": lambda a, b, c: a + (2.0**64 * b) @ c,
    "tiny": lambda a, b, c: a + (2.0**-64 * b) @ c,
    "zero": lambda a, b, c: a + 0.0 * b,
    "into an op of that name": lambda a, b, c: a + torch.ops.fxlrp_test_factors.normalize(0.5 * b),
    "where strides would change": lambda a, b, c: 0.5 * a + b.t(),
    "where it would be done more often": lambda a, b, c: (
        lambda y, z: (y[0] + z[0]).exp() + (y[1] + z[1]).exp() + (y[2] + z[2]).exp()
    )(0.5 * a, 0.25 * b),
}


@pytest.mark.parametrize("name", TAKEN)
def test_factors_are_taken(name: str) -> None:
    """Breaks if a factor that an addition can take stays an op of its own, or is lost."""
    function, left = TAKEN[name]
    module, given = traced(function)
    found = merged(module)
    assert products(found) == left < products(module)
    torch.testing.assert_close(found(*given), module(*given), rtol=0, atol=0)


@pytest.mark.parametrize("name", KEPT)
def test_factors_stay(name: str) -> None:
    """Breaks if a factor were handed to an op that is not linear in what it is given."""
    module, given = traced(KEPT[name])
    found = merged(module)
    assert products(found) == products(module) > 0
    assert found(*given).stride() == module(*given).stride()
    torch.testing.assert_close(found(*given), module(*given), rtol=0, atol=0)


def test_the_forward_is_the_model_s() -> None:
    """Breaks if values took part as coefficients do."""
    module, _ = traced(lambda a, b, c: a + (0.5 * b) @ c)
    for node in module.graph.nodes:
        node.meta.pop("relevance_of")
    assert merged(module) is module


@pytest.mark.parametrize(
    ("dtype", "left"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 1), (torch.int64, 1)]
)
def test_precisions(dtype: torch.dtype, left: int) -> None:
    """Breaks if float16, which has no room for values that wait for a factor, or integers took part."""
    number = 2 if dtype is torch.int64 else 0.5
    module, given = traced(lambda a, b, c: a + (number * b) * c, dtype)
    found = merged(module)
    assert products(found) == left
    assert found(*given).dtype is dtype
    assert torch.equal(found(*given), module(*given))


@pytest.mark.parametrize("step", [lambda x, c: (0.25 * x) @ c, lambda x, c: x @ (0.25 * c)])
def test_it_does_not_add_up_without_end(step: Any) -> None:
    """Breaks if the factors of many layers without an addition left the range of numbers."""
    module, _ = traced(repeated(step, 100))
    given = [torch.ones(4, 4, dtype=torch.float32) for _ in range(3)]
    torch.testing.assert_close(merged(module)(*given), torch.full((4, 4), 2.0))


def test_integers_behind_it_stay() -> None:
    """Breaks if additions that take no factor were touched."""
    module, given = traced(
        lambda a, b, c: torch.add((a + 0.5 * b).argmax(-1), (a + 0.5 * b).argmin(-1), alpha=2)
    )
    found = merged(module)
    assert products(found) == 0
    assert torch.equal(found(*given), module(*given))


def test_a_piece_does_not_keep_the_whole() -> None:
    """Breaks if a factor that frees the tensor which its operand is a piece of were taken off."""
    module, given = traced(lambda a, b, c: a[:1] + 0.5 * (b @ c)[:1])
    found = merged(module)
    assert products(found) == 1
    assert torch.equal(found(*given), module(*given))


def test_it_is_for_the_eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if nothing merged before a graph runs, or if the graph that is shown and saved were another."""
    from fxlrp.compiler import lower

    seen: list[fx.GraphModule] = []
    monkeypatch.setattr(lower, "merged", lambda module: seen.append(merged(module)) or seen[-1])
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    explainer = fxlrp.lrp_compile(model, backend="eager")
    explainer(torch.randn(2, 5, 8), target=lambda output: output.sum((1, 2)))
    assert any(products(found) < products(explainer.relevance_graph) for found in seen)


class Positions(nn.Module):
    """Attention whose queries have the strides of what is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        query = 0.5 * x + self.places.t()
        return nn.functional.scaled_dot_product_attention(query[None], x[None], x[None])[0].sum(-2)


def test_a_model_whose_strides_count() -> None:
    """Breaks if a value's strides changed before an op that reads them."""
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(2, 5, 8)
    explanation = fxlrp.lrp_compile(model, backend="eager")(x, target=1)
    torch.testing.assert_close(explanation.value, model(x)[:, 1])
