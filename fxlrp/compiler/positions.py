"""Positions as relevance leaves: rotary tables and position embeddings are explained beside the inputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..rules import kind_of
from .activity import Source, reachable
from .graphs import copy_graph, is_float, is_op, value
from .provenance import module_path

_TABLES = ("cos", "sin")
_COUNTS = ("arange", "cumsum")
_PICKS = ("gather", "index", "index_select", "take_along_dim")


@dataclass(frozen=True, eq=False)
class PositionLeaf(Source):
    """Where a table of positions meets the explained data; its relevance is reported by position.

    Attributes:
        label: ``cos`` or ``sin`` and the attention that it is for, or the embedding's module or parameter.
        dim: the dimension of positions, from the end.
    """

    label: str = ""
    dim: int = -2

    @property
    def name(self) -> str:
        return self.label


def with_position_leaves(
    module: fx.GraphModule, sources: Sequence[Source]
) -> tuple[fx.GraphModule, tuple[PositionLeaf, ...]]:
    """A graph in which each table of positions enters each of its steps as a node of its own; those nodes.

    A table is a constant factor of explained data that is computed by cosine or sine (rotary embeddings), or
    a constant summand with positions: a lookup by counted ids, a parameter or a table of sines. It is
    expanded to the step's shape first, so that each sample has a leaf of its own.
    """
    new = copy_graph(module, "Positional")
    names = {s.node.name for s in sources}
    active = reachable(new, [n for n in new.graph.nodes if n.name in names])
    batches = {str(value(s.input).shape[0]) for s in sources if value(s.input).dim()}
    leaves = []
    for node in list(new.graph.nodes):
        if node.op != "call_function" or node not in active or len(node.args) < 2:
            continue
        for at, (table, data) in enumerate((node.args[:2], node.args[1::-1])):
            if data not in active or table in active or not _same_shape(data, node):
                continue
            if str(value(node).shape[0]) not in batches:  # samples could not be told apart
                continue
            label = _label(node, table, new)
            if label:
                with new.graph.inserting_before(node):
                    leaf = new.graph.call_function(torch.ops.aten.expand_as.default, (table, data))
                leaf.meta = {**node.meta, "val": value(data), "made_by": "positions"}
                node.args = (*node.args[:at], leaf, *node.args[at + 1 :])
                leaves.append(PositionLeaf(leaf, leaf, (), label, _position_dim(value(table))))
    new.graph.lint()
    new.recompile()
    return new, tuple(leaves)


def per_position(dim: int, table: Tensor, coefficient: Tensor) -> Tensor:
    """Relevance of a leaf summed over all but samples and positions, ``[batch, positions]``, for each of the
    coefficient's targets.
    """
    relevance = table * coefficient
    summed = [d for d in range(1, table.dim()) if d != table.dim() + dim]
    return relevance.sum([d - table.dim() for d in summed])


def _label(node: fx.Node, table: object, module: fx.GraphModule) -> str:
    """What a table of positions is called, or '' for another constant."""
    if not (isinstance(table, fx.Node) and is_float(table) and isinstance(value(table), Tensor)):
        return ""
    if value(table).is_complex() or value(table).dim() < 2:
        return ""
    if is_op(node, "mul", "multiply"):
        trigonometric = _nearest(table, _TABLES)
        return f"{trigonometric} @ {_attention(node)}" if trigonometric else ""
    if not is_op(node, "add"):
        return ""
    if value(node).dim() != 3 or value(table).shape[-2] == 1:  # [batch, positions, features] has positions
        return ""
    if _nearest(table, _TABLES):
        return module_path(table) or table.name
    origin = _behind(table)
    if is_op(origin, "embedding") and _counts(origin.args[1], module):
        return module_path(origin) or str(origin.args[0])
    if origin.op == "get_attr":
        return str(origin.target)
    return ""


def _same_shape(data: object, node: fx.Node) -> bool:
    shapes = [tuple(map(str, value(x).shape)) for x in (data, node) if isinstance(value(x), Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _nearest(node: fx.Node, names: tuple[str, ...]) -> str:
    """The first of these ops on the way back from a node, breadth first."""
    queue, seen = [node], {node}
    for found in queue:
        for name in names:
            if is_op(found, name):
                return name
        new = [x for x in found.all_input_nodes if x not in seen]
        seen.update(new)
        queue.extend(new)
    return ""


def _behind(node: fx.Node) -> fx.Node:
    """The node behind steps that move elements of one tensor only."""
    while node.op == "call_function" and (kind_of(node.target) == "structural" or is_op(node, "detach")):
        sources = [x for x in node.all_input_nodes if is_float(x)]
        if len(sources) != 1:
            break
        node = sources[0]
    return node


def _counts(ids: object, module: fx.GraphModule) -> bool:
    """Whether ids count positions: made by counting, a buffer that counts, or an input of that name."""
    if not isinstance(ids, fx.Node):
        return False
    if is_op(ids, *_COUNTS) or (ids.op == "placeholder" and "position" in str(ids.target)):
        return True
    if ids.op == "get_attr":
        held = operator.attrgetter(str(ids.target))(module).flatten()
        return held.numel() > 1 and bool((held[1:] - held[:-1] == 1).all())
    # What is picked counts, not the places that it is picked from.
    operands = ids.all_input_nodes[:1] if is_op(ids, *_PICKS) else ids.all_input_nodes
    return any(_counts(operand, module) for operand in operands)


def _attention(node: fx.Node) -> str:
    """The attention that a step leads to first, by module path or name."""
    queue, seen = [node], {node}
    for found in queue:
        if found.op == "call_function" and kind_of(found.target) in ("attention", "softmax"):
            return module_path(found) or found.name
        new = [x for x in found.users if x not in seen]
        seen.update(new)
        queue.extend(new)
    return module_path(node) or node.name


def _position_dim(table: Tensor) -> int:
    """The dimension of positions from the end: the last one but the features' that is not 1."""
    for dim in range(-2, -table.dim() - 1, -1):
        if table.shape[dim] != 1:
            return dim
    return -2
