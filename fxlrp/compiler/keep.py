"""What to keep: a minimum cut of a forward's data flow, segment by segment, equal segments decided once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import networkx as nx
from torch import Tensor, fx

from .costs import cost, is_cheap, may_repeat
from .graphs import value
from .parts import Parts

#: Bytes that may be kept in place of moving one: by default only what is next to free is recomputed.
DEFAULT_PRICE = Fraction(1, 4)


@dataclass(frozen=True)
class Policy:
    """How what is kept is chosen.

    Attributes:
        price: bytes that may be kept in place of moving one once more.
        span: how many cuts apart segments begin.
        products: whether more than views, copies and pointwise ops may be recomputed.
    """

    price: Fraction = DEFAULT_PRICE
    span: int = 1
    products: bool = False


@dataclass(eq=False)
class Chooser:
    """Decides what is kept of a graph's forward, for one policy after the other."""

    parts: Parts
    _known: dict[Any, frozenset[int]] = field(default_factory=dict)
    _costs: dict[fx.Node, int] = field(default_factory=dict)

    def cost(self, node: fx.Node) -> int:
        """What computing a node once more costs."""
        if node not in self._costs:
            self._costs[node] = cost(node, self.parts.sizes)
        return self._costs[node]

    def kept(self, policy: Policy) -> frozenset[fx.Node]:
        """Forward nodes whose values live on into the relevance part; inputs and weights are not listed."""
        parts = self.parts
        segments: dict[int, list[fx.Node]] = {}
        for node in parts.forward:
            segments.setdefault(parts.segment(node, policy.span), []).append(node)
        found = set(parts.returned)
        last = max(segments, default=0)
        for i in sorted(segments, reverse=True):
            # The last segment's values are needed as soon as they are there.
            found |= self._of_segment(segments[i], Policy() if i == last else policy, found)
        return frozenset(n for n in found if n.op == "call_function")

    def _of_segment(self, nodes: Sequence[fx.Node], policy: Policy, forced: set[fx.Node]) -> set[fx.Node]:
        """What a segment keeps of its own values and of what it is handed."""
        inside = set(nodes)
        wanted = [n for n in nodes if n in self.parts.read or n in forced]
        needed = _needed(wanted, inside)
        order = [n for n in nodes if n in needed]
        handed = list(dict.fromkeys(o for n in order for o in n.all_input_nodes if o not in inside))
        place = {n: i for i, n in enumerate((*handed, *order))}
        wanted_places = frozenset(place[n] for n in wanted)
        problem = (
            *((self._to_keep(n, forced, is_handed=True), None, ()) for n in handed),
            *(
                (
                    self._to_keep(n, forced),
                    self._to_repeat(n, policy),
                    tuple(place[o] for o in n.all_input_nodes),
                )
                for n in order
            ),
        )
        key = (problem, wanted_places)
        if key not in self._known:
            self._known[key] = _minimum(problem, wanted_places)
        known = self._known[key]
        return {n for n, i in place.items() if i in known}

    def _to_keep(self, node: fx.Node, forced: set[fx.Node], *, is_handed: bool = False) -> int | None:
        """Bytes of keeping a value; None where it cannot be kept or need not be, as a view of something."""
        if node in forced or node in self.parts.long or not _is_data(node):
            return 0
        if is_handed and node in self.parts.read:
            return 0
        if not is_handed and (
            self.parts.is_view(node)
            or (isinstance(value(node), (tuple, list)) and node not in self.parts.read)
        ):
            return None
        storages, _ = self.parts.storages
        return sum(storages.bytes[p] for p in self.parts.pieces(node))

    def _to_repeat(self, node: fx.Node, policy: Policy) -> int | None:
        """The price of a recomputation; None where there is none."""
        if node.op != "call_function" or not may_repeat(node):
            return None
        if not policy.products and not (is_cheap(node) or self.cost(node) == 0):
            return None
        return int(self.cost(node) * policy.price)


def _is_data(node: fx.Node) -> bool:
    return isinstance(value(node), (Tensor, tuple, list))


def _needed(wanted: Sequence[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """Nodes of a segment that what is wanted of it is computed of."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _minimum(
    problem: Sequence[tuple[int | None, int | None, tuple[int, ...]]], wanted: frozenset[int]
) -> frozenset[int]:
    """Which values to keep.

    Value i is the edge from ``(i, 0)`` to ``(i, 1)``: cut where it is kept. The edge from the source to
    ``(i, 0)`` is cut where it is recomputed; then its operands' ends are on the sink's side too, each kept or
    recomputed itself. Edges without a capacity cannot be cut.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    for i, (keep, repeat, operands) in enumerate(problem):
        graph.add_edge((i, 0), (i, 1), **({} if keep is None else {"capacity": keep}))
        graph.add_edge("source", (i, 0), **({} if repeat is None else {"capacity": repeat}))
        for operand in operands:
            graph.add_edge((operand, 1), (i, 0))
        if i in wanted:
            graph.add_edge((i, 1), "sink")
    _, (near, _) = nx.minimum_cut(graph, "source", "sink")
    return frozenset(i for i in range(len(problem)) if (i, 0) in near and (i, 1) not in near)
