"""The softmax and its relevance in PyTorch's ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows import wide


def softmax(scores: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """``softmax(scale * scores + mask)``; see :func:`fxlrp.kernels.softmax.softmax`."""
    scaled = wide(scores) * scale
    if mask is not None:
        scaled = scaled.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scaled + mask
    found: Tensor = torch.ops.aten._safe_softmax.default(scaled, -1)
    return found.to(dtype).contiguous()


def softmax_relevance(coefficient: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """``scale * s * (G - sum(s G))``; see :func:`fxlrp.kernels.softmax.softmax_relevance`."""
    g, s = wide(coefficient), wide(probabilities)
    found = scale * s * (g - (s * g).sum(-1, keepdim=True))
    return found.to(coefficient.dtype).contiguous()
