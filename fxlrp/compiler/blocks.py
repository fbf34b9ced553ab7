"""Blocks: layers that are alike become calls of one graph, which a backend then compiles once.

A relevance graph unrolls every layer twice, forward and relevance. Its nodes come layer by layer in both, so
that layers alike are a sequence of nodes that repeats itself: the same ops, constants, dtypes and shapes at a
fixed distance (``repeats.py``). The repetitions are cut where fewest values cross, which in a residual stream is
the one node that dominates the next layer. Two repetitions are one block if, besides, the same of their nodes
feed the same. What comes from outside of them (the stream, weights, values saved by the forward, masks, sizes)
are the block's inputs; what is used outside its outputs. Nothing is asked about names.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .cleanup import frozen
from .graphs import arg, output_node, value
from .repeats import Run, runs

#: How often something must be repeated to be compiled by itself: with fewer layers, one graph compiles as fast.
TIMES = 3
#: How many nodes it must have: a block of a few small ops is faster as a part of a larger one.
SIZE = 16
#: A stretch of fewer nodes between blocks is left as it is.
_LOOSE = 3

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class Outlined:
    """A graph that calls blocks.

    Attributes:
        graph: takes and returns what the given graph does; its submodules are the blocks and what is between.
        calls: how often each block is called, by the name of its submodule.
    """

    graph: fx.GraphModule
    calls: dict[str, int]


@dataclass(frozen=True, eq=False)
class _Part:
    """A stretch of nodes by itself: its wiring, what it takes from outside, what is used outside."""

    nodes: tuple[fx.Node, ...]
    wiring: Any
    inputs: tuple[fx.Node, ...]
    used: frozenset[int]


def outline(module: fx.GraphModule, *, times: int = TIMES, size: int = SIZE) -> Outlined | None:
    """The same function as calls of blocks, or None where nothing is repeated often enough.

    Args:
        module: a relevance graph.
        times: how often a block must occur at least.
        size: how many nodes it must have at least.
    """
    nodes = _Nodes.of(module)
    for _ in range(2):
        blocks = _blocks(nodes, times, size)
        if not blocks:
            return None
        nodes, moved = nodes.with_shared_first(blocks)
        if not moved:
            break
    else:
        blocks = _blocks(nodes, times, size)
    return _Outliner(module, nodes).run(blocks) if blocks else None


def _blocks(nodes: _Nodes, times: int, size: int) -> list[list[tuple[Run, range]]]:
    """Places of equal parts: one list for each block."""
    by_wiring: dict[Any, list[tuple[Run, range]]] = {}
    for run in runs([nodes.keys[n] for n in nodes.order], nodes.width, times=times, size=size):
        for place in run.parts():
            by_wiring.setdefault(nodes.part(place).wiring, []).append((run, place))
    return [places for places in by_wiring.values() if len(places) >= times]


@dataclass(frozen=True, eq=False)
class _Nodes:
    """A graph's computing nodes in the order in which they are cut.

    Attributes:
        module: the graph.
        order: nodes that compute tensors, tuples of them right before what is taken out of them.
        at: the place of each.
        keys: what each computes apart from which nodes feed it.
        loose: sizes that inputs have and what is computed of such alone, by what they print as. They belong to
            no part, as inputs and weights do not, and are repeated where they are needed.
        sizes: the input and its dimension that each symbol is read from.
    """

    module: fx.GraphModule
    order: tuple[fx.Node, ...]
    at: dict[fx.Node, int]
    keys: dict[fx.Node, Any]
    loose: dict[fx.Node, str]
    sizes: dict[str, tuple[fx.Node, int]]
    parts: dict[range, _Part] = field(default_factory=dict)

    @staticmethod
    def of(module: fx.GraphModule) -> _Nodes:
        sizes: dict[str, tuple[fx.Node, int]] = {}
        loose: dict[fx.Node, str] = {}
        order: dict[fx.Node, None] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder" and isinstance(value(node), Tensor):
                for dim, size in enumerate(value(node).shape):
                    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                        sizes.setdefault(str(size), (node, dim))
            elif node.op == "call_function" and _is_loose(node, loose, sizes):
                loose[node] = str(value(node))
            elif node.op == "call_function":
                for taken in _with_parts(node):
                    order.setdefault(taken)
        found = _Nodes(module, (), {}, {}, loose, sizes)
        return replace(found, keys={node: found.key(node) for node in order}).reordered(order)

    def reordered(self, order: Iterable[fx.Node]) -> _Nodes:
        order = tuple(order)
        at = {node: place for place, node in enumerate(order)}
        return replace(self, order=order, at=at, parts={})

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
            elif isinstance(value(operand), _SYMBOLIC):
                yield from self.operands(operand)

    def part(self, place: range) -> _Part:
        """A stretch of the order by itself."""
        if place not in self.parts:
            self.parts[place] = self._part(self.order[place.start : place.stop])
        return self.parts[place]

    def _part(self, nodes: tuple[fx.Node, ...]) -> _Part:
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
        return _Part(nodes, (tuple(wires), looks), tuple(inputs), used)

    def _takes(self, user: fx.Node, inside: dict[fx.Node, int]) -> bool:
        return user not in inside and user not in self.loose

    def seen(self, node: fx.Node) -> Any:
        """What a node looks like: its fake value, of a weight without one the weight."""
        known = value(node)
        is_weight = known is None and node.op == "get_attr"
        return operator.attrgetter(node.target)(self.module) if is_weight else known

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

    def with_shared_first(self, blocks: list[list[tuple[Run, range]]]) -> tuple[_Nodes, bool]:
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


@dataclass(eq=False)
class _Outliner:
    """One run of :func:`outline`, once the blocks are known."""

    module: fx.GraphModule
    nodes: _Nodes
    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    sizes: dict[str, fx.Node] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def run(self, blocks: list[list[tuple[Run, range]]]) -> Outlined:
        for node in self.module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.env[node] = self.graph.node_copy(node)
                if node.op == "get_attr":
                    self.attributes[node.target] = operator.attrgetter(node.target)(self.module)
        used = [frozenset().union(*(self.nodes.part(p).used for _, p in places)) for places in blocks]
        by_start = {place.start: (i, place) for i, places in enumerate(blocks) for _, place in places}
        position, total = 0, len(self.nodes.order)
        while position < total:
            if position in by_start:
                block, place = by_start[position]
                self._call(f"fxlrp_block_{block}", self.nodes.part(place), sorted(used[block]))
            else:
                end = min((start for start in by_start if start > position), default=total)
                place = range(position, end)
                part = self.nodes.part(place)
                if len(place) < _LOOSE:
                    for node in part.nodes:
                        self._copy(node)
                else:
                    self._call(f"fxlrp_between_{position}", part, sorted(part.used))
            position = place.stop
        self.graph.output(fx.map_arg(arg(output_node(self.module.graph), 0), self._operand))
        self.graph.lint()
        graph = fx.GraphModule(self.attributes, self.graph, "Outlined")
        return Outlined(graph, {f"fxlrp_block_{i}": len(places) for i, places in enumerate(blocks)})

    def _operand(self, node: fx.Node) -> Any:
        """What stands for a node in the outer graph."""
        if node in self.env:
            return self.env[node]
        symbol = self.nodes.loose.get(node, "")
        if symbol in self.nodes.sizes:
            if symbol not in self.sizes:
                tensor, dim = self.nodes.sizes[symbol]
                self.sizes[symbol] = self.graph.call_function(
                    torch.ops.aten.sym_size.int, (self.env[tensor], dim)
                )
                self.sizes[symbol].meta["val"] = value(node)
            return self.sizes[symbol]
        return self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, self._operand)
        if node not in self.nodes.loose:
            self.env[node] = copied
        return copied

    def _call(self, name: str, part: _Part, used: Sequence[int]) -> None:
        if name not in self.attributes:
            self.attributes[name] = self._body(part, used)
        called = self.graph.create_node(
            "call_module", name, tuple(map(self._operand, part.inputs)), {}, name=name
        )
        for i, place in enumerate(used):
            node = part.nodes[place]
            self.env[node] = self.graph.call_function(operator.getitem, (called, i), name=node.name)
            self.env[node].meta = dict(node.meta)

    def _body(self, part: _Part, used: Sequence[int]) -> fx.GraphModule:
        """The part as a graph of its own: inputs in the order in which they are first needed."""
        graph = fx.Graph()
        env: dict[Any, fx.Node] = {}
        for i, node in enumerate(part.inputs):
            given = graph.placeholder(f"given_{i}")
            given.meta["val"] = self.nodes.seen(node)
            env[self.nodes.loose.get(node, node)] = given

        def operand(node: fx.Node) -> Any:
            if node in env:
                return env[node]
            if self.nodes.loose.get(node) in env:
                return env[self.nodes.loose[node]]
            if not isinstance(value(node), _SYMBOLIC):
                return value(node)  # a size that is fixed
            return graph.node_copy(node, operand)

        for node in part.nodes:
            env[node] = graph.node_copy(node, operand)
        graph.output(tuple(env[part.nodes[i]] for i in used))
        graph.eliminate_dead_code()
        return fx.GraphModule({}, graph, "Block")


def _is_loose(node: fx.Node, loose: Container[fx.Node], sizes: Container[str]) -> bool:
    found = value(node)
    if not isinstance(found, (*_SYMBOLIC, int, float)):
        return False
    return not isinstance(found, _SYMBOLIC) or str(found) in sizes or all(n in loose for n in node.all_input_nodes)


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
        return seen.dtype, seen.device, tuple(s if type(s) is int else s.node.expr for s in seen.shape)
    if isinstance(seen, (tuple, list)):
        return tuple(map(_looks, seen))
    return str(seen)
