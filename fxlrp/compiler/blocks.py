"""Blocks: layers that are alike become calls of one graph, which a backend then compiles once.

A relevance graph unrolls every layer twice, forward and relevance. Its nodes come layer by layer in both, so
that layers alike are a sequence of nodes that repeats itself: the same ops, constants, dtypes and shapes at a
fixed distance (``repeats.py``). The repetitions are cut where fewest values cross, which in a residual stream
is the one node that dominates the next layer. Two repetitions are one block if, besides, the same of their
nodes feed the same (``parts.py``). What comes from outside (the stream, weights, values that the forward
saved, masks, sizes) is an input of the block, what is used outside an output. Nothing is asked about names.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .graphs import arg, output_node, value
from .repeats import Run, runs
from .stretches import SYMBOLIC, Nodes, Part

#: How often something must be repeated to be a block: of fewer layers, one graph compiles as fast.
TIMES = 3
#: How many nodes it must have: a block of a few small ops is faster as a part of a larger one.
SIZE = 16
#: A stretch of fewer nodes between blocks is left as it is.
_LOOSE = 3


@dataclass(frozen=True, eq=False)
class Outlined:
    """A graph that calls blocks.

    Attributes:
        graph: takes and returns what the given graph does; its submodules are the blocks and what is between.
        calls: how often each block is called, by the name of its submodule.
    """

    graph: fx.GraphModule
    calls: dict[str, int]


def outline(module: fx.GraphModule, *, times: int = TIMES, size: int = SIZE) -> Outlined | None:
    """The same function as calls of blocks, or None where nothing is repeated often enough.

    Args:
        module: a relevance graph.
        times: how often a block must occur at least.
        size: how many nodes it must have at least.
    """
    nodes = Nodes.of(module)
    if not nodes.are_known:
        return None
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


def _blocks(nodes: Nodes, times: int, size: int) -> list[list[tuple[Run, range]]]:
    """Places of equal parts: one list for each block."""
    by_wiring: dict[Any, list[tuple[Run, range]]] = {}
    for run in runs([nodes.keys[n] for n in nodes.order], nodes.width, times=times, size=size):
        for place in run.parts():
            by_wiring.setdefault(nodes.part(place).wiring, []).append((run, place))
    return [places for places in by_wiring.values() if len(places) >= times]


@dataclass(eq=False)
class _Outliner:
    """One run of :func:`outline`, once the blocks are known."""

    module: fx.GraphModule
    nodes: Nodes
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

    def _call(self, name: str, part: Part, used: Sequence[int]) -> None:
        if name not in self.attributes:
            self.attributes[name] = self._body(part, used)
        called = self.graph.create_node(
            "call_module", name, tuple(map(self._operand, part.inputs)), {}, name=name
        )
        for i, place in enumerate(used):
            node = part.nodes[place]
            self.env[node] = self.graph.call_function(operator.getitem, (called, i), name=node.name)
            self.env[node].meta = dict(node.meta)

    def _body(self, part: Part, used: Sequence[int]) -> fx.GraphModule:
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
            if not isinstance(value(node), SYMBOLIC):
                return value(node)  # a size that is fixed
            return graph.node_copy(node, operand)

        for node in part.nodes:
            env[node] = graph.node_copy(node, operand)
        graph.output(tuple(env[part.nodes[i]] for i in used))
        graph.eliminate_dead_code()
        return fx.GraphModule({}, graph, "Block")
