"""Which kernels were measured to be faster than what they replace, by device: those that ``auto`` takes."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

#: Name of a GPU or a :func:`processor` -> kernel -> whether it is faster. Nothing was measured on a GPU yet.
MEASURED: Final[Mapping[str, Mapping[str, bool]]] = MappingProxyType(
    {"AMD AVX512": MappingProxyType({"onednn": True})}
)


def faster(kernel: str, device: str) -> bool | None:
    """Whether a kernel is faster on a device; None where that was not measured."""
    return MEASURED.get(device, {}).get(kernel)


@functools.cache
def processor() -> str:
    """Who made this processor and what vector instructions PyTorch uses on it: ``"AMD AVX512"``."""
    makers = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:  # other systems than Linux
        told = platform.processor() or os.environ.get("PROCESSOR_IDENTIFIER", "")
    maker = next((name for word, name in makers.items() if word in told), platform.machine())
    return f"{maker} {torch.backends.cpu.get_cpu_capability()}"
