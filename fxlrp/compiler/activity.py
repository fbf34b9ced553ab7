"""Activity: which nodes carry relevance from the explained inputs to the target.

Activity follows floating point data only: sizes read off active tensors, comparisons, indices are not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from ..errors import NoPathError
from .graphs import contents, is_float, is_op, placeholders, value
from .ids import lookups

#: Ops whose output is floating point but depends on the input's shape only or is piecewise constant.
_STOPS = frozenset(
    [
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_empty_strided",
        "detach",
        "sign",
        "sgn",
        "floor",
        "ceil",
        "round",
        "trunc",
        "heaviside",
        "one_hot",
    ]
)
#: How an embedding may travel to the sum in which it meets others of its token.
_SUM_PATH = (
    "add",
    "mul",
    "div",
    "dropout",
    "to",
    "to_copy",
    "type_as",
    "clone",
    "view",
    "reshape",
    "unsqueeze",
    "expand",
    "contiguous",
    "alias",
)


@dataclass(frozen=True, eq=False)
class Source:
    """Where an explained input enters the differentiable part of the graph.

    Attributes:
        input: the input's placeholder.
        node: the node whose value is explained: the placeholder of a float input, the embedding lookup of
            integer ids.
        path: for a lookup, the nodes that hand ids on from the placeholder to it, in the graph's order.
    """

    input: fx.Node
    node: fx.Node
    path: tuple[fx.Node, ...] = ()

    @property
    def is_lookup(self) -> bool:
        """Whether integer ids are explained at their embedding."""
        return self.node is not self.input

    def moved(self, nodes: Mapping[str, fx.Node]) -> Source:
        """The same source in another graph whose nodes have the same names."""
        path = tuple(nodes[n.name] for n in self.path)
        return replace(self, input=nodes[self.input.name], node=nodes[self.node.name], path=path)

    @property
    def name(self) -> str:
        """What its relevance is reported under."""
        return input_name(self.input)


def carries(node: fx.Node) -> bool:
    """Whether a node can hand relevance on at all."""
    return is_float(node) and not is_op(node, *_STOPS)


def float_edges(graph: fx.Graph) -> nx.DiGraph:
    """Edges along which relevance can flow: from floating point operands to what is computed of them."""
    edges = nx.DiGraph()
    for node in graph.nodes:
        edges.add_node(node)
        if node.op == "call_function" and carries(node):
            edges.add_edges_from((operand, node) for operand in contents(node) if is_float(operand))
    return edges


def candidates(graph: fx.Graph) -> tuple[Source, ...]:
    """Every place where an input enters: float placeholders and embedding lookups of integer ones."""
    found: list[Source] = []
    for node in placeholders(graph):
        if is_float(node):
            found.append(Source(node, node))
        else:
            found.extend(Source(node, lookup, path) for lookup, path in lookups(node))
    return tuple(found)


def explained(
    module: fx.GraphModule, targets: Sequence[fx.Node], inputs: Collection[str] = ()
) -> tuple[Source, ...]:
    """The sources that are explained: those of the named inputs, by default of all that count as content.

    By default sources that reach a target as masks of attention only are left out, and of several integer
    inputs whose embeddings are summed before anything else happens to them (token and type ids) the one with
    the largest table is explained; the others count as constants, like position embeddings.

    Raises:
        NoPathError: nothing differentiable leads from an input that was named to the target.
    """
    graph = module.graph
    edges = float_edges(graph)
    if not inputs:
        edges = _without_masks(edges, graph)
    useful = (
        set(targets).union(*(nx.ancestors(edges, t) for t in targets if t in edges)) if targets else set()
    )
    sources = [s for s in candidates(graph) if s.node in useful]
    if inputs:
        return _named(sources, inputs)
    return tuple(s for s in sources if not any(_outranks(other, s) for other in sources))


def _named(sources: Sequence[Source], inputs: Collection[str]) -> tuple[Source, ...]:
    found = tuple(s for s in sources if input_name(s.input) in inputs)
    refuse_missing(found, inputs)
    return found


def refuse_missing(sources: Sequence[Source], inputs: Collection[str]) -> None:
    """Refuse named inputs that no relevance reaches.

    Raises:
        NoPathError: with the first of them.
    """
    reached = {input_name(s.input) for s in sources}
    missing = sorted(set(inputs) - reached)
    if missing:
        raise NoPathError(
            f"No relevance reaches the input '{missing[0]}': no differentiable path leads from it to the "
            "target, or the composite freezes what it goes through. Leave it out of inputs=, or choose "
            f"another composite. Reached: {', '.join(map(repr, sorted(reached))) or 'none'}."
        )


def input_name(placeholder: fx.Node) -> str:
    """An input's own name; its node may be called otherwise, where the name is one of Python's."""
    return str(placeholder.target)


def _without_masks(edges: nx.DiGraph, graph: fx.Graph) -> nx.DiGraph:
    """The edges less those from a mask to its attention: a mask given as an input explains nothing."""
    for node in graph.nodes:
        if is_op(node, "attention", "scaled_dot_product_attention"):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if isinstance(mask, fx.Node) and edges.has_edge(mask, node) and mask not in node.args[:3]:
                edges.remove_edge(mask, node)
    return edges


def reachable(
    module: fx.GraphModule, starts: Iterable[fx.Node], blocked: Iterable[fx.Node] = ()
) -> set[fx.Node]:
    """All nodes that relevance-carrying data reaches from the starts without passing a blocked node."""
    edges = float_edges(module.graph)
    edges.remove_edges_from([edge for node in blocked for edge in list(edges.out_edges(node))])
    active: set[fx.Node] = set()
    for start in starts:
        active |= {start} | nx.descendants(edges, start)
    return active - set(blocked)


@dataclass(frozen=True, eq=False)
class Dependence:
    """Which inputs each node's floating point data comes from."""

    _sources: dict[fx.Node, frozenset[fx.Node]]
    _named: frozenset[str]

    @staticmethod
    def of(module: fx.GraphModule, inputs: Collection[str] = ()) -> Dependence:
        """For all nodes of a graph; ``inputs`` are explained whatever they are used for."""
        edges = _without_masks(float_edges(module.graph), module.graph)
        reached: dict[fx.Node, set[fx.Node]] = {}
        for source in candidates(module.graph):
            for node in {source.node} | nx.descendants(edges, source.node):
                reached.setdefault(node, set()).add(source.input)
        return Dependence({node: frozenset(found) for node, found in reached.items()}, frozenset(inputs))

    def sources_of(self, node: fx.Node) -> frozenset[fx.Node]:
        """The inputs that a node's data comes from."""
        return self._sources.get(node, frozenset())

    def entangled(self, mask: fx.Node, other: fx.Node) -> bool:
        """Whether a mask has relevance of its own: its data come from an input that the other node's come
        from too, or from one that is asked for.
        """
        found = self.sources_of(mask)
        return bool(found & self.sources_of(other)) or any(input_name(s) in self._named for s in found)


def _outranks(other: Source, source: Source) -> bool:
    if not (other.is_lookup and source.is_lookup) or other.input is source.input:
        return False
    if value(other.node.args[0]).numel() <= value(source.node.args[0]).numel():
        return False
    return not _sums(other.node).isdisjoint(_sums(source.node))


def _sums(node: fx.Node) -> set[fx.Node]:
    found, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if is_op(user, *_SUM_PATH) and user not in found:
                found.add(user)
                stack.append(user)
    return {n for n in found if is_op(n, "add")}
