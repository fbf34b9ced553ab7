"""How integer ids travel from an input to the embedding lookups that read them, and relevance back."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules import Structural
from ..rules.activation import op_name
from ..rules.base import Call
from .graphs import arg, is_float, is_op, leaves, tree, value
from .template import Template, Templates

#: Steps that put ids elsewhere, with the operands that hand them on: their places among the positional
#: arguments, None for all.
_MOVES: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        (
            *("view", "reshape", "unsafe_view", "flatten", "unsqueeze", "squeeze", "transpose", "permute"),
            *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
            *("expand", "expand_as", "repeat", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"),
            *("to", "to_copy", "type_as", "long", "clamp", "clamp_min", "masked_fill", "roll", "flip"),
            *("index_select", "pad", "constant_pad_nd"),
        ),
        (0,),
    ),
    "copy": (1,),
    "where": (1, 2),
    "cat": None,
    "stack": None,
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
}
#: Arithmetic on single ids (offsets, hashes): another id in the same place.
_ARITHMETIC = (
    *("add", "sub", "rsub", "mul", "remainder", "fmod", "floor_divide"),
    *("bitwise_and", "bitwise_or", "bitwise_xor"),
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def lookups(placeholder: fx.Node) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The embedding lookups that read an input's ids, each with the nodes that hand the ids on to it."""
    reached: dict[fx.Node, list[fx.Node]] = {placeholder: []}
    found: list[tuple[fx.Node, fx.Node]] = []
    for node in placeholder.graph.nodes:
        if node.op != "call_function":
            continue
        ids = _read_by(node)
        if ids in reached:
            found.append((node, ids))
        arrived = [operand for operand in _handed_on(node) if operand in reached]
        if arrived and not (is_op(node, *_ARITHMETIC) and len(arrived) > 1):
            reached[node] = arrived
    return [(node, _between(reached, ids)) for node, ids in found]


def _between(reached: Mapping[fx.Node, list[fx.Node]], last: fx.Node) -> tuple[fx.Node, ...]:
    needed, stack = set(), [last]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(reached[node])
    return tuple(node for node in reached if node in needed and node.op != "placeholder")


def _handed_on(node: fx.Node) -> list[fx.Node]:
    """The operands whose ids a step hands on; none for a step that makes something else of them."""
    if is_float(node):
        return []
    node = _whole(node)
    if is_op(node, *_ARITHMETIC):
        return [leaf for leaf in leaves(node) if isinstance(leaf, fx.Node)]
    if not is_op(node, *_MOVES):
        return []
    places = _MOVES[op_name(node.target)]
    operands = node.args if places is None else [node.args[i] for i in places if i < len(node.args)]
    return [leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, fx.Node)]


def _read_by(node: fx.Node) -> Any:
    """The ids that a node looks up in a table, or None."""
    if is_op(node, "embedding"):
        return arg(node, 1)
    if (
        is_op(node, "index", "index_select")
        and getattr(node.args[0], "op", "") == "get_attr"
        and is_float(node)
    ):
        indices = arg(node, 1) if is_op(node, "index") else (arg(node, 2),)
        return indices[0] if len(indices) == 1 else None
    return None


def route(
    graph: fx.Graph,
    lookup: fx.Node,
    path: tuple[fx.Node, ...],
    source: fx.Node,
    relevance: fx.Node,
    values: Mapping[fx.Node, Any],
    templates: Templates,
) -> Any:
    """Relevance of looked-up tokens at the places that their ids have in the input.

    Args:
        graph: the relevance graph under construction.
        lookup: the lookup.
        path: the nodes that hand ids on to it, in the graph's order.
        source: the input.
        relevance: relevance of the lookup's tokens, shaped as the ids that it reads.
        values: what stands for the nodes of the captured graph.
        templates: where vjps are traced.
    """
    last = _read_by(lookup)
    relevance.meta.setdefault("val", value(last))
    dtype = value(lookup).dtype
    arrived: dict[fx.Node, fx.Node] = {last: relevance}
    for node in reversed(path):
        for operand in dict.fromkeys(_handed_on(node)) if node in arrived else ():
            if operand is not source and operand not in path:
                continue
            template = _back(node, operand, dtype, templates)
            operands = [values[x] for x in _operands(node)]
            (part,) = template.inline(graph, [*operands, arrived[node]], [0])
            if part is not None and operand in arrived:
                part = graph.call_function(torch.ops.aten.add.Tensor, (arrived[operand], part))
            if part is not None:
                arrived[operand] = part
    return arrived[source]


def _whole(node: fx.Node) -> fx.Node:
    """The step that a node belongs to: an element of a tuple belongs to the step that gives the tuple."""
    return arg(node, 0) if node.target is operator.getitem else node


def _operands(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in leaves(_whole(node)) if isinstance(leaf, fx.Node)]


def _back(node: fx.Node, operand: fx.Node, dtype: torch.dtype, templates: Templates) -> Template:
    """The vjp of a step on ids with respect to one operand, taken as if ids were real numbers: it moves
    elements. Arithmetic changes an id and not its place.
    """
    step = _whole(node)
    flat, spec = tree(step)
    at = flat.index(operand)

    def run(*args: Any, **kwargs: Any) -> Any:
        op: Any = step.target
        result = op(*args, **kwargs)
        return result if step is node else result[node.args[1]]

    def back(*arguments: Any) -> tuple[Any, ...]:
        if is_op(node, *_ARITHMETIC):
            return (arguments[-1].sum_to_size(value(operand).shape),)
        given = iter(arguments[:-1])
        found: list[Any] = [next(given) if isinstance(x, fx.Node) else x for x in flat]
        for i, leaf in enumerate(found):
            if i == at or (
                isinstance(leaf, Tensor) and leaf.dtype in _INTEGERS and not is_op(step, "index_select")
            ):
                found[i] = leaf.to(dtype)
            elif isinstance(leaf, torch.dtype):
                found[i] = dtype
        args, kwargs = pytree.tree_unflatten(found, spec)
        return Structural().linearize(Call(run, args, kwargs, (at,))).pullback(arguments[-1])

    with templates.mode:
        cotangent = torch.empty_like(value(node), dtype=dtype)
    return templates.get(("ids", node.name, at), back, [*(value(x) for x in _operands(node)), cotangent])
