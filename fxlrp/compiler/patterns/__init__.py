"""Patterns that bring different spellings of one step to one op, a pattern a file."""

from .attention import match_attention
from .match import Match, Miss
from .norm import match_norm
from .scan import scan_parameters
from .self_gate import is_gate_of, match_self_gate

__all__ = [
    "Match",
    "Miss",
    "is_gate_of",
    "match_attention",
    "match_norm",
    "match_self_gate",
    "scan_parameters",
]
