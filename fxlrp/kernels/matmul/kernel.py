"""The Triton code that kernels of matrix products share."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Variant, launch
from . import PARTS

#: Elements of the output in a program of :func:`sum_parts`.
_BLOCK = 1024


def add_parts(parts: Tensor, out: Tensor, other: Tensor | None = None) -> None:
    """Write ``parts[:, 0].sum(0)`` to `out` and ``parts[:, 1].sum(0)`` to `other`, summed up in order."""
    # Two kernels, and not one that is given `out` twice: functionalization makes a copy of what a launch
    # writes for each time that it is an argument, and keeps one.
    n = out.numel()
    grid = -(-n // _BLOCK)
    if other is None:
        launch(sum_parts)[(grid,)](parts, out, n, PARTS=parts.shape[0], BLOCK=_BLOCK)
    else:
        launch(sum_both)[(grid, 2)](parts, out, other, n, PARTS=parts.shape[0], BLOCK=_BLOCK)


@triton.jit
def tile_of(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row and column block of a program: GROUP blocks of rows go through the columns together, so that
    programs that run at one time share what they read.
    """
    per_group = GROUP * column_blocks
    first = program // per_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def steps_of(part, depth, PARTS: tl.constexpr, DEPTH: tl.constexpr):
    """The first step over the reduction of a part of it, and that after its last."""
    steps = tl.cdiv(depth, DEPTH)
    each = tl.cdiv(steps, PARTS)
    first = part * each
    return first, tl.minimum(first + each, steps)


@triton.jit
def down(v, SWAP: tl.constexpr):
    """A vector of indices along the first axis of a matrix, or along the second of its transpose."""
    return v[None, :] if SWAP else v[:, None]


@triton.jit
def across(v, SWAP: tl.constexpr):
    """A vector of indices along the second axis of a matrix, or along the first of its transpose."""
    return v[:, None] if SWAP else v[None, :]


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
    """What products are added to: a matrix, or its transpose."""
    return tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.float32)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, SWAP: tl.constexpr):
    """``total + a b``, or of transposes ``total + b a``: then b, which is changed on the way, may stay in
    registers, and few rows of a fill the instruction's shorter side.
    """
    return tl.dot(b if SWAP else a, a if SWAP else b, total, input_precision=PRECISION)


@triton.jit
def sum_parts(parts, out, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = sum_p parts[p, i]``; one block of i a program."""
    _sum(parts, out, tl.cast(n, tl.int64), 1, PARTS, BLOCK)


@triton.jit
def sum_both(parts, out, other, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = sum_p parts[p, 0, i]``, and `other` of ``parts[p, 1]``; a block of one of them a program."""
    size = tl.cast(n, tl.int64)
    if tl.program_id(1) == 0:
        _sum(parts, out, size, 2, PARTS, BLOCK)
    else:
        _sum(parts + size, other, size, 2, PARTS, BLOCK)


@triton.jit
def _sum(parts, out, n, OUTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(PARTS):
        total += tl.load(parts + i, mask=inside, other=0.0)
        parts += OUTS * n
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Both sums for each dtype, and the least and most parts."""
    for kind in DTYPES.values():
        for parts in (2, PARTS):
            one = {"parts": "*fp32", "out": f"*{kind}", "n": "i32"}
            constants = {"PARTS": parts, "BLOCK": _BLOCK}
            yield Variant(f"sum of {parts} parts, {kind}", sum_parts, one, constants)
            both = {**one, "other": f"*{kind}"}
            yield Variant(f"two sums of {parts} parts, {kind}", sum_both, both, constants)
