"""Linear maps by what is fastest on this processor: the last step before a relevance graph runs.

Relevance graphs are the same on every machine. The choice is made where one is lowered, by what was measured
(:mod:`fxlrp.kernels.measured`), never by timing at run time: results do not depend on a machine's load.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import measured, onednn
from .graphs import copy_graph, value

#: What measurements call it.
KERNEL = "onednn"


def is_faster() -> bool:
    """Whether linear maps by oneDNN were measured to be faster on this processor than what PyTorch calls."""
    return torch.backends.mkl.is_available() and bool(measured.faster(KERNEL, measured.processor()))


def by_onednn(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose linear maps are oneDNN's where it takes them; the graph itself without any."""
    if not any(True for _ in _linear_maps(module)):
        return module
    module = copy_graph(module, "ProductsGraph")
    for node, operands in list(_linear_maps(module)):
        node.target, node.args, node.kwargs = torch.ops.fxlrp.onednn_linear.default, operands, {}
    module.recompile()
    return module


def chosen_here(module: fx.GraphModule) -> tuple[str, ...]:
    """For the plan: how many nodes of a relevance graph are computed so on this processor."""
    count = sum(1 for _ in _linear_maps(module)) if is_faster() else 0
    line = (
        f"linear maps of {onednn.LEAST_ROWS} rows and more by oneDNN: {count} products of the relevance "
        f"graph, measured to be faster on {measured.processor()}"
    )
    return (line,) if count else ()


def _linear_maps(module: fx.GraphModule) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """Nodes that oneDNN takes, each with the operands of its op."""
    for node in module.graph.nodes:
        read = _OPERANDS.get(node.target) if node.op == "call_function" and not node.kwargs else None
        operands = read and read(*node.args)
        if operands is not None and _is_served(module, operands[1]):
            yield node, operands


def _linear(x: Any, weight: Any, bias: Any = None) -> tuple[Any, ...]:
    return x, weight, bias, False


def _product(x: Any, weight: Any) -> tuple[Any, ...]:
    return x, weight, None, True


def _added(bias: Any, x: Any, weight: Any) -> tuple[Any, ...] | None:
    known = value(bias)
    return (x, weight, bias, True) if isinstance(known, Tensor) and known.dim() == 1 else None


_ATEN = torch.ops.aten
#: By op, its arguments as x, the weight, the bias, and whether the weight is transposed; None for other uses.
_OPERANDS: dict[Any, Callable[..., tuple[Any, ...] | None]] = {
    _ATEN.linear.default: _linear,
    _ATEN.mm.default: _product,
    _ATEN.matmul.default: _product,
    _ATEN.addmm.default: _added,
}


def _is_served(module: fx.GraphModule, weight: Any) -> bool:
    """Whether a weight is one that oneDNN takes; graphs that were loaded know only those that they hold."""
    if not isinstance(weight, fx.Node):
        return False
    is_held = weight.op == "get_attr"
    known = operator.attrgetter(str(weight.target))(module) if is_held else value(weight)
    return isinstance(known, Tensor) and onednn.can_run(known)[0]
