"""What kernels of matrix products share: the choice of tiles, the order of programs, sums of parts.

A product of few rows has fewer tiles than the device has multiprocessors. Its reduction is then split into
parts of float32, which a second kernel adds in order: no atomic additions, whose order would differ from run to
run. They cost two passes over ``parts x rows x columns`` floats, which stay in the cache of the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Programs that fill a device: one for each multiprocessor of an H200.
PROGRAMS = 132
#: Least steps over the reduction in one part of it, so that the loop's pipeline fills.
_STEPS = 4
#: Most parts of a reduction: each is a pass over the output in float32.
PARTS = 16
#: Shared memory of a program, in KiB, taken where no device says its own: that of sm_90 and sm_100.
_SHARED = 227


@dataclass(frozen=True)
class Tiles:
    """What one program computes: ``rows x columns`` of the output, ``depth`` of the reduction in a step.

    Attributes:
        shared: the most shared memory that it takes on any target, in KiB.
        swap: whether the transposed product is computed, weights first.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    shared: int
    swap: bool = False

    def __str__(self) -> str:
        order = ", swapped" if self.swap else ""
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages{order}"


def choose(table: Sequence[Tiles], rows: int, columns: int, depth: int, shared: int) -> tuple[Tiles, int]:
    """Tiles for a product, and into how many parts its reduction is split.

    The first of the table that fits into shared memory, has no more than twice the rows that there are, and
    fills the device; else the last that fits, its reduction split until the device is full.

    Args:
        table: largest tiles first.
        rows: of the output, a hint.
        columns: of the output.
        depth: length of the reduction.
        shared: shared memory that a program may take, in KiB.
    """
    fitting = [t for t in table if t.shared <= shared] or [min(table, key=lambda t: t.shared)]
    fitting = [t for t in fitting if t.rows < 2 * rows] or [min(fitting, key=lambda t: t.rows)]
    for tiles in fitting:
        if _programs(tiles, rows, columns) >= PROGRAMS:
            return tiles, 1
    tiles = fitting[0] if rows <= fitting[0].rows else fitting[-1]
    wanted = -(-PROGRAMS // max(1, _programs(tiles, rows, columns)))
    allowed = max(1, -(-depth // tiles.depth) // _STEPS)
    return tiles, min(wanted, allowed, PARTS)


def _programs(tiles: Tiles, rows: int, columns: int) -> int:
    return -(-rows // tiles.rows) * -(-columns // tiles.columns)


def hint(shape: Sequence[int]) -> int:
    """How many elements a shape has, by the example at hand where sizes are symbols: no condition on them."""
    return math.prod(_hint(size) for size in shape)


def _hint(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.shape_env.size_hint(size.node.expr, allow_none=True)
    return PROGRAMS * 32 if known is None else int(known)


def shared_memory(device: torch.device) -> int:
    """Shared memory that a program may take on a device, in KiB."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _SHARED
    return _device_shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_shared_memory(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    size: int = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return size // 1024
