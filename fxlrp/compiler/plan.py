"""The plan: a table of nodes and their rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..rules import Rule
from ..rules.serial import rule_text
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
        entry: which entry of the composite decided, None for the preset.
    """

    node: str
    op: str
    kind: str
    rule: Rule
    active: tuple[int, ...]
    reason: str
    module: str
    source: str
    entry: int | None = None


@dataclass(frozen=True)
class Plan:
    """Which node gets which rule, and why; prints as a table.

    Attributes:
        rows: one per node that carries relevance, in the order of the graph.
        sources: where the explained inputs enter.
        notes: how the model was captured and what the patterns found.
        idle: which entries of the composite decided nothing, and why.
        here: what was chosen for this processor; artifacts leave it out.
    """

    rows: tuple[Assignment, ...]
    sources: tuple[Source, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    here: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Assignment]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """How many nodes each rule has."""
        return dict(Counter(row.rule.name for row in self.rows).most_common())

    def table(self, *, structural: bool = False) -> str:
        """The plan as text; structural nodes, whose relevance moves with its elements, on request."""
        rows = [
            (r.kind, r.rule.name, (r.node, r.op, rule_text(r.rule), r.reason, r.module, r.source))
            for r in self.rows
        ]
        return layout(rows, (*self.notes, *self.idle, *self.here), structural=structural)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<fxlrp.Plan of {len(self.rows)} nodes: {self.counts()}>"


#: Columns of a plan's table.
_HEADER = ("node", "op", "rule", "reason", "module", "source")
#: Kinds of ops whose rows are shown on request.
_STRUCTURAL = ("structural", "add")


def layout(
    rows: Sequence[tuple[str, str, tuple[str, ...]]], notes: Sequence[str], *, structural: bool
) -> str:
    """A plan as text, of each row's kind, rule's name and cells."""
    shown = [cells for kind, _, cells in rows if structural or kind not in _STRUCTURAL]
    cells = [(*c[:-1], c[-1].split(" in ")[0]) for c in shown]
    widths = [min(40, max(len(row[i]) for row in [_HEADER, *cells])) for i in range(len(_HEADER))]
    lines = [
        "  ".join(_fit(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [_HEADER, tuple("-" * w for w in widths), *cells]
    ]
    counts = Counter(name for _, name, _ in rows).most_common()
    hidden = len(rows) - len(cells)
    summary = f"{len(rows)} nodes: {', '.join(f'{name} {count}' for name, count in counts)}"
    return "\n".join([*lines, summary + (f" ({hidden} structural rows not shown)" if hidden else ""), *notes])


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"
