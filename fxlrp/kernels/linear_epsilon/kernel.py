"""The epsilon rule's coefficient in one Triton kernel: the factor on the way into the matrix product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Variant, launch
from ..matmul import Table, Tiles, as_rows, hint, shared_memory
from ..matmul.kernel import add_parts, steps_of, tile_of

#: Blocks of rows that go through the columns together.
_GROUP = 8

_HALF = Table(
    few=(
        Tiles(16, 64, 128, warps=4, stages=3),
        Tiles(32, 128, 64, warps=4, stages=3),
        Tiles(64, 128, 64, warps=4, stages=3),
    ),
    tuned=(
        Tiles(16, 32, 256, warps=4, stages=3),
        # Steps of 32: half of each step's multiplications overlap the next one's factors.
        Tiles(128, 256, 32, warps=8, stages=4, shared=120),
        Tiles(128, 128, 64, warps=8, stages=3, shared=128),
    ),
)
_TF32 = Table(
    few=(Tiles(16, 64, 64, warps=4, stages=3), Tiles(64, 64, 32, warps=4, stages=3)),
    tuned=(Tiles(128, 128, 32, warps=8, stages=3, shared=128),),
)
#: Without tensor cores, arithmetic and not reading is the cost from a few rows on, and cuBLAS is ahead there.
_FLOAT32 = Table(
    is_default=False,
    few=(Tiles(16, 64, 32, warps=4, stages=3), Tiles(64, 64, 16, warps=4, stages=3)),
    tuned=(Tiles(128, 128, 16, warps=8, stages=3),),
)


def table(dtype: torch.dtype, tf32: bool) -> Table:
    """What a launch chooses from: tensor cores multiply half precision and TensorFloat-32, not float32."""
    if dtype != torch.float32:
        return _HALF
    return _TF32 if tf32 else _FLOAT32


def relevance(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    epsilon: float,
    row_epsilon: Tensor | None,
    x: Tensor | None,
    tf32: bool,
    chosen: tuple[Tiles, int] | None = None,
) -> Tensor:
    """The op's result; see there. `chosen`: tiles and parts of the reduction, for tests and tuning."""
    depth, columns = weight.shape
    shape = (*g.shape[:-1], columns)
    z2, g3 = as_rows(z), as_rows(g, *g.shape[: g.dim() - z.dim()])
    count = g3.shape[0] if g3.dim() == 3 else 1
    rows = z2.shape[0] * count
    tiles, parts = chosen or table(g.dtype, tf32).choose(
        hint(g.shape[:-1]), columns, depth, shared_memory(g.device)
    )
    x2 = z2 if x is None else as_rows(x)
    floors = (
        z2 if row_epsilon is None else row_epsilon.expand(*z.shape[:-1], 1).reshape(-1).float().contiguous()
    )
    result = torch.empty(shape, dtype=g.dtype, device=g.device)
    out = result if parts == 1 else torch.empty((parts, *shape), dtype=torch.float32, device=g.device)
    grid = (-(-rows // tiles.rows) * -(-columns // tiles.columns), parts)
    launch(relevance_kernel)[grid](
        g3,
        z2,
        weight,
        floors,
        x2,
        out,
        rows,
        count,
        columns,
        depth,
        g3.stride(0) if g3.dim() == 3 else 0,
        g3.stride(-2),
        g3.stride(-1),
        *z2.stride(),
        *weight.stride(),
        *x2.stride(),
        epsilon,
        ROW_EPSILON=row_epsilon is not None,
        TIMES_X=x is not None,
        PRECISION="tf32" if tf32 else "ieee",
        EVEN=depth % tiles.depth == 0,
        PARTS=parts,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        GROUP=_GROUP,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if parts > 1:
        add_parts(out, result)
    return result


@triton.jit
def relevance_kernel(
    g,
    z,
    weight,
    row_epsilon,
    x,
    out,
    rows,
    count,
    columns,
    depth,
    g_k,
    g_m,
    g_d,
    z_m,
    z_d,
    w_d,
    w_n,
    x_m,
    x_n,
    epsilon,
    ROW_EPSILON: tl.constexpr,
    TIMES_X: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[part, k, m, n] = sum_d factor(z[m, d]) g[k, m, d] weight[d, n]``, one tile and part a program.

    Row ``r`` is ``(m, k) = (r // count, r % count)``, so that one tile holds the coefficients of few values.
    """
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    part = tl.program_id(1)
    r = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m, k = r // count, r % count
    row, column = (r < rows)[:, None], (n < columns)[None, :]
    first, last = steps_of(part, depth, PARTS, DEPTH)
    d = first.to(tl.int64) * DEPTH + tl.arange(0, DEPTH)
    g_tile = g + (k * g_k + m * g_m)[:, None] + d[None, :] * g_d
    z_tile = z + (m * z_m)[:, None] + d[None, :] * z_d
    w_tile = weight + d[:, None] * w_d + n[None, :] * w_n
    floor = epsilon
    if ROW_EPSILON:
        floor = tl.load(row_epsilon + m, mask=r < rows, other=1.0)[:, None]
    floor = tl.maximum(floor, 1.1754943508222875e-38)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(first, last):
        left = depth - step * DEPTH
        here = tl.arange(0, DEPTH) < (DEPTH if EVEN else left)
        z_part = tl.load(z_tile, mask=row & here[None, :], other=0.0)
        g_part = tl.load(g_tile, mask=row & here[None, :], other=0.0)
        w_part = tl.load(w_tile, mask=here[:, None] & column, other=0.0)
        size = tl.abs(z_part.to(tl.float32))
        passed = g_part.to(tl.float32) * (size / (size + floor))
        total = tl.dot(passed.to(weight.dtype.element_ty), w_part, total, input_precision=PRECISION)
        g_tile += DEPTH * g_d
        z_tile += DEPTH * z_d
        w_tile += DEPTH * w_d
    values = tl.cast(tl.cdiv(rows, count), tl.int64)
    out += part.to(tl.int64) * rows * columns
    if COLUMNS > 128:  # in halves, which take fewer registers
        halves = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)).split()
        for half in tl.static_range(2):
            c = column_block.to(tl.int64) * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            _store(halves[half], x, out, m, k * values + m, r < rows, c, columns, x_m, x_n, TIMES_X)
    else:
        _store(total, x, out, m, k * values + m, r < rows, n, columns, x_m, x_n, TIMES_X)


@triton.jit
def _store(total, x, out, m, out_row, is_row, n, columns, x_m, x_n, TIMES_X: tl.constexpr):
    inside = is_row[:, None] & (n < columns)[None, :]
    if TIMES_X:
        total *= tl.load(x + (m * x_m)[:, None] + n[None, :] * x_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (out_row * columns)[:, None] + n[None, :], total.to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Every tile of the tables for each dtype, and weights in the other order of strides for the largest."""
    for dtype, kind in DTYPES.items():
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            choices = table(dtype, tf32)
            for tiles, is_default in choices.launched():
                yield _variant(tiles, kind, tf32, is_default=is_default)
            yield _variant(choices.few[-1], kind, tf32, order="w_d", is_default=choices.is_default)


def _variant(
    tiles: Tiles, kind: str, tf32: bool, parts: int = 4, order: str = "w_n", is_default: bool = True
) -> Variant:
    """`order`: along which of its dimensions, in (w_n) or out (w_d), the weight is contiguous."""
    pointers = dict.fromkeys(("g", "z", "weight", "x"), f"*{kind}")
    wide = dict.fromkeys(("g_k", "g_m", "z_m", "w_d", "w_n", "x_m"), "i32")
    sizes = dict.fromkeys(("rows", "columns", "depth"), "i32")
    signature = {
        **pointers,
        "row_epsilon": "*fp32",
        "out": "*fp32" if parts > 1 else f"*{kind}",
        **sizes,
        **wide,
        "epsilon": "fp32",
    }
    del signature[order]
    return Variant(
        f"epsilon relevance, {'tf32' if tf32 else kind}, {tiles}" + ", W transposed" * (order == "w_d"),
        relevance_kernel,
        signature,
        {
            **dict.fromkeys(("count", "g_d", "z_d", "x_n", order), 1),
            "ROW_EPSILON": False,
            "TIMES_X": True,
            "PRECISION": "tf32" if tf32 else "ieee",
            "EVEN": True,
            "PARTS": parts,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "DEPTH": tiles.depth,
            "GROUP": _GROUP,
        },
        tiles.warps,
        tiles.stages,
        is_default,
    )
