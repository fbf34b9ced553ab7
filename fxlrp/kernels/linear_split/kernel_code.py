"""Sign-split rules of linear maps in Triton: the signed and the absolute product from one read of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from ..matmul.kernel import across, dot, down, steps_of, tile_of, zeros


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    out,
    out_absolute,
    rows,
    columns,
    depth,
    x_m,
    x_d,
    w_n,
    w_d,
    b_n,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
):
    """``out[part, m, n] = sum_d x[m, d] weight[n, d] + bias[n]``, and the same of absolute values, in
    `out_absolute`; of several parts in ``out[part, 1]``, with parts two outputs apart.
    """
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    part = tl.program_id(1)
    m = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first, last = steps_of(part, depth, PARTS, DEPTH)
    d = first.to(tl.int64) * DEPTH + tl.arange(0, DEPTH)
    x_tile = x + down(m, SWAP) * x_m + across(d, SWAP) * x_d
    w_tile = weight + down(d, SWAP) * w_d + across(n, SWAP) * w_n
    signed, absolute = zeros(ROWS, COLUMNS, SWAP), zeros(ROWS, COLUMNS, SWAP)
    for step in range(first, last):
        here = tl.arange(0, DEPTH) < (DEPTH if EVEN else depth - step * DEPTH)
        x_part = tl.load(x_tile, mask=down(m < rows, SWAP) & across(here, SWAP), other=0.0)
        w_part = tl.load(w_tile, mask=down(here, SWAP) & across(n < columns, SWAP), other=0.0)
        signed = dot(x_part, w_part, signed, PRECISION, SWAP)
        absolute = dot(tl.abs(x_part), tl.abs(w_part), absolute, PRECISION, SWAP)
        x_tile += DEPTH * x_d
        w_tile += DEPTH * w_d
    if BIASED:
        # Once, with the first part.
        added = tl.load(bias + n * b_n, mask=n < tl.where(part == 0, columns, 0), other=0.0).to(tl.float32)
        signed += across(added, SWAP)
        absolute += across(tl.abs(added), SWAP)
    inside = down(m < rows, SWAP) & across(n < columns, SWAP)
    size = tl.cast(rows, tl.int64) * columns
    place = part * 2 * size + down(m * columns, SWAP) + across(n, SWAP)
    tl.store(out + place, signed.to(out.dtype.element_ty), mask=inside)
    if PARTS > 1:  # not by an argument that lies in `out`: one that is written must be no other's view
        out_absolute = out + size
    tl.store(out_absolute + place, absolute.to(out.dtype.element_ty), mask=inside)


@triton.jit
def factors(
    z, absolute, first, second, floor, RULE: tl.constexpr, NEGATIVE: tl.constexpr, ROUNDING: tl.constexpr
):
    """The rule's factors of G on the way into the signed product and into the absolute one."""
    if RULE == "gamma":
        unsigned = z / (tl.abs(z) + first * absolute + floor)
        signed = tl.abs(unsigned)
    else:
        part = absolute + z
        signed = tl.where(part > ROUNDING * absolute, first * z / (part + floor), 0.0)
        unsigned = signed
        if NEGATIVE:
            part = absolute - z
            negative = tl.where(part > ROUNDING * absolute, second * z / (part + floor), 0.0)
            signed, unsigned = signed + negative, signed - negative
    return signed, unsigned


@triton.jit
def relevance_kernel(
    g,
    z,
    absolute,
    x,
    weight,
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
    a_m,
    a_d,
    w_d,
    w_n,
    x_m,
    x_n,
    first_strength,
    second_strength,
    floor,
    RULE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ROUNDING: tl.constexpr,
    TIMES_X: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
):
    """``out[part, k, m, n] = sum_d f g weight[d, n] + l sign(x) sum_d h g |weight[d, n]|``; row ``r`` is
    ``(m, k) = (r // count, r % count)``, so that one tile holds the coefficients of few values.
    """
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    part = tl.program_id(1)
    r = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m, k = r // count, r % count
    first, last = steps_of(part, depth, PARTS, DEPTH)
    d = first.to(tl.int64) * DEPTH + tl.arange(0, DEPTH)
    g_tile = g + down(k * g_k + m * g_m, SWAP) + across(d, SWAP) * g_d
    z_tile = z + down(m * z_m, SWAP) + across(d, SWAP) * z_d
    a_tile = absolute + down(m * a_m, SWAP) + across(d, SWAP) * a_d
    w_tile = weight + down(d, SWAP) * w_d + across(n, SWAP) * w_n
    signed, unsigned = zeros(ROWS, COLUMNS, SWAP), zeros(ROWS, COLUMNS, SWAP)
    for step in range(first, last):
        here = tl.arange(0, DEPTH) < (DEPTH if EVEN else depth - step * DEPTH)
        inside = down(r < rows, SWAP) & across(here, SWAP)
        z_part = tl.load(z_tile, mask=inside, other=0.0).to(tl.float32)
        a_part = tl.load(a_tile, mask=inside, other=0.0).to(tl.float32)
        g_part = tl.load(g_tile, mask=inside, other=0.0).to(tl.float32)
        w_part = tl.load(w_tile, mask=down(here, SWAP) & across(n < columns, SWAP), other=0.0)
        f, h = factors(z_part, a_part, first_strength, second_strength, floor, RULE, NEGATIVE, ROUNDING)
        signed = dot((g_part * f).to(w_part.dtype), w_part, signed, PRECISION, SWAP)
        unsigned = dot((g_part * h).to(w_part.dtype), tl.abs(w_part), unsigned, PRECISION, SWAP)
        g_tile += DEPTH * g_d
        z_tile += DEPTH * z_d
        a_tile += DEPTH * a_d
        w_tile += DEPTH * w_d
    inside = down(r < rows, SWAP) & across(n < columns, SWAP)
    x_tile = tl.load(x + down(m * x_m, SWAP) + across(n, SWAP) * x_n, mask=inside, other=0.0).to(tl.float32)
    if RULE == "gamma":
        unsigned *= first_strength
    signed += tl.where(x_tile > 0, unsigned, tl.where(x_tile < 0, -unsigned, 0.0))
    if TIMES_X:
        signed *= x_tile
    values = tl.cast(tl.cdiv(rows, count), tl.int64)
    place = part.to(tl.int64) * rows * columns + down((k * values + m) * columns, SWAP) + across(n, SWAP)
    tl.store(out + place, signed.to(out.dtype.element_ty), mask=inside)
