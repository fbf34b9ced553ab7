"""The plan: a table of nodes and their rules."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..rules import Rule
from .activity import Source


@dataclass(frozen=True)
class Assignment:
    """One row of the plan.

    Attributes:
        node: the node's name in the graph.
        op: the op's name.
        kind: the op's kind, a key of ``fxlrp.rules.KINDS``.
        rule: the rule.
        active: which leaves of the node's ``(args, kwargs)`` get relevance.
        reason: which preset or entry of the composite decided.
        module: path of the module that the node runs in.
        source: file, line and function that made it.
    """

    node: str
    op: str
    kind: str
    rule: Rule
    active: tuple[int, ...]
    reason: str
    module: str
    source: str


@dataclass(frozen=True)
class Plan:
    """Which node gets which rule, and why; prints as a table.

    Attributes:
        rows: one per node that carries relevance, in the order of the graph.
        sources: where the explained inputs enter.
        notes: how the model was captured and what the patterns found.
    """

    rows: tuple[Assignment, ...]
    sources: tuple[Source, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Assignment]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """How many nodes each rule has."""
        return dict(Counter(row.rule.name for row in self.rows).most_common())

    def table(self, *, structural: bool = False) -> str:
        """The plan as text; structural nodes, whose relevance moves with its elements, on request."""
        rows = [r for r in self.rows if structural or r.kind not in ("structural", "add")]
        header = ("node", "op", "rule", "reason", "module", "source")
        cells = [
            (r.node, r.op, _rule_text(r.rule), r.reason, r.module, r.source.split(" in ")[0]) for r in rows
        ]
        widths = [min(40, max(len(row[i]) for row in [header, *cells])) for i in range(len(header))]
        lines = [
            "  ".join(_fit(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, tuple("-" * w for w in widths), *cells]
        ]
        hidden = len(self.rows) - len(rows)
        summary = ", ".join(f"{name} {count}" for name, count in self.counts().items())
        return "\n".join(
            [
                *lines,
                f"{len(self.rows)} nodes: {summary}"
                + (f" ({hidden} structural rows not shown)" if hidden else ""),
                *self.notes,
            ]
        )

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<fxlrp.Plan of {len(self.rows)} nodes: {self.counts()}>"


def _rule_text(rule: Rule) -> str:
    """A rule with those of its parameters that are not the default."""
    if not dataclasses.is_dataclass(rule):
        return repr(rule)
    given = [
        f"{f.name}={getattr(rule, f.name)!r}"
        for f in dataclasses.fields(rule)
        if f.repr and getattr(rule, f.name) != f.default
    ]
    return f"{type(rule).__name__}({', '.join(given)})"


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"
