"""For which input sizes a captured graph is valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shapes:
    """Sizes of the inputs as integers or expressions in symbols, with the conditions the trace relied on.

    A size of 1 is let through although torch.export assumes sizes of 2 or more: the graph holds for it, as
    the caller checks on the first such input, by comparing with the model itself.
    """

    sizes: tuple[tuple[Any, ...], ...]
    conditions: tuple[Any, ...]
    ranges: dict[Any, Any]

    @staticmethod
    def of(values: Sequence[Any]) -> Shapes:
        """From the placeholders' fake tensors."""
        sizes = tuple(tuple(expression(size) for size in value.shape) for value in values)
        env = next((v.fake_mode.shape_env for v in values if getattr(v, "fake_mode", None) is not None), None)
        if env is None:
            return Shapes(sizes, (), {})
        return Shapes(sizes, tuple(guard.expr for guard in env.guards), dict(env.var_to_range))

    @property
    def is_dynamic(self) -> bool:
        """Whether any size may change."""
        return any(not isinstance(size, int) for shape in self.sizes for size in shape)

    def admit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph was traced for inputs of these sizes."""
        symbols: dict[Any, int] = {}
        compound = []
        for shape, tensor in zip(self.sizes, tensors, strict=True):
            if len(shape) != tensor.dim():
                return False
            for size, actual in zip(shape, tensor.shape, strict=True):
                if isinstance(size, int):
                    if size != actual:
                        return False
                elif size.is_Symbol:
                    if symbols.setdefault(size, actual) != actual:
                        return False
                else:
                    compound.append((size, actual))
        if any(expr.xreplace(integers(symbols)) != actual for expr, actual in compound):
            return False
        for symbol, actual in symbols.items():
            bounds = self.ranges.get(symbol)
            if bounds is not None and not (actual == 1 or bounds.lower <= actual <= bounds.upper):
                return False
        return all(self._holds(condition, symbols) for condition in self.conditions)

    def evaluate(self, shape: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """A symbolic shape at the sizes of these inputs."""
        symbols = {
            size: actual
            for sizes, tensor in zip(self.sizes, tensors, strict=True)
            for size, actual in zip(sizes, tensor.shape, strict=True)
            if not isinstance(size, int)
        }
        expressions = [expression(size) for size in shape]
        return tuple(e if isinstance(e, int) else int(e.xreplace(integers(symbols))) for e in expressions)

    @staticmethod
    def _holds(condition: Any, symbols: dict[Any, int]) -> bool:
        if not condition.free_symbols <= symbols.keys():
            return True  # about sizes inside the graph, not of the inputs
        return bool(condition.xreplace(integers(symbols)))


def integers(symbols: dict[Any, int]) -> dict[Any, Any]:
    """What symbols stand for, as sympy has it."""
    import sympy

    return {symbol: sympy.Integer(value) for symbol, value in symbols.items()}


def expression(size: int | torch.SymInt) -> Any:
    """A size as an integer or an expression in symbols."""
    if isinstance(size, int):
        return size
    found = size.node.expr
    return int(found) if found.is_Integer else found
