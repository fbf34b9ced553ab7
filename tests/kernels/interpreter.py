"""Triton's interpreter holds bfloat16 as integers and is wrong about it in four places: set right here.

Casts from float32 cut digits off where devices round to nearest even, casts to float32 lose subnormals, and
dot products and absolute values are those of the integers. Needed where kernels multiply or round in
bfloat16; the rest is as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """The interpreter, right about bfloat16; nothing to do where kernels run on a device."""
    tl = __import__("triton.language", fromlist=["language"])
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, fabs = builder.cast_impl, builder.create_dot, builder.create_fabs

    def is_bfloat16(x: Any) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def wide(x: Any) -> Any:
        return handle(_widened(x.data), tl.float32) if is_bfloat16(x) else x

    def cast_impl(self: Any, src: Any, kind: Any) -> Any:
        if src.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return handle(_rounded(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32:
            return wide(src)
        return cast(self, src, kind)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, wide(a), wide(b), *others)

    def create_fabs(self: Any, x: Any) -> Any:
        return handle(x.data & np.uint16(0x7FFF), tl.bfloat16) if is_bfloat16(x) else fabs(self, x)

    right = {"cast_impl": cast_impl, "create_dot": create_dot, "create_fabs": create_fabs}
    with mock.patch.multiple(builder, **right):
        yield
