"""Clean-up of an emitted graph: no duplicates, no dead nodes, no views that depend on strides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..rules.activation import op_name
from .graphs import arg

_IMPURE = ("rand", "bernoulli", "dropout", "normal", "multinomial", "empty")


def clean(root: torch.nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """A graph module over the root's weights and further constants, from a graph that nobody else holds."""
    for node in list(graph.nodes):
        _simplify(graph, node)
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
    elif node.target in (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
        node.replace_all_uses_with(arg(node, 0))
        graph.erase_node(node)
    elif node.target is aten.t.default and getattr(node.args[0], "target", None) is aten.t.default:
        node.replace_all_uses_with(arg(node, 0).args[0])
        graph.erase_node(node)


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
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _freeze(item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return (type(item).__name__ in ("tuple",), tuple(_freeze(i) for i in item))
    if isinstance(item, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in item.items()))
    if isinstance(item, (float, int, bool)):
        return type(item), item
    if isinstance(item, slice):
        return ("slice", item.start, item.stop, item.step)
    if isinstance(item, Tensor):
        return id(item)
    return item
