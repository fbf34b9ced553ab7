"""Tile sizes by kernel, kind of device, width of the elements and head size: static facts, no tuning at run time.

The tables are made for no spilled registers and shared memory within the device's; unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..launch import is_interpreted


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut.

    Attributes:
        queries: rows of a tile.
        keys: columns of a tile.
        warps: of a program.
        stages: how deep loads are pipelined.
        targets: the most coefficients that share their probabilities.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    targets: int = 1


#: What tables are looked up by: a kind of device and the bytes of an element.
Kind = tuple[str, int]
#: Largest padded head size -> tiles, for one kernel.
Table = dict[int, Tiles]

KERNELS = ("forward", "of_queries", "of_keys", "frozen")
#: Where each kind of device is compiled for.
TARGETS: dict[str, tuple[str, ...]] = {
    "ampere": ("sm_80",),
    "hopper": ("sm_90", "sm_100"),
    "cdna": ("gfx942",),
}

TABLES: dict[tuple[str, str, int], Table] = {
    ("forward", "ampere", 2): {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    ("forward", "hopper", 2): {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
    ("forward", "cdna", 2): {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 32, 4, 2), 256: Tiles(64, 32, 4, 1)},
    ("of_queries", "ampere", 2): {
        64: Tiles(64, 64, 8, 2, 4),
        128: Tiles(64, 64, 8, 2, 2),
        256: Tiles(64, 32, 8, 1, 1),
    },
    ("of_queries", "hopper", 2): {
        64: Tiles(64, 64, 4, 3, 4),
        128: Tiles(64, 64, 8, 2, 4),
        256: Tiles(64, 64, 8, 2, 1),
    },
    ("of_queries", "cdna", 2): {
        64: Tiles(64, 32, 4, 1, 4),
        128: Tiles(64, 32, 4, 1, 1),
        256: Tiles(32, 32, 4, 1, 1),
    },
    ("of_keys", "ampere", 2): {
        64: Tiles(64, 64, 8, 2, 2),
        128: Tiles(32, 64, 8, 2, 1),
        256: Tiles(32, 64, 8, 1, 1),
    },
    ("of_keys", "hopper", 2): {
        64: Tiles(64, 64, 4, 3, 4),
        128: Tiles(64, 64, 8, 2, 2),
        256: Tiles(32, 64, 8, 2, 1),
    },
    ("of_keys", "cdna", 2): {
        64: Tiles(32, 64, 4, 1, 2),
        128: Tiles(32, 64, 4, 1, 1),
        256: Tiles(16, 32, 4, 1, 1),
    },
    ("frozen", "ampere", 2): {
        64: Tiles(64, 64, 4, 2, 4),
        128: Tiles(64, 64, 8, 2, 2),
        256: Tiles(32, 64, 8, 2, 1),
    },
    ("frozen", "hopper", 2): {
        64: Tiles(64, 128, 8, 3, 4),
        128: Tiles(64, 128, 8, 3, 2),
        256: Tiles(32, 64, 8, 2, 2),
    },
    ("frozen", "cdna", 2): {
        64: Tiles(32, 64, 4, 1, 4),
        128: Tiles(32, 64, 4, 1, 2),
        256: Tiles(16, 32, 4, 1, 1),
    },
    ("forward", "ampere", 4): {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    ("forward", "hopper", 4): {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)},
    ("forward", "cdna", 4): {64: Tiles(64, 32, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 16, 4, 1)},
    ("of_queries", "ampere", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(32, 32, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
    ("of_queries", "hopper", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(32, 32, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
    ("of_queries", "cdna", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(16, 16, 4, 1, 1),
        256: Tiles(16, 16, 4, 1, 1),
    },
    ("of_keys", "ampere", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(32, 32, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
    ("of_keys", "hopper", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(32, 32, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
    ("of_keys", "cdna", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(16, 16, 4, 1, 1),
        256: Tiles(16, 16, 4, 1, 1),
    },
    ("frozen", "ampere", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(32, 32, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
    ("frozen", "hopper", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(32, 32, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
    ("frozen", "cdna", 4): {
        64: Tiles(32, 32, 4, 1, 1),
        128: Tiles(16, 16, 4, 1, 1),
        256: Tiles(16, 16, 4, 1, 1),
    },
}

#: For the pass before relevance; its keys mean nothing.
PREPARED = Tiles(32, 1, 4, 1)
#: Small, so that small shapes have several.
INTERPRETED = Tiles(16, 16, 4, 1, 2)


def padded(size: int) -> int:
    """The head size of a tile: a power of two, at least 16, which matrix products need."""
    return max(16, 1 << (size - 1).bit_length())


def kind_of(device: torch.device) -> str:
    """Which tables a device takes."""
    if is_interpreted() and device.type != "cuda":
        return "interpreted"
    if torch.version.hip is not None:
        return "cdna"
    return "hopper" if torch.cuda.get_device_capability(device) >= (9, 0) else "ampere"


def choose(kernel: str, kind: str, dtype: torch.dtype, head_size: int) -> Tiles:
    """The tiles of a kernel for a head size, the larger of q's and v's."""
    if kind == "interpreted":
        return INTERPRETED
    table = TABLES[kernel, kind, dtype.itemsize]
    return next(tiles for size, tiles in table.items() if head_size <= size)


def rows() -> Iterator[tuple[str, str, int, int, Tiles]]:
    """Every row: kernel, kind of device, bytes of an element, largest head size, tiles."""
    for (kernel, kind, width), table in TABLES.items():
        for size, tiles in table.items():
            yield kernel, kind, width, size, tiles
