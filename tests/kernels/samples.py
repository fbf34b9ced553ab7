"""Kernels that show what the ahead-of-time compiler must find."""

import triton
import triton.language as tl

from fxlrp.kernels.launch import Variant


@triton.jit
def copies(x, y, n, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def holds_two_tiles(x, y, n, block: tl.constexpr):
    rows = tl.arange(0, block)
    tile = rows[:, None] * n + rows[None, :]
    first, second = tl.load(x + tile), tl.load(y + tile)
    total = tl.max(first + tl.sum(second))  # needs both, whole, and both are needed again
    tl.store(y + tile, (first - total) * second)


@triton.jit
def multiplies(x, y, n, block: tl.constexpr):
    rows, inner = tl.arange(0, 32), tl.arange(0, block)
    first = tl.load(x + rows[:, None] * n + inner[None, :])
    second = tl.load(y + inner[:, None] * n + rows[None, :])
    tl.store(y + rows[:, None] * n + rows[None, :], tl.dot(first, second))


@triton.jit
def mistakes(x, y, n, block: tl.constexpr):
    tl.store(y, tl.load(x).no_such_method())


def _variant(kernel, block, dtype="fp32", **options):
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "n": "i64"}
    return Variant(kernel.fn.__name__, kernel, signature, {"block": block}, **options)


#: Each with the start of what is wrong with it, for each target.
CASES = [
    (_variant(copies, 256), ("sm_80", "sm_90", "sm_100", "gfx942"), ""),
    (_variant(holds_two_tiles, 128), ("sm_80", "sm_90", "sm_100"), "spills "),
    (_variant(holds_two_tiles, 256), ("gfx942",), "spills "),
    (_variant(multiplies, 2048, "fp16", num_warps=16), ("sm_80", "sm_90", "sm_100"), "wants "),
    (_variant(mistakes, 16), ("sm_90", "gfx942"), "does not compile: "),
]
