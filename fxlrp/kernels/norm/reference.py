"""Normalisation and its relevance in PyTorch's ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import wide


def norm(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """Output and 1/std; see :func:`fxlrp.kernels.norm.norm`."""
    value = wide(h)
    if centred:
        value = value - value.mean(-1, keepdim=True)
    rstd = torch.rsqrt((value * value).mean(-1, keepdim=True) + eps)
    output = weighted(value * rstd, weight, offset)
    if bias is not None:
        output = output + wide(bias)
    return output.to(h.dtype).contiguous(), rstd.contiguous()


def norm_relevance(
    coefficient: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    share: float,
    offset: float,
    centred: bool,
) -> Tensor:
    """``added + share * C((offset + w) G) * rstd``; see :func:`fxlrp.kernels.norm.norm_relevance`."""
    value = weighted(wide(coefficient), weight, offset)
    if centred:
        value = value - value.mean(-1, keepdim=True)
    found = value * (share * wide(rstd))
    if added is not None:
        found = found + wide(added)
    return found.to(coefficient.dtype).contiguous()


def transpose(
    coefficient: Tensor, rstd: Tensor, weight: Tensor | None, share: float, offset: float, centred: bool
) -> Tensor:
    """The transpose of the relevance as a map of G: ``(offset + w) * C(share * rstd * G')``."""
    value = wide(coefficient) * (share * wide(rstd))
    if centred:
        value = value - value.mean(-1, keepdim=True)
    return weighted(value, weight, offset).to(coefficient.dtype)


def weighted(value: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """``(offset + w) * value``; value itself without a weight."""
    return value if weight is None else value * (offset + wide(weight))
