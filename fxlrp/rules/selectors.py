"""Selectors: which nodes of a graph an entry of a composite means; they combine by ``&``, ``|``, ``~``."""

from __future__ import annotations

import abc
import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from ..errors import CompositeError
from .table import KINDS


@dataclass(frozen=True)
class Site:
    """What a selector sees of a node.

    Attributes:
        kind: its op's kind, a key of ``fxlrp.rules.KINDS``; '' for an op without one.
        path: path of the innermost module that it runs in, as ``model.named_modules()`` has it.
        op: the op by the name that ``torch.library`` has for it.
        node: its name in the graph.
        types: qualified names of the types of all modules around it, and of their bases.
    """

    kind: str
    path: str = ""
    op: str = ""
    node: str = ""
    types: frozenset[str] = frozenset()


class Selector(abc.ABC):
    """Chooses nodes; ``a & b`` both, ``a | b`` either, ``~a`` all others."""

    @abc.abstractmethod
    def matches(self, site: Site) -> bool:
        """Whether a node is meant."""

    def kinds(self) -> frozenset[str] | None:
        """The kinds that the nodes it means can be of; None for any."""
        return None

    def names_ops(self) -> bool:
        """Whether it names single ops, so that it may also mean ops without a kind."""
        return False

    def parts(self) -> tuple[Selector, ...]:
        """The selectors that it is made of."""
        return ()

    def map(self, change: Callable[[Selector], Selector]) -> Selector:
        """The same selector with each of its parts changed, from the inside out, and then itself."""
        return change(self)

    def __and__(self, other: Selector) -> Selector:
        return _joined(All, self, other)

    def __or__(self, other: Selector) -> Selector:
        return _joined(AnyOf, self, other)

    def __invert__(self) -> Selector:
        return Not(self)


@dataclass(frozen=True)
class Kind(Selector):
    """All nodes of an op kind."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CompositeError(
                f"There is no op kind {self.kind!r}{nearest(self.kind, KINDS)}. Kinds: {', '.join(KINDS)}."
            )

    def matches(self, site: Site) -> bool:
        return site.kind == self.kind

    def kinds(self) -> frozenset[str] | None:
        return frozenset({self.kind})

    def __str__(self) -> str:
        return f"op('{self.kind}')"


@dataclass(frozen=True)
class Op(Selector):
    """All nodes that call one op, by the name that ``torch.library`` has for it."""

    op: str

    def matches(self, site: Site) -> bool:
        return site.op == self.op

    def names_ops(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"op('{self.op}')"


@dataclass(frozen=True)
class Name(Selector):
    """All nodes inside modules whose path matches a pattern with shell-style wildcards."""

    pattern: str

    def matches(self, site: Site) -> bool:
        return fnmatch.fnmatchcase(site.path, self.pattern)

    def __str__(self) -> str:
        return f"name('{self.pattern}')"


@dataclass(frozen=True)
class ModuleType(Selector):
    """All nodes inside modules of a type or of one that derives from it; wildcards allowed."""

    type: str

    def matches(self, site: Site) -> bool:
        return any(
            fnmatch.fnmatchcase(known, self.type) or known.rpartition(".")[2] == self.type
            for known in site.types
        )

    def __str__(self) -> str:
        return f"module_type('{self.type}')"


@dataclass(frozen=True)
class Nodes(Selector):
    """Nodes of one graph by their names: what ``first`` and ``last`` come to on it."""

    names: frozenset[str]

    def matches(self, site: Site) -> bool:
        return site.node in self.names


@dataclass(frozen=True)
class First(Selector):
    """Of the nodes of a selector those that none other of them leads to, from the explained inputs on."""

    inner: Selector

    def __post_init__(self) -> None:
        _refuse_other(self.inner)

    def matches(self, site: Site) -> bool:
        raise CompositeError(f"{self} means nothing without a graph; the compiler locates it on one.")

    def kinds(self) -> frozenset[str] | None:
        return self.inner.kinds()

    def parts(self) -> tuple[Selector, ...]:
        return (self.inner,)

    def map(self, change: Callable[[Selector], Selector]) -> Selector:
        return change(type(self)(self.inner.map(change)))

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}({self.inner})"


@dataclass(frozen=True)
class Last(First):
    """Of the nodes of a selector those that lead to none other of them, on the way to the target."""


@dataclass(frozen=True)
class All(Selector):
    """Nodes that every one of several selectors means."""

    of: tuple[Selector, ...]

    def matches(self, site: Site) -> bool:
        return all(part.matches(site) for part in self.of)

    def kinds(self) -> frozenset[str] | None:
        known = [kinds for part in self.of if (kinds := part.kinds()) is not None]
        return frozenset.intersection(*known) if known else None

    def names_ops(self) -> bool:
        return any(part.names_ops() for part in self.of)

    def parts(self) -> tuple[Selector, ...]:
        return self.of

    def map(self, change: Callable[[Selector], Selector]) -> Selector:
        return change(type(self)(tuple(part.map(change) for part in self.of)))

    def __str__(self) -> str:
        return " & ".join(f"({p})" if isinstance(p, AnyOf) else str(p) for p in self.of)


@dataclass(frozen=True)
class AnyOf(All):
    """Nodes that at least one of several selectors means."""

    def matches(self, site: Site) -> bool:
        return any(part.matches(site) for part in self.of)

    def kinds(self) -> frozenset[str] | None:
        known = [part.kinds() for part in self.of]
        return None if any(k is None for k in known) else frozenset().union(*(k for k in known if k))

    def __str__(self) -> str:
        return " | ".join(map(str, self.of))


@dataclass(frozen=True)
class Not(Selector):
    """Nodes that a selector does not mean."""

    inner: Selector

    def __post_init__(self) -> None:
        _refuse_other(self.inner)

    def matches(self, site: Site) -> bool:
        return not self.inner.matches(site)

    def kinds(self) -> frozenset[str] | None:
        return frozenset(KINDS) - {self.inner.kind} if isinstance(self.inner, Kind) else None

    def parts(self) -> tuple[Selector, ...]:
        return (self.inner,)

    def map(self, change: Callable[[Selector], Selector]) -> Selector:
        return change(Not(self.inner.map(change)))

    def __str__(self) -> str:
        return f"~({self.inner})" if isinstance(self.inner, All) else f"~{self.inner}"


def op(kind: str) -> Selector:
    """All nodes of an op kind, ``op("linear")``, or of one op by the name that ``torch.library`` has for it,
    ``op("mylib::scan")``. The kinds are the keys of ``fxlrp.rules.KINDS``.
    """
    return Op(kind) if "::" in kind else Kind(kind)


def name(pattern: str) -> Selector:
    """All nodes inside modules whose path matches: ``name("model.layers.*.mlp.*")``; ``*`` crosses dots."""
    return Name(pattern)


def module_type(kind: type | str) -> Selector:
    """All nodes inside modules of a type, its subclasses included: ``module_type(torch.nn.Conv2d)``,
    ``module_type("Conv2d")``, ``module_type("*Attention")``.
    """
    return ModuleType(kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")


def first(selector: Selector) -> Selector:
    """Of the selected nodes the first ones: ``first(op("conv") | op("linear"))`` are those that relevance
    passes last, each being reached from an explained input without another selected node between.
    """
    return First(selector)


def last(selector: Selector) -> Selector:
    """Of the selected nodes the last ones before the target."""
    return Last(selector)


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for a message, or nothing where no known word is near."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _refuse_other(given: object) -> None:
    if not isinstance(given, Selector):
        raise CompositeError(f"Selectors combine with selectors, as fxlrp.op('linear'); got {given!r}.")


def _joined(kind: type[All], first: Selector, second: Selector) -> Selector:
    _refuse_other(second)
    parts = [s.of if isinstance(s, All) and type(s) is kind else (s,) for s in (first, second)]
    return kind((*parts[0], *parts[1]))


#: Selectors by the word that stands for them in JSON; their only field is what the word maps to.
WORDS: dict[str, type[Selector]] = {
    "op": Kind,
    "call": Op,
    "name": Name,
    "module_type": ModuleType,
    "first": First,
    "last": Last,
    "all": All,
    "any": AnyOf,
    "not": Not,
}


def to_data(selector: Selector) -> dict[str, object]:
    """A selector as plain data: ``{"op": "linear"}``, ``{"all": [{"op": …}, {"name": …}]}``."""
    word = next((word for word, kind in WORDS.items() if type(selector) is kind), None)
    if word is None:
        raise CompositeError(f"{selector!r} has no form as data.")
    content = getattr(selector, fields(selector)[0].name)  # type: ignore[arg-type]
    if isinstance(content, tuple):
        return {word: [to_data(part) for part in content]}
    return {word: to_data(content) if isinstance(content, Selector) else content}


def from_data(data: object) -> Selector:
    """A selector from what :func:`to_data` made of it."""
    if not (isinstance(data, dict) and len(data) == 1 and next(iter(data)) in WORDS):
        raise CompositeError(f"No selector: {data!r}. One is a mapping of one of {', '.join(WORDS)}.")
    ((word, content),) = data.items()
    kind = WORDS[word]
    if isinstance(content, list):
        return kind(tuple(map(from_data, content)))  # type: ignore[call-arg]
    return kind(from_data(content) if isinstance(content, dict) else content)  # type: ignore[call-arg]
