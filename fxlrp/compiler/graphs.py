"""Small helpers on fx graphs that several stages use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from ..rules.activation import op_name


def copy_graph(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """A new graph over the same weights: tensors are shared, nodes and their metadata are not."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    return fx.GraphModule(module, graph, name)


def value(node: Any) -> Any:
    """The fake tensor(s) or symbolic size that a node computes."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def arg(node: fx.Node, index: int) -> Any:
    """A node's positional argument, untyped: fx's own type for it is a union of everything."""
    return node.args[index]


def is_float(node: Any) -> bool:
    """Whether a node computes a floating point or complex tensor, or a tuple with one."""
    return isinstance(node, fx.Node) and any(
        isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())
        for v in pytree.tree_leaves(value(node))
    )


def is_op(node: Any, *names: str) -> bool:
    """Whether a node calls an op with one of these names (see :func:`fxlrp.rules.activation.op_name`)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node.target) in names


def leaves(node: fx.Node) -> list[Any]:
    """All leaves of a node's ``(args, kwargs)`` in pytree order; nodes among them are its operands."""
    return _tree(node)[0]


def contents(node: fx.Node) -> list[Any]:
    """The leaves whose values a node computes with: None in place of one that only gives dtype or size."""
    found = leaves(node)
    if is_op(node, "type_as", "to", "expand_as", "view_as", "reshape_as") and len(node.args) > 1:
        found[1] = None
    return found


def _tree(node: fx.Node) -> tuple[list[Any], Any]:
    return pytree.tree_flatten((_plain(node.args), dict(node.kwargs)))


def tree(node: fx.Node) -> tuple[list[Any], Any]:
    """Leaves and structure of a node's ``(args, kwargs)``."""
    return _tree(node)


def _plain(item: Any) -> Any:
    """fx keeps lists as its own immutable type, which pytree takes for leaves in some versions of torch."""
    if isinstance(item, (tuple, list)) and not hasattr(item, "_fields"):
        return type(item)(map(_plain, item)) if type(item) in (tuple, list) else [_plain(i) for i in item]
    return item


def without_casts(node: Any) -> Any:
    """The node behind dtype conversions, clones and dropout that is switched off."""
    while is_op(
        node,
        "to",
        "to_copy",
        "type_as",
        "float",
        "contiguous",
        "clone",
        "alias",
        "dropout",
        "lift_fresh_copy",
    ):
        if is_op(node, "dropout") and len(node.args) > 2 and node.args[2] and node.args[1]:
            break
        node = node.args[0]
    return node


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's output node."""
    found: fx.Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return found


def outputs(graph: fx.Graph) -> tuple[Any, ...]:
    """What the graph returns."""
    return tuple(arg(output_node(graph), 0))


def placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    """The graph's inputs in order."""
    return (n for n in graph.nodes if n.op == "placeholder")


def fake_mode(graph: fx.Graph) -> Any:
    """The fake tensor mode that the graph's values live in."""
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(value(node)):
            if isinstance(leaf, torch._subclasses.FakeTensor):
                return leaf.fake_mode
    raise AssertionError("a captured graph holds at least one fake tensor")


@contextmanager
def computing(mode: Any) -> Iterator[None]:
    """Where ops compute fake values: without gradients, and by decompositions that know symbolic sizes.

    PyTorch's rules for the shapes of some ops (addcmul with operands to broadcast) call others that take
    symbols only by way of the Python dispatcher.
    """
    with mode, torch.no_grad(), enable_python_dispatcher():
        yield


def propagate(graph: fx.Graph) -> None:
    """Recompute the values of a graph under construction, from its inputs and weights on.

    Raises:
        RuntimeError: an op does not take what it would now be given.
    """
    with computing(fake_mode(graph)):
        for node in graph.nodes:
            if node.op == "call_function" and "val" in node.meta:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
                node.meta["val"] = node.target(*args, **kwargs)
