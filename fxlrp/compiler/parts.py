"""The two parts of a relevance graph, forward and relevance, and where the forward hands on least."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from .graphs import arg, output_node, outputs, value
from .liveness import Sizes, Step, Storages
from .template import ancestors

#: How much more has to be handed on between two cuts than at them.
_PROMINENCE = 2.5


@dataclass(frozen=True, eq=False)
class Parts:
    """A relevance graph in two parts: what the explained value is computed of, and the rest."""

    graph: fx.Graph
    sizes: Sizes

    @cached_property
    def forward(self) -> tuple[fx.Node, ...]:
        """Nodes of the forward in order; elements of tuples and sizes right behind what they are read of."""
        scalar = outputs(self.graph)[1]
        found = ancestors([scalar], set()) if isinstance(scalar, fx.Node) else set()
        ordered: list[fx.Node] = []
        for node in self.graph.nodes:
            if node in found or node.op in ("placeholder", "get_attr"):
                ordered.append(node)
                ordered.extend(self._light(node))
        return tuple(dict.fromkeys(ordered))

    def _light(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if is_light(user):
                yield user
                yield from self._light(user)

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        """Places in the forward."""
        return {node: i for i, node in enumerate(self.forward)}

    @cached_property
    def later(self) -> tuple[fx.Node, ...]:
        """The relevance part, in order; the output is its end."""
        return tuple(n for n in self.graph.nodes if n not in self.index)

    @cached_property
    def read(self) -> frozenset[fx.Node]:
        """Forward nodes that relevance nodes read."""
        return frozenset(o for n in self.later for o in n.all_input_nodes if o in self.index)

    @cached_property
    def returned(self) -> frozenset[fx.Node]:
        """Forward nodes that the graph returns."""
        return frozenset(n for n in output_node(self.graph).all_input_nodes if n in self.index)

    @cached_property
    def storages(self) -> tuple[Storages, dict[fx.Node, Step]]:
        """Pieces of memory of the forward as it stands."""
        storages = Storages(self.sizes)
        steps: dict[fx.Node, Step] = {}
        for node in self.forward:
            steps[node] = Step(node, {n: steps[n] for n in node.all_input_nodes})
            storages.of(steps[node])
        return storages, steps

    def pieces(self, node: fx.Node) -> tuple[int, ...]:
        """Pieces of memory that a forward node's value lies in."""
        storages, steps = self.storages
        return storages.of(steps[node])

    def is_view(self, node: fx.Node) -> bool:
        """Whether a value lies in another's memory; an element of a new tuple has its own."""
        if node.target is operator.getitem:
            return self.sizes.is_alias(arg(node, 0))
        return self.sizes.is_alias(node)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Places in the forward behind which least has to be handed on, see :data:`_PROMINENCE`.

        What is handed on through half of the forward (masks, positions, an encoder's output) does not count.
        """
        storages, _ = self.storages
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for node in self.forward:
            for piece in self.pieces(node):
                first.setdefault(piece, self.index[node])
            for operand in node.all_input_nodes:
                for piece in self.pieces(operand):
                    last[piece] = self.index[node]
        change = [0] * (len(self.forward) + 1)
        for piece, end in last.items():
            if end - first[piece] <= len(self.forward) // 2:
                change[first[piece]] += storages.bytes[piece]
                change[end] -= storages.bytes[piece]
        return tuple(_valleys(change))

    def segment(self, node: fx.Node, span: int) -> int:
        """Which segment a forward node is in."""
        return bisect.bisect_left(self.cuts, self.index[node]) // span

    def _long(self, node: fx.Node) -> bool:
        """Whether a value is read across several cuts in any case, so that keeping it adds little."""
        places = [self.segment(u, 1) for u in node.users if u in self.index]
        return bool(places) and max(places) - self.segment(node, 1) > 1

    @cached_property
    def long(self) -> frozenset[fx.Node]:
        """Forward nodes that are read across several cuts in any case: keeping them adds little."""
        return frozenset(n for n in self.forward if n.op != "call_function" or self._long(n))


def is_light(node: fx.Node) -> bool:
    """Whether a node reads a size or takes an element of a tuple."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    return node.target is operator.getitem or (
        not isinstance(value(node), (Tensor, tuple, list)) and isinstance(value(arg(node, 0)), Tensor)
    )


def _valleys(change: Sequence[int]) -> Iterator[int]:
    """Places of minima between which a running sum rises by the prominence; the first of equal ones."""
    total, high, low, place = 0, 0, 0, -1
    for i, step in enumerate(change):
        total += step
        if total and (total < low or place < 0) and high >= _PROMINENCE * total:
            low, place = total, i
        if place >= 0 and total >= _PROMINENCE * low:
            yield place
            place, high = -1, 0
        high = max(high, total)
