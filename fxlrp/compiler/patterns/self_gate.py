"""Hand-written activations: ``x * g(x)`` with an elementwise g: SiLU, GELU, quick GELU, Mish, Hardswish.

No list of formulas: the gate is recognised by being an elementwise function of the other factor alone, so
f(0) = 0 and f(x)/x = g(x) hold by construction.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ...rules import ops
from ..graphs import is_op, value, without_casts
from .match import Match, Miss

_POINTWISE = (
    "sigmoid",
    "tanh",
    "erf",
    "erfc",
    "exp",
    "softplus",
    "relu",
    "relu6",
    "hardtanh",
    "hardsigmoid",
    "clamp",
    "clamp_min",
    "clamp_max",
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "square",
    "neg",
    "abs",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "log",
    "log1p",
    "expm1",
    "log_sigmoid",
    "gt",
    "ge",
    "lt",
    "le",
    "sin",
    "cos",
    "to",
    "to_copy",
    "type_as",
    "float",
    "clone",
    "contiguous",
    "alias",
    "dropout",
    "lift_fresh_copy",
)


def match_self_gate(node: fx.Node) -> Match | Miss | None:
    """``c x * g(x)`` or ``g(x) * c x`` with an elementwise g and a constant c."""
    if not is_op(node, "mul", "multiply"):
        return None
    first, second = node.args[:2]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return None
    for carrier, gate in ((first, second), (second, first)):
        base = _unscaled(carrier)
        if carrier is not gate and base is not without_casts(gate) and _function_of(gate, base, 24):
            if value(carrier).shape != value(gate).shape:
                return Miss(node, "an activation x * g(x)", "the gate is broadcast")
            return Match(node, ops.self_gate, (carrier, gate), "activation x * g(x)")
    return None


def is_gate_of(carrier: object, gate: object) -> bool:
    """Whether ``carrier * gate`` is an activation ``c x * g(x)``."""
    if not (isinstance(carrier, fx.Node) and isinstance(gate, fx.Node)) or carrier is gate:
        return False
    base = _unscaled(carrier)
    return (
        base is not without_casts(gate)
        and _function_of(gate, base, 24)
        and value(carrier).shape == value(gate).shape
    )


def _unscaled(node: Any) -> Any:
    """The x in ``c * x``."""
    node = without_casts(node)
    while True:
        if (is_op(node, "mul", "div") and isinstance(node.args[1], (int, float))) or is_op(node, "neg"):
            node = without_casts(node.args[0])
        elif is_op(node, "mul") and isinstance(node.args[0], (int, float)):
            node = without_casts(node.args[1])
        else:
            return node


def _function_of(node: Any, x: fx.Node, depth: int) -> bool:
    """Whether a node is an elementwise function of x and of constants only."""
    if without_casts(node) is x:
        return True
    if depth == 0 or not is_op(node, *_POINTWISE):
        return False
    operands = [
        a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a.op != "get_attr"
    ]
    if is_op(node, "type_as"):
        operands = operands[:1]
    return bool(operands) and all(_function_of(a, x, depth - 1) for a in operands)
