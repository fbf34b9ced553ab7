"""The epsilon rule of a linear map in plain PyTorch, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(z: Tensor, epsilon: float, row_epsilon: Tensor | None) -> Tensor:
    """``|z| / (|z| + epsilon)``, in float32 at least; 0 where both are 0."""
    magnitude = _wide(z.abs())
    least = torch.finfo(magnitude.dtype).tiny
    floor = max(epsilon, least) if row_epsilon is None else row_epsilon.clamp_min(least)
    return magnitude / (magnitude + floor)


def row_deviation(z: Tensor) -> Tensor:
    """The standard deviation of each row, ``[..., 1]``, in float32 at least."""
    wide = _wide(z)
    length = torch.linalg.vector_norm(wide - wide.mean(-1, keepdim=True), dim=-1, keepdim=True)
    deviation: Tensor = (length * length / z.shape[-1]).sqrt()
    return deviation


def relevance(
    g: Tensor, z: Tensor, weight: Tensor, epsilon: float, row_epsilon: Tensor | None, x: Tensor | None
) -> Tensor:
    """``(factor(z) * g) W``, times x if there is one."""
    passed = g if epsilon == 0 and row_epsilon is None else damped(g, z, epsilon, row_epsilon)
    coefficient = torch.matmul(passed, weight)
    return coefficient if x is None else coefficient * x


def damped(g: Tensor, z: Tensor, epsilon: float, row_epsilon: Tensor | None) -> Tensor:
    """``factor(z) * g`` in the dtype of g."""
    return (g * factor(z, epsilon, row_epsilon)).to(g.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
