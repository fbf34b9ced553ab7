"""What the kernels over rows share: wider dtypes, tensors as rows, and sizes as far as they are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """A tensor in float32 where it is in half precision: what sums and functions are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def as_rows(x: Tensor, columns: Any) -> Tensor:
    """``[..., columns]`` as ``[rows, columns]`` with columns side by side; a copy only where no view does it."""
    x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x if x.stride(-1) == 1 else x.contiguous()


def with_k(x: Tensor, dims: int) -> Tensor:
    """``[*shape]`` or ``[K, *shape]`` as ``[K, *shape]``, where shape has ``dims`` dimensions."""
    return x if x.dim() == dims + 1 else x.unsqueeze(0)


def as_k_rows(x: Tensor, dims: int) -> Tensor:
    """``[*shape]`` or ``[K, *shape]`` as ``[K, rows, columns]`` with columns side by side."""
    x = with_k(x, dims)
    x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def known(size: Any) -> int | None:
    """A size as a number where nothing can change it; None for a symbol. Adds no guard."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else None
    return int(size)


def likely(size: Any, otherwise: int) -> int:
    """A size as a number to choose a tile by: of a symbol, what it was traced with. Adds no guard."""
    found = known(size)
    if found is None:
        hint = getattr(size.node, "_hint", None)
        found = otherwise if hint is None else int(hint)
    return found
