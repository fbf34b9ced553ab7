"""Triton code that attention's kernels share: tiles, scores in base 2, masks, and which blocks are seen.

Names: rows are queries, columns keys, as a tile's rows and columns or the other way round. Scores are multiplied with log2(e), so that probabilities are powers of 2.
"""

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
def load_rows(base, start, stride, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
              EDGE: tl.constexpr):  # fmt: skip
    """Rows from ``start`` on; 0 behind the last of ``WIDTH`` columns and, at an edge, behind ``count`` rows."""
    pointers = base + wide(start) * stride + places_in(stride, SIZE, COLUMNS)
    columns = tl.arange(0, COLUMNS)[None, :] < WIDTH
    rows = (start + tl.arange(0, SIZE))[:, None] < count
    if EDGE:
        if WIDTH == COLUMNS:
            tile = tl.load(pointers, mask=rows, other=0.0)
        else:
            tile = tl.load(pointers, mask=rows & columns, other=0.0)
    elif WIDTH == COLUMNS:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=columns, other=0.0)
    return tile


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a b`` in float32. The interpreter has no products of bfloat16; in float32 they are the same."""
    if PRECISION == "interpreted":
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(a, b, input_precision=PRECISION)
    return found


@triton.jit
def plus_product(total, a, b, PRECISION: tl.constexpr):
    """``total + a b`` in float32."""
    if PRECISION == "interpreted":
        found = total + product(a, b, PRECISION)
    else:
        found = tl.dot(a, b, total, input_precision=PRECISION)
    return found


@triton.jit
def store_rows(base, start, stride, count, tile, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
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
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.125, near, tl.where(x < 0.0, -far, far))


@triton.jit
def scored(raw, inner, outer, CAP: tl.constexpr):
    """Scores in base 2: ``raw inner``, or ``outer tanh(raw inner)``."""
    if CAP == "none":
        scores = raw * inner
    else:
        scores = tanh(raw * inner) * outer
    return scores


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
def masked(scores, mask_ptr, row_stride, column_stride, row, column, rows, columns, queries, keys, offset, window,
           MASK: tl.constexpr, PER_KEY: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
           EDGE: tl.constexpr):  # fmt: skip
    """Scores with the mask added, and -inf at unseen keys.

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
    if EDGE:
        ahead = (column + columns) - (row + rows + offset)
        seen = columns < keys - column
        if CAUSAL:
            seen = seen & (ahead <= 0)
        if WINDOW:
            seen = seen & (ahead > -window) & (ahead < window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def span(first, last, count, below, above, LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """Which of ``count`` places lie from ``f - below`` to ``f + above`` for f from first to last, in blocks.

    Returns start, inner, outer, stop: blocks from inner to outer lie there for every f, and are whole; those
    from start to inner and from outer to stop hold some that do. Without ``LOWER`` inner is 0, without
    ``UPPER`` only the count bounds.
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
        outer = tl.maximum(inner, outer)
    return start, inner, outer, stop
