"""Presets against their papers' formulas, and what each promises of the graph that it leaves."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from oracles.papers import Tables, TinyLlama, TinyMamba, Treatment, fixed, half, rotary
from torch import Tensor, fx

import fxlrp
from fxlrp.compiler.graphs import leaves, outputs
from fxlrp.compiler.rewrite import is_rule

#: FIELD's matrix of presets: what each paper does to the steps of a Llama.
LLAMA = {
    "attnlrp": Treatment(scores=half, mixed=half, slope=fixed, gated=half, factor=fixed),
    "relp": Treatment(slope=fixed, gated=half, factor=fixed),
    "libra": Treatment(probabilities=fixed, slope=fixed, gated=half, factor=fixed),
    "ali": Treatment(probabilities=fixed, factor=fixed),
    "gradient": Treatment(),
    "attribution-graph": Treatment(probabilities=fixed, factor=fixed, gated=fixed),
}


def ids_of(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(1))


def model_of(kind: type[Any]) -> Any:
    torch.manual_seed(3)
    return kind().double().eval()


def relevance_of(logits: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradient x Input of the predicted last logit."""
    last = logits[:, -1]
    gradients = torch.autograd.grad(last.max(-1).values.sum(), leaves)
    return [(x * g).detach() for x, g in zip(leaves, gradients, strict=True)]


@pytest.mark.parametrize("title", LLAMA)
def test_presets_equal_their_papers_on_a_llama(title: str) -> None:
    """Breaks if a preset gives one kind of step another treatment than its paper does."""
    model, ids = model_of(TinyLlama), ids_of()
    x = model.embed(ids).detach().requires_grad_()
    logits = model.run(x, [rotary(ids.shape[1], model.size)] * 2, LLAMA[title])
    (expected,) = relevance_of(logits, [x])
    found = fxlrp.lrp_compile(model, title)(ids)
    torch.testing.assert_close(found.relevance, expected.sum(-1), atol=1e-12, rtol=1e-9)
    assert found.ledger.residual < 1e-12


@pytest.mark.parametrize(("length", "order"), [(2, "(db)u"), (5, "(db)u"), (3, "d(bu)"), (3, "(du)b")])
def test_mamba_equals_its_paper(length: int, order: str) -> None:
    """MambaLRP: the scan linear in its input, SiLU by the identity rule, the gate by halves; however the
    product of step size, B and input is grouped.
    """
    model, ids = model_of(TinyMamba), ids_of(length=length)
    for block in model.blocks:
        block.order = order
    x = model.embed(ids).detach().requires_grad_()
    (expected,) = relevance_of(
        model.run(x, Treatment(slope=fixed, gated=half, factor=fixed, scan=fixed)), [x]
    )
    found = fxlrp.lrp_compile(model, "mamba")(ids)
    torch.testing.assert_close(found.relevance, expected.sum(-1), atol=1e-12, rtol=1e-9)
    assert found.ledger.residual < 1e-12


def test_the_scans_parameters_are_what_mamba_fixes() -> None:
    """Breaks if the pattern finds no scan, so that the preset is attnlrp under another name."""
    model, ids = model_of(TinyMamba), ids_of()
    by_paper = fxlrp.lrp_compile(model, "mamba")
    without = by_paper.with_composite("attnlrp")
    assert not torch.allclose(by_paper(ids).relevance, without(ids).relevance, rtol=1e-3)
    kinds = {row.op: row.kind for row in by_paper.plan if row.op in ("matmul", "exp")}
    assert kinds["matmul"] == "linear"  # the readout is linear in the state once C is fixed


def test_no_scan_no_fixing() -> None:
    """On a model without scans the preset is attnlrp: nothing else is taken for one."""
    model, ids = model_of(TinyLlama), ids_of()
    explainer = fxlrp.lrp_compile(model, "mamba")
    with pytest.warns(fxlrp.CompositeWarning, match="no selective scan was found"):
        explainer(ids)
    torch.testing.assert_close(explainer(ids).relevance, explainer.with_composite("attnlrp")(ids).relevance)


# ----------------------------------------------------------------------------------------------------
# positions


def position_oracle(model: TinyLlama, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """PA-LRP: one copy of the tables per layer and sample carries relevance, products by the uniform rule."""
    batch, length = ids.shape
    plain = rotary(length, model.size)
    x = model.embed(ids).detach().requires_grad_()
    copies = [
        Tables(*(t.expand(batch, 1, *t.shape).clone().requires_grad_() for t in (plain.cos, plain.sin)))
        for _ in model.layers
    ]
    how = Treatment(rotated=half, scores=half, mixed=half, slope=fixed, gated=half, factor=fixed)
    leaves = [x, *(t for own in copies for t in (own.cos, own.sin))]
    tokens, *tables = relevance_of(model.run(x, copies, how), leaves)
    return tokens.sum(-1), [t.sum((1, 3)) for t in tables]


def test_pa_equals_its_paper() -> None:
    """Tokens, each layer's cosine and sine, and their sum as PA-LRP merges them."""
    model, ids = model_of(TinyLlama), ids_of()
    tokens, tables = position_oracle(model, ids)
    found = fxlrp.lrp_compile(model, "pa")(ids)
    torch.testing.assert_close(found.relevance, tokens, atol=1e-12, rtol=1e-9)
    assert list(found.positions) == [f"{t} @ layers.{i}" for i in range(2) for t in ("cos", "sin")]
    for mine, its in zip(found.positions.values(), tables, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-12, rtol=1e-9)
    assert found.ledger.residual < 1e-12
    rotary_part = sum(t.abs() / t.abs().amax(-1, keepdim=True) for t in tables)
    merged = tokens / tokens.abs().amax(-1, keepdim=True) + rotary_part / rotary_part.amax(-1, keepdim=True)
    merged = merged / merged.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(found.position_aware(), merged)


def test_positions_of_one_sample_do_not_mix_with_anothers() -> None:
    """The tables are shared by the batch; their relevance is each sample's own, by one program."""
    model, ids = model_of(TinyLlama), ids_of(3, 7)
    explainer = fxlrp.lrp_compile(model, "pa")
    together = explainer(ids)
    for i in range(3):
        alone = explainer(ids[i : i + 1])
        for label, found in together.positions.items():
            torch.testing.assert_close(found[i : i + 1], alone.positions[label])
    assert len(explainer._programs) == 1


def test_position_embeddings_are_leaves() -> None:
    """GPT-2's and BERT's learned positions: a lookup by counted ids; token types are none."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 23, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    models = {
        "transformer.wpe": GPT2LMHeadModel(GPT2Config(vocab_size=23, n_layer=1, n_head=2, n_embd=8)),
        "bert.embeddings.position_embeddings": BertForSequenceClassification(
            BertConfig(**sizes, intermediate_size=8)
        ),
    }
    for label, model in models.items():
        explainer = fxlrp.lrp_compile(model.double().eval(), "pa")
        found = explainer(ids_of())
        assert list(found.positions) == [label]
        assert found.ledger.residual < 1e-10
        plain = explainer.with_composite("attnlrp")(ids_of())
        torch.testing.assert_close(found.relevance, plain.relevance)  # the sum keeps its shares
        constant = sum(e.amount for e in plain.ledger.entries if e.cause == "constant")
        other = sum(e.amount for e in found.ledger.entries if e.cause == "constant")
        torch.testing.assert_close(found.positions[label].sum(-1), constant - other)


def test_a_model_in_which_no_positions_are_found_is_told() -> None:
    """Breaks if relevance of tokens alone passes for position-aware."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    with pytest.warns(fxlrp.CompositeWarning, match="no table of positions was found"):
        fxlrp.lrp_compile(model, "pa")(torch.randn(2, 4))


def test_other_composites_have_no_positions() -> None:
    """And asking for them says what to do."""
    found = fxlrp.lrp_compile(model_of(TinyLlama))(ids_of())
    assert found.positions == {}
    with pytest.raises(fxlrp.InputError, match="under composite='pa'"):
        found.position_aware()


# ----------------------------------------------------------------------------------------------------
# frozen composites are linear


def coefficients_off_the_point(explainer: fxlrp.Explainer, ids: Tensor, step: float) -> Tensor:
    """The coefficients of the embeddings when these are moved and all that counts as a constant stays.

    For a graph that is linear in what is explained they do not change, whatever the step: its second
    derivative is zero.
    """
    explainer(ids, target=3)
    graph, source = explainer.rule_graph.graph, explainer.plan.sources[0].node
    held: dict[fx.Node, Any] = {}
    moved: dict[fx.Node, Any] = {}
    steps: dict[fx.Node, Any] = {}
    given = iter((ids,))
    for node in graph.nodes:
        if node.op == "placeholder":
            held[node] = next(given)
        elif node.op == "get_attr":
            held[node] = operator.attrgetter(node.target)(explainer.rule_graph).detach()
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), held.__getitem__)
            held[node] = node.target(*args, **kwargs)
            if is_rule(node) and node.target.active:
                call = node.target.bind(args, kwargs)
                operands = leaves(node)
                call = call.with_active([moved.get(operands[i], held[operands[i]]) for i in call.active])
                steps[node] = node.target.rule.linearize(call)
                moved[node] = steps[node].output
            elif node.target is operator.getitem and node.args[0] in moved:
                moved[node] = moved[node.args[0]][node.args[1]]
        if node is source:
            moved[node] = held[node] + step * torch.ones_like(held[node]).cumsum(-1).sin()
    (logits,) = (n for n in outputs(graph) if n is not None)
    seed = torch.zeros_like(held[logits]).index_fill_(-1, torch.tensor(3), 1.0)
    cotangents: dict[fx.Node, Any] = {logits: seed}
    for node in reversed(graph.nodes):
        if node not in cotangents:
            continue
        if node.target is operator.getitem:
            parent, place = node.args
            slots = cotangents.setdefault(parent, [None] * len(held[parent]))
            slots[place] = cotangents[node]
        elif node in steps:
            operands = leaves(node)
            for i, g in zip(node.target.active, steps[node].pullback(cotangents[node]), strict=True):
                if g is not None:
                    cotangents[operands[i]] = cotangents[operands[i]] + g if operands[i] in cotangents else g
    return cotangents[source]


@pytest.mark.parametrize(
    ("title", "linear"),
    [("attribution-graph", True), ("cp", True), ("attnlrp", False), ("gradient", False), ("relp", False)],
)
def test_frozen_composites_are_linear(title: str, linear: bool) -> None:
    """Input invariance, and with it a Hessian of zero: breaks if a frozen graph lets one factor vary, and the
    test cannot see it if composites that are not linear pass too.
    """
    model, ids = model_of(TinyLlama), ids_of(1)
    explainer = fxlrp.lrp_compile(model, title)
    at = coefficients_off_the_point(explainer, ids, 0.0)
    torch.testing.assert_close(at.mul(model.embed(ids)).sum(-1), explainer(ids, target=3).relevance)
    off = [coefficients_off_the_point(explainer, ids, step) for step in (0.5, 50.0)]
    assert all(torch.equal(at, other) for other in off) == linear


def test_attribution_graphs_skip_only_what_there_is_a_way_round() -> None:
    """A pooler's tanh lies on every way: frozen, it would leave nothing to explain."""
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    found = fxlrp.lrp_compile(model, "attribution-graph")(torch.randn(2, 4).double())
    assert bool(found.relevance.any()) and found.ledger.residual < 1e-12


def test_vjp_of_position_aware_rules_is_that_of_the_call() -> None:
    """The share of the rotary tables is taken from queries and keys there too."""
    model, ids = model_of(TinyLlama), ids_of(1)
    explainer = fxlrp.lrp_compile(model, "pa")
    start = torch.zeros(1, 1, ids.shape[1], 23, dtype=torch.float64)
    start[..., -1, 3] = 1
    ways = explainer.vjp("output", start, ids, wrt="ids")
    torch.testing.assert_close(ways["ids"][0], explainer(ids, target=3).coefficients)


def test_attribution_graphs_leave_constants_only() -> None:
    """All that does not arrive at the inputs is biases and what is frozen: no Taylor step is left."""
    found = fxlrp.lrp_compile(model_of(TinyLlama), "attribution-graph")(ids_of(1), target=3)
    causes = {cause for cause, amount in found.ledger.by_cause().items() if float(amount.abs()) > 1e-14}
    assert causes == {"bias", "frozen"}
