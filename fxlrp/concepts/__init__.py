"""Concepts: which samples a latent's units stand for, and relevance through chosen units alone."""

from .conditional import ConditionalExplanation, conditional
from .references import References, reference_samples

__all__ = ["ConditionalExplanation", "References", "conditional", "reference_samples"]
