"""What kernels of matrix products share: the choice of tiles, the order of programs, sums of parts.

A product of few rows has fewer tiles than the device has multiprocessors. Its reduction is then split into
parts of float32, which a second kernel adds in order: no atomic additions, whose order would differ from run
to run. They cost two passes over ``parts x rows x columns`` floats, which stay in the device's cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Multiprocessors of an H200, one program each of those with large tiles.
PROCESSORS = 132
#: Least steps over the reduction in one part of it, so that the loop's pipeline fills.
_STEPS = 4
#: Most parts of a reduction: each is a pass over the output in float32.
PARTS = 16
#: Rows where nothing is known of them.
_UNKNOWN = 4096
#: Shared memory of a program, in KiB, taken where a device does not say its own: that of sm_90 and sm_100.
_SHARED = 227


@dataclass(frozen=True)
class Tiles:
    """What one program computes: ``rows x columns`` of the output, ``depth`` of the reduction in a step.

    Attributes:
        swap: whether the transposed product is computed, weights first.
        shared: KiB of shared memory that it may take on NVIDIA's GPUs; all have 99 for a program.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    shared: int = 99

    def __str__(self) -> str:
        order = ", swapped" if self.swap else ""
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages{order}"


@dataclass(frozen=True)
class Table:
    """The tiles that launches choose from.

    Attributes:
        few: for as few rows as they have, fewest first: reading the weights is the cost, so that one tile
            takes all rows, and the reduction is split until reads of enough programs are under way.
        many: for more, largest first: the first that fills the device, or the last with a split reduction.
        tuned: not chosen; alternatives to measure.
        is_default: whether ops launch these at all.
    """

    few: tuple[Tiles, ...]
    many: tuple[Tiles, ...] = ()
    tuned: tuple[Tiles, ...] = ()
    is_default: bool = True

    def choose(self, rows: int, columns: int, depth: int, shared: int) -> tuple[Tiles, int]:
        """Tiles for a product, and parts of its reduction.

        Args:
            rows: of the output; a hint where it is a symbol.
            columns: of the output.
            depth: length of the reduction.
            shared: KiB of shared memory that a program may take.
        """
        for tiles in self.few:
            if rows <= tiles.rows:
                return tiles, _parts(tiles, rows, columns, depth, 2 * PROCESSORS)
        for tiles in self.many:
            if tiles.shared <= shared and _programs(tiles, rows, columns) >= PROCESSORS:
                return tiles, 1
        tiles = (self.many or self.few)[-1]
        return tiles, _parts(tiles, rows, columns, depth, PROCESSORS)

    def launched(self) -> Iterator[tuple[Tiles, bool]]:
        """Every tile, and whether launches choose it."""
        yield from ((tiles, self.is_default) for tiles in (*self.few, *self.many))
        yield from ((tiles, False) for tiles in self.tuned)


def _programs(tiles: Tiles, rows: int, columns: int) -> int:
    return -(-rows // tiles.rows) * -(-columns // tiles.columns)


def _parts(tiles: Tiles, rows: int, columns: int, depth: int, wanted: int) -> int:
    fill = wanted // max(1, _programs(tiles, rows, columns))
    return max(1, min(fill, -(-depth // tiles.depth) // _STEPS, PARTS))


def as_rows(x: Tensor, *lead: Any) -> Tensor:
    """``[*lead, ..., columns]`` as ``[*lead, rows, columns]``; a copy only where no view does it."""
    return x.reshape(*lead, math.prod(x.shape[len(lead) : -1]), x.shape[-1])


def hint(shape: Sequence[int]) -> int:
    """How many elements a shape has, by the example at hand where sizes are symbols: no condition on them."""
    return math.prod(_hint(size) for size in shape)


def _hint(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    shapes, expression = size.node.shape_env, size.node.expr
    if hasattr(shapes, "optimization_hint"):
        return int(shapes.optimization_hint(expression, fallback=_UNKNOWN))
    known = shapes.size_hint(expression, allow_none=True)  # torch's older name of it
    return _UNKNOWN if known is None else int(known)


def shared_memory(device: torch.device) -> int:
    """Shared memory that a program may take on a device, in KiB. AMD's pipeline takes less of it for the same
    tiles, all of which fit there.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return _SHARED
    return _device_shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_shared_memory(index: int) -> int:
    size: int = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin")  # noqa: B009
    return size // 1024
