"""Launches of sign-split rules of linear maps: tiles, operands, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import DTYPES, Variant, launch
from ..matmul import Table, Tiles, as_rows, hint, shared_memory
from ..matmul.kernel import add_parts
from .kernel_code import forward_kernel, relevance_kernel
from .reference import ROUNDING

#: Blocks of rows that go through the columns together.
_GROUP = 8

#: For few rows weights come first (swap): their absolute values then stay in registers.
_HALF_FEW = (
    Tiles(16, 64, 128, warps=4, stages=3, swap=True),
    Tiles(32, 128, 64, warps=4, stages=3, swap=True),
    Tiles(64, 128, 32, warps=4, stages=3, swap=True),
)
_TF32_FEW = (
    Tiles(16, 64, 32, warps=4, stages=3, swap=True),
    Tiles(64, 64, 32, warps=4, stages=2),
)
#: Without tensor cores, arithmetic and not reading is the cost from a few rows on, and cuBLAS is ahead there.
_FLOAT32 = Table(
    is_default=False,
    few=(Tiles(16, 64, 16, warps=4, stages=3), Tiles(64, 64, 16, warps=8, stages=3)),
)
_TF32 = Table(few=_TF32_FEW, tuned=(Tiles(64, 128, 32, warps=8, stages=3, shared=120),))
_FORWARD = Table(
    few=(*_HALF_FEW, Tiles(128, 64, 32, warps=8, stages=4)),
    tuned=(Tiles(128, 128, 64, warps=8, stages=3, shared=112),),
)
#: Factors of three operands take registers, so that tiles are smaller than on the way forward.
_RELEVANCE = Table(
    few=_HALF_FEW,
    many=(Tiles(64, 128, 32, warps=8, stages=4),),
    tuned=(Tiles(128, 128, 32, warps=8, stages=4, shared=160),),
)


def table(dtype: torch.dtype, tf32: bool, is_forward: bool) -> Table:
    """What a launch chooses from: tensor cores multiply half precision and TensorFloat-32, not float32."""
    if dtype == torch.float32:
        return _TF32 if tf32 else _FLOAT32
    return _FORWARD if is_forward else _RELEVANCE


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tf32: bool,
    chosen: tuple[Tiles, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op's results; see there. `chosen`: tiles and parts of the reduction, for tests and tuning."""
    columns, depth = weight.shape
    x2 = as_rows(x)
    rows = x2.shape[0]
    tiles, parts = chosen or table(x.dtype, tf32, True).choose(
        hint(x.shape[:-1]), columns, depth, shared_memory(x.device)
    )
    shape = (*x.shape[:-1], columns)
    z, absolute = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    both = None if parts == 1 else torch.empty((parts, 2, *shape), dtype=torch.float32, device=x.device)
    launch(forward_kernel)[_grid(tiles, rows, columns, parts)](
        x2,
        weight,
        weight if bias is None else bias,
        z if both is None else both,
        absolute,
        rows,
        columns,
        depth,
        *x2.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        BIASED=bias is not None,
        **_constants(tiles, parts, depth, tf32),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if both is not None:
        add_parts(both, z, absolute)
    return z, absolute


def relevance(
    g: Tensor,
    z: Tensor,
    absolute: Tensor,
    x: Tensor,
    weight: Tensor,
    rule: str,
    strengths: Sequence[float],
    epsilon: float,
    times_x: bool,
    tf32: bool,
    chosen: tuple[Tiles, int] | None = None,
) -> Tensor:
    """The op's result; see there. `chosen`: tiles and parts of the reduction, for tests and tuning."""
    depth, columns = weight.shape
    z2, a2, x2 = as_rows(z), as_rows(absolute), as_rows(x)
    g3 = as_rows(g, *g.shape[: g.dim() - z.dim()])
    count = g3.shape[0] if g3.dim() == 3 else 1
    rows = z2.shape[0] * count
    tiles, parts = chosen or table(g.dtype, tf32, False).choose(
        hint(g.shape[:-1]), columns, depth, shared_memory(g.device)
    )
    shape = (*g.shape[:-1], columns)
    result = torch.empty(shape, dtype=g.dtype, device=g.device)
    out = result if parts == 1 else torch.empty((parts, *shape), dtype=torch.float32, device=g.device)
    launch(relevance_kernel)[_grid(tiles, rows, columns, parts)](
        g3,
        z2,
        a2,
        x2,
        weight,
        out,
        rows,
        count,
        columns,
        depth,
        g3.stride(0) if g3.dim() == 3 else 0,
        g3.stride(-2),
        g3.stride(-1),
        *z2.stride(),
        *a2.stride(),
        *weight.stride(),
        *x2.stride(),
        *_numbers(rule, strengths, epsilon),
        RULE=rule,
        NEGATIVE=rule == "alpha_beta" and strengths[1] != 0,
        ROUNDING=ROUNDING * torch.finfo(g.dtype).eps,
        TIMES_X=times_x,
        **_constants(tiles, parts, depth, tf32),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if parts > 1:
        add_parts(out, result)
    return result


def _numbers(rule: str, strengths: Sequence[float], epsilon: float) -> tuple[float, float, float]:
    """Strengths and stabiliser as the kernel takes them: (l, 0, floor) or (alpha, beta, 2 epsilon)."""
    if rule == "gamma":
        (gamma,) = strengths
        return gamma / (2 + gamma), 0.0, max(2 * epsilon / (2 + gamma), torch.finfo(torch.float32).tiny)
    alpha, beta = strengths
    return alpha, beta, 2 * epsilon


def _grid(tiles: Tiles, rows: int, columns: int, parts: int) -> tuple[int, int]:
    return -(-rows // tiles.rows) * -(-columns // tiles.columns), parts


def _constants(tiles: Tiles, parts: int, depth: int, tf32: bool) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "EVEN": depth % tiles.depth == 0,
        "PARTS": parts,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "GROUP": _GROUP,
        "SWAP": tiles.swap,
    }


def variants() -> Iterator[Variant]:
    """Every tile for each dtype, both ways; for the largest also the other rule and transposed weights."""
    for dtype in DTYPES:
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            for make, choices in (
                (_forward_variant, table(dtype, tf32, True)),
                (_relevance_variant, table(dtype, tf32, False)),
            ):
                for tiles, is_default in choices.launched():
                    yield make(tiles, dtype, tf32, is_default=is_default)
                largest = (choices.many or choices.few)[-1]
                yield make(largest, dtype, tf32, transposed=True, is_default=choices.is_default)
            yield _relevance_variant(largest, dtype, tf32, rule="gamma", is_default=choices.is_default)


def _forward_variant(
    tiles: Tiles,
    dtype: torch.dtype,
    tf32: bool,
    parts: int = 4,
    transposed: bool = False,
    is_default: bool = True,
) -> Variant:
    kind, order = DTYPES[dtype], "w_n" if transposed else "w_d"
    signature = {
        **dict.fromkeys(("x", "weight", "bias"), f"*{kind}"),
        "out": "*fp32" if parts > 1 else f"*{kind}",
        "out_absolute": f"*{kind}",
        **dict.fromkeys(("rows", "columns", "depth", "x_m", "w_n", "w_d"), "i32"),
    }
    del signature[order]
    constants = dict.fromkeys(("x_d", "b_n", order), 1) | {"BIASED": True}
    return Variant(
        _label("split forward", tiles, kind, tf32, transposed),
        forward_kernel,
        signature,
        constants | _constants(tiles, parts, 0, tf32),
        tiles.warps,
        tiles.stages,
        is_default,
    )


def _relevance_variant(
    tiles: Tiles,
    dtype: torch.dtype,
    tf32: bool,
    parts: int = 4,
    transposed: bool = False,
    is_default: bool = True,
    rule: str = "alpha_beta",
) -> Variant:
    kind, order = DTYPES[dtype], "w_d" if transposed else "w_n"
    signature = {
        **dict.fromkeys(("g", "z", "absolute", "x", "weight"), f"*{kind}"),
        "out": "*fp32" if parts > 1 else f"*{kind}",
        **dict.fromkeys(("rows", "columns", "depth", "g_k", "g_m", "z_m", "a_m", "w_d", "w_n", "x_m"), "i32"),
        **dict.fromkeys(("first_strength", "second_strength", "floor"), "fp32"),
    }
    del signature[order]
    constants = {
        **dict.fromkeys(("count", "g_d", "z_d", "a_d", "x_n", order), 1),
        "RULE": rule,
        "NEGATIVE": rule == "alpha_beta",
        "ROUNDING": ROUNDING * torch.finfo(dtype).eps,
        "TIMES_X": True,
    }
    return Variant(
        _label(f"split relevance, {rule}", tiles, kind, tf32, transposed),
        relevance_kernel,
        signature,
        constants | _constants(tiles, parts, 0, tf32),
        tiles.warps,
        tiles.stages,
        is_default,
    )


def _label(what: str, tiles: Tiles, kind: str, tf32: bool, transposed: bool) -> str:
    text = f"{what}, {'tf32' if tf32 else kind}, {tiles}"
    return text + ", W transposed" * transposed
