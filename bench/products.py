"""The distance to the limit: a relevance graph's matrix products alone, replayed on the operands they had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

#: Matrix products, convolutions and fused attention; everything else of an explanation is overhead.
PRODUCTS = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "matmul",
    "linear",
    "onednn_linear",
    "grouped_mm",
    "grouped_mm_fallback",
    "grouped_mm_fallback_backward",
    "convolution",
    "conv1d",
    "conv2d",
    "convolution_backward",
    "scaled_dot_product",
)


def is_product(node: fx.Node) -> bool:
    """Whether a node is one of :data:`PRODUCTS`."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "").strip("_")
    return node.op == "call_function" and (name in PRODUCTS or name.startswith(PRODUCTS[-1]))


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run_node(self, n: fx.Node) -> Any:
        if is_product(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.calls.append((n.target, args, kwargs))
        return super().run_node(n)


def replay(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """A function that runs the graph's products, one after the other, on the operands that they had.

    The operands are kept: it takes as much memory as all of them.
    """
    recorder = _Recorder(graph)
    with torch.no_grad():
        recorder.run(*inputs)
    bound = [(getattr(op, "_op", op), args, kwargs) for op, args, kwargs in recorder.calls]
    if not bound:
        raise ValueError("the graph has no matrix products")

    def run() -> None:
        with torch.no_grad():
            for op, args, kwargs in bound:
                op(*args, **kwargs)

    return run
