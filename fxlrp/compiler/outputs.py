"""The model's output as a flat tuple of tensors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class _Slot:
    """The place of tensor number ``index`` in the output."""

    index: int


@dataclass(frozen=True, eq=False)
class Outputs:
    """The structure of a model's output, with slots for its tensors.

    Containers that are neither tuples, lists, mappings nor dataclasses (caches, say) hold nothing that a
    target could read and stand as None.
    """

    structure: Any

    def rebuild(self, tensors: Any) -> Any:
        """The model's output with these tensors in its slots."""
        return _map(self.structure, _Slot, lambda slot: tensors[slot.index])

    def logits(self) -> int | None:
        """Where the logits are: the output itself, its field ``logits`` or a tuple's first tensor."""
        structure = self.structure
        if isinstance(structure, _Slot):
            return structure.index
        field = (
            structure.get("logits") if isinstance(structure, Mapping) else getattr(structure, "logits", None)
        )
        if field is None and type(structure) in (tuple, list) and structure:
            field = structure[0]
        return field.index if isinstance(field, _Slot) else None

    def describe(self) -> str:
        """The output's type and fields, for messages."""
        structure = self.structure
        if isinstance(structure, Mapping):
            return f"{type(structure).__name__} with {', '.join(map(str, structure))}"
        return type(structure).__name__


def flatten_output(output: Any) -> tuple[tuple[Tensor, ...], Outputs]:
    """Tensors of an output in order, and its structure."""
    tensors: list[Tensor] = []

    def slot(tensor: Tensor) -> _Slot:
        tensors.append(tensor)
        return _Slot(len(tensors) - 1)

    structure = _map(output, Tensor, slot)
    return tuple(tensors), Outputs(structure)


def _map(value: Any, leaf: type, function: Any) -> Any:
    if isinstance(value, leaf):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        items = {key: _map(item, leaf, function) for key, item in value.items()}
        return _build(type(value), items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, leaf, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, leaf, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _map(getattr(value, f.name), leaf, function) for f in dataclasses.fields(value) if f.init
        }
        return dataclasses.replace(value, **fields)
    return None


def _build(kind: type, items: dict[str, Any]) -> Any:
    try:
        return kind(**items)
    except TypeError:
        return items
