"""Tile sizes by kernel, kind of device, width of elements and head size: static facts, no tuning at run time.

The tables are made for no spilled registers and shared memory within the device's; unmeasured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Row:
    """The tiles of a kernel for heads up to some size.

    Attributes:
        one: for one coefficient.
        laden: with a window, a soft cap, a stabiliser of scores or a mask that differs between queries.
        many: for several coefficients; those of one where there are no registers for more.
    """

    one: Tiles
    laden: Tiles
    many: Tiles | None = None


#: Largest padded head size -> tiles, for one kernel.
Table = dict[int, Row]

#: Where each kind of device is compiled for.
TARGETS: dict[str, tuple[str, ...]] = {
    "ampere": ("sm_80",),
    "hopper": ("sm_90",),
    "blackwell": ("sm_100",),
    "cdna": ("gfx942",),
}
KERNELS = ("forward", "of_queries", "of_keys", "frozen")
#: Up to this head size one kernel computes both keys' and values' coefficients; above, one each.
TOGETHER = 128

#: By kernel, kind of device and bytes of an element.
TABLES: dict[tuple[str, str, int], Table] = {
    ("forward", "ampere", 2): {
        64: Row(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
        128: Row(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2)),
        256: Row(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
    },
    ("of_queries", "ampere", 2): {
        64: Row(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2, 2)),
        128: Row(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2, 2)),
        256: Row(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1)),
    },
    ("of_keys", "ampere", 2): {
        64: Row(Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2)),
        128: Row(Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2)),
        256: Row(Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)),
    },
    ("frozen", "ampere", 2): {
        64: Row(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2, 2)),
        128: Row(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2, 2)),
        256: Row(Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2)),
    },
    ("forward", "ampere", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_queries", "ampere", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_keys", "ampere", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("frozen", "ampere", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("forward", "hopper", 2): {
        64: Row(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3)),
        128: Row(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
        256: Row(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2)),
    },
    ("of_queries", "hopper", 2): {
        64: Row(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2, 4)),
        128: Row(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2, 2)),
        256: Row(Tiles(128, 32, 8, 1), Tiles(128, 32, 8, 1)),
    },
    ("of_keys", "hopper", 2): {
        64: Row(Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 128, 8, 2, 2)),
        128: Row(Tiles(32, 128, 8, 2), Tiles(32, 128, 8, 1)),
        256: Row(Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 1)),
    },
    ("frozen", "hopper", 2): {
        64: Row(Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2, 2)),
        128: Row(Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 128, 8, 2, 2)),
        256: Row(Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2)),
    },
    ("forward", "hopper", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_queries", "hopper", 4): {
        64: Row(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
    },
    ("of_keys", "hopper", 4): {
        64: Row(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("frozen", "hopper", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("forward", "blackwell", 2): {
        64: Row(Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1)),
        128: Row(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
        256: Row(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1)),
    },
    ("of_queries", "blackwell", 2): {
        64: Row(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2, 4)),
        128: Row(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2, 2)),
        256: Row(Tiles(128, 32, 8, 1), Tiles(64, 32, 8, 2)),
    },
    ("of_keys", "blackwell", 2): {
        64: Row(Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 128, 8, 2, 2)),
        128: Row(Tiles(32, 128, 8, 1), Tiles(32, 128, 8, 1)),
        256: Row(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
    },
    ("frozen", "blackwell", 2): {
        64: Row(Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 1)),
        128: Row(Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2)),
        256: Row(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1)),
    },
    ("forward", "blackwell", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_queries", "blackwell", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
    },
    ("of_keys", "blackwell", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("frozen", "blackwell", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("forward", "cdna", 2): {
        64: Row(Tiles(128, 64, 8, 1), Tiles(128, 64, 8, 1)),
        128: Row(Tiles(128, 32, 8, 1), Tiles(64, 32, 8, 1)),
        256: Row(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    ("of_queries", "cdna", 2): {
        64: Row(Tiles(64, 64, 8, 1), Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1, 4)),
        128: Row(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1)),
        256: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_keys", "cdna", 2): {
        64: Row(Tiles(64, 64, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1, 2)),
        128: Row(Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)),
        256: Row(Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1)),
    },
    ("frozen", "cdna", 2): {
        64: Row(Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 8, 1, 4)),
        128: Row(Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 1), Tiles(32, 64, 8, 1, 2)),
        256: Row(Tiles(32, 64, 8, 1), Tiles(16, 64, 8, 1)),
    },
    ("forward", "cdna", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_queries", "cdna", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("of_keys", "cdna", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    ("frozen", "cdna", 4): {
        64: Row(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
        128: Row(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
}

#: For the pass before relevance; its keys mean nothing.
PREPARED = Tiles(16, 1, 4, 1)
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
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x has as little shared memory for a program as 8.6 and 8.9, and no wgmma.
    return {9: "hopper", 10: "blackwell"}.get(major, "ampere")


def choose(
    kernel: str, kind: str, dtype: torch.dtype, head_size: int, targets: int | None, laden: bool
) -> Tiles:
    """The tiles of a kernel for a head size, the larger of q's and v's, and a number of coefficients.

    Targets of None are many. No tile has places for twice the targets that there are.
    """
    if kind == "interpreted":
        chosen = INTERPRETED
    else:
        row = next(row for size, row in TABLES[kernel, kind, dtype.itemsize].items() if head_size <= size)
        chosen = row.laden if laden else row.one if targets == 1 or row.many is None else row.many
    if targets is None:
        return chosen
    return replace(chosen, targets=min(chosen.targets, 1 << max(targets - 1, 0).bit_length()))
