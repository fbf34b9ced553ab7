"""How integer ids travel from an input to the embedding lookups that read them, and relevance back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules import Structural
from ..rules.activation import op_name
from ..rules.base import Call, many
from .graphs import arg, is_float, is_op, leaves, tree, value
from .template import Templates

#: Steps that put ids elsewhere, with the operands that hand them on: their places among the positional
#: arguments, None for all.
_MOVES: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        (
            *("view", "reshape", "unsafe_view", "flatten", "unsqueeze", "squeeze", "transpose", "permute"),
            *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
            *("expand", "expand_as", "repeat", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"),
            *("to", "to_copy", "type_as", "long", "clamp", "clamp_min", "masked_fill", "roll", "flip"),
            *("index", "index_select", "index_fill", "gather", "pad", "constant_pad_nd", "unfold"),
        ),
        (0,),
    ),
    "copy": (1,),
    "index_put": (0, 2),
    "masked_scatter": (0, 2),
    "scatter": (0, 3),
    "where": (1, 2),
    "cat": None,
    "stack": None,
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
}
#: Steps that take a dtype from an operand that they do not hand on.
_AS_ANOTHER = ("copy", "type_as", "to")
#: Arithmetic on single ids (offsets, hashes): another id in the same place.
_ARITHMETIC = (
    *("add", "sub", "rsub", "mul", "remainder", "fmod", "floor_divide"),
    *("bitwise_and", "bitwise_or", "bitwise_xor"),
)


def lookups(placeholder: fx.Node) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The embedding lookups that read an input's ids, each with the nodes that hand the ids on to it."""
    reached: dict[fx.Node, list[fx.Node]] = {placeholder: []}
    computed = {placeholder}
    given = _computed_of_inputs(placeholder.graph)
    found: list[tuple[fx.Node, fx.Node]] = []
    for node in placeholder.graph.nodes:
        if node.op != "call_function" or computed.isdisjoint(node.all_input_nodes):
            continue
        computed.add(node)
        ids = _read_by(node)
        if ids in reached:
            found.append((node, ids))
        operands = _handed_on(node)
        arrived = [operand for operand in operands if operand in reached]
        # Arithmetic on two numbers that come from inputs is no id of one place: a running count, a masked id.
        if arrived and not (is_op(node, *_ARITHMETIC) and len(given.intersection(operands)) > 1):
            reached[node] = arrived
    return [(node, _between(reached, ids)) for node, ids in found]


def _computed_of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values, and not only sizes, come from an input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            isinstance(value(node), Tensor)
            and not is_op(node, "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
            and any(isinstance(value(x), Tensor) and x in found for x in node.all_input_nodes)
        ):
            found.add(node)
    return found


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
    if is_op(node, *_ARITHMETIC) or _sums_window(node):
        return [leaf for leaf in leaves(node) if isinstance(leaf, fx.Node)]
    flat = leaves(node)
    return [flat[i] for i in _moved(node) if isinstance(flat[i], fx.Node)]


def _moved(step: fx.Node) -> list[int]:
    """Which of a step's leaves are the ids that it puts elsewhere."""
    if not is_op(step, *_MOVES):
        return []
    flat, spec = tree(step)
    args, _ = pytree.tree_unflatten(range(len(flat)), spec)
    places = _MOVES[op_name(step.target)]
    return pytree.tree_leaves(args if places is None else [args[i] for i in places if i < len(args)])


def _sums_window(node: fx.Node) -> bool:
    """Whether a step adds up what arithmetic made of the ids in each window: a hash of several ids."""
    if not is_op(node, "sum") or len(node.args) < 2:
        return False
    last = value(node.args[0]).dim() - 1
    return node.args[1] in ([-1], [last]) and _unfolded(node.args[0])


def _unfolded(node: Any) -> bool:
    if is_op(node, *_ARITHMETIC):
        return any(_unfolded(leaf) for leaf in leaves(node))
    return is_op(node, "unfold")


def _read_by(node: fx.Node) -> Any:
    """The ids that a node looks up in a table, or None."""
    if is_op(node, "embedding"):
        return arg(node, 1)
    if (
        is_op(node, "index", "index_select")
        and getattr(node.args[0], "op", "") == "get_attr"
        and is_float(node)
        and value(node.args[0]).dim() == 2
        and (is_op(node, "index") or node.args[1] == 0)
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
    lead: Any = None,
) -> Any:
    """Emit the way back of looked-up tokens' relevance to the places that their ids have in the input.

    Args:
        graph: the relevance graph under construction.
        lookup: the lookup.
        path: the nodes that hand ids on to it, in the graph's order.
        source: the input.
        relevance: relevance of the lookup's tokens, shaped as the ids that it reads.
        values: what stands for the nodes of the captured graph.
        templates: where vjps are traced.
        lead: the relevance's leading size, where there are several targets.
    """
    dtype = value(lookup).dtype
    relevance.meta.setdefault("val", value(_read_by(lookup)))

    def back(node: fx.Node, operand: fx.Node, coefficient: Any) -> Any:
        with templates.mode:
            like = torch.empty_like(value(node), dtype=dtype)
            like = like if lead is None else like.new_empty((lead, *like.shape))
        fakes = [*(value(x) for x in _operands(node)), like]
        key = ("ids", node.name, operand.name)

        def one(*given: Any) -> tuple[Tensor | None, ...]:
            return (_back(node, operand, given),)

        def each(*given: Any) -> tuple[Tensor | None, ...]:
            return many(lambda coefficient: one(*given[:-1], coefficient))(given[-1])

        template = templates.get(key, one if lead is None else each, fakes)
        return template.inline(graph, [*(values[x] for x in _operands(node)), coefficient], [0])[0]

    def add(first: Any, second: Any) -> Any:
        return graph.call_function(torch.ops.aten.add.Tensor, (first, second))

    return _walk(lookup, path, source, relevance, back, add)


def arriving(
    lookup: fx.Node,
    path: tuple[fx.Node, ...],
    source: fx.Node,
    relevance: Tensor,
    values: Mapping[fx.Node, Any],
) -> Tensor | None:
    """The same on real tensors: relevance at the input's places; None where no id of the input is read."""

    def back(node: fx.Node, operand: fx.Node, coefficient: Tensor) -> Tensor | None:
        return _back(node, operand, [*(values[x] for x in _operands(node)), coefficient])

    found: Tensor | None = _walk(lookup, path, source, relevance, back, operator.add)
    return found


def _walk(
    lookup: fx.Node,
    path: tuple[fx.Node, ...],
    source: fx.Node,
    relevance: Any,
    back: Callable[[fx.Node, fx.Node, Any], Any],
    add: Callable[[Any, Any], Any],
) -> Any:
    arrived: dict[fx.Node, Any] = {_read_by(lookup): relevance}
    for node in reversed(path):
        for operand in dict.fromkeys(_handed_on(node)) if node in arrived else ():
            part = back(node, operand, arrived[node]) if operand is source or operand in path else None
            if part is not None:
                arrived[operand] = add(arrived[operand], part) if operand in arrived else part
    return arrived.get(source)


def _whole(node: fx.Node) -> fx.Node:
    """The step that a node belongs to: an element of a tuple belongs to the step that gives the tuple."""
    return arg(node, 0) if node.target is operator.getitem else node


def _operands(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in leaves(_whole(node)) if isinstance(leaf, fx.Node)]


def _back(node: fx.Node, operand: fx.Node, given: Sequence[Any]) -> Tensor | None:
    """The vjp of a step on ids with respect to one operand, taken as if ids were real numbers: it moves
    elements. Arithmetic changes an id and not its place; the ids of one hash share alike.
    ``given``: the step's operands, the coefficient.
    """
    step = _whole(node)
    flat, spec = tree(step)
    *operands, coefficient = given
    if is_op(node, *_ARITHMETIC):
        return coefficient.sum_to_size(operands[_operands(node).index(operand)].shape)  # type: ignore[no-any-return]
    if _sums_window(node):
        window = operands[0].shape[-1]
        return coefficient.reshape(*operands[0].shape[:-1], 1).expand(operands[0].shape) / window  # type: ignore[no-any-return]

    def run(*args: Any, **kwargs: Any) -> Any:
        op: Any = step.target
        result = op(*args, **kwargs)
        return result if step is node else result[node.args[1]]

    following = iter(operands)
    found: list[Any] = [next(following) if isinstance(x, fx.Node) else x for x in flat]
    # Not those that say where: indices stay integers, masks stay truth values.
    moved = _moved(step)
    numbers = range(len(flat)) if is_op(step, *_AS_ANOTHER) else moved
    for i, leaf in enumerate(found):
        if isinstance(leaf, Tensor) and i in numbers:
            found[i] = leaf.to(coefficient.dtype)
        elif isinstance(leaf, torch.dtype):
            found[i] = coefficient.dtype
    args, kwargs = pytree.tree_unflatten(found, spec)
    at = tuple(i for i in moved if flat[i] is operand)
    parts = Structural().linearize(Call(run, args, kwargs, at)).pullback(coefficient)
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) if found else None
