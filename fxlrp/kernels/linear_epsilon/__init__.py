"""The epsilon rule of a linear map: its factor is computed on the way into the matrix product.

For ``z = x W^T + b`` the coefficient of x is ``C = (sigma(z) * G) W``, ``sigma(z) = |z| / (|z| + epsilon)``,
and its relevance ``x * C``. Shapes: W [out, in], in either order of strides; x [..., in]; z [..., out];
G [..., out], or [K, ..., out] for K coefficients on the same values; C as G, with ``in`` last.

Rounding is that of the steps one by one: sigma in float32, its product with G rounded to their dtype,
products summed up in float32. Few rows are summed in parts of the reduction, which a second kernel adds in a
fixed order, so that results are the same from run to run.

Up to 64 rows the kernel is launched; with more, or in float32 without TensorFloat-32, the steps are one by
one, which torch.compile fuses into what precedes them. Predicted for an H200 and unmeasured, in bfloat16
with M rows and W 4096 x 4096: for few rows, reading W (33.5 MB, 8 us) is the cost of both ways, and the
factor's own launch (2 to 3 us) is saved. At M = 4096 the factor's pass over z and G is 100 MB, 23 us beside
174 us of the product at 790 TFLOP/s. In the product, it is computed again for each of 16 tiles of 256
columns: 13 to 18 instructions for each element, 400 to 580 cycles of a multiprocessor for each 512 of its
tensor cores, and half of them not at the same time. So there the pair, of which cuBLAS is 0.88, is ahead.

Source: Bach et al. 2015, eq. 58; Achtibat et al. 2024 (AttnLRP), eq. 8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from ..launch import runs_triton, unavailable
from ..rows import alike, fits
from . import reference

#: Rows up to which the kernel is launched.
MOST_ROWS = 64


def can_run(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    epsilon: float,
    row_epsilon: Tensor | None = None,
    x: Tensor | None = None,
    tf32: bool = False,
) -> tuple[bool, str]:
    """Whether the kernel takes these operands, and why not. Of how many rows there are nothing is said."""
    if reason := unavailable(g.device, g.dtype):
        return False, reason
    if g.dtype == torch.float32 and not tf32:
        return False, "in float32 without TensorFloat-32 the steps one by one are as fast"
    if not g.dtype == z.dtype == weight.dtype:
        return False, f"z, G and W must have one dtype, not {z.dtype}, {g.dtype} and {weight.dtype}"
    if weight.dim() != 2 or z.dim() == 0 or g.dim() - z.dim() not in (0, 1):
        return False, "it takes W [out, in], z [..., out] and G [..., out] or [K, ..., out]"
    wanted = (*z.shape[:-1], weight.shape[1])
    belong = fits(g.shape, z.shape) and alike(z.shape[-1:], weight.shape[:1])
    if not belong or (x is not None and not alike(wanted, x.shape)):
        return False, "shapes of x, z, G and W do not belong together"
    if epsilon == 0 and row_epsilon is None:
        return False, "with epsilon 0 there is no factor, only a matrix product"
    return True, ""


@triton_op("fxlrp::linear_epsilon_relevance", mutates_args={})
def linear_epsilon_relevance(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    epsilon: float = 0.0,
    row_epsilon: Tensor | None = None,
    x: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """``(sigma(z) * G) W``, the coefficient of x in ``z = x W^T + b``; times x where x is given.

    Args:
        g: coefficients of z, ``[..., out]`` or ``[K, ..., out]``.
        z: the output, ``[..., out]``.
        weight: ``[out, in]``.
        epsilon: the stabiliser; with 0, and without `row_epsilon`, all of G goes through.
        row_epsilon: a stabiliser for each row in place of `epsilon`, ``[..., 1]``.
        x: ``[..., in]``, to return relevance in place of coefficients.
        tf32: whether float32 products may round their factors to TensorFloat-32.
    """
    if runs_triton(g, z, weight) and can_run(g, z, weight, epsilon, row_epsilon, x, tf32)[0]:
        from . import kernel

        if math.prod(g.shape[:-1]) <= MOST_ROWS:  # of symbols a guard: what is compiled for few serves few
            return kernel.relevance(g, z, weight, epsilon, row_epsilon, x, tf32)
    return reference.relevance(g, z, weight, epsilon, row_epsilon, x)


@triton_op("fxlrp::linear_epsilon", mutates_args={})
def linear_epsilon(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    relative: bool = False,
    tf32: bool = False,
) -> Tensor:
    """``x W^T + b``, PyTorch's own, whose derivative for x is the epsilon rule; for W and b it has none.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        epsilon: the stabiliser.
        relative: whether epsilon counts in standard deviations of each row of the output.
        tf32: as in :func:`linear_epsilon_relevance`.
    """
    return torch.nn.functional.linear(x, weight, bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(output, weight)


def _epsilon_rule(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, weight = ctx.saved_tensors
    epsilon, relative, tf32 = ctx.settings
    rows = epsilon * reference.row_deviation(z) if relative and epsilon else None
    return linear_epsilon_relevance(g, z, weight, epsilon, rows, None, tf32), None, None, None, None, None


def _keep_factor(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, z, weight, ctx.epsilon, row_epsilon, x, _ = inputs
    ctx.save_for_backward(z, weight, row_epsilon, x)


def _transposed(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
    """The relevance op is linear in G: ``sigma(z) * (c W^T)``."""
    z, weight, row_epsilon, x = ctx.saved_tensors
    product = torch.nn.functional.linear(c if x is None else c * x, weight)
    if ctx.epsilon or row_epsilon is not None:
        product = reference.damped(product, z, ctx.epsilon, row_epsilon)
    return product, None, None, None, None, None, None


def _fake_relevance(g: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return g.new_empty((*g.shape[:-1], weight.shape[1]))


linear_epsilon_relevance.register_fake(_fake_relevance)
linear_epsilon.register_autograd(_epsilon_rule, setup_context=_keep)
linear_epsilon_relevance.register_autograd(_transposed, setup_context=_keep_factor)
