"""Where Triton kernels run, how they are launched, and what is compiled of them ahead of time."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

#: What kernels read and write; sums are in float32.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled for one choice of dtypes and constants; what the ahead-of-time tests build.

    Attributes:
        label: how tables call it, such as ``"softmax relevance, bf16, 1024 columns"``.
        kernel: the ``triton.jit`` function.
        signature: Triton's type of each parameter that is not a constant: ``{"x": "*bf16", "rows": "i64"}``.
        constants: values of the ``tl.constexpr`` parameters.
        num_warps: warps of 32 threads for each program.
        num_stages: how deep loads are pipelined.
        is_default: whether a launch chooses it without tuning; such a one must not spill registers.
        targets: what launches choose it for, and tests compile it for.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    is_default: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``, read when Triton is imported)."""
    return has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device, *dtypes: torch.dtype) -> str:
    """Why no kernel runs on tensors of such a device and dtypes; empty where kernels run."""
    if not has_triton():
        return "Triton is not installed"
    if device.type != "cuda" and not is_interpreted():
        return f"Triton has no {device.type} backend (TRITON_INTERPRET=1 interprets kernels on a CPU)"
    odd = [str(d).removeprefix("torch.") for d in dtypes if d not in DTYPES]
    if odd:
        return f"kernels take float32, bfloat16 and float16, not {', '.join(odd)}"
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"kernels are for compute capability 8.0 or more, this device has {major}.{minor}"
    return ""


def runs_triton(*tensors: Tensor) -> bool:
    """Whether an op launches its kernel for these tensors, or computes the reference.

    On a GPU it launches, also while the op is traced. On a CPU only the interpreter launches, on real
    tensors: what is traced there is the reference, which Inductor fuses.
    """
    if tensors[0].is_cuda:
        return True
    return is_interpreted() and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def launch(kernel: Any) -> Any:
    """A kernel to be called as ``launch(kernel)[grid](*args)``: visible to Inductor where it is compiled."""
    return kernel if is_interpreted() else wrap_triton(kernel)
