"""What the kernels over rows share: wider dtypes, tensors as rows, and sizes as far as they are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def wide(x: Tensor) -> Tensor:
    """A tensor in float32 where it is in half precision: what sums and functions are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def as_rows(x: Tensor, columns: Any) -> Tensor:
    """``[..., columns]`` as ``[rows, columns]`` with columns side by side; a copy only where no view does."""
    x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x if x.stride(-1) == 1 else x.contiguous()


def with_k(x: Tensor, dims: int) -> Tensor:
    """``[*shape]`` or ``[K, *shape]`` as ``[K, *shape]``, where shape has ``dims`` dimensions."""
    return x if x.dim() == dims + 1 else x.unsqueeze(0)


def as_k_rows(x: Tensor, dims: int) -> Tensor:
    """``[*shape]`` or ``[K, *shape]`` as ``[K, rows, columns]`` with columns side by side."""
    x = with_k(x, dims)
    x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def alike(shape: Sequence[Any], *others: Sequence[Any]) -> bool:
    """Whether shapes are known to be equal. Adds no guard: symbols that may differ make them unlike."""
    return all(
        len(o) == len(shape) and all(statically_known_true(m == n) for m, n in zip(o, shape, strict=True))
        for o in others
    )


def fits(coefficient: Sequence[Any], shape: Sequence[Any]) -> bool:
    """Whether a coefficient's shape is known to be ``[*shape]`` or ``[K, *shape]``."""
    more = len(coefficient) - len(shape)
    return more in (0, 1) and alike(shape, coefficient[more:])


def known(size: Any) -> int | None:
    """A size as a number where nothing can change it; None for a symbol. Adds no guard."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else None
    return int(size)


def likely(size: Any, otherwise: int) -> int:
    """A size as a number to choose a tile by: of a symbol, what it was traced with. Adds no guard."""
    found = known(size)
    if found is None:
        hint = getattr(size.node, "_hint", None)
        found = otherwise if hint is None else int(hint)
    return found


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time.

    Attributes:
        rows: of the tile, a power of 2.
        columns: of the tile, a power of 2.
        warps: of 32 threads.
        loops: whether the program goes on to further tiles of the same rows.
    """

    rows: int
    columns: int
    warps: int
    loops: bool = False

    def __str__(self) -> str:
        loop = ", looped" if self.loops else ""
        return f"{self.rows} x {self.columns}, {self.warps} warps{loop}"


@dataclass(frozen=True)
class Tiles:
    """Tiles for rows of any length: one tile for a whole row up to a width, beyond it several.

    Sizes are bytes of one tensor. A thread has two or more loads of 16 bytes under way, enough to hide the
    latency of memory, and few enough for two programs or more on a multiprocessor, so that one computes
    while another waits.

    Attributes:
        widest: of the widest row that is one tile.
        per_thread: what a thread holds of a tile that is wide enough.
        looped: the widest tile of a row that has several.
        smallest: what a tile of narrow rows has at least.
    """

    widest: int
    per_thread: int
    looped: int
    smallest: int = 4096

    def of(self, columns: Any, itemsize: int) -> Tile:
        """The tile for rows of so many columns; a symbol gets one that is right for any number of them."""
        width = max(_NARROWEST, 1 << (likely(columns, 1024) - 1).bit_length())
        if known(columns) is None or width * itemsize > self.widest:
            return self._looped(min(width, self.looped // itemsize), itemsize)
        return self._one(width, itemsize)

    def all(self, itemsize: int) -> list[Tile]:
        """Every tile that :meth:`of` can choose."""
        widths = [1 << i for i in range(_NARROWEST.bit_length() - 1, (self.widest // itemsize).bit_length())]
        looped = [self._looped(w, itemsize) for w in widths if w * itemsize <= self.looped]
        return [*(self._one(w, itemsize) for w in widths), *looped]

    def _one(self, width: int, itemsize: int) -> Tile:
        elements = max(width, self.smallest // itemsize)
        warps = elements * itemsize // (32 * self.per_thread)
        return Tile(elements // width, width, min(16, max(4, warps)))

    def _looped(self, width: int, itemsize: int) -> Tile:
        # Of the widest, few programs at a time: what they read again is then still in the L2 cache.
        warps = 16 if width * itemsize == self.looped else 8
        return replace(self._one(width, itemsize), warps=warps, loops=True)


#: Columns of the narrowest tile.
_NARROWEST = 32
