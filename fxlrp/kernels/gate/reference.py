"""Activations, gates and their relevance in PyTorch's ops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rows import wide


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _gelu_ratio(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh_ratio(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _quick_gelu_ratio(x: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * x)


def _mish_ratio(x: Tensor) -> Tensor:
    return torch.tanh(F.softplus(x))


def _hardswish_ratio(x: Tensor) -> Tensor:
    return F.relu6(x + 3.0) / 6.0


def _softsign_ratio(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + x.abs())


#: f(x) and f(x)/x by the activation's name.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, _step),
    "silu": (F.silu, torch.sigmoid),
    "gelu": (F.gelu, _gelu_ratio),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_ratio),
    "quick_gelu": (_quick_gelu, _quick_gelu_ratio),
    "mish": (F.mish, _mish_ratio),
    "hardswish": (F.hardswish, _hardswish_ratio),
    "softsign": (F.softsign, _softsign_ratio),
}


def activation(x: Tensor, name: str) -> Tensor:
    """f(x); see :func:`fxlrp.kernels.gate.activation`."""
    return ACTIVATIONS[name][0](wide(x)).to(x.dtype).contiguous()


def activation_relevance(coefficient: Tensor, x: Tensor, name: str) -> Tensor:
    """``G f(x)/x``; see :func:`fxlrp.kernels.gate.activation_relevance`."""
    return (wide(coefficient) * ACTIVATIONS[name][1](wide(x))).to(coefficient.dtype).contiguous()


def gate(a: Tensor, b: Tensor, name: str) -> Tensor:
    """``f(a) b``; see :func:`fxlrp.kernels.gate.gate`."""
    return (ACTIVATIONS[name][0](wide(a)) * wide(b)).to(b.dtype).contiguous()


def gate_relevance(
    coefficient: Tensor, a: Tensor, b: Tensor, name: str, share_a: float, share_b: float
) -> tuple[Tensor, Tensor]:
    """Coefficients of a and b; see :func:`fxlrp.kernels.gate.gate_relevance`."""
    value, ratio = ACTIVATIONS[name]
    g, x = wide(coefficient), wide(a)
    found = share_a * g * (ratio(x) * wide(b)), share_b * g * value(x)
    of_a, of_b = (f.to(coefficient.dtype).contiguous() for f in found)
    return of_a, of_b


def halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """a and b of ``[a, b]``, or of ``[b, a]``."""
    first, second = packed.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def packed_gate_relevance(
    coefficient: Tensor, packed: Tensor, name: str, gate_first: bool, share_a: float, share_b: float
) -> Tensor:
    """The coefficient of both halves; see :func:`fxlrp.kernels.gate.packed_gate_relevance`."""
    a, b = halves(packed, gate_first)
    of_a, of_b = gate_relevance(coefficient, a, b, name, share_a, share_b)
    if share_a == 0:
        of_a = torch.zeros_like(of_a)
    return torch.cat((of_a, of_b) if gate_first else (of_b, of_a), -1)
