"""Which kernels were measured to be faster than what they replace, by device: those that ``auto`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

#: Device name -> kernel -> whether it is faster. Empty: nothing was measured on a GPU yet.
MEASURED: Final[Mapping[str, Mapping[str, bool]]] = MappingProxyType({})


def faster(kernel: str, device: str) -> bool | None:
    """Whether a kernel is faster on a device; None where that was not measured."""
    return MEASURED.get(device, {}).get(kernel)
