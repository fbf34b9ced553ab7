"""What the op computes, by PyTorch's own linear map."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear as _linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``x W^T + b``, or ``x W + b`` of a transposed weight, contiguous."""
    return _linear(x, weight.t() if transposed else weight, bias).contiguous()
