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
