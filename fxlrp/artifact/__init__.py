"""Artifacts: explainers as files that need neither the model's code nor pickle; docs/artifacts.md."""

from .header import Header, SavedPlan, SavedRow, inspect
from .load import load
from .loaded import LoadedExplainer
from .save import save

__all__ = ["Header", "LoadedExplainer", "SavedPlan", "SavedRow", "inspect", "load", "save"]
