"""Gamma, alpha-beta and z+ of a linear map: both products, signed and absolute, from one read of the weights.

Forward ``z = x W^T + b`` and ``A = |x| |W|^T + |b|``. Back, with factors f and h of z and A that the rule
gives and ``l`` a number, the coefficient of x is ``C = (f G) W + l sign(x) ((h G) |W|)``:

- ``gamma``: ``h = z / (|z| + l A + 2 epsilon / (2 + gamma))``, ``f = |h|``, ``l = gamma / (2 + gamma)``;
- ``alpha_beta``: ``p = alpha z / (A + z + 2 epsilon)``, ``n = beta z / (A - z + 2 epsilon)``, each 0 where
  its sum is but rounding; ``f = p + n``, ``h = p - n``, ``l = 1``. z+ is alpha 1, beta 0.

Shapes: W [out, in], in either order of strides; x [..., in]; z, A [..., out]; G [..., out], or
[K, ..., out] for K coefficients on the same values; C as G, with ``in`` last. Absolute values are taken and
factors computed on the way into the products; operands are rounded as by the steps one by one. Few rows are
summed in parts of the reduction, which a second kernel adds in a fixed order, so that results are the same
from run to run.

Up to 128 rows (64 in TensorFloat-32) the kernels are launched; with more, or in float32 without
TensorFloat-32, the steps are one by one. Predicted for an H200 and unmeasured, in bfloat16 with M rows and
W 4096 x 4096: one by one, ``|W|`` is read, written and read again (4 passes over W in place of 1). For up
to 64 rows, 134 MB become 33.5 MB: 8 us in place of 31. At M = 4096 both products (2 x 174 us at 790
TFLOP/s) are the cost, beside 40 to 60 us of passes that would be saved; but absolute values of weights go
through registers back to shared memory, and back, 30 to 40 instructions of factors for each element are
repeated for each of 32 tiles, more cycles than the tensor cores take. So there cuBLAS is ahead; both meet
near 200 rows.

Source: Montavon et al. 2019 (gamma), Bach et al. 2015, eq. 60 (alpha-beta), Montavon et al. 2017 (z+). The
form with absolute values is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from ..launch import runs_triton, unavailable
from ..rows import alike, fits
from . import reference

#: Rule -> how many strengths it has: (gamma,) or (alpha, beta).
RULES = {"gamma": 1, "alpha_beta": 2}


#: Rows up to which the kernels are launched: float32's, by TensorFloat-32, and those of half precision.
MOST_ROWS = {4: 64, 2: 128}


def can_run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    results: Sequence[Tensor] = (),
    g: Tensor | None = None,
    tf32: bool = False,
) -> tuple[bool, str]:
    """Whether the kernels take these operands (results: z and A), and why not. Of how many rows there are
    nothing is said.
    """
    if reason := unavailable(x.device, x.dtype):
        return False, reason
    if x.dtype == torch.float32 and not tf32:
        return False, "in float32 without TensorFloat-32 the steps one by one are as fast"
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias, g, *results)):
        return False, f"all operands must have the dtype of x, {x.dtype}"
    if weight.dim() != 2 or x.dim() == 0:
        return False, "it takes W [out, in] and x [..., in]"
    out = (*x.shape[:-1], weight.shape[0])
    if not (
        alike(x.shape[-1:], weight.shape[1:])
        and (bias is None or alike(bias.shape, weight.shape[:1]))
        and alike(out, *(t.shape for t in results))
        and (g is None or fits(g.shape, out))
    ):
        return False, "shapes of x, W, b, z, A and G do not belong together"
    return True, ""


@triton_op("fxlrp::linear_split_relevance", mutates_args={})
def linear_split_relevance(
    g: Tensor,
    z: Tensor,
    absolute: Tensor,
    x: Tensor,
    weight: Tensor,
    rule: str,
    strengths: Sequence[float],
    epsilon: float = 0.0,
    times_x: bool = False,
    tf32: bool = False,
) -> Tensor:
    """``(f G) W + l sign(x) ((h G) |W|)``, the coefficient of x, with the rule's factors f, h and l.

    Args:
        g: coefficients of z, ``[..., out]`` or ``[K, ..., out]``.
        z: ``x W^T + b``, ``[..., out]``.
        absolute: ``A = |x| |W|^T + |b|``, ``[..., out]``.
        x: ``[..., in]``.
        weight: ``[out, in]``.
        rule: ``"gamma"`` or ``"alpha_beta"``.
        strengths: ``(gamma,)``, or ``(alpha, beta)``; z+ is (1, 0).
        epsilon: the stabiliser.
        times_x: whether to return relevance, the coefficient times x.
        tf32: whether float32 products may round their factors to TensorFloat-32.

    Raises:
        ValueError: there is no such rule, or it takes another number of strengths.
    """
    if RULES.get(rule) != len(strengths):
        raise ValueError(f"rule={rule!r} with {len(strengths)} strengths: give one of {RULES} with so many")
    if runs_triton(g, z, x, weight) and can_run(x, weight, None, (z, absolute), g, tf32)[0]:
        from . import kernel

        if _are_few(g):
            return kernel.relevance(g, z, absolute, x, weight, rule, strengths, epsilon, times_x, tf32)
    return reference.relevance(g, z, absolute, x, weight, rule, strengths, epsilon, times_x)


@triton_op("fxlrp::linear_split", mutates_args={})
def linear_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: str,
    strengths: Sequence[float],
    epsilon: float = 0.0,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """``z = x W^T + b`` and ``A = |x| |W|^T + |b|``; the derivative of z for x is the rule, others are none.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        rule: as in :func:`linear_split_relevance`, and what follows.
        strengths: the rule's.
        epsilon: the rule's stabiliser.
        tf32: whether float32 products may round their factors to TensorFloat-32.
    """
    if runs_triton(x, weight) and can_run(x, weight, bias, tf32=tf32)[0]:
        from . import kernel

        if _are_few(x):
            return kernel.forward(x, weight, bias, tf32)
    return reference.forward(x, weight, bias)


def _are_few(x: Tensor) -> bool:
    """Whether the kernels are launched; of symbols a guard, since what is compiled for few serves few."""
    return math.prod(x.shape[:-1]) <= MOST_ROWS[x.dtype.itemsize]


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _fake_relevance(g: Tensor, z: Tensor, absolute: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return g.new_empty((*g.shape[:-1], weight.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *ctx.settings, ctx.tf32 = inputs
    ctx.save_for_backward(*output, x, weight)
    ctx.mark_non_differentiable(output[1])


def _split_rule(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    coefficient = linear_split_relevance(g, *ctx.saved_tensors, *ctx.settings, False, ctx.tf32)
    return coefficient, None, None, None, None, None, None


def _keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *values, rule, strengths, epsilon, times_x, _ = inputs
    ctx.settings = rule, strengths, epsilon, times_x
    ctx.save_for_backward(*values)


def _transposed(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
    """The relevance op is linear in G."""
    return reference.transposed(c, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


linear_split.register_fake(_fake)
linear_split_relevance.register_fake(_fake_relevance)
linear_split.register_autograd(_split_rule, setup_context=_keep)
linear_split_relevance.register_autograd(_transposed, setup_context=_keep_factors)
