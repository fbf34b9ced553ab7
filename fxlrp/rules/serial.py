"""Rules as plain data, for composites in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..errors import CompositeError
from .activation import Identity
from .attention import AttentionRule, FrozenAttention, GradientAttention
from .base import Freeze, Gradient, Rule, Taylor, WinnerTakesAll
from .first_layer import Box, Flat, WSquare
from .linear import Epsilon, Structural
from .norm import IdentityNorm, NormRule
from .product import FreezeDenominator, Uniform
from .selectors import nearest
from .softmax import SoftmaxTaylor
from .solve import Substitution
from .split import AlphaBeta, Gamma, ZPlus

_CLASSES: tuple[type[Rule], ...] = (
    AlphaBeta,
    AttentionRule,
    Box,
    Epsilon,
    Flat,
    Freeze,
    FreezeDenominator,
    FrozenAttention,
    Gamma,
    Gradient,
    GradientAttention,
    Identity,
    IdentityNorm,
    NormRule,
    SoftmaxTaylor,
    Structural,
    Substitution,
    Taylor,
    Uniform,
    WSquare,
    WinnerTakesAll,
    ZPlus,
)
#: The library's rules by name.
RULES: Mapping[str, type[Rule]] = {kind.__name__: kind for kind in _CLASSES}


def parameters(rule: Rule) -> dict[str, Any]:
    """A rule's parameters that differ from their defaults."""
    return {f.name: v for f in fields(rule) if (v := getattr(rule, f.name)) != f.default}  # type: ignore[arg-type]


def rule_text(rule: Rule) -> str:
    """A rule as it would be written, without what is default: ``Epsilon(epsilon=0.001)``."""
    return f"{type(rule).__name__}({', '.join(f'{k}={v!r}' for k, v in parameters(rule).items())})"


def rule_to_data(rule: Rule) -> dict[str, Any]:
    """A rule as plain data: ``{"rule": "Epsilon", "epsilon": 0.001}``."""
    return {"rule": type(rule).__name__, **parameters(rule)}


def rule_from_data(data: Mapping[str, Any], own: Iterable[type[Rule]] = ()) -> Rule:
    """A rule from what :func:`rule_to_data` made of it; ``own`` are classes beside the library's.

    Raises:
        CompositeError: an unknown rule, or parameters that it does not take.
    """
    known = {**RULES, **{kind.__name__: kind for kind in own}}
    name = str(data["rule"])
    if name not in known:
        raise CompositeError(
            f"There is no rule {name!r}{nearest(name, known)}. Rules: {', '.join(known)}; "
            "classes of your own: from_json(text, rules=(MyRule,))."
        )
    given = {k: _tuples(v) for k, v in data.items() if k not in ("rule", "select")}
    try:
        return known[name](**given)
    except TypeError as error:
        takes = ", ".join(f.name for f in fields(known[name])) or "no parameters"  # type: ignore[arg-type]
        raise CompositeError(f"{name} takes {takes}: {error}.") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
