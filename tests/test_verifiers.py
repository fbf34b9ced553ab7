"""Verifiers, tested with passes that are broken on purpose; plans and composites; ops that no rule covers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxlrp
from fxlrp.compiler.activity import explained
from fxlrp.compiler.assign import assign
from fxlrp.compiler.canonicalize import canonicalize
from fxlrp.compiler.capture import capture
from fxlrp.compiler.graphs import copy_graph, outputs
from fxlrp.compiler.inputs import bind
from fxlrp.compiler.plan import Plan
from fxlrp.compiler.rewrite import RuleOp, rewrite
from fxlrp.compiler.verify import verify_functional, verify_relevance, verify_rules
from fxlrp.errors import GraphError
from fxlrp.rules import KINDS, PRESETS, Epsilon, Gradient, Identity, Structural, Taylor, Uniform, as_composite

aten = torch.ops.aten


class Block(nn.Module):
    """Two layers with a gate and a norm, named so that selectors have something to choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.SiLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) * self.first(x))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    model = Block().eval()
    return canonicalize(capture(model, bind(model, (X,), {})).graph).graph


def plan_of(graph: fx.GraphModule, composite: str | fxlrp.Composite = "attnlrp") -> Plan:
    targets = list(outputs(graph.graph))
    return assign(graph, explained(graph, targets), targets, as_composite(composite))


# ----------------------------------------------------------------------------------------------------
# functional graphs


def mutate(module: fx.GraphModule, node: fx.Node) -> None:
    node.target = aten.mul_.Tensor


def call_a_module(module: fx.GraphModule, node: fx.Node) -> None:
    module.add_module("other", nn.Identity())
    with module.graph.inserting_after(node):
        other = module.graph.call_module("other", (node,))
    node.replace_all_uses_with(other, lambda user: user is not other)


def leave_a_region(module: fx.GraphModule, node: fx.Node) -> None:
    with module.graph.inserting_after(node):
        module.graph.call_function(torch.ops.higher_order.wrap_with_set_grad_enabled, (False, None, node))


def lose_a_value(module: fx.GraphModule, node: fx.Node) -> None:
    del node.meta["val"]


def read_too_early(module: fx.GraphModule, node: fx.Node) -> None:
    later = next(n for n in reversed(module.graph.nodes) if n.op == "call_function")
    node.args = (later, *node.args[1:])


def product_node(module: fx.GraphModule) -> fx.Node:
    return next(n for n in module.graph.nodes if n.target in (aten.mul.Tensor, operator.mul))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (mutate, "mutates an operand"),
        (call_a_module, "is a call_module, not a function call"),
        (leave_a_region, "is a region"),
        (lose_a_value, "has no value"),
        (read_too_early, "before it has been defined"),
    ],
)
def test_functional(graph: fx.GraphModule, damage: Callable[..., None], message: str) -> None:
    """Breaks if a capture that left one of these behind would go on to the next stage."""
    assert verify_functional(graph) is graph
    broken = copy_graph(graph, "Broken")
    damage(broken, product_node(broken))
    with pytest.raises((GraphError, RuntimeError), match=message):
        verify_functional(broken)


def test_functional_knows_fresh_graphs(graph: fx.GraphModule) -> None:
    """What canonicalisation and capture return passes, so that the verifier can be used on it at all."""
    model = Block().eval()
    captured = capture(model, bind(model, (X,), {})).graph
    assert verify_functional(captured) is captured


# ----------------------------------------------------------------------------------------------------
# rule graphs


def with_row(plan: Plan, change: dict[str, Any], kind: str = "product") -> Plan:
    """The plan with one row of this kind changed."""
    rows = list(plan.rows)
    index = next(i for i, row in enumerate(rows) if row.kind == kind)
    rows[index] = dataclasses.replace(rows[index], **change)
    return dataclasses.replace(plan, rows=tuple(rows))


def test_rules(graph: fx.GraphModule) -> None:
    """Breaks if a rewrite that drops, adds or mixes up rules is let through."""
    plan = plan_of(graph)
    good = rewrite(graph, plan)
    assert verify_rules(good, plan) is good
    with pytest.raises(GraphError, match=r"rule nodes and plan differ in \['"):
        verify_rules(rewrite(graph, dataclasses.replace(plan, rows=plan.rows[1:])), plan)
    with pytest.raises(GraphError, match="rule nodes and plan differ"):
        verify_rules(good, dataclasses.replace(plan, rows=plan.rows[:-1]))
    with pytest.raises(GraphError, match="has another rule than the plan says"):
        verify_rules(rewrite(graph, with_row(plan, {"rule": Gradient()})), plan)
    with pytest.raises(GraphError, match="has another rule than the plan says"):
        verify_rules(rewrite(graph, with_row(plan, {"active": (1,)})), plan)


def test_rules_with_an_active_integer() -> None:
    """Ids are no floating point operand: relevance cannot be handed to them."""

    class Gather(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return torch.gather(x, 1, ids) * 2.0

    model, ids = Gather(), torch.tensor([[0, 1], [2, 3]])
    canonical = canonicalize(capture(model, bind(model, (X, ids), {})).graph).graph
    plan = plan_of(canonical)
    index = next(i for i, row in enumerate(plan.rows) if row.op == "gather")
    rows = list(plan.rows)
    rows[index] = dataclasses.replace(rows[index], active=(2,))
    wrong = dataclasses.replace(plan, rows=tuple(rows))
    with pytest.raises(
        GraphError, match="operand 2 of 'gather' is to get relevance but is not floating point"
    ):
        verify_rules(rewrite(canonical, wrong), wrong)


def test_a_rewrite_computes_the_same(graph: fx.GraphModule) -> None:
    """The rule graph's forward is the model's own, to the bit."""
    rules = rewrite(graph, plan_of(graph))
    assert torch.equal(rules(X)[0], graph(X)[0])
    assert any(isinstance(n.target, RuleOp) for n in rules.graph.nodes)


# ----------------------------------------------------------------------------------------------------
# relevance graphs


def small(op: Any, *more: Any) -> fx.GraphModule:
    made = fx.Graph()
    x = made.placeholder("x")
    made.output((made.call_function(op, (x, *more)),))
    return fx.GraphModule(nn.Module(), made)


def requires_grad(x: Tensor) -> Tensor:
    return x


requires_grad.__qualname__ = requires_grad.__name__ = "requires_grad_"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: small(RuleOp(aten.relu.default, Identity(), (0,))), "is still a rule node"),
        (lambda: small(requires_grad), "calls autograd"),
        (lambda: small(aten.relu_.default), "mutates an operand"),
    ],
    ids=["rule", "requires_grad", "mutation"],
)
def test_relevance(broken: Callable[[], fx.GraphModule], message: str) -> None:
    """Breaks if a transposition that leaves one of these behind is let through."""
    good = small(aten.relu.default)
    assert verify_relevance(good) is good
    with pytest.raises(GraphError, match=message):
        verify_relevance(broken())


def test_relevance_that_is_a_constant() -> None:
    """A tensor that was traced as a constant would be the first input's relevance for ever."""
    made = fx.Graph()
    made.placeholder("x")
    made.output((torch.ones(2),))
    with pytest.raises(GraphError, match="returns a constant"):
        verify_relevance(fx.GraphModule(nn.Module(), made))


# ----------------------------------------------------------------------------------------------------
# ops without a rule


class Uncovered(nn.Module):
    """An op that has no row in the table, inside a module of its own."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinc(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner = Uncovered.Inner()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def test_uncovered_op() -> None:
    """Breaks if a nonlinear op without a rule is a gradient silently, or the error says less than this."""
    with pytest.raises(fxlrp.UncoveredOpError) as found:
        fxlrp.lrp_compile(Uncovered())(X.double())
    message = str(found.value)
    for part in ("'sinc'", "aten.sinc", "module 'inner'", "test_verifiers.py:", "in forward", "strict=False"):
        assert part in message, message
    assert "fxlrp.register_rule(" in message and "docs/rules.md" in message


def test_uncovered_op_as_a_taylor_step() -> None:
    """strict=False: the step is a gradient, the plan says so, and the ledger shows what it leaves over."""
    model = Uncovered()
    explainer = fxlrp.lrp_compile(model, strict=False)
    explanation = explainer(X.double())
    (row,) = [row for row in explainer.plan if row.op == "sinc"]
    assert row.rule == Taylor() and row.kind == "uncovered" and row.module == "inner"
    assert "first-order Taylor (strict=False)" in row.reason
    assert "first-order Taylor" in str(explainer.plan)
    assert explanation.ledger.residual < 1e-12
    assert any(e.cause == "remainder" and e.module == "inner" for e in explanation.ledger.entries)
    leaf = X.double().requires_grad_()
    model(leaf).max(-1).values.sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(explanation.relevance, leaf.detach() * leaf.grad, atol=1e-12)


@pytest.mark.parametrize("composite", ["gradient", "ali"])
def test_composites_without_rules_take_any_op(composite: str) -> None:
    """Gradient x Input needs no rule, so nothing is uncovered."""
    explainer = fxlrp.lrp_compile(Uncovered(), composite=composite)
    explainer(X.double())
    (row,) = [row for row in explainer.plan if row.op == "sinc"]
    assert row.rule == Gradient() and "no rules" in row.reason


def test_a_constant_needs_no_rule() -> None:
    """Only what carries relevance needs one."""

    class Constant(Uncovered):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * torch.sinc(x.detach()))

    fxlrp.lrp_compile(Constant())(X.double())


# ----------------------------------------------------------------------------------------------------
# plans


def test_plan_prints(graph: fx.GraphModule) -> None:
    """Breaks if the table loses a column, the counts, or what it hides."""
    plan = dataclasses.replace(plan_of(graph), notes=("captured by hand",))
    text = str(plan)
    header, _, *rows = text.splitlines()
    assert header.split() == ["node", "op", "rule", "reason", "module", "source"]
    assert any("layer_norm" in row and "NormRule()" in row and "inner.0" in row for row in rows)
    assert any("silu" in row and "attnlrp: activation" in row for row in rows)
    assert any("test_verifiers.py:" in row for row in rows)
    assert rows[-2].startswith(f"{len(plan)} nodes: ") and "epsilon 3" in rows[-2]
    assert rows[-1] == "captured by hand"
    assert len(plan.table(structural=True).splitlines()) >= len(text.splitlines())
    assert repr(plan).startswith(f"<fxlrp.Plan of {len(plan)} nodes: {{'epsilon': 3")
    assert plan.counts() == {"epsilon": 3, "ln_rule": 1, "identity": 1, "uniform": 1}
    assert all(KINDS.keys() >= {row.kind} for row in plan)


# ----------------------------------------------------------------------------------------------------
# composites


def rules_of(plan: Plan) -> dict[str, tuple[Any, str]]:
    return {row.module: (row.rule, row.reason) for row in plan if row.kind == "linear"}


def test_first_match_wins(graph: fx.GraphModule) -> None:
    """Breaks if a later entry overrides an earlier one, or a selector asks for one of its conditions only."""
    composite = fxlrp.Composite(
        (
            (fxlrp.rules.Selector(kind="linear", path="inner.*"), Epsilon(0.1)),
            (fxlrp.name("head"), Epsilon(0.2)),
            (fxlrp.op("linear"), Epsilon(0.3)),
            (fxlrp.name("*"), Epsilon(0.4)),
        )
    )
    found = rules_of(plan_of(graph, composite))
    assert found == {
        "inner.1": (Epsilon(0.1), "entry 0 of the composite"),
        "head": (Epsilon(0.2), "entry 1 of the composite"),
        "first": (Epsilon(0.3), "entry 2 of the composite"),
    }
    turned = fxlrp.Composite(tuple(reversed(composite.entries)))
    assert {rule for rule, _ in rules_of(plan_of(graph, turned)).values()} == {Epsilon(0.4)}


def test_what_no_entry_matches_is_the_presets(graph: fx.GraphModule) -> None:
    """Breaks if base is ignored, or an entry reaches further than its selector."""
    composite = fxlrp.Composite(((fxlrp.op("linear"), Epsilon(0.3)),), base="gradient")
    for row in plan_of(graph, composite):
        expected = Epsilon(0.3) if row.kind == "linear" else PRESETS["gradient"].rules[row.kind]
        assert row.rule == expected
        assert row.reason.startswith("entry 0" if row.kind == "linear" else f"gradient: {row.kind}")


def test_entries_change_the_relevance() -> None:
    """An epsilon for one layer damps what goes through it, and the ledger books it there."""
    model = Block().double().eval()
    composite = fxlrp.Composite(((fxlrp.name("inner.1"), Epsilon(0.5)),))
    found = fxlrp.lrp_compile(model, composite=composite)(X.double())
    plain = fxlrp.lrp_compile(model)(X.double())
    assert not torch.allclose(found.relevance, plain.relevance)
    assert {e.module for e in found.ledger.entries if e.cause == "epsilon"} == {"inner.1"}
    assert found.ledger.residual < 1e-10


def test_every_preset_has_a_rule_for_every_kind() -> None:
    """Breaks if a kind is added to the table and forgotten in a preset."""
    assert set(fxlrp.composites) == set(PRESETS) == {"attnlrp", "cp", "ali", "gradient"}
    for title, preset in PRESETS.items():
        assert set(preset.rules) == set(KINDS)
        for kind in KINDS:
            assert as_composite(title).rule(kind, "any.where") == (preset.rules[kind], f"{title}: {kind}")


def test_errors_of_composites() -> None:
    """A name that does not exist is told with those that do; an entry that is none is shown."""
    with pytest.raises(
        fxlrp.CompositeError, match=r"There is no op kind 'lineer'\. Kinds: linear, conv, add"
    ):
        fxlrp.op("lineer")
    with pytest.raises(fxlrp.CompositeError, match=r"There is no composite 'lrp'\. Presets: attnlrp, cp"):
        fxlrp.lrp_compile(Block(), composite="lrp")
    with pytest.raises(fxlrp.CompositeError, match="There is no composite 'other'"):
        fxlrp.Composite(base="other")
    for entry in (("linear", Epsilon()), (fxlrp.op("linear"), Epsilon), (fxlrp.op("linear"),), Epsilon()):
        with pytest.raises(fxlrp.CompositeError, match=r"pairs \(selector, rule\)"):
            fxlrp.Composite((entry,))  # type: ignore[arg-type]
    with pytest.raises(fxlrp.CompositeError, match="not dict"):
        fxlrp.lrp_compile(Block(), composite={"linear": Epsilon()})  # type: ignore[arg-type]


def test_rules_are_values() -> None:
    """Equal parameters make equal rules, so that plans can be compared and programs be cached."""
    assert Epsilon(0.1) == Epsilon(0.1) != Epsilon(0.2)
    assert Epsilon() != Structural() and Uniform() != Epsilon()
    assert len({Epsilon(0.1), Epsilon(0.1), Uniform(shares=(0.5, 0.5))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Epsilon().epsilon = 1.0  # type: ignore[misc]
