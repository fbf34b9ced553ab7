"""What a pattern returns: a match to put in place, a miss with its reason, None where it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True, eq=False)
class Match:
    """A node that can be written as a canonical op.

    Attributes:
        node: the node to replace.
        op: the canonical op.
        args: its operands.
        kwargs: its named operands.
        pattern: the pattern's name.
    """

    node: fx.Node
    op: Callable[..., Any]
    args: tuple[Any, ...]
    pattern: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Miss:
    """A node that looks like a pattern but is not one, and why."""

    node: fx.Node
    pattern: str
    reason: str

    def __str__(self) -> str:
        return f"'{self.node.name}' is almost {self.pattern}: {self.reason}"
