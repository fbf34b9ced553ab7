"""Rules of layer-wise relevance propagation, a family a file."""

from .activation import Identity
from .attention import AttentionRule, FrozenAttention, GradientAttention
from .base import Call, Freeze, Gradient, Linearization, Rule, Taylor, WinnerTakesAll, vjp
from .composites import Composite, as_composite
from .first_layer import Box, Flat, WSquare
from .linear import Epsilon, Structural
from .norm import IdentityNorm, NormRule
from .presets import PRESETS, Preset, preset
from .product import FreezeDenominator, Uniform
from .registry import register_rule
from .selectors import Selector, first, last, module_type, name, op
from .softmax import SoftmaxTaylor
from .solve import Substitution
from .split import AlphaBeta, Gamma, ZPlus
from .table import KINDS, MULTILINEAR, OP_KINDS, kind_of

__all__ = [
    "KINDS",
    "MULTILINEAR",
    "OP_KINDS",
    "PRESETS",
    "AlphaBeta",
    "AttentionRule",
    "Box",
    "Call",
    "Composite",
    "Epsilon",
    "Flat",
    "Freeze",
    "FreezeDenominator",
    "FrozenAttention",
    "Gamma",
    "Gradient",
    "GradientAttention",
    "Identity",
    "IdentityNorm",
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
    "WSquare",
    "WinnerTakesAll",
    "ZPlus",
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
