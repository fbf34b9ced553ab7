"""Activations, gates and their relevance in Triton: elementwise over tiles of rows and columns.

Tensors whose elements lie side by side count as one row; halves of packed tensors are rows that lie apart.
A program does one tile for all K coefficients, so that values and what is made of them stay in registers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Variant, launch
from ..rows import Tile, as_k_rows, as_rows, known, likely, with_k
from .reference import ACTIVATIONS, halves

#: Bytes of each tensor that one program of 4 warps does: two loads of 16 bytes a thread. Of a gate's
#: relevance, which reads three tensors and keeps two results, one.
_BYTES, _BYTES_OF_GATE = 4096, 2048
_WARPS = 4
#: The least width of a tile that is taken because it divides the columns, so that no lane is idle.
_NARROW = 256


@triton.jit
def _ratio(x, ACTIVATION: tl.constexpr):
    """``f(x)/x`` in closed form."""
    if ACTIVATION == "relu":
        r = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        r = tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        r = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3)
        r = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        r = tl.sigmoid(1.702 * x)
    elif ACTIVATION == "mish":
        # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); 1 in float32 from 20 on
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        r = n / (n + 2.0)
    elif ACTIVATION == "hardswish":
        r = tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    else:
        tl.static_assert(ACTIVATION == "softsign")
        r = 1.0 / (1.0 + tl.abs(x))
    return r


@triton.jit
def _value(x, ratio, ACTIVATION: tl.constexpr):
    """f(x), from f(x)/x where that has the limits of f."""
    return tl.where(x <= 0.0, 0.0, x) if ACTIVATION == "relu" else x * ratio


@triton.jit
def _place(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``[ROWS, 1]`` and the first column of this program's tile."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    start = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
    return row[:, None], start


@triton.jit
def _times_kernel(
    x,
    factors,
    out,
    count,
    rows,
    columns,
    x_row,
    factors_k,
    factors_row,
    out_k,
    ACTIVATION: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``f(x) * factor``, or ``f(x)/x * factor``, for each of the factors; f(x) where there are none."""
    row, start = _place(columns, ROWS, COLUMNS)
    at = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (at < columns - start)
    x += row.to(tl.int64) * x_row + start
    out += row.to(tl.int64) * columns + start
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    ratio = _ratio(value, ACTIVATION)
    made = ratio if RATIO else _value(value, ratio, ACTIVATION)
    if factors is None:
        tl.store(out + at, made.to(out.dtype.element_ty), mask=inside)
    else:
        factors += row.to(tl.int64) * factors_row + start
        for _ in range(count):
            factor = tl.load(factors + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + at, (made * factor).to(out.dtype.element_ty), mask=inside)
            factors += factors_k
            out += out_k


@triton.jit
def _relevance_kernel(
    coefficient,
    a,
    b,
    of_a,
    of_b,
    share_a,
    share_b,
    count,
    rows,
    columns,
    coefficient_k,
    coefficient_row,
    a_row,
    b_row,
    out_k,
    out_row,
    place_a,
    place_b,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Both coefficients; without b that of a is 0, without ``of_b`` they go to their places in ``of_a``."""
    row, start = _place(columns, ROWS, COLUMNS)
    at = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (at < columns - start)
    wide_row = row.to(tl.int64)
    coefficient += wide_row * coefficient_row + start
    if of_b is None:
        of_b = of_a + (wide_row * out_row + start + place_b)
    else:
        of_b += wide_row * out_row + start
    of_a += wide_row * out_row + start + place_a
    value = tl.load(a + wide_row * a_row + start + at, mask=inside, other=0.0).to(tl.float32)
    ratio = _ratio(value, ACTIVATION)
    to_b = share_b * _value(value, ratio, ACTIVATION)
    to_a = tl.zeros_like(value)
    if b is not None:
        factor = tl.load(b + wide_row * b_row + start + at, mask=inside, other=0.0).to(tl.float32)
        to_a = share_a * ratio * factor
    for _ in range(count):
        g = tl.load(coefficient + at, mask=inside, other=0.0).to(tl.float32)
        if b is None:
            tl.store(of_a + at, to_a.to(of_a.dtype.element_ty), mask=inside)
        else:
            tl.store(of_a + at, (to_a * g).to(of_a.dtype.element_ty), mask=inside)
        tl.store(of_b + at, (to_b * g).to(of_b.dtype.element_ty), mask=inside)
        coefficient += coefficient_k
        of_a += out_k
        of_b += out_k


def _tile(columns: Any, elements: int) -> Tile:
    """A tile of so many elements whose width divides the columns where that is not too narrow."""
    width = min(elements, max(32, 1 << (likely(columns, elements) - 1).bit_length()))
    exact = known(columns)
    if exact is not None and exact % width:
        dividing = exact & -exact
        width = dividing if _NARROW <= dividing < width else width
    return Tile(elements // width, width, _WARPS)


def _as_matrices(
    values: Sequence[Tensor], coefficients: Sequence[Tensor], flat: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Values as ``[rows, columns]``, coefficients as ``[K, rows, columns]``; one row where all are dense."""
    shape = values[0].shape
    with_lead = [with_k(c, len(shape)) for c in coefficients]
    if flat and all(t.is_contiguous() for t in (*values, *with_lead)):
        n = values[0].numel()
        return [v.reshape(1, n) for v in values], [c.reshape(c.shape[0], 1, n) for c in with_lead]
    return [as_rows(v, shape[-1]) for v in values], [as_k_rows(c, len(shape)) for c in with_lead]


def run_activation(x: Tensor, name: str, tile: Tile | None = None) -> Tensor:
    """Launch :func:`fxlrp.kernels.gate.activation`; ``tile`` for tests and tuning, here and below."""
    return _times(x, None, name, False, tile)


def run_activation_relevance(coefficient: Tensor, x: Tensor, name: str, tile: Tile | None = None) -> Tensor:
    """Launch :func:`fxlrp.kernels.gate.activation_relevance`."""
    return _times(x, coefficient, name, True, tile)


def run_gate(a: Tensor, b: Tensor, name: str, tile: Tile | None = None) -> Tensor:
    """Launch :func:`fxlrp.kernels.gate.gate`."""
    return _times(a, b, name, False, tile)


def _times(x: Tensor, factors: Tensor | None, name: str, is_ratio: bool, tile: Tile | None) -> Tensor:
    like = x if factors is None else factors
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if out.numel() == 0:
        return out
    (value,), found = _as_matrices([x], [] if factors is None else [factors])
    by_k = found[0] if found else None
    rows, columns = value.shape
    tile = tile or _tile(columns, _BYTES // out.dtype.itemsize)
    launch(_times_kernel)[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        value,
        by_k,
        out,
        1 if by_k is None else by_k.shape[0],
        rows,
        columns,
        value.stride(0),
        0 if by_k is None else by_k.stride(0),
        0 if by_k is None else by_k.stride(1),
        rows * columns,
        ACTIVATION=name,
        RATIO=is_ratio,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out


def run_gate_relevance(
    coefficient: Tensor,
    a: Tensor,
    b: Tensor,
    name: str,
    share_a: float,
    share_b: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`fxlrp.kernels.gate.gate_relevance`."""
    of_a, of_b = (
        torch.empty(coefficient.shape, dtype=coefficient.dtype, device=coefficient.device) for _ in range(2)
    )
    if of_a.numel():
        (a, b), (g,) = _as_matrices([a, b], [coefficient])
        _relevance(g, a, b, of_a, of_b, g.shape[-1], (0, 0), name, (share_a, share_b), tile)
    return of_a, of_b


def run_packed_gate_relevance(
    coefficient: Tensor,
    packed: Tensor,
    name: str,
    gate_first: bool,
    share_a: float,
    share_b: float,
    tile: Tile | None = None,
) -> Tensor:
    """Launch :func:`fxlrp.kernels.gate.packed_gate_relevance`."""
    shape = (*coefficient.shape[:-1], packed.shape[-1])
    out = torch.empty(shape, dtype=coefficient.dtype, device=coefficient.device)
    if out.numel():
        (a, b), (g,) = _as_matrices(halves(packed, gate_first), [coefficient], flat=False)
        columns = g.shape[-1]
        places = (0, columns) if gate_first else (columns, 0)
        read = b if share_a != 0 else None
        _relevance(g, a, read, out, None, packed.shape[-1], places, name, (share_a, share_b), tile)
    return out


def _relevance(
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    of_a: Tensor,
    of_b: Tensor | None,
    out_row: Any,
    places: tuple[Any, Any],
    name: str,
    shares: tuple[float, float],
    tile: Tile | None,
) -> None:
    """Matrices in, coefficients into ``of_a`` and ``of_b``, whose rows are ``out_row`` elements apart."""
    count, rows, columns = g.shape
    tile = tile or _tile(columns, _BYTES_OF_GATE // g.dtype.itemsize)
    launch(_relevance_kernel)[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        g,
        a,
        b,
        of_a,
        of_b,
        *shares,
        count,
        rows,
        columns,
        g.stride(0),
        g.stride(1),
        a.stride(0),
        0 if b is None else b.stride(0),
        rows * out_row,
        out_row,
        *places,
        ACTIVATION=name,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )


def variants() -> Iterator[Variant]:
    """Every activation with the widest tile; other forms and tiles with GELU, which takes most registers."""
    for dtype, name in DTYPES.items():
        wide, half = (_one_row(size // dtype.itemsize) for size in (_BYTES, _BYTES_OF_GATE))
        for activation in ACTIVATIONS:
            yield _times_variant(name, activation, "gate", wide)
            yield _relevance_variant(name, activation, "gate relevance", half)
        for form in ("activation", "activation relevance"):
            yield _times_variant(name, "gelu", form, wide)
        for form in ("packed gate relevance", "packed frozen gate relevance"):
            yield _relevance_variant(name, "gelu", form, half)
        for tile in _narrower(wide):
            yield _times_variant(name, "gelu", "gate", tile)
        for tile in _narrower(half):
            yield _relevance_variant(name, "gelu", "gate relevance", tile)


def _one_row(elements: int) -> Tile:
    return Tile(1, elements, _WARPS)


def _narrower(tile: Tile) -> Iterator[Tile]:
    for width in (1 << i for i in range(5, tile.columns.bit_length() - 1)):
        yield Tile(tile.columns // width, width, _WARPS)


def _times_variant(name: str, activation: str, form: str, tile: Tile) -> Variant:
    factors = () if form == "activation" else ("factors",)
    sizes = ("count", "rows", "columns", "x_row", "factors_k", "factors_row", "out_k")
    signature = dict.fromkeys(("x", *factors, "out"), f"*{name}") | dict.fromkeys(sizes, "i32")
    constants = dict.fromkeys({"factors"} - set(factors)) | {"RATIO": form == "activation relevance"}
    return _variant(_times_kernel, name, activation, form, tile, signature, constants)


def _relevance_variant(name: str, activation: str, form: str, tile: Tile) -> Variant:
    absent = {"gate relevance": (), "packed gate relevance": ("of_b",)}.get(form, ("b", "of_b"))
    pointers = [p for p in ("coefficient", "a", "b", "of_a", "of_b") if p not in absent]
    sizes = ("count", "rows", "columns", "coefficient_k", "coefficient_row", "a_row", "b_row")
    places = ("out_k", "out_row", "place_a", "place_b")
    signature = dict.fromkeys(pointers, f"*{name}") | dict.fromkeys((*sizes, *places), "i32")
    signature |= {"share_a": "fp32", "share_b": "fp32"}
    return _variant(_relevance_kernel, name, activation, form, tile, signature, dict.fromkeys(absent))


def _variant(
    kernel: object,
    name: str,
    activation: str,
    form: str,
    tile: Tile,
    signature: dict[str, str],
    constants: dict[str, Any],
) -> Variant:
    constants |= {"ACTIVATION": activation, "ROWS": tile.rows, "COLUMNS": tile.columns}
    label = f"{form}, {name}, {activation}, {tile}"
    return Variant(label, kernel, signature, constants, num_warps=tile.warps)
