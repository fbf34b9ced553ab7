"""Composites as data: which rule each node gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..errors import CompositeError
from .base import Rule
from .presets import Preset, preset
from .registry import registered_by_name
from .selectors import Selector, Site, from_data, to_data
from .serial import rule_from_data, rule_text, rule_to_data

Entry = tuple[Selector, Rule]


@dataclass(frozen=True)
class Composite:
    """Rules by selector. Prints as a table; :meth:`to_json` and :meth:`from_json` keep it as a file.

    Attributes:
        entries: pairs of a selector and a rule; the first that matches a node wins. An entry speaks only for
            the kinds of ops that its rule is defined for: ``(name("*.mlp.*"), Epsilon(0.1))`` leaves
            activations alone.
        base: name of the preset that decides what no entry matches.
        title: how reports call it.

    Raises:
        CompositeError: an unknown base, or an entry whose rule serves none of the kinds that it selects.
    """

    entries: tuple[Entry, ...] = ()
    base: str = "attnlrp"
    title: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        preset(self.base)
        for entry in self.entries:
            _refuse_unfit(entry)

    def rulebook(self) -> Rulebook:
        """Its entries and then those of its base, with the base's rules by kind behind them."""
        base = preset(self.base)
        own = [(s, r, f"entry {i} of the composite") for i, (s, r) in enumerate(self.entries)]
        its = [(s, r, f"{base.title}: {s}") for s, r in base.entries]
        return Rulebook((*own, *its), base)

    def to_json(self) -> str:
        """The composite as JSON; :meth:`from_json` reads it back equal."""
        entries = [{"select": to_data(s), **rule_to_data(r)} for s, r in self.entries]
        return json.dumps({"title": self.title, "base": self.base, "entries": entries}, indent=2)

    @staticmethod
    def from_json(text: str, rules: Iterable[type[Rule]] = ()) -> Composite:
        """A composite from its JSON.

        Args:
            text: what :meth:`to_json` gives.
            rules: classes of rules of your own that occur in it.

        Raises:
            CompositeError: unknown rules, selectors or presets; parameters that a rule does not take.
        """
        try:
            data = json.loads(text)
            entries = [(from_data(e["select"]), rule_from_data(e, rules)) for e in data["entries"]]
            return Composite(tuple(entries), data["base"], data["title"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CompositeError(f"No composite as JSON: {type(error).__name__}: {error}.") from error

    def __str__(self) -> str:
        base = preset(self.base)
        rows = [(str(i), str(s), rule_text(r)) for i, (s, r) in enumerate(self.entries)]
        rows += [(base.title, str(s), rule_text(r)) for s, r in base.entries]
        rows += [(base.title, f"op('{kind}')", rule_text(r)) for kind, r in base.rules.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([f"{self.title}, on top of {base.title} ({base.source})", *lines])


@dataclass(frozen=True)
class Choice:
    """A rule for a node, and where it comes from.

    Attributes:
        rule: the rule.
        reason: which preset or entry of the composite decided.
        entry: the entry's place in the rulebook; None for a preset's rule by kind.
    """

    rule: Rule
    reason: str
    entry: int | None = None


@dataclass(frozen=True)
class Rulebook:
    """A composite laid out: entries with the reason they give, and the preset behind them."""

    entries: tuple[tuple[Selector, Rule, str], ...]
    preset: Preset

    def map(self, change: Callable[[Selector], Selector]) -> Rulebook:
        """The same rulebook with its selectors changed, as :meth:`Selector.map` does."""
        return replace(self, entries=tuple((s.map(change), r, why) for s, r, why in self.entries))

    def choose(self, site: Site) -> Choice | None:
        """The rule for a node, or None for an op without a kind that nothing speaks for.

        An op without a kind gets the rule of an entry that means it and whose rule takes any op or that names
        the op; else the rule that was registered for it.
        """
        for i, (selector, rule, reason) in enumerate(self.entries):
            serves = rule.kinds is None or site.kind in rule.kinds
            if (serves or (not site.kind and selector.names_ops())) and selector.matches(site):
                return Choice(rule, reason, i)
        if site.kind:
            return Choice(self.preset.rules[site.kind], f"{self.preset.title}: {site.kind}")
        rule_of_op = None if self.preset.allows_any_op else registered_by_name(site.op)
        return None if rule_of_op is None else Choice(rule_of_op, "registered for this op")


def _refuse_unfit(entry: object) -> None:
    if not (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], Selector)
        and isinstance(entry[1], Rule)
    ):
        raise CompositeError(
            "Composite entries are pairs (selector, rule), as (fxlrp.op('linear'), Epsilon(1e-6)); "
            f"got {entry!r}."
        )
    selector, rule = entry
    kinds = selector.kinds()
    if kinds is not None and rule.kinds is not None and not kinds & rule.kinds:
        raise CompositeError(
            f"{rule_text(rule)} is not defined for ops of kind {', '.join(sorted(kinds))} ({selector}), "
            f"only for {', '.join(sorted(rule.kinds))}."
        )


def as_composite(composite: str | Composite) -> Composite:
    """A composite from a preset's name or from itself."""
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, str):
        return Composite(base=composite, title=composite)
    raise CompositeError(
        f"composite is a preset's name or a fxlrp.Composite, not {type(composite).__name__}."
    )
