"""Composites: selectors, what they decide on a graph, what they say of themselves, composites in files."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxlrp
from fxlrp.rules import (
    KINDS,
    PRESETS,
    Epsilon,
    Freeze,
    Gradient,
    Identity,
    Rule,
    Selector,
    Structural,
    Taylor,
    Uniform,
)
from fxlrp.rules.composites import as_composite
from fxlrp.rules.describe import matrix
from fxlrp.rules.selectors import Site, from_data, to_data
from fxlrp.rules.serial import RULES, rule_from_data, rule_to_data

REPOSITORY = Path(__file__).resolve().parents[1]
op, name, module_type, first, last = fxlrp.op, fxlrp.name, fxlrp.module_type, fxlrp.first, fxlrp.last


class Wide(nn.Linear):
    """A linear layer of a type of its own."""


class Net(nn.Module):
    """Two branches of linear layers that meet, so that first and last are several nodes each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(5, 5), nn.SiLU(), Wide(5, 5))
        self.right = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.body = nn.ModuleDict({"up": nn.Linear(5, 7), "gate": nn.Linear(5, 7), "down": nn.Linear(7, 5)})
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.left(x) + self.right(x))
        x = x + self.body["down"](nn.functional.silu(self.body["gate"](x)) * self.body["up"](x))
        return self.head(x)


@pytest.fixture(scope="module")
def explainer() -> fxlrp.Explainer:
    torch.manual_seed(0)
    compiled = fxlrp.lrp_compile(Net().eval())
    compiled(X)
    return compiled


X = torch.arange(10.0).reshape(2, 5).sin()
MARK = Epsilon(0.125)


def marked(explainer: fxlrp.Explainer, selector: Selector, rule: Rule = MARK) -> set[str]:
    """The modules whose nodes an entry of this selector decides."""
    own = explainer.with_composite(fxlrp.Composite([(selector, rule)]))
    own(X)
    return {row.module for row in own.plan if row.entry == 0}


LAYERS = {"left.0", "left.2", "right", "body.up", "body.gate", "body.down", "head"}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (op("linear"), LAYERS),
        (op("linear") & name("body.*"), {"body.up", "body.gate", "body.down"}),
        (op("linear") & ~name("body.*"), LAYERS - {"body.up", "body.gate", "body.down"}),
        (op("linear") & (name("left.*") | name("head")), {"left.0", "left.2", "head"}),
        (name("left.0") | name("right"), {"left.0", "right"}),
        (module_type(Wide), {"left.2"}),
        (module_type(nn.Linear), LAYERS),  # a subclass is one too
        (module_type("Wide"), {"left.2"}),
        (module_type(nn.Sequential), {"left.0", "left.2"}),  # nodes inside a module of the type
        (module_type("torch.nn.*"), LAYERS),
        (op("linear") & module_type(nn.Linear) & ~module_type(Wide), LAYERS - {"left.2"}),
        (op("aten::linear"), LAYERS),
        (first(op("linear")), {"left.0", "right"}),
        (first(op("linear") & name("body.*")), {"body.up", "body.gate"}),
        (last(op("linear")), {"head"}),
        (last(op("linear") & ~name("head")), {"body.down"}),
        (last(op("linear") & name("left.*")) | first(op("linear") & name("body.up")), {"left.2", "body.up"}),
        (first(op("conv") | op("linear")), {"left.0", "right"}),
    ],
    ids=lambda value: str(value) if isinstance(value, Selector) else "",
)
def test_what_selectors_choose(explainer: fxlrp.Explainer, selector: Selector, expected: set[str]) -> None:
    """Breaks if a selector means more or less than its words say."""
    assert marked(explainer, selector) == expected


def test_selectors_by_kind_choose_their_kind_only(explainer: fxlrp.Explainer) -> None:
    """A rule that takes any op goes to the nodes of the kind and no others."""
    own = explainer.with_composite(fxlrp.Composite([(op("activation"), Gradient())]))
    own(X)
    assert {row.kind for row in own.plan if row.entry == 0} == {"activation"}
    assert all(
        isinstance(row.rule, Gradient) == (row.entry == 0) for row in own.plan if row.kind == "activation"
    )


def test_the_last_layer_is_that_of_the_target() -> None:
    """``last`` looks at what leads to the target and not at what the model computes beside it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(self.stem(x))
            return logits, self.other(logits)

    compiled = fxlrp.lrp_compile(Two().eval(), fxlrp.Composite([(last(op("linear")), MARK)]))
    compiled(torch.randn(2, 4))
    assert {row.module for row in compiled.plan if row.entry == 0} == {"head"}


class Gated(nn.Module):
    """Layers on both sides of a split, and a class inside another."""

    class Inner(nn.Linear):
        """A linear layer by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), self.Inner(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wide(x).chunk(2, -1)
        return self.narrow(gate.relu() + up)


def test_tuples_lie_between_layers_too() -> None:
    """Breaks if elements of a tuple end the way from one layer to the next; or nested classes are unknown."""
    for selector, expected in (
        (first(op("linear")), {"wide"}),
        (last(op("linear")), {"narrow"}),
        (module_type(nn.Linear), {"wide", "narrow"}),
        (module_type(Gated.Inner), {"narrow"}),
    ):
        compiled = fxlrp.lrp_compile(Gated().eval(), fxlrp.Composite([(selector, MARK)]))
        compiled(torch.randn(2, 4))
        assert {row.module for row in compiled.plan if row.entry == 0} == expected, selector


def test_an_entry_speaks_louder_than_what_its_base_does_to_gates() -> None:
    """A rule for products is given as it is said, whether the base freezes gates or not."""
    compiled = fxlrp.lrp_compile(Net().eval(), fxlrp.Composite([(op("product"), Uniform())], base="cp"))
    compiled(X)
    (row,) = (row for row in compiled.plan if row.kind == "product")
    assert row.entry == 0 and row.rule == Uniform() and len(row.active) == 2


def test_selectors_alone() -> None:
    """The logic of selectors on sites that no graph has; first and last need a graph and say so."""
    site = Site("linear", "a.b", "aten::linear", "n", frozenset({"x.Y"}))
    assert (op("linear") & name("a.*")).matches(site) and not (op("linear") & name("b")).matches(site)
    assert (op("conv") | module_type("Y")).matches(site) and (~op("conv")).matches(site)
    assert (op("linear") & name("a") & name("b")) == type(op("linear") & name("a"))(
        (op("linear"), name("a"), name("b"))
    )
    assert (op("linear") & name("*")).kinds() == {"linear"} and (op("linear") | name("*")).kinds() is None
    assert (~op("linear")).kinds() == set(KINDS) - {"linear"} and (~name("*")).kinds() is None
    assert first(op("conv") | op("linear")).kinds() == {"conv", "linear"}
    with pytest.raises(fxlrp.CompositeError, match=r"first\(op\('linear'\)\) means nothing without a graph"):
        first(op("linear")).matches(site)
    for wrong in (
        lambda: op("linear") & "head",
        lambda: first("linear"),
        lambda: from_data({"not": "linear"}),
    ):
        with pytest.raises(fxlrp.CompositeError, match="combine with selectors"):
            wrong()


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (
            [(name("boby.*"), MARK)],
            r"entry 0 .*no node that carries relevance matches; near: body\.(up|gate|down)",
        ),
        ([(op("linear"), MARK), (name("head"), MARK)], "entry 1 .*entries before it decide all"),
        ([(name("norm"), Identity())], "entry 0 .*it selects norm.* only, and its rule serves activation"),
        (
            [(op("conv"), MARK)],
            r"entry 0 .*\(op\('conv'\): Epsilon\(epsilon=0.125\)\) decided nothing: no node",
        ),
    ],
)
def test_entries_that_decide_nothing_are_told(
    explainer: fxlrp.Explainer, entries: list[tuple[Selector, Rule]], says: str
) -> None:
    """A misspelt module path must not go unnoticed: a warning, and a line of the plan."""
    own = explainer.with_composite(fxlrp.Composite(entries))
    with pytest.warns(fxlrp.CompositeWarning, match=says):
        own(X)
    assert len(own.plan.idle) == 1 and own.plan.idle[0] in str(own.plan)


def test_entries_that_decide_something_are_not_told(explainer: fxlrp.Explainer) -> None:
    """Breaks if entries of frozen nodes, which get no row of their own, count as idle."""
    own = explainer.with_composite(fxlrp.Composite([(op("linear"), MARK), (name("left.1"), Freeze())]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own(X)
    assert own.plan.idle == ()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ((op("softmax"), Epsilon()), r"Epsilon\(\) is not defined for ops of kind softmax"),
        ((op("softmax") & name("a"), Epsilon()), "only for add, conv, linear"),
        ((op("norm") | op("activation"), Epsilon()), "of kind activation, norm"),
        ((first(op("norm")), Uniform()), "only for matmul, product"),
    ],
)
def test_a_rule_that_serves_none_of_its_kinds_is_refused(entry: tuple[Selector, Rule], says: str) -> None:
    """Breaks if such an entry waits silently for a model."""
    with pytest.raises(fxlrp.CompositeError, match=says):
        fxlrp.Composite([entry])


def test_names_that_do_not_exist_are_told_with_the_nearest() -> None:
    """Unknown kinds, presets and rules: the error lists what there is."""
    with pytest.raises(
        fxlrp.CompositeError, match=r"'attnlpr' \(did you mean 'attnlrp'\?\)\. Presets: attnlrp, "
    ):
        fxlrp.Composite(base="attnlpr")
    with pytest.raises(fxlrp.CompositeError, match=r"'atention' \(did you mean 'attention'\?\)"):
        op("atention")
    with pytest.raises(fxlrp.CompositeError, match=r"'Epsilom' \(did you mean 'Epsilon'\?\)\. Rules: "):
        rule_from_data({"rule": "Epsilom"})
    with pytest.raises(fxlrp.CompositeError, match="Epsilon takes epsilon"):
        rule_from_data({"rule": "Epsilon", "eps": 1.0})


# ----------------------------------------------------------------------------------------------------
# composites in files


def test_composites_come_back_from_json() -> None:
    """Breaks if a selector or a rule loses a part on the way."""
    entries = [
        (op("linear") & (name("a.*") | ~module_type(nn.Linear)), Epsilon(1e-3)),
        (first(op("conv") | op("linear")), Epsilon()),
        (last(op("aten::exp")), Freeze()),
        (op("product"), Uniform(shares=(0.25, 0.75))),
        (op("add"), Structural(0.5)),
    ]
    composite = fxlrp.Composite(entries, base="cp", title="mine")
    assert fxlrp.Composite.from_json(composite.to_json()) == composite
    assert fxlrp.Composite.from_json(as_composite("cp").to_json()) == as_composite("cp")


def test_every_rule_has_a_form_as_data() -> None:
    """Breaks if a rule of a preset is missing from the table that JSON is read by."""
    for preset in PRESETS.values():
        for rule in [*preset.rules.values(), *(rule for _, rule in preset.entries)]:
            assert rule_from_data(rule_to_data(rule)) == rule
        for selector, _ in preset.entries:
            assert from_data(to_data(selector)) == selector
    assert all(dataclasses.is_dataclass(kind) for kind in RULES.values())


@dataclass(frozen=True)
class Half(Taylor):
    """A rule of a user's own."""

    share: float = 0.5


def test_rules_of_ones_own_in_json() -> None:
    """The class is given to the reader; without it the error says how."""
    text = fxlrp.Composite([(op("activation"), Half(0.25))]).to_json()
    assert fxlrp.Composite.from_json(text, rules=(Half,)).entries[0][1] == Half(0.25)
    with pytest.raises(fxlrp.CompositeError, match=r"no rule 'Half'.*from_json\(text, rules=\(MyRule,\)\)"):
        fxlrp.Composite.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"title": "a", "base": "cp", "entries": [{}]}', "null"])
def test_what_is_no_composite_is_refused(text: str) -> None:
    """Files that hold something else end in one kind of error."""
    with pytest.raises(fxlrp.CompositeError, match="No composite as JSON"):
        fxlrp.Composite.from_json(text)


def test_composites_print_as_tables() -> None:
    """Breaks if the table loses entries, the base's rules or their order."""
    text = str(fxlrp.Composite([(op("linear") & name("a.*"), Epsilon(1e-3))], base="cp", title="mine"))
    head, entry, *rest = text.splitlines()
    assert head.startswith("mine, on top of cp (Ali et al. 2022")
    assert entry.split() == ["0", "op('linear')", "&", "name('a.*')", "Epsilon(epsilon=0.001)"]
    assert [line.split()[1] for line in rest[-len(KINDS) :]] == [
        f"op('{kind}')" for kind in PRESETS["cp"].rules
    ]


def test_the_documentation_has_the_presets_as_they_are() -> None:
    """Breaks if a preset changes and docs/composites.md does not: `fxlrp composites --markdown`."""
    page = (REPOSITORY / "docs" / "composites.md").read_text(encoding="utf-8")
    assert matrix() in page
    _, _, head, _, *rows = matrix().splitlines()
    assert [row.split("`")[1] for row in rows] == list(PRESETS)
    assert all(row.count("|") == head.count("|") for row in rows)
