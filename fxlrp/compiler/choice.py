"""Choices: some positions along one dimension of a tensor, as graphs spell them and as they are moved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .commute import same
from .graphs import is_op, value

#: Meta key of nodes that hold one row for each of several targets: ``ROW`` for what is computed of such rows,
#: ``CHOICE`` for where they are chosen. The coefficient of a row is that of its target alone.
TARGETS, ROW, CHOICE = "targets", "row", "choice"

_END = 2**63 - 1


def select_rows(x: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Each sample's own positions, ``[batch]`` or ``[batch, K]``, along a dimension behind the batch.

    Shapes: ``[batch, ..., n, ...]`` -> ``[batch, ..., 1 or K, ...]``.
    """
    positions = positions.unsqueeze(-1) if positions.dim() == 1 else positions
    samples = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x.movedim(dim, 1)[samples, positions].movedim(1, dim) if dim != 1 else x[samples, positions]


def select_index(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """The same positions for all samples; as in ``x[index]``, those below 0 count from the end.

    Shapes: ``[..., n, ...]`` and ``[m]`` -> ``[..., m, ...]``.
    """
    chosen: Tensor = torch.ops.aten.index.Tensor(x, [*[None] * dim, index])
    return chosen


@dataclass(frozen=True)
class Choice:
    """The positions that ``op(x, dim, *operands)`` takes out of x: a slice, an index, or rows of each sample.

    Attributes:
        op: ``slice``, ``index_select``, :func:`select_index` or :func:`select_rows`.
        operands: what it takes behind the dimension.
        mark: ``CHOICE`` where each position is that of a target of its own.
    """

    op: Any
    operands: tuple[Any, ...]
    mark: str | None = None

    @property
    def is_per_sample(self) -> bool:
        """Whether each sample has positions of its own."""
        return self.op is select_rows

    @property
    def is_last(self) -> bool:
        """Whether it is the last position, and that alone."""
        return replace(self, mark=None) == part(-1)

    @property
    def nodes(self) -> list[fx.Node]:
        """What the positions are read from."""
        return [x for x in self.operands if isinstance(x, fx.Node)]


@dataclass(frozen=True)
class Reading:
    """How a node reads its first operand: chosen positions of one dimension, which goes if it ``drops``."""

    choice: Choice
    dim: int
    drops: bool = False


def part(start: Any, stop: Any = None, step: int = 1) -> Choice:
    """A slice; by default of one position."""
    if stop is None:
        stop = start + 1 if start != -1 else _END
    return Choice(torch.ops.aten.slice.Tensor, (start, stop, step))


def reading(node: fx.Node) -> Reading | None:
    """What a node chooses of its first operand, if that is what it does."""
    for names, row in _READERS:
        if is_op(node, *names) and isinstance(node.args[0], fx.Node) and not node.kwargs:
            found: Reading | None = row(node, value(node.args[0]), *node.args[1:])
            mark = node.meta.get(TARGETS)
            return found and replace(found, choice=replace(found.choice, mark=mark))
    return None


def _slice(
    node: fx.Node, x: Tensor, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Reading:
    choice = part(0 if start is None else start, _END if stop is None else stop, step)
    return Reading(choice, dim % x.dim())


def _narrow(node: fx.Node, x: Tensor, dim: int, start: Any, length: Any) -> Reading | None:
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return Reading(part(start, start + length if start + length else _END), dim % x.dim())


def _select(node: fx.Node, x: Tensor, dim: int, index: Any) -> Reading | None:
    return Reading(part(index), dim % x.dim(), drops=True) if isinstance(index, int) else None


def _index_select(node: fx.Node, x: Tensor, dim: int, index: fx.Node) -> Reading | None:
    return Reading(Choice(node.target, (index,)), dim % x.dim()) if value(index).dim() == 1 else None


def _index(node: fx.Node, x: Tensor, indices: Any) -> Reading | None:
    """One index of positions, or one position for each sample."""
    given = {i: index for i, index in enumerate(indices) if index is not None}
    if any(value(i).dim() != 1 or value(i).dtype is torch.bool for i in given.values()):
        return None
    if len(given) == 1:
        ((dim, index),) = given.items()
        return Reading(Choice(select_index, (index,)), dim)
    if tuple(given) == (0, 1) and _counts(given[0], x.shape[0]):
        return Reading(Choice(select_rows, (given[1],)), 1, drops=True)
    return None


def _counts(index: fx.Node, size: Any) -> bool:
    """Whether an index is 0, 1, ... up to a size."""
    if not is_op(index, "arange"):
        return False
    start, stop, step = {1: (0, *index.args, 1), 2: (*index.args, 1), 3: index.args}[len(index.args)]
    return bool(start == 0 and step == 1 and same(value(stop), size))


def _gather(node: fx.Node, x: Tensor, dim: int, index: fx.Node) -> Reading | None:
    """The same positions for all features of a sample: their index is a view of one for each sample."""
    dim = dim % x.dim()
    source: Any = index.args[0] if is_op(index, "expand", "repeat") else None
    if not isinstance(source, fx.Node) or dim == 0 or value(source).dim() != x.dim():
        return None
    others = [d for d in range(1, x.dim()) if d != dim]
    whole = all(same(value(index).shape[d], x.shape[d]) for d in (0, *others))
    if not whole or not all(same(value(source).shape[d], 1) for d in others):
        return None
    if not all(same(value(source).shape[d], value(index).shape[d]) for d in (0, dim)):
        return None
    with node.graph.inserting_after(source):
        positions = node.graph.call_function(torch.ops.aten.squeeze.dims, (source, others))
    with value(source).fake_mode:
        positions.meta = {**source.meta, "val": value(source).squeeze(others)}
    return Reading(Choice(select_rows, (positions,)), dim)


def _rows(node: fx.Node, x: Tensor, dim: int, positions: fx.Node) -> Reading:
    return Reading(Choice(select_rows, (positions,)), dim)


_READERS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("slice",), _slice),
    (("narrow",), _narrow),
    (("select",), _select),
    (("index_select", "select_index"), _index_select),
    (("index",), _index),
    (("gather",), _gather),
    (("select_rows",), _rows),
)
