"""Factors: multiplications by a number that the next addition does on the side.

Rules leave many of them behind: the halves of the uniform rule, the scale of scores. Where no compiler fuses
them, each reads and writes a tensor of its own. Linear ops hand such a factor on, ``f(c x) = c f(x)``, until
an addition takes it: ``a + c b`` is one op, ``add(a, b, alpha=c)``.

The result is the same where factors are powers of 2, as those of rules are; others round elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .graphs import arg, copy_graph, is_op, leaves, value

_ATEN = torch.ops.aten
_ADD, _MUL, _CAT = _ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.cat.default
#: Precisions with room for values that are not multiplied yet.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Factors that are handed on are between this and one over it: others may keep clear of overflow.
_LARGEST = 2.0**16
_FIRST = """reshape view transpose permute t unsqueeze squeeze expand slice select contiguous clone neg sum
    mean slice_backward select_backward div linear"""
_EITHER = "mul matmul mm bmm self_gate normalize"
#: Linear ops, by name, and the positions of the arguments that each is linear in by itself.
_LINEAR = {**dict.fromkeys(_FIRST.split(), (0,)), **dict.fromkeys(_EITHER.split(), (0, 1))}


def merged(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a relevance graph whose additions multiply by what stood before them."""
    module = copy_graph(module, "RelevanceGraph")
    _hand_on(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _hand_on(graph: fx.Graph) -> None:
    free = _free(graph)
    held: dict[Any, tuple[fx.Node, float]] = {}  # what stands for a node, and the factor that it lacks
    for node in list(graph.nodes):
        found = [held.get(x, (x, 1.0)) if isinstance(x, fx.Node) else (x, 1.0) for x in node.args]
        given, scales = tuple(x for x, _ in found), [scale for _, scale in found]
        factor = _factor(node)
        if factor is not None:
            total = factor * scales[0]
            if node in free and 1 / _LARGEST <= abs(total) <= _LARGEST:
                held[node] = given[0], total
            else:
                node.args = (given[0], total)
        elif not any(x in held for x in node.all_input_nodes):
            continue
        elif node.target is _ADD:
            held[node] = node, _add(node, given, scales, node in free)
        elif node.target is _CAT:
            held[node] = node, _join(node, held)
        else:
            node.args = given
            held[node] = node, math.prod(scales)


def _add(node: fx.Node, given: tuple[Any, ...], scales: list[float], is_free: bool) -> float:
    """Make an addition take the factors of its operands; gives the factor that the sum then lacks."""
    (first, second), (left, right) = given, scales
    alpha: Any = node.kwargs.get("alpha", 1)
    right, lacks = alpha * right, 1.0
    if left != 1.0 and right == 1.0:
        first, second, left, right = second, first, right, left
    elif left != 1.0 and is_free:
        right, lacks = right / left, left
    elif left != 1.0:
        first = _times(node, first, left)
    node.args, node.kwargs = (first, second), {} if right == 1.0 else {"alpha": right}
    return lacks


def _join(node: fx.Node, held: Mapping[Any, tuple[fx.Node, float]]) -> float:
    """Make a tensor of parts lack the factor that most of them lack; gives that factor."""
    found = [held.get(part, (part, 1.0)) for part in arg(node, 0)]
    lacks: float = Counter(scale for _, scale in found).most_common(1)[0][0]
    parts = [x if scale == lacks else _times(node, x, scale / lacks) for x, scale in found]
    node.args = (parts, *node.args[1:])
    return lacks


def _times(user: fx.Node, x: fx.Node, factor: float) -> fx.Node:
    with user.graph.inserting_before(user):
        product = user.graph.call_function(_MUL, (x, factor))
    product.meta = dict(x.meta)
    return product


def _free(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that may lack a factor: all that reads them hands it on, or adds."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _dtype(node) in _DTYPES and node.users and all(_takes(u, node, found) for u in node.users):
            found.add(node)
    return found


def _takes(user: fx.Node, node: fx.Node, free: set[fx.Node]) -> bool:
    """Whether an op hands on the factor of an operand that it reads once, or can have it on the side."""
    if sum(x is node for x in leaves(user)) != 1 or _dtype(user) is not _dtype(node):
        return False
    if _is_sum(user) or _factor(user) is not None:
        return True
    if user not in free or user.kwargs or (is_op(user, "linear") and len(user.args) > 2):
        return False
    if user.target is _CAT:
        return True
    place = next((i for i, x in enumerate(user.args) if x is node), None)
    return any(place in places and is_op(user, name) for name, places in _LINEAR.items())


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two different tensors of its own type."""
    return (
        node.target is _ADD
        and all(_dtype(x) is _dtype(node) is not None for x in node.args)
        and node.args[0] is not node.args[1]
        and isinstance(node.kwargs.get("alpha", 1), (int, float))
    )


def _factor(node: fx.Node) -> float | None:
    """The number that a node multiplies a tensor of its own type by."""
    if node.target is not _MUL or not isinstance(node.args[1], (int, float)):
        return None
    return float(node.args[1]) if _dtype(arg(node, 0)) is _dtype(node) is not None else None


def _dtype(node: Any) -> torch.dtype | None:
    """The type of the floating point tensor that a node computes."""
    found = value(node)
    is_tensor = isinstance(node, fx.Node) and isinstance(found, Tensor)
    return found.dtype if is_tensor and found.is_floating_point() else None
