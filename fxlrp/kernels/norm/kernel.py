"""Normalisation and its relevance in Triton: a program holds one or several rows, or goes along one again.

The weight is read by every program, from the L1 or L2 cache; programs of narrow rows hold several and read
it once. Of a row that is longer than the tile the mean, the squares and the output are a pass each, so that
a mean that is large beside the deviation costs no digits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Variant, launch
from ..rows import Tile, Tiles, as_k_rows, as_rows

TILES = Tiles(widest=16384, per_thread=32, looped=8192)
#: By whether the mean is taken away; if not, nothing is summed along a row, so that loops read it once too.
#: If so, tiles of narrow rows are larger: smaller ones, in fewer warps, spilled on sm_80 and sm_100.
RELEVANCE_TILES = {
    True: replace(TILES, smallest=8192),
    False: Tiles(widest=8192, per_thread=32, looped=8192),
}
#: Tiles of a loop that are under way or in use at a time.
_STAGES = tl.constexpr(2)


@triton.jit
def _sum(x, residual, at, inside, policy: tl.constexpr, dtype: tl.constexpr):
    """``h = x + residual`` at a tile's columns, rounded to its dtype; 0 outside."""
    h = tl.load(x + at, mask=inside, other=0.0, eviction_policy=policy).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=inside, other=0.0, eviction_policy=policy).to(tl.float32)
        h = h.to(dtype).to(tl.float32)
    return h


@triton.jit
def _factor(weight, at, columns, offset):
    """``offset + w`` of a tile's columns, ``[1, COLUMNS]``."""
    w = tl.load(weight + at, mask=at < columns, other=0.0, eviction_policy="evict_last")
    return offset + w.to(tl.float32)


@triton.jit
def _finish(y, h, value, normal, weight, bias, at, inside, columns, offset):
    """Store ``y = (offset + w) * normal + b`` and h of a tile."""
    if h is not None:
        tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)
    if weight is not None:
        normal *= _factor(weight, at, columns, offset)
    if bias is not None:
        normal += _factor(bias, at, columns, 0.0)
    tl.store(y + at, normal.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    h,
    rstd,
    eps,
    offset,
    rows,
    columns,
    x_row,
    residual_row,
    CENTRED: tl.constexpr,
    LOOPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = y.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, COLUMNS)[None, :]
    is_row = row < rows
    x += row.to(tl.int64) * x_row
    if residual is not None:
        residual += row.to(tl.int64) * residual_row
    y += row.to(tl.int64) * columns
    if h is not None:
        h += row.to(tl.int64) * columns
    inside = is_row & (at < columns)
    mean = 0.0
    if not LOOPS:
        value = _sum(x, residual, at, inside, "", dtype)
        centre = value
        if CENTRED:
            mean = (tl.sum(value, 1) / columns)[:, None]
            centre = tl.where(inside, value - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centre * centre, 1) / columns + eps)[:, None]
        _finish(y, h, value, centre * scale, weight, bias, at, inside, columns, offset)
    else:
        if CENTRED:
            lanes = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in tl.range(0, columns, COLUMNS, num_stages=_STAGES):
                there = is_row & (start + at < columns)
                lanes += _sum(x, residual, start + at, there, "evict_last", dtype)
            mean = (tl.sum(lanes, 1) / columns)[:, None]
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in tl.range(0, columns, COLUMNS, num_stages=_STAGES):
            there = is_row & (start + at < columns)
            value = _sum(x, residual, start + at, there, "evict_last", dtype)
            centre = tl.where(there, value - mean, 0.0)
            squares += centre * centre
        scale = tl.rsqrt(tl.sum(squares, 1) / columns + eps)[:, None]
        for start in tl.range(0, columns, COLUMNS, num_stages=_STAGES):
            there = is_row & (start + at < columns)
            value = _sum(x, residual, start + at, there, "evict_first", dtype)
            normal = (value - mean) * scale
            _finish(y, h, value, normal, weight, bias, start + at, there, columns, offset)
    tl.store(rstd + row, scale, mask=is_row)


@triton.jit
def _weighted(coefficient, weight, at, inside, columns, offset):
    """``(offset + w) * G`` of a tile; 0 outside."""
    value = tl.load(coefficient + at, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:  # read again for each coefficient: kept, it costs registers
        value *= _factor(weight, at, columns, offset)
    return value


@triton.jit
def _store_relevance(out, added, value, at, inside):
    if added is not None:
        value += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _relevance_kernel(
    coefficient,
    rstd,
    weight,
    added,
    out,
    share,
    offset,
    count,
    rows,
    columns,
    coefficient_k,
    coefficient_row,
    added_k,
    added_row,
    out_k,
    CENTRED: tl.constexpr,
    LOOPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, COLUMNS)[None, :]
    is_row = row < rows
    coefficient += row.to(tl.int64) * coefficient_row
    if added is not None:
        added += row.to(tl.int64) * added_row
    out += row.to(tl.int64) * columns
    inside = is_row & (at < columns)
    scale = tl.load(rstd + row, mask=is_row, other=0.0).to(tl.float32) * share
    for _ in range(count):
        if not LOOPS:
            value = _weighted(coefficient, weight, at, inside, columns, offset)
            if CENTRED:
                value -= (tl.sum(value, 1) / columns)[:, None]
            _store_relevance(out, added, value * scale, at, inside)
        else:
            mean = 0.0
            if CENTRED:
                lanes = tl.zeros((ROWS, COLUMNS), tl.float32)
                for start in tl.range(0, columns, COLUMNS, num_stages=_STAGES):
                    there = is_row & (start + at < columns)
                    lanes += _weighted(coefficient, weight, start + at, there, columns, offset)
                mean = (tl.sum(lanes, 1) / columns)[:, None]
            for start in tl.range(0, columns, COLUMNS, num_stages=_STAGES):
                there = is_row & (start + at < columns)
                value = _weighted(coefficient, weight, start + at, there, columns, offset) - mean
                _store_relevance(out, added, value * scale, start + at, there)
        coefficient += coefficient_k
        if added is not None:
            added += added_k
        out += out_k


def run_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and rstd of :func:`fxlrp.kernels.norm.add_norm`; without a residual h is x.

    ``tile`` is for tests and tuning.
    """
    columns = x.shape[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if y.numel():
        rows = as_rows(x, columns)
        residuals = None if residual is None else as_rows(residual, columns)
        tile = tile or TILES.of(columns, dtype.itemsize)
        launch(_norm_kernel)[(triton.cdiv(rows.shape[0], tile.rows),)](
            rows,
            residuals,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            h,
            rstd,
            eps,
            offset,
            rows.shape[0],
            columns,
            rows.stride(0),
            0 if residuals is None else residuals.stride(0),
            CENTRED=centred,
            LOOPS=tile.loops,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return y, x if h is None else h, rstd


def run_relevance(
    coefficient: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    share: float,
    offset: float,
    centred: bool,
    tile: Tile | None = None,
) -> Tensor:
    """Launch :func:`fxlrp.kernels.norm.norm_relevance`; ``tile`` for tests and tuning."""
    columns = coefficient.shape[-1]
    out = torch.empty(coefficient.shape, dtype=coefficient.dtype, device=coefficient.device)
    if out.numel() == 0:
        return out
    g = as_k_rows(coefficient, rstd.dim())
    a = None if added is None else as_k_rows(added, rstd.dim())
    tile = tile or RELEVANCE_TILES[centred].of(columns, g.dtype.itemsize)
    launch(_relevance_kernel)[(triton.cdiv(g.shape[1], tile.rows),)](
        g,
        rstd.contiguous(),
        None if weight is None else weight.contiguous(),
        a,
        out,
        share,
        offset,
        g.shape[0],
        g.shape[1],
        columns,
        g.stride(0),
        g.stride(1),
        0 if a is None else a.stride(0),
        0 if a is None else a.stride(1),
        g.shape[1] * columns,
        CENTRED=centred,
        LOOPS=tile.loops,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out


def variants() -> Iterator[Variant]:
    """LayerNorm with every operand for all tiles; RMSNorm, and less operands, for the widest tiles."""
    for dtype, name in DTYPES.items():
        for centred in (True, False):
            for tile in TILES.all(dtype.itemsize):
                for given in _given(("residual", "weight", "bias"), centred, tile, TILES, dtype):
                    yield _forward(name, given, centred, tile)
            tiles = RELEVANCE_TILES[centred]
            for tile in tiles.all(dtype.itemsize):
                for given in _given(("added", "weight"), centred, tile, tiles, dtype):
                    yield _relevance(name, given, centred, tile)


def _given(
    operands: tuple[str, ...], centred: bool, tile: Tile, tiles: Tiles, dtype: torch.dtype
) -> Iterator[tuple[str, ...]]:
    """Which optional operands a tile is compiled with: all, and where registers are most, fewer as well."""
    is_widest = tile.columns * dtype.itemsize == (tiles.looped if tile.loops else tiles.widest)
    if centred or is_widest:
        yield operands
    if is_widest and not tile.loops:
        yield from (operands[i:] for i in range(1, len(operands) + 1))


def _forward(name: str, given: tuple[str, ...], centred: bool, tile: Tile) -> Variant:
    h = ("h",) if "residual" in given else ()
    absent = {"residual", "weight", "bias", "h"} - {*given, *h}
    signature = dict.fromkeys(("x", *given, "y", *h), f"*{name}")
    signature |= {"rstd": "*fp32", "eps": "fp32", "offset": "fp32"}
    signature |= dict.fromkeys(("rows", "columns", "x_row", "residual_row"), "i32")
    return _variant(_norm_kernel, "forward", name, signature, given, absent, centred, tile)


def _relevance(name: str, given: tuple[str, ...], centred: bool, tile: Tile) -> Variant:
    absent = {"weight", "added"} - set(given)
    signature = dict.fromkeys(("coefficient", *given, "out"), f"*{name}")
    signature |= {"rstd": "*fp32", "share": "fp32", "offset": "fp32"}
    sizes = ("coefficient_k", "coefficient_row", "added_k", "added_row", "out_k")
    signature |= dict.fromkeys(("count", "rows", "columns", *sizes), "i32")
    return _variant(_relevance_kernel, "relevance", name, signature, given, absent, centred, tile)


def _variant(
    kernel: object,
    what: str,
    name: str,
    signature: dict[str, str],
    given: tuple[str, ...],
    absent: set[str],
    centred: bool,
    tile: Tile,
) -> Variant:
    form = "LayerNorm" if centred else "RMSNorm"
    beside = ", ".join(given) or "nothing"
    constants = {
        **dict.fromkeys(sorted(absent)),
        "CENTRED": centred,
        "LOOPS": tile.loops,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
    label = f"{form} {what}, {name}, with {beside}, {tile}"
    return Variant(label, kernel, signature, constants, num_warps=tile.warps)
