"""Several targets in as many passes as memory allows, and what to do where not even one fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compiler.budget import Memory
from .errors import is_out_of_memory


def in_chunks(run: Callable[[int, int], Any], count: int, chunk: int | None) -> Any:
    """``run(start, stop)`` for all ``count`` targets, joined at the second dimension.

    ``chunk`` targets at a time, all where it is None; where memory runs out half as many, down to one.

    Raises:
        torch.OutOfMemoryError, RuntimeError: one target alone does not fit.
    """
    size = count if chunk is None else min(chunk, count)
    start, parts = 0, []
    while start < count:
        stop = min(start + size, count)
        try:
            parts.append(run(start, stop))
            start = stop
        except RuntimeError as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start + 1) // 2
            # Out of the handler before the next try: until then the error keeps the failed run's tensors.
    return parts[0] if len(parts) == 1 else _joined(parts)


@contextlib.contextmanager
def advised(memory: Callable[[], Memory | None]) -> Iterator[None]:
    """A region in which running out of memory says how to take less: a note on the error, which stays as it
    is. `memory` gives that of the program that ran, or None where none was built yet.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            error.add_note(f"fxlrp: {_advice(memory())}")
        raise


def _advice(memory: Memory | None) -> str:
    if memory is None:
        return (
            "memory ran out while the model was captured and its graph checked, which takes a forward and an "
            "ordinary backward pass. Explain a shorter input or a smaller batch first: what is captured then "
            "serves other sizes, too, and lrp_compile(..., memory_budget=...) bounds what explanations take."
        )
    said = f"{memory.describe()}, at the sizes of the first call. "
    if memory.chosen.peak <= memory.least.peak:
        return said + "This is the least that can be. Give shorter inputs, smaller batches or fewer targets."
    return (
        f"{said}lrp_compile(..., memory_budget={memory.least_share}) takes the least that can be, "
        f"{memory.least.peak / 2**20:.1f} MiB; any share of the default between computes less again."
    )


def _joined(parts: list[Any]) -> Any:
    leaves = [pytree.tree_leaves(part) for part in parts]
    tensors: list[Tensor] = [torch.cat(column, 1) for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(tensors, pytree.tree_structure(parts[0]))
