"""Linear maps in float32 on a CPU by oneDNN, where PyTorch itself calls MKL.

``z = x W^T + b``, or ``z = x W + b`` where W is given transposed, as it is on the way back. Shapes:
x [..., in], W [out, in] (transposed: [in, out]), b [out], z [..., out].

MKL has its fastest code for one maker's processors. On others oneDNN, which PyTorch has too but takes in
float32 only for convolutions, is ahead: :mod:`fxlrp.kernels.measured` says on which that was measured.

**Rounding.** Sums are in float32, in another order. The error is 1.7 to 2.3 times MKL's in the mean (of
squares) for 520 to 2,048 terms of mixed sign, 3 to 4.5 times for terms of one sign, as products of rules by
sign have. Explanations of whole models cannot be told apart by it. The user's choice of precision
(``torch.set_float32_matmul_precision``) holds for both.

**Sizes.** A call costs 16 microseconds more to set up than MKL's, so that small weights and few rows stay
with PyTorch. For each new shape oneDNN makes code that it keeps (0.3 MB), so rows are filled up with zeros to
one of 16 numbers of rows between a power of 2 and the next: texts of many lengths share code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import reference

#: Elements and shorter side of a weight, and rows, from which on it was measured to be faster.
LEAST_WEIGHT, LEAST_SIDE, LEAST_ROWS = 2**18, 256, 64
#: Classes of weights that are nothing but numbers.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)

_LIBRARY = torch.library.Library("fxlrp", "FRAGMENT")
_LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")


def can_run(weight: Tensor) -> tuple[bool, str]:
    """Whether oneDNN takes maps by this weight and is worth its setup, and why not."""
    if not torch.backends.mkldnn.is_available():
        return False, "this build of PyTorch has no oneDNN"
    if type(weight) not in _PLAIN or weight.layout != torch.strided:
        return False, "the weight is no plain tensor"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False, "it is for float32 on a CPU"
    if weight.dim() != 2 or not all(isinstance(size, int) for size in weight.shape):
        return False, "the weight is no matrix of a known size"
    if weight.numel() < LEAST_WEIGHT or min(weight.shape) < LEAST_SIDE:
        return False, f"it is for matrices of {LEAST_WEIGHT} elements and {LEAST_SIDE} rows and columns"
    return True, ""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    rows = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    given = weight.t() if transposed else weight
    fits = x.dtype == weight.dtype and _is_dense(weight) and _is_row(bias, given)
    if rows < LEAST_ROWS or not fits or not torch.backends.mkldnn.enabled:
        return reference.linear(x, weight, bias, transposed)
    step = 1 << max(0, rows.bit_length() - 5)
    filled = rows + -rows % step
    operand = x
    if filled > rows:
        operand = x.new_empty((filled, x.shape[-1]))
        operand[:rows].view(x.shape).copy_(x)
        operand[rows:].zero_()
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(operand, given, bias, "none", [], "")
    return found if filled == rows else found[:rows].view(*x.shape[:-1], given.shape[0])


def _is_dense(matrix: Tensor) -> bool:
    """Whether a matrix has no gaps, in either order."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _is_row(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether a bias is as oneDNN reads it, which looks neither at its strides nor broadcasts it."""
    if bias is None:
        return True
    return bias.shape == weight.shape[:1] and bias.is_contiguous() and bias.dtype == weight.dtype


def _differentiable(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """oneDNN's result has no derivative: where one is taken, in either direction, PyTorch has the map."""
    reads = (x, weight, bias)
    is_taped = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in reads)
    if is_taped or forward_ad._current_level >= 0:
        return reference.linear(x, weight, bias, transposed)
    with torch._C._AutoDispatchBelowAutograd():
        found: Tensor = torch.ops.fxlrp.onednn_linear.default._op(x, weight, bias, transposed)
    return found


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Multiplications and additions of a map, for PyTorch's counter; it gives shapes."""
    return int(2 * math.prod(x[:-1]) * math.prod(weight))


_LIBRARY.impl("onednn_linear", reference.linear, "CompositeExplicitAutograd")
if torch.backends.mkldnn.is_available():
    _LIBRARY.impl("onednn_linear", _linear, "CPU")
    _LIBRARY.impl("onednn_linear", _differentiable, "AutogradCPU")
torch.library.register_fake("fxlrp::onednn_linear", _fake_linear)
register_flop_formula(torch.ops.fxlrp.onednn_linear)(_flops)
