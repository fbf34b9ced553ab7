"""Softmax over the last dimension with scale and mask, and its relevance.

Predicted on an H200, unmeasured: both are bound by memory. The softmax moves 2 tensors (scores in,
probabilities out) and the mask as far as it is not broadcast; the relevance 3 (probabilities and G in,
coefficient out), for K coefficients 1 + 2K. A row is read once where it fits the registers of one program
(32 KiB of scores, 16 KiB of the relevance's tensors: 16,384 and 8,192 columns in half precision); of longer
ones the first tile is read once and the rest twice, the second time from the L2 cache as long as the rows
under way fit it: up to about 65,000 columns in half precision. Beyond, they move 3 and 5K tensors. At 4.3
TB/s of copy bandwidth, 64 Mi scores in bfloat16 (268 MB) take 62 us, at the 85 % aimed at 73 us; their
relevance (403 MB) 94 and 110 us. Work is 1 to 3 exponentials and about 5 operations an element, below half
of what the time of the traffic allows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import runs_triton, unavailable
from ..rows import fits
from . import reference

__all__ = ["can_run", "softmax", "softmax_relevance"]


@torch.library.triton_op("fxlrp::softmax", mutates_args={})
def softmax(
    scores: Tensor, mask: Tensor | None = None, scale: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """``s = softmax(scale * scores + mask)`` over the last dimension.

    Computed in float32 (float64 for float64). A row in which every entry is -inf gives 0, as
    ``aten._safe_softmax`` does, which attention written out uses (``aten._softmax`` gives NaN there). Its
    derivative is the rule's, ``scale * s * (G - sum(s G))``; the mask is a constant.

    Args:
        scores: ``[..., columns]``.
        mask: broadcastable to the scores: added, or boolean with True for what is kept.
        scale: of the scores.
        dtype: of the output; the scores' by default.

    Returns:
        Probabilities in the scores' shape, contiguous.

    Source: AttnLRP, Prop. 3.1, for the derivative.
    """
    if runs_triton(scores) and can_run(scores, mask)[0]:
        from . import kernel

        return kernel.run_softmax(scores, mask, scale, dtype or scores.dtype)
    return reference.softmax(scores, mask, scale, dtype or scores.dtype)


def _fake_softmax(
    scores: Tensor, mask: Tensor | None = None, scale: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(scores.shape, dtype=dtype or scores.dtype, device=scores.device)


@torch.library.triton_op("fxlrp::softmax_relevance", mutates_args={})
def softmax_relevance(coefficient: Tensor, probabilities: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * s * (G - sum(s G))``: from the coefficient of probabilities s to that of the scores.

    The map of G is symmetric, so it is its own derivative with respect to G; s is a constant there.

    Args:
        coefficient: G, ``[..., columns]`` or ``[K, ..., columns]``.
        probabilities: s, ``[..., columns]``.
        scale: of the scores.

    Returns:
        The coefficient in G's shape and dtype, contiguous.

    Source: AttnLRP, Prop. 3.1; Bach et al. 2015 call the sum the bias of the Taylor step.
    """
    ok, _ = can_run(probabilities, coefficient)
    if runs_triton(coefficient, probabilities) and ok and fits(coefficient.shape, probabilities.shape):
        from . import kernel

        return kernel.run_relevance(coefficient, probabilities, scale)
    return reference.softmax_relevance(coefficient, probabilities, scale)


def _fake_softmax_relevance(coefficient: Tensor, probabilities: Tensor, scale: float = 1.0) -> Tensor:
    return torch.empty(coefficient.shape, dtype=coefficient.dtype, device=coefficient.device)


def can_run(scores: Tensor, *others: Tensor | None) -> tuple[bool, str]:
    """Whether the kernels run on these (fake) scores, or probabilities, and the tensors beside; why not."""
    floats = [t.dtype for t in (scores, *others) if t is not None and t.dtype != torch.bool]
    reason = unavailable(scores.device, *floats)
    if not reason and scores.dim() == 0:
        reason = "a number has no last dimension"
    return not reason, reason


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, _, ctx.scale, _ = inputs
    ctx.dtype = scores.dtype
    ctx.save_for_backward(output)


def _pull(ctx: Any, coefficient: Tensor) -> tuple[Tensor, None, None, None]:
    (probabilities,) = ctx.saved_tensors
    found = softmax_relevance(coefficient, probabilities, ctx.scale)
    return found.to(ctx.dtype), None, None, None


def _remember_relevance(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, probabilities, ctx.scale = inputs
    ctx.save_for_backward(probabilities)


def _transpose(ctx: Any, coefficient: Tensor) -> tuple[Tensor, None, None]:
    (probabilities,) = ctx.saved_tensors
    return softmax_relevance(coefficient, probabilities, ctx.scale), None, None


softmax.register_fake(_fake_softmax)
softmax_relevance.register_fake(_fake_softmax_relevance)
softmax.register_autograd(_pull, setup_context=_remember)
softmax_relevance.register_autograd(_transpose, setup_context=_remember_relevance)
