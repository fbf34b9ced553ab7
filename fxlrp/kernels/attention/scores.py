"""Triton code that attention's kernels share: tiles, scores in base 2, masks, and which blocks are seen.

Rows are queries, columns keys, as a tile's rows and columns or the other way round. Scores are multiplied
with log2(e), so that probabilities are powers of 2.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
#: What finite masks are raised to: times log2(e) it must stay finite.
LEAST = tl.constexpr(-2e38)


@triton.jit
def wide(x):
    """A number in 64 bits, whether a launch or a loop made it a constant or a value."""
    return tl.zeros((), tl.int64) + x


@triton.jit
def places_in(stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the elements of ``SIZE`` rows lie behind the first; in 32 bits, which registers are spared by."""
    return tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_rows(base, start, stride, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from ``start`` on; 0 behind the last of ``count`` rows and of ``WIDTH`` columns."""
    inside = tl.arange(0, SIZE)[:, None] < count - start
    if WIDTH != COLUMNS:
        inside = inside & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    return tl.load(base + wide(start) * stride + places_in(stride, SIZE, COLUMNS), mask=inside, other=0.0)


@triton.jit
def store_rows(
    base, start, stride, count, tile, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write those rows and columns that exist."""
    pointers = base + wide(start) * stride + places_in(stride, SIZE, COLUMNS)
    inside = ((start + tl.arange(0, SIZE))[:, None] < count) & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """By its series near 0, where 1 - exp(-2 |x|) loses digits."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    square = x * x
    near = 62.0 / 2835.0 + square * (-1382.0 / 155925.0 + square * (21844.0 / 6081075.0))
    near = -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * near))
    near = x * (1.0 + square * near)
    return tl.where(tl.abs(x) < 0.4375, near, tl.where(x < 0.0, -far, far))


@triton.jit
def scored(raw, inner, outer, CAP: tl.constexpr):
    """Scores in base 2: ``raw inner``, or ``outer tanh(raw inner)``."""
    return raw * inner if CAP == "none" else tanh(raw * inner) * outer


@triton.jit
def slope(raw, inner, score_epsilon, CAP: tl.constexpr, DAMP: tl.constexpr):
    """What relevance is multiplied with on its way through the cap and the scores' stabiliser."""
    factor = tl.full(raw.shape, 1.0, tl.float32)
    if CAP == "identity":
        x = raw * inner
        small = tl.abs(x) < 1e-3
        factor = tl.where(small, 1.0 - x * x * (1.0 / 3.0), tanh(x) / tl.where(small, 1.0, x))
    if CAP == "gradient":
        t = tanh(raw * inner)
        factor = (1.0 - t) * (1.0 + t)
    if DAMP:
        factor *= tl.abs(raw) / (tl.abs(raw) + score_epsilon)
    return factor


@triton.jit
def masked(scores, mask_ptr, row_stride, column_stride, row, column, rows, columns, queries, keys,
           MASK: tl.constexpr, PER_KEY: tl.constexpr):  # fmt: skip
    """Scores with the mask added, or -inf where it keeps nothing.

    The tile starts at ``row`` and ``column``; ``rows`` and ``columns`` count from there and broadcast to it.
    """
    if MASK != "none":
        given = mask_ptr + wide(column) * column_stride + columns * column_stride
        inside = columns < keys - column
        if not PER_KEY:
            given += wide(row) * row_stride + rows * row_stride
            inside = inside & (rows < queries - row)
        if MASK == "keep":
            scores = tl.where(tl.load(given, mask=inside, other=1) != 0, scores, float("-inf"))
        else:
            bias = tl.load(given, mask=inside, other=0.0).to(tl.float32)
            scores += tl.where(bias == float("-inf"), bias, tl.maximum(bias, LEAST) * LOG2E)
    return scores


@triton.jit
def seen(
    scores, row, column, rows, columns, keys, offset, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Scores with -inf at keys that are not there, behind a query's place, or out of its window."""
    ahead = (column + columns) - (row + rows + offset)
    kept = columns < keys - column
    if CAUSAL:
        kept = kept & (ahead <= 0)
    if WINDOW:
        kept = kept & (ahead > -window) & (ahead < window)
    return tl.where(kept, scores, float("-inf"))


@triton.jit
def span(first, last, count, below, above, LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """Which of ``count`` places lie from ``f - below`` to ``f + above`` for f from first to last, in blocks.

    Returns start, inner, outer, stop: blocks from start to stop hold all that do, and from inner to outer
    they are whole and lie there for every f. Without ``LOWER`` both begin at 0, without ``UPPER`` only the
    count bounds.
    """
    start = 0
    inner = 0
    stop = count
    outer = count // BLOCK * BLOCK
    if UPPER:
        stop = tl.minimum(tl.maximum(last + above + 1, 0), count)
        outer = tl.minimum(tl.maximum(first + above + 1, 0) // BLOCK * BLOCK, outer)
    if LOWER:
        start = tl.maximum(first - below, 0) // BLOCK * BLOCK
        inner = (tl.maximum(last - below, 0) + BLOCK - 1) // BLOCK * BLOCK
    return start, inner, outer, stop
