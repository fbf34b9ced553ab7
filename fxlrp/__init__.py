"""fxlrp: compile any Transformer into its layer-wise relevance propagation."""

from . import concepts
from ._version import __version__ as __version__
from .artifact import LoadedExplainer, load
from .errors import (
    ArtifactError,
    CaptureError,
    CompositeError,
    CompositeWarning,
    FxlrpError,
    InputError,
    NonFiniteError,
    NoPathError,
    StochasticModelError,
    TargetError,
    UncoveredOpError,
)
from .explainer import Explainer, lrp_compile
from .explanation import Explanation
from .ledger import Ledger
from .maps import JVP, VJP
from .rules import PRESETS, Composite, first, last, module_type, name, op, register_rule
from .similarity import Similarity, SimilarityExplanation
from .targets import Function, Logit, LogitDifference, LogProb, Predicted, Span, Target, TopK

#: The names that ``composite=`` takes.
composites = tuple(PRESETS)

__all__ = [
    "JVP",
    "VJP",
    "ArtifactError",
    "CaptureError",
    "Composite",
    "CompositeError",
    "CompositeWarning",
    "Explainer",
    "Explanation",
    "Function",
    "FxlrpError",
    "InputError",
    "Ledger",
    "LoadedExplainer",
    "LogProb",
    "Logit",
    "LogitDifference",
    "NoPathError",
    "NonFiniteError",
    "Predicted",
    "Similarity",
    "SimilarityExplanation",
    "Span",
    "StochasticModelError",
    "Target",
    "TargetError",
    "TopK",
    "UncoveredOpError",
    "composites",
    "concepts",
    "first",
    "last",
    "load",
    "lrp_compile",
    "module_type",
    "name",
    "op",
    "register_rule",
]
