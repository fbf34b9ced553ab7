"""The softmax and its relevance in Triton: a program holds one or several rows, or goes along one.

Of a row that is longer than the tile the first tile stays in registers, the others are read twice. So the
looped form reads a row once too where it fits, which is what a number of columns that is a symbol needs.
Long rows have programs of 16 warps, of which one or two fit a multiprocessor: what all of them are about to
read again then stays in the L2 cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Variant, launch
from ..rows import Tile, Tiles, as_k_rows, as_rows

TILES = Tiles(widest=32768, per_thread=32, looped=8192)
RELEVANCE_TILES = Tiles(widest=16384, per_thread=32, looped=16384)
#: Tiles of a loop that are under way or in use at a time.
_STAGES = tl.constexpr(3)


@triton.jit
def _scaled(scores, mask, at, inside, scale, MASK: tl.constexpr, ALONG: tl.constexpr, policy: tl.constexpr):
    """``scale * scores + mask`` at a tile's columns; -inf outside. The pointers are those of the rows."""
    x = tl.load(scores + at, mask=inside, other=0.0, eviction_policy=policy).to(tl.float32) * scale
    if MASK != "none":
        m = tl.load(mask + at * ALONG, mask=inside, other=0, eviction_policy=policy)
        if MASK == "keep":
            x = tl.where(m != 0, x, float("-inf"))
        else:
            x += m.to(tl.float32)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _finite(top):
    """0 in place of -inf, so that exp(x - top) is 0 and not NaN where all of a row is masked."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _softmax_kernel(
    scores,
    mask,
    out,
    scale,
    rows,
    columns,
    row_stride,
    heads,
    queries,
    mask_batch,
    mask_head,
    mask_query,
    MASK: tl.constexpr,
    ALONG: tl.constexpr,
    LOOPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, COLUMNS)[None, :]
    is_row = row < rows
    scores += row.to(tl.int64) * row_stride
    out += row.to(tl.int64) * columns
    if MASK != "none":
        mask += (row // (heads * queries)).to(tl.int64) * mask_batch
        mask += (row // queries % heads).to(tl.int64) * mask_head
        mask += (row % queries).to(tl.int64) * mask_query
    inside = is_row & (at < columns)
    stages: tl.constexpr = _STAGES if MASK == "none" else 2  # with a mask, registers are short
    first = _scaled(scores, mask, at, inside, scale, MASK, ALONG, "")
    if LOOPS:
        # Each lane keeps its own maximum and sum; they meet once, after the loop.
        top, total = first, tl.where(first == float("-inf"), 0.0, 1.0)
        for start in tl.range(COLUMNS, columns, COLUMNS, num_stages=stages):
            there = is_row & (start + at < columns)
            x = _scaled(scores, mask, start + at, there, scale, MASK, ALONG, "evict_last")
            higher = tl.maximum(top, x)
            shift = _finite(higher)
            total = total * tl.exp(top - shift) + tl.exp(x - shift)
            top = higher
        peak = _finite(tl.max(top, 1))[:, None]
        total = tl.sum(total * tl.exp(top - peak), 1)[:, None]
    else:
        peak = _finite(tl.max(first, 1))[:, None]
        total = tl.sum(tl.exp(first - peak), 1)[:, None]
    # A sum of 0 is that of a row that is masked as a whole.
    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(out + at, (tl.exp(first - peak) * factor).to(out.dtype.element_ty), mask=inside)
    if LOOPS:
        for start in tl.range(COLUMNS, columns, COLUMNS, num_stages=stages):
            there = is_row & (start + at < columns)
            x = _scaled(scores, mask, start + at, there, scale, MASK, ALONG, "evict_first")
            value = tl.exp(x - peak) * factor
            tl.store(out + start + at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _relevance_kernel(
    coefficient,
    probabilities,
    out,
    scale,
    count,
    rows,
    columns,
    coefficient_k,
    coefficient_row,
    probabilities_row,
    out_k,
    LOOPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, COLUMNS)[None, :]
    is_row = row < rows
    coefficient += row.to(tl.int64) * coefficient_row
    probabilities += row.to(tl.int64) * probabilities_row
    out += row.to(tl.int64) * columns
    inside = is_row & (at < columns)
    s = tl.load(probabilities + at, mask=inside, other=0.0).to(tl.float32)
    for _ in range(count):
        g = tl.load(coefficient + at, mask=inside, other=0.0).to(tl.float32)
        lanes = s * g
        if LOOPS:
            for start in tl.range(COLUMNS, columns, COLUMNS, num_stages=_STAGES):
                there = is_row & (start + at < columns)
                p = tl.load(probabilities + start + at, mask=there, other=0.0, eviction_policy="evict_last")
                c = tl.load(coefficient + start + at, mask=there, other=0.0, eviction_policy="evict_last")
                lanes += p.to(tl.float32) * c.to(tl.float32)
        total = tl.sum(lanes, 1)[:, None]
        tl.store(out + at, (scale * s * (g - total)).to(out.dtype.element_ty), mask=inside)
        if LOOPS:
            for start in tl.range(COLUMNS, columns, COLUMNS, num_stages=_STAGES):
                there = is_row & (start + at < columns)
                p = tl.load(probabilities + start + at, mask=there, other=0.0)
                c = tl.load(coefficient + start + at, mask=there, other=0.0, eviction_policy="evict_first")
                value = scale * p.to(tl.float32) * (c.to(tl.float32) - total)
                tl.store(out + start + at, value.to(out.dtype.element_ty), mask=there)
        coefficient += coefficient_k
        out += out_k


def run_softmax(
    scores: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """Launch :func:`fxlrp.kernels.softmax.softmax`; ``tile`` for tests and tuning."""
    columns = scores.shape[-1]
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    if out.numel() == 0:
        return out
    x = as_rows(scores, columns)
    tile = tile or TILES.of(columns, x.dtype.itemsize)
    kind, along, broadcast, heads, queries, strides = _mask(mask, scores)
    launch(_softmax_kernel)[(triton.cdiv(x.shape[0], tile.rows),)](
        x,
        broadcast,
        out,
        scale,
        x.shape[0],
        columns,
        x.stride(0),
        heads,
        queries,
        *strides,
        MASK=kind,
        ALONG=along,
        LOOPS=tile.loops,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out


def _mask(mask: Tensor | None, scores: Tensor) -> tuple[str, int, Tensor | None, Any, Any, tuple[Any, ...]]:
    """Kind of mask, its stride along columns (0 or 1), the tensor, and sizes and strides of its rows.

    Rows are counted over batch, heads and queries; a broadcast dimension has the stride 0 and is not copied.
    """
    if mask is None:
        return "none", 0, None, 1, 1, (0, 0, 0)
    kind = "keep" if mask.dtype == torch.bool else "add"
    if kind == "keep":
        mask = mask.view(torch.uint8)
    expanded = mask.expand(scores.shape)
    if expanded.stride(-1) not in (0, 1):
        expanded = mask.contiguous().expand(scores.shape)
    *lead, columns = scores.shape
    batch, heads, queries = [1] * (3 - len(lead)) + lead if len(lead) < 3 else (-1, *lead[-2:])
    expanded = expanded.reshape(batch, heads, queries, columns)
    return kind, expanded.stride(-1), expanded, heads, queries, expanded.stride()[:3]


def run_relevance(
    coefficient: Tensor, probabilities: Tensor, scale: float, tile: Tile | None = None
) -> Tensor:
    """Launch :func:`fxlrp.kernels.softmax.softmax_relevance`; ``tile`` for tests and tuning."""
    columns = probabilities.shape[-1]
    out = torch.empty(coefficient.shape, dtype=coefficient.dtype, device=coefficient.device)
    if out.numel() == 0:
        return out
    s, g = as_rows(probabilities, columns), as_k_rows(coefficient, probabilities.dim())
    tile = tile or RELEVANCE_TILES.of(columns, g.dtype.itemsize)
    launch(_relevance_kernel)[(triton.cdiv(s.shape[0], tile.rows),)](
        g,
        s,
        out,
        scale,
        g.shape[0],
        s.shape[0],
        columns,
        g.stride(0),
        g.stride(1),
        s.stride(0),
        s.shape[0] * columns,
        LOOPS=tile.loops,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out


#: Their types: what is added comes in float32 or in less.
_MASKS = {"keep": "*u8", "add": "*fp32"}


def variants() -> Iterator[Variant]:
    """Every tile with every dtype; masks, which take a register more, with the tiles of most registers."""
    for dtype, name in DTYPES.items():
        for tile in TILES.all(dtype.itemsize):
            wide = tile.columns * dtype.itemsize in (TILES.looped, TILES.widest)
            for mask in ("none", *_MASKS) if wide else ("none",):
                yield _forward(name, mask, tile)
        for tile in RELEVANCE_TILES.all(dtype.itemsize):
            yield _relevance(name, tile)


def _constants(tile: Tile) -> dict[str, Any]:
    return {"LOOPS": tile.loops, "ROWS": tile.rows, "COLUMNS": tile.columns}


def _forward(name: str, mask: str, tile: Tile) -> Variant:
    sizes = ("rows", "columns", "row_stride", "heads", "queries", "mask_batch", "mask_head", "mask_query")
    signature = {"scores": f"*{name}", "out": f"*{name}", "scale": "fp32", **dict.fromkeys(sizes, "i32")}
    constants = _constants(tile) | {"MASK": mask, "ALONG": int(mask != "none")}
    if mask == "none":
        constants["mask"] = None
    else:
        signature["mask"] = _MASKS[mask]
    label = f"softmax, {name}, {mask.replace('none', 'no')} mask, {tile}"
    return Variant(label, _softmax_kernel, signature, constants, num_warps=tile.warps)


def _relevance(name: str, tile: Tile) -> Variant:
    sizes = (
        "count",
        "rows",
        "columns",
        "coefficient_k",
        "coefficient_row",
        "probabilities_row",
        "out_k",
    )
    signature = dict.fromkeys(("coefficient", "probabilities", "out"), f"*{name}")
    signature |= {"scale": "fp32", **dict.fromkeys(sizes, "i32")}
    label = f"softmax relevance, {name}, {tile}"
    return Variant(label, _relevance_kernel, signature, _constants(tile), num_warps=tile.warps)
