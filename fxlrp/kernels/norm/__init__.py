"""RMSNorm and LayerNorm with the residual sum before them, and the LN-rule's relevance.

Predicted on an H200, unmeasured: all are bound by memory. The norm moves 2 tensors (x in, y out), with the
residual sum 4 (x, residual in; h, y out), the relevance 2 (G in, coefficient out), 3 with an added
coefficient, for K coefficients K times that. The weight comes from the caches. Of the statistics one float
a row is kept, 1/std: no relevance needs the mean. Rows of up to 16 KiB (8192 columns in half precision) are
read once; longer ones once more for the squares of the norm and for each mean, then from the L2 cache. At
4.3 TB/s of copy bandwidth, 16,384 rows of 4096 columns in bfloat16 with the residual sum (537 MB) take 125
us, at the 85 % aimed at 147 us. Work is about 10 operations an element, a tenth of what the time of the
traffic allows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import runs_triton, unavailable
from ..rows import alike, fits
from . import reference

__all__ = ["add_norm", "can_run", "norm", "norm_relevance"]


@torch.library.triton_op("fxlrp::norm", mutates_args={})
def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = (offset + w) * C(x) * rstd + b`` with ``rstd = 1 / sqrt(mean(C(x)^2) + eps)``.

    Computed in float32 (float64 for float64). C is the identity for RMSNorm, and takes the mean away for
    LayerNorm (``centred``). The derivative is the LN-rule's, with rstd held fixed (:func:`norm_relevance`);
    weight and bias carry no relevance.

    Args:
        x: ``[..., columns]``.
        weight: w, ``[columns]``; without it the factor is 1.
        bias: b, ``[columns]``.
        eps: added to the mean of squares.
        offset: added to the weight, where the model stores it less 1.
        centred: whether the mean is taken away.

    Returns:
        y in the shape and dtype of x, rstd ``[..., 1]`` in float32 (float64 for float64); contiguous.

    Source: Zhang and Sennrich 2019; Ba et al. 2016. Ali et al. 2022, eq. 13, for the derivative.
    """
    if runs_triton(x) and can_run(x, weight, bias)[0] and _are_of_columns(x, weight, bias):
        from . import kernel

        y, _, rstd = kernel.run_norm(x, None, weight, bias, eps, offset, centred)
        return y, rstd
    return reference.norm(x, weight, bias, eps, offset, centred)


def _fake_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), _statistic(x, x.dtype)


@torch.library.triton_op("fxlrp::add_norm", mutates_args={})
def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``h = x + residual`` and its norm; h is rounded to its dtype first, as by an addition of its own.

    The derivative hands ``G_h + norm_relevance(G_y)`` to x and to the residual alike.

    Args:
        x: ``[..., columns]``.
        residual: of x's shape.
        weight: as in :func:`norm`, and so are the rest.
        bias: ``[columns]``.
        eps: added to the mean of squares.
        offset: added to the weight.
        centred: whether the mean is taken away.

    Returns:
        y and h in the dtype of the sum, rstd ``[..., 1]`` in float32 (float64 for float64); contiguous.
    """
    ok = can_run(x, residual, weight, bias)[0] and alike(x.shape, residual.shape)
    if runs_triton(x, residual) and ok and _are_of_columns(x, weight, bias):
        from . import kernel

        return kernel.run_norm(x, residual, weight, bias, eps, offset, centred)
    h = (x + residual).contiguous()
    y, rstd = reference.norm(h, weight, bias, eps, offset, centred)
    return y, h, rstd


def _fake_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y, h = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    return y, h, _statistic(x, dtype)


@torch.library.triton_op("fxlrp::norm_relevance", mutates_args={})
def norm_relevance(
    coefficient: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    added: Tensor | None = None,
    share: float = 1.0,
    offset: float = 0.0,
    centred: bool = False,
) -> Tensor:
    """``added + share * C((offset + w) G) * rstd``: the LN-rule, and what comes along the residual.

    The bias of a LayerNorm keeps ``sum(b G)``. Differentiable with respect to G and ``added``.

    Args:
        coefficient: G of the norm's output, ``[..., columns]`` or ``[K, ..., columns]``.
        rstd: ``[..., 1]``, of the forward.
        weight: w, ``[columns]``; without it the factor is 1.
        added: another coefficient of the norm's input, in the shape of G.
        share: factor of what comes through the norm.
        offset: added to the weight.
        centred: whether the forward takes the mean away.

    Returns:
        The coefficient of the norm's input in G's shape and dtype, contiguous.

    Source: Ali et al. 2022, eq. 13 (LN-rule); AttnLRP, Prop. 3.4.
    """
    ok = can_run(coefficient, rstd, weight, added)[0] and _are_of_columns(coefficient, weight)
    ok = ok and (added is None or alike(coefficient.shape, added.shape))
    ok = ok and fits((*coefficient.shape[:-1], 1), rstd.shape)
    if runs_triton(coefficient, rstd) and ok:
        from . import kernel

        return kernel.run_relevance(coefficient, rstd, weight, added, share, offset, centred)
    return reference.norm_relevance(coefficient, rstd, weight, added, share, offset, centred)


def _fake_norm_relevance(
    coefficient: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    added: Tensor | None = None,
    share: float = 1.0,
    offset: float = 0.0,
    centred: bool = False,
) -> Tensor:
    return torch.empty(coefficient.shape, dtype=coefficient.dtype, device=coefficient.device)


def can_run(x: Tensor, *others: Tensor | None) -> tuple[bool, str]:
    """Whether the kernels run on this (fake) x, or G, and the tensors beside it; why not."""
    reason = unavailable(x.device, x.dtype, *(t.dtype for t in others if t is not None))
    if not reason and x.dim() == 0:
        reason = "a number has no last dimension"
    return not reason, reason


def _are_of_columns(x: Tensor, *vectors: Tensor | None) -> bool:
    return all(v is None or alike(x.shape[-1:], v.shape) for v in vectors)


def _statistic(x: Tensor, dtype: torch.dtype) -> Tensor:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.empty((*x.shape[:-1], 1), dtype=kept, device=x.device)


def _remember_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, _, _, ctx.offset, ctx.centred = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _pull_norm(ctx: Any, coefficient: Tensor | None, _: Any) -> tuple[Any, ...]:
    rstd, weight = ctx.saved_tensors
    found = None
    if coefficient is not None:
        found = norm_relevance(coefficient, rstd, weight, None, 1.0, ctx.offset, ctx.centred)
    return found, None, None, None, None, None


def _remember_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, _, ctx.offset, ctx.centred = inputs
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.save_for_backward(output[2], weight)
    ctx.set_materialize_grads(False)


def _pull_add_norm(ctx: Any, of_y: Tensor | None, of_h: Tensor | None, _: Any) -> tuple[Any, ...]:
    rstd, weight = ctx.saved_tensors
    found = of_h
    if of_y is not None:
        found = norm_relevance(of_y, rstd, weight, of_h, 1.0, ctx.offset, ctx.centred)
    both = [None if found is None else found.to(dtype) for dtype in ctx.dtypes]
    return (*both, None, None, None, None, None)


def _remember_relevance(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rstd, weight, added, ctx.share, ctx.offset, ctx.centred = inputs
    ctx.dtype = None if added is None else added.dtype
    ctx.save_for_backward(rstd, weight)


def _transpose(ctx: Any, coefficient: Tensor) -> tuple[Any, ...]:
    rstd, weight = ctx.saved_tensors
    of_g = reference.transpose(coefficient, rstd, weight, ctx.share, ctx.offset, ctx.centred)
    of_added = None if ctx.dtype is None else coefficient.to(ctx.dtype)
    return of_g, None, None, of_added, None, None, None


norm.register_fake(_fake_norm)
add_norm.register_fake(_fake_add_norm)
norm_relevance.register_fake(_fake_norm_relevance)
norm.register_autograd(_pull_norm, setup_context=_remember_norm)
add_norm.register_autograd(_pull_add_norm, setup_context=_remember_add_norm)
norm_relevance.register_autograd(_transpose, setup_context=_remember_relevance)
