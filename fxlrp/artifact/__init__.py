"""Artifacts: explainers as files that need neither the model's code nor pickle to be read; docs/artifacts.md."""

from .load import Header, LoadedExplainer, SavedPlan, SavedRow, inspect, load
from .save import save

__all__ = ["Header", "LoadedExplainer", "SavedPlan", "SavedRow", "inspect", "load", "save"]
