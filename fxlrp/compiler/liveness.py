"""Liveness: which memory the values of a graph lie in, and how much is in use while it runs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules.activation import op_name
from .graphs import arg, value
from .shapes import integers

#: Ops whose result is a view where strides allow it and a copy else.
_BY_STRIDES = frozenset(("reshape", "flatten", "unflatten", "view_as", "reshape_as"))
#: Ops whose result is their operand where nothing is to change and a copy else.
_BY_TYPE = frozenset(("contiguous", "to", "type_as", "float", "expand_copy"))


@dataclass(frozen=True, eq=False)
class Step:
    """One computation of a node's value; a node that is computed again has several.

    Attributes:
        node: what is computed.
        operands: which step computed each node that it reads.
        again: whether this is a recomputation.
    """

    node: fx.Node
    operands: Mapping[fx.Node, Step]
    again: bool = False


@dataclass(frozen=True, eq=False)
class Sizes:
    """Bytes of values at the sizes of an example.

    Attributes:
        symbols: what the symbols of the trace stand for; others count with the trace's own hints.
    """

    symbols: Mapping[Any, int] = field(default_factory=dict)
    _known: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def number(self, size: Any) -> int:
        """A size as a number; 1 where nothing is known of it."""
        if isinstance(size, int):
            return size
        found = size.node.expr.xreplace(self.symbols)
        if not found.is_Integer:
            hint = size.node.hint
            return 1 if hint is None else int(hint)
        return int(found)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """A fake tensor's shape as numbers."""
        return tuple(map(self.number, tensor.shape))

    def elements(self, tensor: Tensor) -> int:
        """How many elements a fake tensor has."""
        total = 1
        for size in self.shape(tensor):
            total *= size
        return total

    def leaves(self, node: fx.Node) -> tuple[int, ...]:
        """Bytes of each tensor in a node's value, of whatever else 0."""
        made = value(node)
        key = id(made)
        if key not in self._known or self._known[key][0] is not made:
            found = tuple(
                self.elements(leaf) * leaf.dtype.itemsize if isinstance(leaf, Tensor) else 0
                for leaf in pytree.tree_leaves(made)
            )
            self._known[key] = made, found
        leaves: tuple[int, ...] = self._known[key][1]
        return leaves

    def bytes(self, node: fx.Node) -> int:
        """Bytes of all of a node's value."""
        return sum(self.leaves(node))

    def is_alias(self, node: fx.Node) -> bool:
        """Whether a node's value lies in its first operand's memory: a view of it, or an element of it."""
        if node.op != "call_function" or not node.args or not isinstance(arg(node, 0), fx.Node):
            return False
        if node.target is operator.getitem:
            return True
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
            return False
        name, made, given = op_name(node.target), value(node), value(arg(node, 0))
        if not isinstance(made, Tensor) or not isinstance(given, Tensor):
            return True
        if name in _BY_TYPE:
            same = made.dtype == given.dtype and made.device == given.device
            return same and (name != "contiguous" or self._on_meta(given).is_contiguous())
        if name in _BY_STRIDES:
            given = self._on_meta(given)
            same_memory: bool = _memory(given.reshape(self.shape(made))) == _memory(given)
            return same_memory
        return True

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return torch.empty(self.shape(tensor), device="meta")
        strides = tuple(map(self.number, tensor.stride()))
        return torch.empty_strided(self.shape(tensor), strides, device="meta")


@dataclass(eq=False)
class Storages:
    """Which pieces of memory the value of each step lies in; several where it is a tuple."""

    sizes: Sizes
    bytes: list[int] = field(default_factory=list)
    _of: dict[Step, tuple[int, ...]] = field(default_factory=dict)
    _alias: dict[fx.Node, bool] = field(default_factory=dict)

    def of(self, step: Step) -> tuple[int, ...]:
        """The pieces of one step, whose operands have been asked for before."""
        if step not in self._of:
            self._of[step] = self._new(step)
        return self._of[step]

    def _new(self, step: Step) -> tuple[int, ...]:
        node = step.node
        if node not in self._alias:
            self._alias[node] = self.sizes.is_alias(node)
        if self._alias[node]:
            base = self.of(step.operands[arg(node, 0)])
            if node.target is operator.getitem and isinstance(arg(node, 1), int) and len(base) > 1:
                return (base[arg(node, 1)],)
            return base
        given = node.op != "call_function"  # inputs and weights are there before and after
        pieces = []
        for size in self.sizes.leaves(node):
            pieces.append(len(self.bytes))
            self.bytes.append(0 if given else size)
        return tuple(pieces)


def steps_of(graph: fx.Graph) -> list[Step]:
    """A graph as it stands."""
    done: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        done[node] = Step(node, {n: done[n] for n in node.all_input_nodes})
    return list(done.values())


def in_use(steps: Sequence[Step], sizes: Sizes) -> Iterator[int]:
    """Bytes that are in use while each step runs, its result and its operands included.

    Values are freed after the step that reads them last, as the code that fx writes does; inputs and weights
    do not count, what kernels take for themselves is not known. The last step is the output.
    """
    storages = Storages(sizes)
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for piece in storages.of(step):
            last[piece] = i
        for operand in step.operands.values():
            for piece in storages.of(operand):
                last[piece] = i
    ends: dict[int, list[int]] = {}
    for piece, i in last.items():
        ends.setdefault(i, []).append(piece)
    counted = 0
    live = 0
    for i, step in enumerate(steps):
        pieces = storages.of(step)
        new = max(pieces, default=-1) + 1
        while counted < new:  # pieces are numbered as they are made
            live += storages.bytes[counted]
            counted += 1
        yield live
        live -= sum(storages.bytes[piece] for piece in ends.get(i, ()))


def peak(steps: Sequence[Step], sizes: Sizes) -> int:
    """The most bytes that are in use at any time."""
    return max(in_use(steps, sizes), default=0)


def _memory(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def sizes_at(
    fakes: Sequence[Any], tensors: Sequence[Tensor], counts: Sequence[tuple[Any, int]] = ()
) -> Sizes:
    """What the symbols in fake inputs stand for where the inputs are these tensors.

    Args:
        fakes: fake tensors with symbolic sizes.
        tensors: one for each of them.
        counts: further symbolic sizes and what they stand for.
    """
    symbols: dict[Any, int] = {}
    given = [
        (s, n) for f, t in zip(fakes, tensors, strict=True) for s, n in zip(f.shape, t.shape, strict=True)
    ]
    for size, number in (*given, *counts):
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            symbols[size.node.expr] = number
    return Sizes(integers(symbols))
