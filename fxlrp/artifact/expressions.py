"""Sizes of inputs: expressions in symbols as JSON, and for which inputs an artifact is valid.

An expression is an integer, a symbol's name, or ``[operator, operand, ...]``. It is evaluated over rational
numbers, without sympy, whose parser runs what it reads as code.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from ..compiler.shapes import Shapes
from ..errors import ArtifactError, InputError
from .strict import check, fields, identifier, items, refuse

_DEPTH = 40
#: Numbers above are no sizes, and those that powers make of powers would never end.
_LARGEST = 1 << 128


def _product(*factors: Any) -> Any:
    return functools.reduce(operator.mul, factors, Fraction(1))


def _sum(*terms: Any) -> Any:
    return sum(terms, Fraction(0))


def _every(*parts: Any) -> bool:
    return all(parts)


def _some(*parts: Any) -> bool:
    return any(parts)


def _power(base: Any, exponent: Any) -> Any:
    return base ** int(exponent)


def _modular(base: Any, divisor: Any, modulus: Any) -> Any:
    return math.floor(base / divisor) % modulus


def _floordiv(dividend: Any, divisor: Any) -> Any:
    return math.floor(dividend / divisor)


#: Operators by name: what computes them and how many operands they take (None for any number from 1 on).
_OPERATORS: Mapping[str, tuple[Callable[..., Any], int | None]] = {
    "add": (_sum, None),
    "mul": (_product, None),
    "pow": (_power, 2),
    "floordiv": (_floordiv, 2),
    "mod": (operator.mod, 2),
    "modular": (_modular, 3),
    "ratio": (operator.truediv, 2),
    "max": (max, None),
    "min": (min, None),
    "eq": (operator.eq, 2),
    "ne": (operator.ne, 2),
    "lt": (operator.lt, 2),
    "le": (operator.le, 2),
    "gt": (operator.gt, 2),
    "ge": (operator.ge, 2),
    "and": (_every, None),
    "or": (_some, None),
    "not": (operator.not_, 1),
}
#: sympy's and PyTorch's classes of expressions.
_CLASSES = {
    "Add": "add",
    "Mul": "mul",
    "Pow": "pow",
    "PowByNatural": "pow",
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "Mod": "mod",
    "PythonMod": "mod",
    "ModularIndexing": "modular",
    "Max": "max",
    "Min": "min",
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "And": "and",
    "Or": "or",
    "Not": "not",
}


def to_data(expression: Any) -> Any:
    """A size or condition as plain data.

    Raises:
        ArtifactError: it has a part that the format does not know.
    """
    if isinstance(expression, (int, str)):
        return int(expression) if isinstance(expression, int) else expression
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return str(expression)
    if expression.is_Rational:
        return ["ratio", int(expression.p), int(expression.q)]
    name = _CLASSES.get(type(expression).__name__)
    if name is None or (name == "pow" and not (expression.args[1].is_Integer and expression.args[1] >= 0)):
        raise ArtifactError(
            f"The sizes that this program is valid for cannot be written down: {expression}. Save one for "
            "fixed sizes: lrp_compile(model, dynamic=False)."
        )
    return [name, *map(to_data, expression.args)]


def from_data(data: Any, where: str, symbols: frozenset[str], depth: int = 0) -> Any:
    """A size or condition that was read, checked.

    Raises:
        ArtifactError: not one that :func:`to_data` gives.
    """
    if type(data) is int:
        return data
    if type(data) is str:
        if data not in symbols:
            refuse(where, f"has the symbol {data[:40]!r}, which is no size of an input")
        return data
    head, *operands = check(data, list, where) or [None]
    if type(head) is not str or head not in _OPERATORS or depth > _DEPTH:
        refuse(where, "is no expression")
    count = _OPERATORS[head][1]
    if not operands or (count is not None and len(operands) != count):
        refuse(where, f"gives {head!r} {len(operands)} operands")
    if head == "pow" and not (type(operands[1]) is int and 0 <= operands[1] <= 8):
        refuse(where, "has an exponent that is not 0 to 8")
    return [head, *(from_data(o, where, symbols, depth + 1) for o in operands)]


def evaluate(expression: Any, symbols: Mapping[str, int]) -> Any:
    """An expression at these sizes.

    Raises:
        InputError: a division by 0, or a number that is no size any more.
    """
    if isinstance(expression, int):
        return Fraction(expression)
    if isinstance(expression, str):
        return Fraction(symbols[expression])
    head, *operands = expression
    try:
        found = _OPERATORS[head][0](*(evaluate(o, symbols) for o in operands))
    except ZeroDivisionError:
        raise InputError(f"{text(expression)} has no value for these sizes.") from None
    if isinstance(found, (int, Fraction)) and max(abs(found.numerator), found.denominator) > _LARGEST:
        raise InputError("The artifact's conditions on sizes compute larger numbers than sizes can be.")
    return found


def text(expression: Any) -> str:
    """An expression to read: ``le(add(s0, 1), 64)``."""
    if not isinstance(expression, list):
        return str(expression)
    head, *operands = expression
    return f"{head}({', '.join(map(text, operands))})"


@dataclass(frozen=True)
class Sizes:
    """For which sizes of the inputs a program is valid.

    Attributes:
        shapes: of the inputs, each size an integer or an expression.
        conditions: that hold for the symbols in them.
        ranges: least and largest value of each symbol; None for no largest.
        ones: which sizes were 1, of all sizes of all inputs in order, when the program was compared with the
            model; a program is traced for sizes of 2 and more.
    """

    shapes: tuple[tuple[Any, ...], ...]
    conditions: tuple[Any, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    ones: frozenset[tuple[bool, ...]]

    @staticmethod
    def of(shapes: Shapes, ones: set[tuple[bool, ...]]) -> Sizes:
        """From the conditions of a trace."""
        symbols = {str(s) for s in _symbols(shapes.sizes)}
        conditions = [
            to_data(c)
            for c in dict.fromkeys(shapes.conditions)
            if {str(s) for s in c.free_symbols} <= symbols and c.free_symbols
        ]
        ranges = {
            str(s): (int(r.lower), int(r.upper) if r.upper.is_Integer else None)
            for s, r in shapes.ranges.items()
            if str(s) in symbols and r.lower.is_Integer
        }
        return Sizes(
            tuple(tuple(map(to_data, shape)) for shape in shapes.sizes),
            tuple(conditions),
            ranges,
            frozenset(ones),
        )

    @property
    def symbols(self) -> frozenset[str]:
        """The sizes that may change, by name."""
        return frozenset(size for shape in self.shapes for size in shape if isinstance(size, str))

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "shapes": [list(shape) for shape in self.shapes],
            "conditions": list(self.conditions),
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "ones": [list(pattern) for pattern in sorted(self.ones)],
        }

    @staticmethod
    def from_data(data: Any, where: str) -> Sizes:
        """What :meth:`to_data` gave, checked.

        Raises:
            ArtifactError: anything else.
        """
        shapes, conditions, ranges, ones = fields(
            data, where, shapes=list, conditions=list, ranges=dict, ones=list
        )
        shapes = [items(s, (int, str, list), f"{where}.shapes") for s in shapes]
        symbols = frozenset(
            identifier(size, f"{where}.shapes") for shape in shapes for size in shape if isinstance(size, str)
        )
        count = sum(map(len, shapes))
        if any(isinstance(size, int) and size < 0 for shape in shapes for size in shape):
            refuse(f"{where}.shapes", "has a negative size")
        if not ranges.keys() <= symbols:
            refuse(f"{where}.ranges", "names a symbol that is no size")
        for name, pair in ranges.items():
            low, high = pair if type(pair) is list and len(pair) == 2 else (None, None)
            check(low, int, f"{where}.ranges.{name}")
            check(high, (int, type(None)), f"{where}.ranges.{name}")
        patterns = [tuple(items(pattern, bool, f"{where}.ones")) for pattern in ones]
        if any(len(pattern) != count for pattern in patterns):
            refuse(f"{where}.ones", "does not have one entry for each size")
        return Sizes(
            tuple(tuple(from_data(s, f"{where}.shapes", symbols) for s in shape) for shape in shapes),
            tuple(from_data(c, f"{where}.conditions", symbols) for c in conditions),
            {name: (low, high) for name, (low, high) in ranges.items()},
            frozenset(patterns),
        )

    def read(self, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, int]:
        """What the symbols are for these inputs.

        Raises:
            InputError: the program is not valid for their sizes.
        """
        symbols: dict[str, int] = {}
        first: dict[str, str] = {}
        for place, size, actual in self._pairs(names, tensors):
            if isinstance(size, int) and size != actual:
                raise InputError(f"{place} is {actual}; this artifact was saved for {size}.")
            if isinstance(size, str):
                if symbols.setdefault(size, actual) != actual:
                    raise InputError(f"{place} is {actual}, but {first[size]} is {symbols[size]}.")
                first.setdefault(size, place)
                low, high = self.ranges.get(size, (0, None))
                if actual != 1 and (actual < low or (high is not None and actual > high)):
                    most = "" if high is None else f" to {high}"
                    raise InputError(f"{place} is {actual}; this artifact takes {low}{most}.")
        for place, size, actual in self._pairs(names, tensors):
            if isinstance(size, list) and evaluate(size, symbols) != actual:
                raise InputError(f"{place} is {actual}, not {text(size)} with {_values(symbols)}.")
        for condition in self.conditions:
            if not evaluate(condition, symbols):
                raise InputError(
                    f"This artifact is valid where {text(condition)}; here {_values(symbols)}, "
                    f"which are {', '.join(f'{s}: {p}' for s, p in first.items())}."
                )
        self._check_ones(names, tensors)
        return symbols

    def _check_ones(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        pattern = tuple(size == 1 for tensor in tensors for size in tensor.shape)
        places = [
            place
            for place, size, actual in self._pairs(names, tensors)
            if actual == 1 and not isinstance(size, int)
        ]
        if places and pattern not in self.ones:
            raise InputError(
                f"{places[0]} is 1, and this artifact was not compared with the model for that. Call the "
                "explainer once with such an input and save it again, or give two samples."
            )

    def _pairs(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[tuple[str, Any, int]]:
        for name, shape, tensor in zip(names, self.shapes, tensors, strict=True):
            if len(shape) != tensor.dim():
                raise InputError(
                    f"Input '{name}' has shape {tuple(tensor.shape)}; this artifact takes {len(shape)} "
                    "dimensions."
                )
            for i, (size, actual) in enumerate(zip(shape, tensor.shape, strict=True)):
                yield f"Size {i} of input '{name}'", size, actual


def _symbols(shapes: Sequence[Sequence[Any]]) -> set[Any]:
    return {s for shape in shapes for s in shape if not isinstance(s, int) and s.is_Symbol}


def _values(symbols: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in symbols.items())
