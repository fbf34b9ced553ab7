"""Locate: what selectors see of each node, and which nodes of a graph are the first and last of a kind."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import fx

from ..rules.composites import Rulebook
from ..rules.registry import qualified_name
from ..rules.selectors import First, Last, Name, Nodes, Selector, Site
from ..rules.serial import rule_text
from .graphs import contents
from .provenance import module_path, modules


def site_of(node: fx.Node, kind: str | None) -> Site:
    """A node as selectors see it."""
    types = frozenset(name for _, known in modules(node) for name in _with_bases(known))
    return Site(kind or "", module_path(node), qualified_name(node.target), node.name, types)


def located(rulebook: Rulebook, sites: Mapping[fx.Node, Site]) -> Rulebook:
    """The rulebook with each ``first(…)`` and ``last(…)`` as the nodes that it means on this graph.

    Args:
        rulebook: what may hold such selectors.
        sites: the nodes that carry relevance, in the graph's order.
    """

    return rulebook.map(functools.partial(_located, sites))


def on_graph(selector: Selector, sites: Mapping[fx.Node, Site]) -> Selector:
    """A selector with each ``first(…)`` and ``last(…)`` as the nodes that it means among these."""
    return selector.map(functools.partial(_located, sites))


def _located(sites: Mapping[fx.Node, Site], selector: Selector) -> Selector:
    if not isinstance(selector, First):
        return selector
    chosen = {node for node, site in sites.items() if selector.inner.matches(site)}
    # All nodes in between count, elements of tuples too, which are no sites.
    order = list(next(iter(sites)).graph.nodes) if sites else []
    if type(selector) is Last:
        return Nodes(_ends(chosen, order[::-1], lambda n: list(n.users)))
    return Nodes(_ends(chosen, order, lambda n: [x for x in contents(n) if isinstance(x, fx.Node)]))


def idle_entries(
    rulebook: Rulebook, count: int, given: Collection[int | None], sites: Iterable[Site]
) -> tuple[str, ...]:
    """A line for each of the first ``count`` entries that decided nothing, with the likely cause."""
    known = list(sites)
    notes = []
    for i, (selector, rule, reason) in enumerate(rulebook.entries[:count]):
        if i in given:
            continue
        meant = [site for site in known if selector.matches(site)]
        kinds = {site.kind for site in meant if site.kind}
        if not meant:
            why = f"no node that carries relevance matches{_near_paths(selector, known)}"
        elif rule.kinds is not None and not kinds & rule.kinds:
            selects, serves = (", ".join(sorted(names)) for names in (kinds, rule.kinds))
            why = f"it selects {selects} only, and its rule serves {serves}"
        else:
            why = "entries before it decide all that it selects"
        notes.append(f"{reason} ({selector}: {rule_text(rule)}) decided nothing: {why}")
    return tuple(notes)


def _near_paths(selector: Selector, sites: Iterable[Site]) -> str:
    if isinstance(selector, Name):
        near = difflib.get_close_matches(selector.pattern, {site.path for site in sites}, 3, cutoff=0.4)
        return f"; near: {', '.join(near)}" if near else ""
    return "".join(dict.fromkeys(_near_paths(part, sites) for part in selector.parts()))


def _ends(
    chosen: set[fx.Node], order: Iterable[fx.Node], before: Callable[[fx.Node], list[fx.Node]]
) -> frozenset[str]:
    """Of the chosen nodes those that no other one comes before, in this order."""
    behind: dict[fx.Node, bool] = {}
    for node in order:
        behind[node] = any(other in chosen or behind.get(other, False) for other in before(node))
    return frozenset(node.name for node in chosen if not behind[node])


@functools.cache
def _with_bases(name: str) -> tuple[str, ...]:
    """The qualified names of a type and of those that it derives from, as far as it can be found."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):  # a class may be defined inside another
        found: object = sys.modules.get(".".join(parts[:cut]))
        for part in parts[cut:]:
            found = getattr(found, part, None)
        if isinstance(found, type):
            bases = (base for base in found.__mro__ if base is not object)
            return tuple(f"{base.__module__}.{base.__qualname__}" for base in bases)
    return (name,)
