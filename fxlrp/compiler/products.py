"""Linear maps by what is fastest on this processor: the last step before a relevance graph runs.

Relevance graphs are the same on every machine. The choice is made where one is lowered, by what was measured
(:mod:`fxlrp.kernels.measured`), never by timing at run time: results do not depend on a machine's load.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import measured, onednn
from .graphs import arg, copy_graph, is_op, value

#: What measurements call it.
KERNEL = "onednn"


def is_faster() -> bool:
    """Whether linear maps by oneDNN were measured to be faster on this processor."""
    return bool(measured.faster(KERNEL, measured.processor()))


def by_onednn(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose linear maps are oneDNN's where it takes them; the graph itself without any."""
    if not any(True for _ in _linear_maps(module)):
        return module
    module = copy_graph(module, "ProductsGraph")
    for node, operands in list(_linear_maps(module)):
        node.target, node.args, node.kwargs = torch.ops.fxlrp.onednn_linear.default, operands, {}
    module.recompile()
    return module


def notes(module: fx.GraphModule) -> tuple[str, ...]:
    """For the plan: how many nodes of a relevance graph are computed so on this processor."""
    count = sum(1 for _ in _linear_maps(module)) if is_faster() else 0
    where = f"measured to be faster on {measured.processor()}"
    return (f"linear maps by oneDNN: {count} products of the relevance graph, {where}",) if count else ()


def _linear_maps(module: fx.GraphModule) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """Nodes that oneDNN takes, each with the operands of its op."""
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        operands = _operands(node)
        if operands is not None and _is_served(module, operands[1]):
            yield node, operands


def _operands(node: fx.Node) -> tuple[Any, ...] | None:
    """Of a linear map: x, the weight, the bias, and whether the weight is transposed."""
    if node.kwargs:
        return None
    if is_op(node, "linear"):
        return (*(*node.args, None)[:3], False)
    if is_op(node, "mm", "matmul"):
        return (*node.args, None, True)
    is_bias = (
        is_op(node, "addmm") and isinstance(value(arg(node, 0)), Tensor) and value(arg(node, 0)).dim() == 1
    )
    return (*node.args[1:], arg(node, 0), True) if is_bias else None


def _is_served(module: fx.GraphModule, weight: Any) -> bool:
    """Whether a weight is one that oneDNN takes; graphs that were loaded know only those that they hold."""
    if not isinstance(weight, fx.Node):
        return False
    is_held = weight.op == "get_attr"
    known = operator.attrgetter(str(weight.target))(module) if is_held else value(weight)
    return isinstance(known, Tensor) and onednn.can_run(known)[0]
