"""Factors that additions take: where they do, where they do not, and that nothing else changes."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxlrp.compiler.factors import merged

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def traced(function: Function, dtype: torch.dtype = torch.float64) -> tuple[fx.GraphModule, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return make_fx(function)(*given), given


def products(module: fx.GraphModule) -> int:
    """How many nodes multiply by a number."""
    nodes = (n for n in module.graph.nodes if n.target is aten.mul.Tensor)
    return sum(not isinstance(n.args[1], fx.Node) for n in nodes)


#: By name, a function and how many of its multiplications by a number are left.
TAKEN: dict[str, tuple[Function, int]] = {
    "first operand": (lambda a, b, c: 0.5 * a + b, 0),
    "second operand": (lambda a, b, c: a + 0.5 * b, 0),
    "both": (lambda a, b, c: (0.5 * a + 0.25 * b) @ c + a, 0),
    "both, the sum is returned": (lambda a, b, c: 0.5 * a + 0.25 * b, 1),
    "both by the same": (lambda a, b, c: (0.5 * a + 0.5 * b) * c + a, 0),
    "through a product": (lambda a, b, c: a + (0.5 * b) @ c, 0),
    "through a weight": (lambda a, b, c: a + torch.nn.functional.linear(0.5 * b, c), 0),
    "through views": (lambda a, b, c: a + (0.5 * b).t()[:, :1].unsqueeze(0).expand(3, 4, 4)[1], 0),
    "through parts": (lambda a, b, c: a + torch.cat([0.5 * b[:, :2], -(0.5 * c)[:, :2]], 1), 0),
    "parts by two numbers": (lambda a, b, c: a + torch.cat([0.5 * b[:2], 0.25 * c[:1], 0.5 * c[:1]]), 1),
    "two readers": (lambda a, b, c: (lambda x: (a + x) * (c + x @ b))(0.5 * b), 0),
    "factors of a factor": (lambda a, b, c: a + 0.5 * (0.25 * b), 0),
    "factors of a factor that stays": (lambda a, b, c: torch.exp(0.5 * (0.25 * b)), 1),
    "factors that cancel": (lambda a, b, c: 2.0 * a + 0.5 * b + (2.0 * a) @ (0.5 * b), 0),
    "on top of alpha": (lambda a, b, c: torch.add(a, 0.5 * b, alpha=3), 0),
    "sum over a dimension": (lambda a, b, c: a + (0.5 * b).sum(-1, keepdim=True), 0),
    "a divisor of another": (lambda a, b, c: a + (0.5 * b) / c.exp(), 0),
}

KEPT: dict[str, Function] = {
    "returned": lambda a, b, c: 0.5 * a,
    "returned beside": lambda a, b, c: (lambda x: torch.stack([x, a + x]))(0.5 * b),
    "into something that is not linear": lambda a, b, c: a + torch.exp(0.5 * b),
    "one reader is not linear": lambda a, b, c: (lambda x: (a + x) * torch.exp(x))(0.5 * b),
    "squared": lambda a, b, c: (lambda x: a + x * x)(0.5 * b),
    "twice in a product": lambda a, b, c: (lambda x: a + x @ x)(0.5 * b),
    "added to itself": lambda a, b, c: (lambda x: x + x)(0.5 * b),
    "a divisor": lambda a, b, c: a + b / (0.5 * c),
    "beside a bias": lambda a, b, c: a + torch.nn.functional.linear(0.5 * b, c, c[0]),
    "beside a number": lambda a, b, c: (0.5 * b + 1) @ c + a,
    "of another type": lambda a, b, c: a + (0.5 * b).float().double(),
    "huge": lambda a, b, c: a + (1e20 * b) @ c,
    "tiny": lambda a, b, c: a + (1e-20 * b) @ c,
    "zero": lambda a, b, c: a + 0.0 * b,
}


@pytest.mark.parametrize("name", TAKEN)
def test_factors_are_taken(name: str) -> None:
    """Breaks if a factor that an addition can take stays an op of its own, or is lost."""
    function, left = TAKEN[name]
    module, given = traced(function)
    found = merged(module)
    assert products(found) == left < products(module)
    assert len(found.graph.nodes) < len(module.graph.nodes)
    torch.testing.assert_close(found(*given), module(*given), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", KEPT)
def test_factors_stay(name: str) -> None:
    """Breaks if a factor were handed to an op that is not linear in what it is given."""
    module, given = traced(KEPT[name])
    found = merged(module)
    assert found.code == module.code
    torch.testing.assert_close(found(*given), module(*given), rtol=0, atol=0)


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
    torch.testing.assert_close(found(*given), module(*given))


def test_it_does_not_add_up_without_end() -> None:
    """Breaks if the factors of many layers without an addition left the range of numbers."""

    def deep(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        x = b
        for _ in range(200):
            x = (0.25 * x) @ c
        return a + x

    module, (a, b, c) = traced(deep)
    found = merged(module)
    counts = Counter(n.target for n in found.graph.nodes)
    assert products(found) == 200 // 9
    assert counts[aten.mm.default] == 200
    torch.testing.assert_close(found(a, b, c), module(a, b, c), rtol=1e-10, atol=0)
