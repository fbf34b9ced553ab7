"""Decomposed normalisation: ``x * rsqrt(mean(x^2) + eps)`` in all its spellings.

Only the core is matched, the product of x with 1/std or 1/rms of x. Casts before it, the weight after it
(multiplied before or after casting back, with or without ``1 +``) and the bias are linear in x and need no
pattern, so the same few lines cover every spelling. The centring of a LayerNorm, ``x - mean(x)``, is linear
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from ...rules import ops
from ..graphs import is_op, without_casts
from .match import Match, Miss

_NAME = "a normalisation"


def match_norm(node: fx.Node) -> Match | Miss | None:
    """``x * f`` with f = 1/rms(x) or 1/std(x), or ``x / d`` with d = rms(x), std(x) or |x|."""
    if is_op(node, "mul", "multiply"):
        for x, factor in (node.args[:2], node.args[1::-1]):
            inverse = _inverse_deviation(factor)
            if inverse is not None:
                return _core(node, x, inverse, ops.normalize, factor)
    elif is_op(node, "div", "divide", "true_divide") and "rounding_mode" not in node.kwargs:
        x, deviation = node.args[:2]
        power = _deviation(deviation)
        if power is not None:
            return _core(node, x, power, ops.normalize_divide, deviation)
    return None


def _core(node: fx.Node, x: Any, of: fx.Node, op: Any, factor: Any) -> Match | Miss | None:
    if not isinstance(x, fx.Node):
        return None  # 1/std by itself, which the product with x will match
    normalized = {_key(y) for plain in _unweighted(x) for y in (plain, _centred(plain))} - {None}
    measured = {_key(of), _key(_centred(of))} - {None}
    if normalized & measured:
        return Match(node, op, (x, factor), "normalisation")
    return Miss(node, _NAME, f"the statistic is taken of '{of.name}', the product is with '{x}'")


def _inverse_deviation(node: Any) -> Any:
    """The y in ``1 / rms(y)``, or None."""
    node = _unshaped(without_casts(node))
    if is_op(node, "mul") and isinstance(node.args[1], (int, float)):
        node = _unshaped(without_casts(node.args[0]))
    if is_op(node, "rsqrt"):
        return _power(node.args[0])
    if is_op(node, "pow") and node.args[1] == -0.5:
        return _power(node.args[0])
    if is_op(node, "reciprocal"):
        return _deviation(node.args[0])
    if is_op(node, "div") and isinstance(node.args[0], (int, float)):
        return _deviation(node.args[1])
    return None


def _deviation(node: Any) -> Any:
    """The y in ``rms(y)``, ``std(y)`` or ``|y|``, with or without an epsilon, or None."""
    node = _plus_epsilon(_unshaped(_plus_epsilon(without_casts(node))))
    if is_op(node, "mul", "div") and isinstance(node.args[1], (int, float)):
        node = _plus_epsilon(without_casts(node.args[0]))
    if is_op(node, "sqrt") or (is_op(node, "pow") and node.args[1] == 0.5):
        return _power(node.args[0])
    if is_op(node, "getitem") and is_op(node.args[0], "std_mean") and node.args[1] == 0:
        return node.args[0].args[0]
    if is_op(node, "std", "linalg_vector_norm", "linalg_norm", "norm"):
        order = node.args[1] if len(node.args) > 1 and not is_op(node, "std") else 2
        return node.args[0] if order in (2, 2.0) or not isinstance(order, (int, float)) else None
    return None


def _power(node: Any) -> Any:
    """The y in ``mean(y^2)``, ``sum(y^2)`` or ``var(y)``, with or without an epsilon, or None."""
    node = _plus_epsilon(without_casts(node))
    if is_op(node, "mul", "div") and isinstance(node.args[1], (int, float)):
        node = without_casts(node.args[0])
    if is_op(node, "var"):
        return node.args[0]
    if is_op(node, "getitem") and is_op(node.args[0], "var_mean") and node.args[1] == 0:
        return node.args[0].args[0]
    if not is_op(node, "mean", "sum"):
        return None
    square = without_casts(node.args[0])
    if is_op(square, "pow") and square.args[1] == 2:
        return square.args[0]
    if is_op(square, "square"):
        return square.args[0]
    if is_op(square, "mul") and square.args[0] is square.args[1]:
        return square.args[0]
    return None


def _plus_epsilon(node: Any) -> Any:
    """What is below an added or clamped-in epsilon."""
    if is_op(node, "add", "clamp_min", "clamp", "maximum", "max"):
        first = node.args[0]
        other = node.args[1] if len(node.args) > 1 else None
        if other is None or isinstance(other, (int, float)) or getattr(other, "op", "") == "get_attr":
            return without_casts(first)
        if isinstance(first, (int, float)) or getattr(first, "op", "") == "get_attr":
            return without_casts(other)
    return node


def _centred(node: Any) -> Any:
    """The x in ``x - mean(x)``, or None."""
    node = without_casts(node)
    if is_op(node, "sub"):
        mean = without_casts(node.args[1])
        if is_op(mean, "getitem") and is_op(mean.args[0], "var_mean", "std_mean") and mean.args[1] == 1:
            mean = mean.args[0]
        if is_op(mean, "mean", "var_mean", "std_mean") and _key(mean.args[0]) == _key(node.args[0]):
            return node.args[0]
    return None


def _unweighted(node: Any) -> Iterator[Any]:
    """A node, and what is below each of the weights and constants that multiply it."""
    node = without_casts(node)
    yield node
    while is_op(node, "mul", "multiply"):
        first, second = node.args[:2]
        if _is_constant(second):
            node = without_casts(first)
        elif _is_constant(first):
            node = without_casts(second)
        else:
            break
        yield node


def _is_constant(node: Any) -> bool:
    return isinstance(node, (int, float)) or getattr(without_casts(node), "op", "") == "get_attr"


def _unshaped(node: Any) -> Any:
    """What is below added and expanded dimensions."""
    while is_op(node, "expand", "expand_as", "unsqueeze", "view", "reshape"):
        node = without_casts(node.args[0])
    return node


def _key(node: Any) -> Any:
    return without_casts(node) if isinstance(node, fx.Node) else None
