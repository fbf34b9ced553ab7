"""Strict JSON: what is not exactly as the format has it is refused, with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from ..errors import ArtifactError

T = TypeVar("T")
#: Sizes, strides, offsets and integer arguments.
_LIMIT = 2**63
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}", re.ASCII)


def parse(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        ArtifactError: no JSON, a key twice, NaN or an infinity, an integer of more than 64 bits, too deep.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_bounded_int
        )
    except RecursionError:
        raise ArtifactError(f"{where} is nested too deeply: it is damaged.") from None
    except ValueError as error:
        raise ArtifactError(f"{where} is not the JSON that it should be: {error}.") from error


def dump(data: Any) -> str:
    """Plain data as JSON, the same text for the same data."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def fields(data: Any, where: str, **kinds: Any) -> list[Any]:
    """The values of an object with exactly these keys, each of its type (or one of several), in this order.

    Raises:
        ArtifactError: no object, a key too many or too few, or a value of another type.
    """
    if type(data) is not dict:
        refuse(where, f"is {_kind(data)}, not an object")
    if data.keys() != kinds.keys():
        wrong = sorted(map(str, data.keys() ^ kinds.keys()))
        refuse(where, f"has or lacks the keys {', '.join(map(repr, wrong[:5]))}")
    for key, kind in kinds.items():
        check(data[key], kind, f"{where}.{key}")
    return [data[key] for key in kinds]


def check(value: Any, kind: type[T] | tuple[Any, ...], where: str) -> T:
    """A value of exactly this type: True is no int.

    Raises:
        ArtifactError: of another type.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        refuse(where, f"is {_kind(value)}, not {' or '.join(k.__name__ for k in kinds)}")
    found: T = value
    return found


def items(data: Any, kind: Any, where: str) -> list[Any]:
    """The elements of a list, each of this type."""
    return [check(item, kind, f"{where}[{i}]") for i, item in enumerate(check(data, list, where))]


def identifier(text: Any, where: str) -> str:
    """A name that may stand in generated code: ASCII letters, digits and underscores."""
    name: str = check(text, str, where)
    if not _NAME.fullmatch(name):
        refuse(where, f"is no name: {name[:60]!r}")
    return name


def sizes(data: Any, where: str) -> tuple[int, ...]:
    """A list of integers of 0 or more."""
    found = items(data, int, where)
    if any(size < 0 for size in found):
        refuse(where, f"has a negative size: {found}")
    return tuple(found)


def unique(names: Sequence[str], where: str) -> None:
    """Refuse a name that comes twice."""
    if len(set(names)) != len(names):
        refuse(where, f"has {next(n for n in names if names.count(n) > 1)!r} twice")


def refuse(where: str, why: str) -> NoReturn:
    """Raise the error for a place that is not as the format has it."""
    raise ArtifactError(f"The artifact is damaged or not one of this format: {where} {why}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _bounded_int(text: str) -> int:
    value = int(text)
    if not -_LIMIT <= value < _LIMIT:
        raise ValueError("an integer has more than 64 bits")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
