"""Linear maps in float32 on a CPU by oneDNN, where PyTorch itself calls MKL.

``z = x W^T + b``, or ``z = x W + b`` where W is given transposed, as it is on the way back. Shapes:
x [..., in], W [out, in] (transposed: [in, out]), b [out], z [..., out].

MKL has its fastest code for one maker's processors. On others oneDNN, which PyTorch has too but takes in
float32 only for convolutions, is ahead: :mod:`fxlrp.kernels.measured` says on which that was measured.
Sums are in float32, one by one where MKL adds up parts: on sums of 520 to 2,048 terms the error is 1.7 to 2.3
times MKL's in the mean (of squares), which explanations of whole models cannot be told apart by. The user's
choice of precision (``torch.set_float32_matmul_precision``) holds for both.

One call costs 16 microseconds more to set up than MKL's. So small weights stay with PyTorch, and so do
single rows times a transposed weight, which oneDNN reads against the order of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

#: Elements of a weight from which on it was measured to be faster for any number of rows.
LEAST_WEIGHT = 2**18

_LIBRARY = torch.library.Library("fxlrp", "FRAGMENT")
_LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")
_LIBRARY.impl("onednn_linear", reference.linear, "CompositeExplicitAutograd")


def can_run(weight: Tensor) -> tuple[bool, str]:
    """Whether oneDNN takes maps by this weight and is worth its setup, and why not."""
    if not torch.backends.mkldnn.is_available():
        return False, "this build of PyTorch has no oneDNN"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False, "it is for float32 on a CPU"
    if weight.dim() != 2 or weight.numel() < LEAST_WEIGHT:
        return False, f"it is for matrices of {LEAST_WEIGHT} elements and more"
    return True, ""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows < 1 + transposed or x.dtype != weight.dtype or not _is_dense(weight):
        return reference.linear(x, weight, bias, transposed)
    given = weight.t() if transposed else weight
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, given, bias, "none", [], "")
    return found


def _is_dense(matrix: Tensor) -> bool:
    """Whether a matrix has no gaps, in either order."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


if torch.backends.mkldnn.is_available():
    _LIBRARY.impl("onednn_linear", _linear, "CPU")


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


torch.library.register_fake("fxlrp::onednn_linear", _fake_linear)
