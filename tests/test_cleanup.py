"""Clean-up of the emitted graph: each rewrite where it holds, and not where it does not."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxlrp.compiler.cleanup import clean

aten = torch.ops.aten


def cleaned(function: Any, *tensors: Tensor) -> tuple[fx.GraphModule, Counter[str]]:
    module = make_fx(function)(*tensors)
    found = clean(module, module.graph, {})
    return found, Counter(
        n.target.overloadpacket.__name__ for n in found.graph.nodes if n.op == "call_function"
    )


def padded(piece: Tensor, start: int, end: int, size: int = 6) -> Tensor:
    return aten.slice_backward.default(piece, [2, size], 1, start, end, 1)


def halves(a: Tensor, b: Tensor) -> Tensor:
    return padded(b, 2, 2**63 - 1) + padded(a, 0, 2)


def test_padded_halves_are_joined() -> None:
    """The halves of a rotary embedding's coefficient are written once, not padded and summed."""
    a, b = torch.randn(2, 2), torch.randn(2, 4)
    found, ops = cleaned(halves, a, b)
    assert ops == {"cat": 1}
    torch.testing.assert_close(found(a, b), halves(a, b), rtol=0, atol=0)


def test_three_padded_pieces_are_joined() -> None:
    """Sums of sums count as one."""

    def thirds(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return padded(b, 2, 4) + (padded(a, 0, 2) + padded(c, 4, 6))

    given = [torch.randn(2, 2) for _ in range(3)]
    found, ops = cleaned(thirds, *given)
    assert ops == {"cat": 1}
    torch.testing.assert_close(found(*given), thirds(*given), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: padded(b, 0, 4) + padded(a, 0, 2),  # overlap
        lambda a, b: padded(b, 2, 6, 7) + padded(a, 0, 2, 7),  # a gap at the end
        lambda a, b: padded(a, 0, 2) + padded(a + 1, 0, 2),  # one place twice
        lambda a, b: (lambda p: (p + padded(a, 0, 2)) * p)(padded(b, 2, 6)),  # read elsewhere
        lambda a, b: torch.add(padded(b, 2, 6), padded(a, 0, 2), alpha=2),  # scaled
        lambda a, b: (
            aten.slice_backward.default(b, [2, 8], 1, 0, 8, 2)
            + aten.slice_backward.default(b, [2, 8], 1, 1, 8, 2)
        ),
    ],
    ids=["overlap", "gap", "twice", "read", "scaled", "strided"],
)
def test_other_sums_are_left_alone(function: Any) -> None:
    """Only pieces that tile the whole, read by nobody else, are joined."""
    given = torch.randn(2, 2), torch.randn(2, 4)
    found, ops = cleaned(function, *given)
    assert "cat" not in ops
    torch.testing.assert_close(found(*given), function(*given), rtol=0, atol=0)


def test_a_piece_beyond_the_whole_is_added() -> None:
    """Of pieces that come twice, one may be joined and none may be lost."""

    def thrice(a: Tensor, b: Tensor) -> Tensor:
        return padded(b, 2, 6) + padded(a, 0, 2) + padded(a + 1, 0, 2)

    given = torch.randn(2, 2), torch.randn(2, 4)
    found, _ = cleaned(thrice, *given)
    torch.testing.assert_close(found(*given), thrice(*given), rtol=0, atol=0)


def rows(x: Tensor, w: Tensor) -> Tensor:
    return x.view(6, 4) @ w


#: By rewrite, a graph in which it fires and one in which it must not: functions, and the ops that are left.
PAIRS: dict[str, tuple[tuple[Any, dict[str, int]], tuple[Any, dict[str, int]]]] = {
    "transposed twice": (
        (lambda x, w: w.t().t() * 2, {"mul": 1}),
        (lambda x, w: w.t() * 2, {"t": 1, "mul": 1}),
    ),
    "shape as before": (
        (lambda x, w: x.view(2, 3, 4) * 2, {"mul": 1}),
        (lambda x, w: x.view(2, 12) * 2, {"reshape": 1, "mul": 1}),
    ),
    "product of rows": (
        (lambda x, w: rows(x, w).view(2, 3, 5), {"matmul": 1}),
        (lambda x, w: rows(x, w).view(3, 2, 5), {"reshape": 2, "mm": 1}),
    ),
    "rows read elsewhere": (
        (lambda x, w: rows(x, w).view(2, 3, 5), {"matmul": 1}),
        (
            lambda x, w: (lambda y: y.view(2, 3, 5) + y.sum())(rows(x, w)),
            {"reshape": 2, "mm": 1, "sum": 1, "add": 1},
        ),
    ),
    "computed twice": (
        (lambda x, w: x.sin() + x.sin(), {"sin": 1, "add": 1}),
        (lambda x, w: x.sin() + x.cos(), {"sin": 1, "cos": 1, "add": 1}),
    ),
    "constants of one type": (
        (lambda x, w: x * 2 + x * 2, {"mul": 1, "add": 1}),
        (lambda x, w: x * 2 + x * 2.0, {"mul": 2, "add": 1}),
    ),
    "random numbers": (
        (lambda x, w: x.sin() + x.sin(), {"sin": 1, "add": 1}),
        (lambda x, w: torch.rand_like(x) + torch.rand_like(x), {"rand_like": 2, "add": 1}),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_rewrite_fires_and_does_not(name: str) -> None:
    """Breaks if a rewrite is lost, or applied where the result is another."""
    given = torch.randn(2, 3, 4), torch.randn(4, 5)
    for function, expected in PAIRS[name]:
        found, ops = cleaned(function, *given)
        assert ops == expected
        if "rand_like" not in ops:
            torch.testing.assert_close(found(*given), function(*given))


@pytest.mark.parametrize(("user", "left"), [(aten.mul.Tensor, 0), (aten.cumsum.default, 1)])
def test_contiguity_that_no_kernel_needs_is_dropped(user: Any, left: int) -> None:
    """Kept before ops whose kernels may read their operand as if it were contiguous."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    copied = graph.call_function(aten.contiguous.default, (graph.call_function(aten.t.default, (x,)),))
    graph.output(graph.call_function(user, (copied, 0 if left else copied)))
    found = clean(torch.nn.Module(), graph, {})
    assert sum(n.target is aten.contiguous.default for n in found.graph.nodes) == left
    given = torch.randn(3, 4)
    torch.testing.assert_close(found(given), user(given.t(), 0 if left else given.t()))
