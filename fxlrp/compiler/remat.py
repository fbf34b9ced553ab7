"""Rematerialisation: which forward values the relevance part of a graph keeps and which it computes again.

The forward is divided at cuts, the places where least has to be handed on (of a Transformer the residual
stream between two blocks). Within a segment between cuts, what to keep is a minimum cut of the data flow:

    minimise  sum of bytes(v) over kept v  +  price * sum of cost(v) over recomputed v,

such that whatever relevance nodes read is kept, or recomputed from values that are. Nothing is recomputed
across the beginning of a segment, so that no product of the forward runs more than once more. What is
recomputed stands right before the first relevance node that needs it.

Source: the minimum cut is that of activation checkpointing in compilers (He and Yu 2023, AOTAutograd), here
with the cost of recomputation in the objective; segments of about the square root of the depth are those of
Chen et al. 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from .graphs import value
from .keep import Chooser, Policy
from .liveness import Step, peak
from .parts import Parts, is_light

#: What `meta` of a recomputed node says under ``made_by``.
MADE_BY = "remat"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A relevance graph's computations in order.

    Attributes:
        steps: the computations; the last is the output.
        cost: of what is recomputed, see :func:`fxlrp.compiler.costs.cost`.
        peak: estimated bytes in use at the worst moment, inputs and weights not counted.
    """

    steps: tuple[Step, ...]
    cost: int
    peak: int


def schedule(chooser: Chooser, policy: Policy) -> Schedule:
    """The computations of a graph whose relevance part keeps what a policy chooses."""
    parts = chooser.parts
    usual = chooser.kept(Policy())
    run = _Run(parts, usual if policy == Policy() else chooser.kept(policy), usual, policy.span)
    steps = tuple(run.steps())
    cost = sum(chooser.cost(s.node) for s in steps if s.again)
    return Schedule(steps, cost, peak(steps, parts.sizes))


def written(module: fx.GraphModule, steps: tuple[Step, ...]) -> fx.GraphModule:
    """A schedule as a graph over the same weights."""
    graph = fx.Graph()
    made: dict[Step, fx.Node] = {}
    for step in steps:
        given = {n: made[s] for n, s in step.operands.items()}.__getitem__
        if step.node.op == "output":
            graph.output(fx.map_arg(step.node.args[0], given))
            continue
        node = graph.node_copy(step.node, given)
        node.meta = dict(step.node.meta)
        if step.again:
            node.meta["made_by"] = MADE_BY
        made[step] = node
    graph.lint()
    return fx.GraphModule(module, graph, "RelevanceGraph")


@dataclass(eq=False)
class _Run:
    """A graph's computations as it runs.

    Attributes:
        kept: forward nodes whose values live on.
        usual: those that would by default: what a segment that runs again keeps for its own relevance.
        span: how many cuts apart segments begin.
    """

    parts: Parts
    kept: frozenset[fx.Node]
    usual: frozenset[fx.Node]
    span: int
    done: dict[fx.Node, Step] = field(default_factory=dict)
    copies: dict[fx.Node, Step] = field(default_factory=dict)
    place: int = -1

    def __post_init__(self) -> None:
        self.pieces = {piece for node in self.kept for piece in self.parts.pieces(node)}
        self.at_cuts = {self.parts.forward[i] for i in self.parts.cuts}

    def steps(self) -> Iterator[Step]:
        for node in self.parts.forward:
            self.done[node] = Step(node, {n: self.done[n] for n in node.all_input_nodes})
            yield self.done[node]
        for node in self.parts.later:
            for operand in node.all_input_nodes:
                if operand in self.parts.index and not self._lives(operand):
                    yield from self._again(operand)
            self.done[node] = Step(node, {n: self._step(n) for n in node.all_input_nodes})
            yield self.done[node]

    def _lives(self, node: fx.Node) -> bool:
        """Whether a forward value is there in the relevance part; views of what is kept are."""
        if node.op != "call_function" or node in self.kept or (is_light(node) and not self._is_data(node)):
            return True
        pieces = self.parts.pieces(node)
        return not self._is_data(node) or all(p in self.pieces for p in pieces)

    def _is_data(self, node: fx.Node) -> bool:
        return bool(self.parts.sizes.leaves(node)) and not isinstance(value(node), int)

    def _step(self, node: fx.Node) -> Step:
        if node in self.copies and not self._lives(node):
            return self.copies[node]
        return self.done[node]

    def _again(self, wanted: fx.Node) -> Iterator[Step]:
        """What has to be computed again for a value, from what is kept and what its segment is handed."""
        place = self.parts.segment(wanted, 1)
        if place != self.place:  # what was computed on the way to other relevance is not kept for later
            self.copies = {n: s for n, s in self.copies.items() if n in self.usual or n in self.at_cuts}
            self.place = place
        first = self.parts.segment(wanted, self.span)
        missing: set[fx.Node] = set()
        stack = [wanted]
        while stack:
            node = stack.pop()
            if (
                node not in missing
                and node not in self.copies
                and not self._lives(node)
                and self.parts.segment(node, self.span) == first
            ):
                missing.add(node)
                stack.extend(node.all_input_nodes)
                # All elements of a tuple at once: it does not run again for the others.
                stack.extend(u for u in node.users if is_light(u) and u in self.parts.read)
        for node in sorted(missing, key=self.parts.index.__getitem__):
            step = Step(node, {n: self._step(n) for n in node.all_input_nodes}, again=True)
            self.copies[node] = step
            yield step
