"""Stretches of a graph's nodes, what feeds them, and what of them is used elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from .cleanup import frozen
from .graphs import is_float, value
from .repeats import Run

#: Sizes and what is computed of them.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of nodes by itself: its wiring, what it takes from outside, what is used outside."""

    nodes: tuple[fx.Node, ...]
    wiring: Any
    inputs: tuple[fx.Node, ...]
    used: frozenset[int]


@dataclass(frozen=True, eq=False)
class Nodes:
    """A graph's computing nodes in the order in which they are cut.

    Attributes:
        module: the graph.
        order: nodes that compute tensors, tuples of them right before what is taken out of them.
        at: the place of each.
        keys: what each computes apart from which nodes feed it, as a number.
        loose: sizes that inputs have and what is computed of such alone, by what they print as. They belong
            to no part, as inputs and weights do not, and are repeated where they are needed.
        sizes: the input and its dimension that each symbol is read from.
    """

    module: fx.GraphModule
    order: tuple[fx.Node, ...]
    at: dict[fx.Node, int]
    keys: dict[fx.Node, int]
    loose: dict[fx.Node, str]
    sizes: dict[str, tuple[fx.Node, int]]
    parts: dict[range, Part] = field(default_factory=dict)

    @staticmethod
    def of(module: fx.GraphModule) -> Nodes:
        sizes: dict[str, tuple[fx.Node, int]] = {}
        loose: dict[fx.Node, str] = {}
        order: dict[fx.Node, None] = {}
        light: set[fx.Node] = set()
        for node in module.graph.nodes:
            if (node.op == "placeholder" and not is_float(node)) or (
                node.op == "call_function" and light.issuperset(node.all_input_nodes)
            ):
                light.add(node)
            if node.op == "placeholder" and isinstance(value(node), Tensor):
                for dim, size in enumerate(value(node).shape):
                    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                        sizes.setdefault(str(size), (node, dim))
            elif node.op == "call_function" and _is_loose(node, loose, sizes):
                loose[node] = str(value(node))
            elif node.op == "call_function":
                for taken in _with_parts(node):
                    order.setdefault(taken)
        found = Nodes(module, (), {}, {}, loose, sizes)
        # What depends on no weight and no float input (masks, positions) may come in between any layers.
        ordered = sorted(order, key=lambda node: node not in light)
        numbers: dict[Any, int] = {}
        keys = {node: numbers.setdefault(found.key(node), len(numbers)) for node in ordered}
        return replace(found, keys=keys).reordered(ordered)

    def reordered(self, order: Iterable[fx.Node]) -> Nodes:
        order = tuple(order)
        at = {node: place for place, node in enumerate(order)}
        return replace(self, order=order, at=at, parts={})

    @property
    def are_known(self) -> bool:
        """Whether it is known what all values look like that may become a part's inputs."""
        return not any(value(n) is None and any(u.op != "output" for u in n.users) for n in self.order)

    def key(self, node: fx.Node) -> Any:
        """Op, constants, dtype and shape; of loose nodes their value. Strides are the backend's to choose."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: ("node", self.loose.get(n)))
        return node.target, frozen(args), frozen(kwargs), _looks(value(node))

    def operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that feed a node, in the order of its arguments; of loose ones the symbols that they need."""
        found: list[fx.Node] = []
        fx.map_arg((node.args, dict(node.kwargs)), found.append)
        for operand in found:
            if operand not in self.loose or self.loose[operand] in self.sizes:
                yield operand
            elif isinstance(value(operand), SYMBOLIC):
                yield from self.operands(operand)

    def part(self, place: range) -> Part:
        """A stretch of the order by itself."""
        if place not in self.parts:
            self.parts[place] = self._part(self.order[place.start : place.stop])
        return self.parts[place]

    def _part(self, nodes: tuple[fx.Node, ...]) -> Part:
        inside = {node: i for i, node in enumerate(nodes)}
        outside: dict[Any, int] = {}
        inputs: list[fx.Node] = []
        wires: list[Any] = []
        for node in nodes:
            wires.append(self.keys[node])
            for operand in self.operands(node):
                if operand in inside:
                    wires.append(inside[operand])
                    continue
                name = self.loose.get(operand, operand)
                if name not in outside:
                    outside[name] = len(inputs)
                    inputs.append(operand)
                wires.append((outside[name],))
        looks = tuple(self.loose[n] if n in self.loose else _looks(self.seen(n)) for n in inputs)
        used = frozenset(i for node, i in inside.items() if any(self._takes(u, inside) for u in node.users))
        return Part(nodes, (tuple(wires), looks), tuple(inputs), used)

    def _takes(self, user: fx.Node, inside: dict[fx.Node, int]) -> bool:
        return user not in inside and user not in self.loose

    def seen(self, node: fx.Node) -> Any:
        """What a node looks like: its fake value, of a weight without one the weight."""
        known = value(node)
        is_weight = known is None and node.op == "get_attr"
        return operator.attrgetter(cast(str, node.target))(self.module) if is_weight else known

    def width(self, start: int, period: int) -> list[int]:
        """How many values cross a cut behind the first repetition, for each of the cuts of one period."""
        first = start + period
        crossing = [0] * (period + 1)
        for place in range(start, min(start + 2 * period, len(self.order))):
            users = [self.at[user] for user in self.order[place].users if user in self.at]
            last = max((u for u in users if u < place + 2 * period), default=place)
            from_, to = max(place + 1, first), min(last, place + period, first + period - 1)
            if from_ <= to:
                crossing[from_ - first] += 1
                crossing[to + 1 - first] -= 1
        for i in range(1, period + 1):
            crossing[i] += crossing[i - 1]
        return crossing[:period]

    def with_shared_first(self, blocks: list[list[tuple[Run, range]]]) -> tuple[Nodes, bool]:
        """What all parts of a block share goes before the first of them.

        Equal nodes are merged at the first that needs them, which makes the first layer differ from others.
        """
        order = list(self.order)
        moved = False
        ends = sorted(place.stop for places in blocks for _, place in places)
        for places in blocks:
            taken = [self.part(place).inputs for _, place in places]
            shared = set(taken[0]).intersection(*taken[1:])
            first = places[0][1].start
            behind = max((end for end in ends if end <= first), default=0)
            start = max(behind, first - 2 * places[0][0].period)
            ahead = self._ancestors(shared, start, first + len(places[0][1]))
            window = self.order[start : places[0][1].stop]
            if ahead and len(ahead) <= places[0][0].period:
                order[start : places[0][1].stop] = sorted(window, key=lambda n: n not in ahead)
                moved |= [n in ahead for n in window] != sorted((n in ahead for n in window), reverse=True)
        return (self.reordered(order), True) if moved else (self, False)

    def _ancestors(self, nodes: set[fx.Node], start: int, stop: int) -> set[fx.Node]:
        """Nodes in a window that these ones are computed of, and what is taken out of tuples with them."""
        found: set[fx.Node] = set()
        stack = [node for node in nodes if start <= self.at.get(node, -1) < stop]
        while stack:
            node = stack.pop()
            if node not in found:
                found.update(_with_parts(node))
                stack += [n for n in self.operands(node) if start <= self.at.get(n, -1) < stop]
        return found


def _is_loose(node: fx.Node, loose: Container[fx.Node], sizes: Container[str]) -> bool:
    found = value(node)
    if not isinstance(found, (*SYMBOLIC, int, float)):
        return False
    return (
        not isinstance(found, SYMBOLIC)
        or str(found) in sizes
        or all(n in loose for n in node.all_input_nodes)
    )


def _with_parts(node: fx.Node) -> Iterator[fx.Node]:
    """A node and, of a tuple, what is taken out of it: a tuple does not leave the part that computes it."""
    yield node
    if isinstance(value(node), (tuple, list)):
        for user in node.users:
            if user.target is operator.getitem:
                yield from _with_parts(user)


def _looks(seen: Any) -> Any:
    """What must be equal of two values: dtype, device and sizes."""
    if isinstance(seen, Tensor):
        return (
            seen.dtype,
            seen.device,
            tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in seen.shape),
        )
    if isinstance(seen, (tuple, list)):
        return tuple(map(_looks, seen))
    return str(seen)
