"""Factors: multiplications by powers of 2 that the next addition does on the side.

Rules leave many of them behind: the halves of the uniform rule. Where no compiler fuses them, each reads and
writes a tensor of its own. Linear ops hand such a factor on, ``f(c x) = c f(x)``, until an addition takes it:
``a + c b`` is one op, ``add(a, b, alpha=c)``. Powers of 2 never round: the result is exactly the same.

Only coefficients take part: the forward stays the model's, op by op, and its ops may read strides, which
coefficients do not promise. It is a step of the eager backend: compilers fuse multiplications anyway, and
layers that are alike stay alike for them.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..rules.ops import normalize, self_gate
from .graphs import arg, copy_graph, value

_ATEN = torch.ops.aten
_ADD, _MUL, _CAT = _ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.cat.default
#: Precisions with room for values that are not multiplied yet.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Factors that are handed on are between this and one over it: others may keep clear of overflow.
_LARGEST = 2.0**16
_FIRST = """reshape transpose permute t unsqueeze squeeze expand slice select contiguous clone neg sum mean
    slice_backward select_backward div linear"""
#: Linear ops and the positions of the arguments that each is linear in by itself.
_LINEAR: dict[Any, tuple[int, ...]] = {
    **{getattr(_ATEN, name): (0,) for name in _FIRST.split()},
    **dict.fromkeys((_ATEN.mul, _ATEN.matmul, _ATEN.mm, _ATEN.bmm, self_gate, normalize), (0, 1)),
}
_PIECES, _SPLITS = (
    (_ATEN.slice, _ATEN.select),
    (_ATEN.split, _ATEN.split_with_sizes, _ATEN.chunk, _ATEN.unbind, _ATEN.tensor_split),
)
_VIEWS = (
    *_PIECES,
    *(_ATEN.reshape, _ATEN.transpose, _ATEN.permute, _ATEN.t),
    *(_ATEN.unsqueeze, _ATEN.squeeze, _ATEN.expand),
)
#: What stands for a node, and the factor that this lacks.
_Held = dict[Any, tuple[fx.Node, float]]
#: Multiplies a node by a number, before another node.
_Times = Callable[[fx.Node, float, fx.Node], fx.Node]


def merged(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a relevance graph whose additions multiply by what stood before them; the graph itself where
    that leaves as many multiplications as there were.
    """
    found = copy_graph(module, "RelevanceGraph")
    _hand_on(found.graph)
    found.graph.eliminate_dead_code()
    found.graph.lint()
    found.recompile()
    return found if _count(found.graph) < _count(module.graph) else module


def _count(graph: fx.Graph) -> int:
    return sum(_factor(node) is not None for node in graph.nodes)


def _hand_on(graph: fx.Graph) -> None:
    free = _free(graph)
    held: _Held = {}
    times = _maker()
    for node in list(graph.nodes):
        factor = _factor(node)
        if factor is not None and (node in free or arg(node, 0) in held):
            x, scale = held.get(node.args[0], (arg(node, 0), 1.0))
            if node in free and _fits(scale * factor) and not _is_piece(x):
                held[node] = x, scale * factor
            else:
                node.args = (x, scale * factor)
        elif any(x in held for x in node.all_input_nodes):
            lacks = _READERS.get(node.target, _linear)(node, held, times, node in free)
            if lacks != 1.0:
                held[node] = node, lacks


def _add(node: fx.Node, held: _Held, times: _Times, may_lack: bool) -> float:
    """Make an addition take the factors of its operands; gives the factor that the sum then lacks."""
    (first, left), (second, right) = (held.get(x, (x, 1.0)) for x in node.all_input_nodes)
    alpha: Any = node.kwargs.get("alpha", 1)
    right, lacks = alpha * right, 1.0
    if left != 1.0 and right == 1.0 and _is_alike(first, second):
        first, second, left, right = second, first, right, left
    elif left != 1.0 and right != 1.0 and may_lack and _fits(right / left):
        left, right, lacks = 1.0, right / left, left
    if left != 1.0:
        first = times(first, left, node)
    node.args, node.kwargs = (first, second), {} if right == 1.0 else {"alpha": right}
    return lacks


def _join(node: fx.Node, held: _Held, times: _Times, may_lack: bool) -> float:
    """Make a tensor of parts lack the factor that most of them lack; gives that factor."""
    found = [held.get(part, (part, 1.0)) for part in arg(node, 0)]
    lacks: float = Counter(scale for _, scale in found).most_common(1)[0][0]
    if not all(_fits(scale / lacks) for _, scale in found):
        lacks = 1.0
    parts = [x if scale == lacks else times(x, scale / lacks, node) for x, scale in found]
    node.args = (parts, *node.args[1:])
    return lacks


def _linear(node: fx.Node, held: _Held, times: _Times, may_lack: bool) -> float:
    """Make an op hand on the factors of its operands, as far as their product is none to keep."""
    lacks, given = 1.0, list(node.args)
    for i, x in enumerate(given):
        if isinstance(x, fx.Node) and x in held:
            given[i], scale = held[x]
            if _fits(lacks * scale):
                lacks *= scale
            else:
                given[i] = times(held[x][0], scale, node)
    node.args = tuple(given)
    return lacks


_READERS = {_ADD: _add, _CAT: _join}


def _maker() -> _Times:
    """Makes a product once for each node and number, before the first that reads it."""
    made: dict[tuple[fx.Node, float], fx.Node] = {}

    def times(x: fx.Node, factor: float, reader: fx.Node) -> fx.Node:
        if (x, factor) not in made:
            with reader.graph.inserting_before(reader):
                made[x, factor] = reader.graph.call_function(_MUL, (x, factor))
            made[x, factor].meta = dict(x.meta)
        return made[x, factor]

    return times


def _free(graph: fx.Graph) -> set[fx.Node]:
    """Coefficients that may lack a factor: all that reads them hands it on, or adds."""
    coefficients: set[fx.Node] = set()
    for node in graph.nodes:
        if "relevance_of" in node.meta or not coefficients.isdisjoint(node.all_input_nodes):
            coefficients.add(node)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_known = node in coefficients and node.users and _dtype(node) in _DTYPES
        if is_known and all(_takes(user, node, found) for user in node.users):
            found.add(node)
    return found


def _is_piece(node: fx.Node) -> bool:
    """Whether a node is part of a larger tensor, whose memory is free sooner if a product takes its place."""
    while getattr(node.target, "overloadpacket", None) in _VIEWS:
        if node.target.overloadpacket in _PIECES:  # type: ignore[union-attr]
            return True
        node = arg(node, 0)
    is_element = node.target is operator.getitem
    return is_element and getattr(arg(node, 0).target, "overloadpacket", None) in _SPLITS


def _takes(user: fx.Node, node: fx.Node, free: set[fx.Node]) -> bool:
    """Whether an op hands on the factor of an operand that it reads once, or can have it on the side."""
    if user.op != "call_function" or _dtype(user) is not _dtype(node):
        return False
    if user.target is _CAT:
        parts = arg(user, 0)
        return user in free and parts.count(node) == 1 and all(_dtype(x) is _dtype(node) for x in parts)
    places = [i for i, x in enumerate(user.args) if x is node]
    if len(places) != 1:
        return False
    if _is_sum(user) or _factor(user) is not None:
        return True
    linear = _LINEAR.get(getattr(user.target, "overloadpacket", user.target), ())
    has_bias = user.target is _ATEN.linear.default and len(user.args) > 2
    return user in free and not user.kwargs and places[0] in linear and not has_bias


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own type."""
    return (
        node.target is _ADD
        and all(_dtype(x) is _dtype(node) is not None for x in node.args)
        and isinstance(node.kwargs.get("alpha", 1), (int, float))
    )


def _is_alike(first: fx.Node, second: fx.Node) -> bool:
    """Whether operands may change places: the first one's strides are the result's."""
    left, right = value(first), value(second)
    return str((left.shape, left.stride())) == str((right.shape, right.stride()))


def _factor(node: fx.Node) -> float | None:
    """The power of 2 that a node multiplies a tensor of its own type by; with other numbers it rounds."""
    number = node.args[1] if node.target is _MUL else None
    if not isinstance(number, (int, float)) or abs(math.frexp(number)[0]) != 0.5:
        return None
    return float(number) if _dtype(arg(node, 0)) is _dtype(node) is not None else None


def _fits(factor: float) -> bool:
    return 1 / _LARGEST <= abs(factor) <= _LARGEST


def _dtype(node: Any) -> torch.dtype | None:
    """The type of the floating point tensor that a node computes."""
    found = value(node)
    is_tensor = isinstance(node, fx.Node) and isinstance(found, Tensor)
    return found.dtype if is_tensor and found.is_floating_point() else None
