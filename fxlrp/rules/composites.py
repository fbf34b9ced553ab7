"""Composites as data: which rule each kind of op gets."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import CompositeError
from .activation import Identity
from .attention import AttentionRule, FrozenAttention, GradientAttention
from .base import Freeze, Gradient, Rule, Taylor, WinnerTakesAll
from .linear import Epsilon, Structural
from .norm import NormRule
from .product import FreezeDenominator, Uniform
from .registry import qualified_name, registered
from .softmax import SoftmaxTaylor
from .solve import Substitution
from .table import KINDS


@dataclass(frozen=True)
class Selector:
    """Nodes by op kind, by module path (shell-style wildcards), by op; all that are given must match."""

    kind: str | None = None
    path: str | None = None
    op: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise CompositeError(f"There is no op kind {self.kind!r}. Kinds: {', '.join(KINDS)}.")

    def matches(self, kind: str, module_path: str, op: str = "") -> bool:
        """Whether a node of this kind in this module, which calls this op, is meant."""
        return (
            (self.kind is None or self.kind == kind)
            and (self.op is None or self.op == op)
            and (self.path is None or fnmatch.fnmatchcase(module_path, self.path))
        )


def op(kind: str) -> Selector:
    """All nodes of an op kind, ``op("linear")``, or of one op by the name that ``torch.library`` has for it,
    ``op("mylib::scan")``. The kinds are the keys of ``fxlrp.rules.KINDS``.
    """
    return Selector(op=kind) if "::" in kind else Selector(kind=kind)


def name(pattern: str) -> Selector:
    """All nodes inside modules whose path matches: ``name("model.layers.*.mlp.*")``."""
    return Selector(path=pattern)


@dataclass(frozen=True)
class Composite:
    """Rules by op kind.

    Attributes:
        entries: pairs of a selector and a rule; the first that matches a node wins. An entry speaks only for
            the kinds of ops that its rule is defined for: ``(name("*.mlp.*"), Epsilon(0.1))`` leaves
            activations alone.
        base: name of the preset that decides what no entry matches.
        title: how reports call it.
    """

    entries: tuple[tuple[Selector, Rule], ...] = ()
    base: str = "attnlrp"
    title: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        preset(self.base)
        for entry in self.entries:
            if not (
                isinstance(entry, tuple)
                and len(entry) == 2
                and isinstance(entry[0], Selector)
                and isinstance(entry[1], Rule)
            ):
                raise CompositeError(
                    "Composite entries are pairs (selector, rule), as (fxlrp.op('linear'), "
                    f"Epsilon(1e-6)); got {entry!r}."
                )
            selector, rule = entry
            if selector.kind is not None and rule.kinds is not None and selector.kind not in rule.kinds:
                raise CompositeError(
                    f"{rule!r} is not defined for ops of kind {selector.kind!r}, only for "
                    f"{', '.join(sorted(rule.kinds))}."
                )

    def rule(self, kind: str, module_path: str, op: str = "") -> tuple[Rule, str]:
        """The rule for a node, and where it comes from."""
        for i, (selector, rule) in enumerate(self.entries):
            if selector.matches(kind, module_path, op) and (rule.kinds is None or kind in rule.kinds):
                return rule, f"entry {i} of the composite"
        return preset(self.base).rules[kind], f"{self.base}: {kind}"

    def explicit(self, module_path: str, op: Any) -> tuple[Rule, str] | None:
        """The rule of an op without a kind: that of an entry by module path or op whose rule takes any op, or
        the one that was registered for it.
        """
        for i, (selector, rule) in enumerate(self.entries):
            meant = selector.kind is None and selector.matches("", module_path, qualified_name(op))
            if meant and (rule.kinds is None or selector.op is not None):
                return rule, f"entry {i} of the composite"
        rule_of_op = None if self.allows_any_op else registered(op)
        return None if rule_of_op is None else (rule_of_op, "registered for this op")

    @property
    def freezes_gates(self) -> bool:
        """Whether the activation in ``act(gate) * up`` counts as a constant."""
        return preset(self.base).freezes_gates

    @property
    def allows_any_op(self) -> bool:
        """Whether ops without a row in the table are differentiated as they are."""
        return preset(self.base).allows_any_op


@dataclass(frozen=True)
class Preset:
    """A named set of rules: one per kind, and what the kinds alone cannot say."""

    title: str
    source: str
    rules: Mapping[str, Rule] = field(hash=False)
    freezes_gates: bool = False
    allows_any_op: bool = False


_GRADIENT: Mapping[str, Rule] = MappingProxyType(
    {
        **{kind: Gradient() for kind in KINDS},
        "linear": Epsilon(),
        "conv": Epsilon(),
        "add": Structural(),
        "structural": Structural(),
        "attention": GradientAttention(),
    }
)

_ATTNLRP: Mapping[str, Rule] = MappingProxyType(
    {
        "linear": Epsilon(),
        "conv": Epsilon(),
        "add": Structural(),
        "structural": Structural(),
        "product": Uniform(),
        "matmul": Uniform(),
        "division": FreezeDenominator(),
        "attention": AttentionRule(),
        "attention_weights": SoftmaxTaylor(),
        "softmax": SoftmaxTaylor(),
        "norm": NormRule(),
        "activation": Identity(),
        "gate": Freeze(),
        "nonlinear": Taylor(),
        "solve": Substitution(),
        "selection": WinnerTakesAll(),
    }
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "attnlrp": Preset("attnlrp", "Achtibat et al. 2024", _ATTNLRP),
        "cp": Preset(
            "cp",
            "Ali et al. 2022 as evaluated in Achtibat et al. 2024: attention weights and gates frozen",
            MappingProxyType(
                {
                    **_ATTNLRP,
                    "attention": FrozenAttention(),
                    "attention_weights": Freeze(),
                    "softmax": Freeze(),
                }
            ),
            freezes_gates=True,
        ),
        "ali": Preset(
            "ali",
            "Ali et al. 2022, AH+LN: attention weights and norm factors frozen, nothing else",
            MappingProxyType(
                {
                    **_GRADIENT,
                    "attention": FrozenAttention(),
                    "attention_weights": Freeze(),
                    "norm": NormRule(),
                }
            ),
            allows_any_op=True,
        ),
        "gradient": Preset("gradient", "Gradient x Input: no rules", _GRADIENT, allows_any_op=True),
    }
)


def preset(title: str) -> Preset:
    """A preset by name."""
    if title not in PRESETS:
        raise CompositeError(f"There is no composite {title!r}. Presets: {', '.join(PRESETS)}.")
    return PRESETS[title]


def as_composite(composite: str | Composite) -> Composite:
    """A composite from a preset's name or from itself."""
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, str):
        return Composite(base=composite, title=composite)
    raise CompositeError(
        f"composite is a preset's name or a fxlrp.Composite, not {type(composite).__name__}."
    )
