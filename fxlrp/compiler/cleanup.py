"""Clean-up of an emitted graph: no duplicates, no dead nodes, no views that depend on strides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..rules.activation import op_name
from .graphs import arg, is_op, value

#: Ops that take operands of any strides; the kernels of other derivatives may read them as contiguous.
_VIEWS = ("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select")
_ANY_STRIDES = (
    *_VIEWS,
    "contiguous",
    "mm",
    "bmm",
    "matmul",
    "linear",
    "mul",
    "add",
    "sub",
    "div",
    "neg",
    "sum",
)
_IMPURE = ("rand", "bernoulli", "dropout", "normal", "multinomial", "empty")


def clean(root: torch.nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """A graph module over the root's weights and further constants, from a graph that nobody else holds."""
    for node in list(graph.nodes):
        _simplify(graph, node)
    for node in list(graph.nodes):
        _fold_matmul(graph, node)
    for node in reversed(list(graph.nodes)):
        _fold_slices(graph, node)
    _deduplicate(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(_detached(root, graph, constants), graph, "RelevanceGraph")


def _detached(root: torch.nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> dict[str, Any]:
    """The root's weights as plain tensors on the same memory: nothing differentiates the relevance graph."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = constants.get(node.target, root)
            for part in node.target.split(".") if value is root else ():
                value = getattr(value, part)
            found[node.target] = value.detach() if isinstance(value, Tensor) else value
    return found


def _simplify(graph: fx.Graph, node: fx.Node) -> None:
    if node.op != "call_function":
        return
    aten = torch.ops.aten
    if node.target in (aten.view.default, aten._unsafe_view.default):
        # Coefficients need not have the strides they were traced with; reshape copies only where it must.
        node.target = aten.reshape.default
    same = _same_as(node)
    if same is not None:
        node.replace_all_uses_with(same)
        graph.erase_node(node)


def _same_as(node: fx.Node) -> Any:
    """An earlier node that can stand for this one, or None."""
    aten: Any = torch.ops.aten
    operand: Any = node.args[0] if node.args else None
    if node.target in (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
        return operand
    if node.target is aten.t.default and operand.target is aten.t.default:
        return operand.args[0]
    if node.target is aten.reshape.default and _same_shape(node, operand):
        return operand
    if node.target is aten.contiguous.default and all(is_op(user, *_ANY_STRIDES) for user in node.users):
        return operand
    return None


def _fold_matmul(graph: fx.Graph, node: fx.Node) -> None:
    """``mm`` of flattened rows whose result gets its leading dimensions back: one ``matmul``, as in C++."""
    if not is_op(node, "mm") or not is_op(node.args[0], "reshape") or not node.users:
        return
    rows = arg(node, 0).args[0]
    given, results = value(rows), [value(user) for user in node.users]
    if not isinstance(given, Tensor) or given.dim() < 3:
        return
    shape = _shape((*given.shape[:-1], value(node).shape[-1]))
    if _shape(given.shape[-1:]) != _shape(value(arg(node, 0)).shape[-1:]):
        return
    if not all(is_op(user, "reshape") for user in node.users) or any(
        _shape(v.shape) != shape for v in results
    ):
        return
    with graph.inserting_before(node):
        folded = graph.call_function(torch.ops.aten.matmul.default, (rows, node.args[1]))
    folded.meta = {**node.meta, "val": results[0]}
    for user in list(node.users):
        user.replace_all_uses_with(folded)
        graph.erase_node(user)
    graph.erase_node(node)


def _fold_slices(graph: fx.Graph, node: fx.Node) -> None:
    """The sum of pieces that were each padded with zeros to the whole, as ``cat``: rotary embeddings' halves.

    Each ``slice_backward`` writes the whole tensor, and each sum reads and writes it.
    """
    pieces = _padded_pieces(node, node) if is_op(node, "add") else []
    if len(pieces) < 2:
        return
    dims = {piece.args[2] for piece in pieces}
    (dim,) = dims if len(dims) == 1 else (None,)
    whole = value(node)
    if not isinstance(dim, int) or not isinstance(whole, Tensor) or not isinstance(whole.shape[dim], int):
        return
    starts = {piece.args[3]: piece for piece in pieces}
    if len(starts) < len(pieces):
        return
    at, ordered = 0, []
    while at in starts:
        piece = starts.pop(at)
        ordered.append(piece.args[0])
        at = min(arg(piece, 4), whole.shape[dim])
    if starts or at != whole.shape[dim]:
        return
    with graph.inserting_before(node):
        joined = graph.call_function(torch.ops.aten.cat.default, (ordered, dim))
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)
    graph.erase_node(node)


def _padded_pieces(node: Any, root: fx.Node) -> list[fx.Node]:
    """The ``slice_backward`` nodes that a sum is made of, or none where it has other terms or readers."""
    if not isinstance(node, fx.Node) or (node is not root and len(node.users) > 1):
        return []
    if is_op(node, "slice_backward"):
        known = all(isinstance(x, int) for x in node.args[2:6])
        return [node] if known and node.args[5] == 1 else []
    if is_op(node, "add") and len(node.args) == 2 and not node.kwargs:
        sides = [_padded_pieces(term, root) for term in node.args]
        return [*sides[0], *sides[1]] if all(sides) else []
    return []


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    left, right = value(first), value(second)
    return (
        isinstance(left, Tensor) and isinstance(right, Tensor) and _shape(left.shape) == _shape(right.shape)
    )


def _shape(sizes: Any) -> tuple[str, ...]:
    """Sizes to compare without asking whether symbols are equal, which would add conditions to the trace."""
    return tuple(map(str, sizes))


def _deduplicate(graph: fx.Graph) -> None:
    """One node for equal computations; one for each symbolic size, whatever tensor it is read from."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(node: fx.Node) -> Any:
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function" or op_name(node.target).startswith(_IMPURE):
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return ("size", str(value.node.expr))
    try:
        key = (node.target, frozen(node.args), frozen(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def frozen(item: Any) -> Any:
    """A node's argument as a key that tells constants of different types apart."""
    if isinstance(item, (list, tuple)):
        return (type(item).__name__ in ("tuple",), tuple(frozen(i) for i in item))
    if isinstance(item, dict):
        return tuple(sorted((k, frozen(v)) for k, v in item.items()))
    if isinstance(item, (float, int, bool)):
        return type(item), item
    if isinstance(item, slice):
        return ("slice", item.start, item.stop, item.step)
    if isinstance(item, Tensor):
        return id(item)
    return item
