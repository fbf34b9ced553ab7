"""Rules of layer-wise relevance propagation, a family a file."""

from .activation import Identity
from .attention import AttentionRule, FrozenAttention, GradientAttention
from .base import Call, Freeze, Gradient, Linearization, Rule, Taylor, WinnerTakesAll, vjp
from .composites import Composite, as_composite
from .linear import Epsilon, Structural
from .norm import NormRule
from .presets import PRESETS, Preset, preset
from .product import FreezeDenominator, Uniform
from .registry import register_rule
from .selectors import Selector, first, last, module_type, name, op
from .softmax import SoftmaxTaylor
from .solve import Substitution
from .table import KINDS, MULTILINEAR, OP_KINDS, kind_of

__all__ = [
    "KINDS",
    "MULTILINEAR",
    "OP_KINDS",
    "PRESETS",
    "AttentionRule",
    "Call",
    "Composite",
    "Epsilon",
    "Freeze",
    "FreezeDenominator",
    "FrozenAttention",
    "Gradient",
    "GradientAttention",
    "Identity",
    "Linearization",
    "NormRule",
    "Preset",
    "Rule",
    "Selector",
    "SoftmaxTaylor",
    "Structural",
    "Substitution",
    "Taylor",
    "Uniform",
    "WinnerTakesAll",
    "as_composite",
    "first",
    "kind_of",
    "last",
    "module_type",
    "name",
    "op",
    "preset",
    "register_rule",
    "vjp",
]
