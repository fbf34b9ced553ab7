"""Rules of layer-wise relevance propagation, a family a file."""

from .activation import Identity
from .attention import AttentionRule, FrozenAttention, GradientAttention
from .base import Freeze, Gradient, Rule, Taylor, WinnerTakesAll
from .composites import PRESETS, Composite, Selector, as_composite, name, op
from .linear import Epsilon, Structural
from .norm import NormRule
from .product import FreezeDenominator, Uniform
from .softmax import SoftmaxTaylor
from .table import KINDS, MULTILINEAR, OP_KINDS, kind_of

__all__ = [
    "KINDS",
    "MULTILINEAR",
    "OP_KINDS",
    "PRESETS",
    "AttentionRule",
    "Composite",
    "Epsilon",
    "Freeze",
    "FreezeDenominator",
    "FrozenAttention",
    "Gradient",
    "GradientAttention",
    "Identity",
    "NormRule",
    "Rule",
    "Selector",
    "SoftmaxTaylor",
    "Structural",
    "Taylor",
    "Uniform",
    "WinnerTakesAll",
    "as_composite",
    "kind_of",
    "name",
    "op",
]
