"""Demand slicing: choices of positions move up as far as positions are treated alike, and nothing changes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxlrp
from bench.models import case
from fxlrp.compiler.canonicalize import canonicalize
from fxlrp.compiler.demand import only_outputs
from fxlrp.compiler.pipeline import build
from fxlrp.compiler.slicing import demanded
from fxlrp.rules.activation import op_name
from fxlrp.rules.base import Call, vjp
from fxlrp.rules.ops import attention
from fxlrp.rules.transposed_attention import attention_of_values

Step = Callable[..., Any]


def traced(function: Step, *tensors: Tensor) -> fx.GraphModule:
    """The canonical graph of a function, with symbolic sizes."""
    made = make_fx(lambda *x: (function(*x),), tracing_mode="symbolic", pre_dispatch=True)(*tensors)
    return canonicalize(made).graph


def shapes(module: fx.GraphModule, name: str) -> list[tuple[str, ...]]:
    """What the calls of an op compute."""
    found = [n for n in module.graph.nodes if n.op == "call_function" and op_name(n.target) == name]
    values = [n.meta["val"][0] if isinstance(n.meta["val"], (tuple, list)) else n.meta["val"] for n in found]
    return [tuple(map(str, v.shape)) for v in values]


def sliced(function: Step, *tensors: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph before and after, which compute the same."""
    before = traced(function, *tensors)
    after = demanded(before)
    torch.testing.assert_close(after(*tensors), before(*tensors), rtol=1e-12, atol=1e-12)
    return before, after


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


X, W = normal(3, 5, 8), normal(6, 8)
Q, K, V = (normal(3, 2, 5, 4) for _ in range(3))
KEEP = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
ROWS = torch.tensor([4, 0, 2])


def chosen(step: Step, choose: Step) -> Step:
    """A step and a choice of its output, as a function of tensors and rows."""
    return lambda *tensors: choose(step(*tensors[:-1]), tensors[-1])


#: Name -> the op, the step, how its output is chosen, tensors.
MOVES: dict[str, tuple[str, Step, Step, tuple[Tensor, ...]]] = {
    "linear": ("linear", F.linear, lambda y, rows: y[:, 0], (X, W)),
    "last": ("linear", F.linear, lambda y, rows: y[:, -1:], (X, W)),
    "range": ("linear", F.linear, lambda y, rows: y[:, 1:3], (X, W)),
    "pointwise": ("mul", torch.mul, lambda y, rows: y[:, 0], (X, X[:, :, :1])),
    "broadcast": ("add", torch.add, lambda y, rows: y[:, 0], (X, X[0])),
    "norm": ("layer_norm", lambda x: F.layer_norm(x, (8,)), lambda y, rows: y[:, 2], (X,)),
    "softmax": ("softmax", lambda x: x.softmax(-1), lambda y, rows: y[:, 0], (X,)),
    "sum": ("sum", lambda x: x.sum(-1), lambda y, rows: y[:, 0], (X,)),
    "kept sum": ("mean", lambda x: x.mean(-1, keepdim=True), lambda y, rows: y[:, 0], (X,)),
    "transpose": ("transpose", lambda x: x.transpose(1, 2), lambda y, rows: y[..., 0], (X,)),
    "permute": ("permute", lambda x: x.permute(1, 2, 0), lambda y, rows: y[0], (X,)),
    "unsqueeze": ("unsqueeze", lambda x: x.unsqueeze(1), lambda y, rows: y[:, :, 0], (X,)),
    "squeeze": ("squeeze", lambda x: x.squeeze(1), lambda y, rows: y[:, 0], (X.unsqueeze(1),)),
    "heads": ("reshape", lambda x: x.reshape(x.shape[0], x.shape[1], 2, 4), lambda y, rows: y[:, 0], (X,)),
    "expand": ("expand", lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1), lambda y, rows: y[:, :, 0], (X,)),
    "cat": ("cat", lambda x: torch.cat([x, -x], -1), lambda y, rows: y[:, 0], (X,)),
    "stack": ("stack", lambda x: torch.stack([x, -x], 1), lambda y, rows: y[:, :, 0], (X,)),
    "split": ("split", lambda x: math.prod(x.split(4, -1)), lambda y, rows: y[:, 0], (X,)),
    "slice": ("exp", lambda x: x.exp()[..., 2:4], lambda y, rows: y[:, 0], (X,)),
    "select": ("exp", lambda x: x.exp().select(2, 3), lambda y, rows: y[:, 0], (X,)),
    "rows of a product": ("matmul", torch.matmul, lambda y, rows: y[:, :, 0], (Q, K.mT)),
    "columns of a product": ("matmul", torch.matmul, lambda y, rows: y[..., 0], (Q, K.mT)),
    "flat rows": (
        "addmm",
        lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()).reshape(x.shape[0], x.shape[1], 6),
        lambda y, rows: y[:, 0],
        (X, W, W[:, 0]),
    ),
    "queries": ("attention", F.scaled_dot_product_attention, lambda y, rows: y[:, :, 0], (Q, K, V)),
    "a mask's rows": (
        "attention",
        F.scaled_dot_product_attention,
        lambda y, rows: y[:, :, 3],
        (Q, K, V, KEEP),
    ),
    "a bias' rows": (
        "attention",
        F.scaled_dot_product_attention,
        lambda y, rows: y[:, :, 3],
        (Q, K, V, normal(2, 5, 5)),
    ),
    "index": ("exp", torch.exp, lambda y, rows: y[:, rows[:1]], (X,)),
    "index from the end": ("exp", torch.exp, lambda y, rows: y[:, rows[:1] * 0 - 1], (X,)),
    "part of an index": ("exp", torch.exp, lambda y, rows: y[:, rows[:1] * 0 - 1][:, :, 2:4], (X,)),
    "given rows": ("linear", F.linear, lambda y, rows: y[torch.arange(y.shape[0]), rows], (X, W)),
    "gathered rows": (
        "linear",
        F.linear,
        lambda y, rows: y.gather(1, rows.reshape(-1, 1, 1).expand(-1, -1, y.shape[-1])),
        (X, W),
    ),
    "given queries": (
        "attention",
        F.scaled_dot_product_attention,
        lambda y, rows: y.transpose(1, 2)[torch.arange(y.shape[0]), rows],
        (Q, K, V, KEEP),
    ),
    "queries of one mask": (
        "attention",
        F.scaled_dot_product_attention,
        lambda y, rows: y.transpose(1, 2)[torch.arange(y.shape[0]), rows],
        (Q, K, V, KEEP[0, 0]),
    ),
}
STAYS: dict[str, tuple[str, Step, Step, tuple[Tensor, ...]]] = {
    "softmax along it": ("softmax", lambda x: x.softmax(1), lambda y, rows: y[:, 0], (X,)),
    "running sum": ("cumsum", lambda x: x.cumsum(1), lambda y, rows: y[:, 0], (X,)),
    "norm along it": ("layer_norm", lambda x: F.layer_norm(x, (5, 8)), lambda y, rows: y[:, 0], (X,)),
    "features of a product": ("linear", F.linear, lambda y, rows: y[..., 0], (X, W)),
    "mixed by a view": ("reshape", lambda x: x.exp().reshape(3, 8, 5), lambda y, rows: y[:, 0], (X,)),
    "joined along it": ("cat", lambda x: torch.cat([x, -x], 1), lambda y, rows: y[:, 0], (X,)),
    "rolled": ("roll", lambda x: x.roll(1, 1), lambda y, rows: y[:, 0], (X,)),
    "a part of heads": ("attention", F.scaled_dot_product_attention, lambda y, rows: y[:, 0], (Q, K, V)),
    "read by a pool too": ("exp", torch.exp, lambda y, rows: y[:, 0] + y.mean(1), (X,)),
    "two choices": ("exp", torch.exp, lambda y, rows: y[:, 0] + y[:, 1], (X,)),
    "chosen by itself": (
        "exp",
        torch.exp,
        lambda y, rows: y[torch.arange(y.shape[0]), y.sum(-1).argmax(-1)],
        (X,),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_choice_moves_past(name: str) -> None:
    """Breaks if a row of the table is lost, chooses along another dimension, or changes the function."""
    op, step, choose, tensors = MOVES[name]
    before, after = sliced(chosen(step, choose), *tensors, ROWS)
    full, few = (max(map(cost, shapes(graph, op))) for graph in (before, after))
    assert few < full, after.code


@pytest.mark.parametrize("name", STAYS)
def test_a_choice_stays_behind(name: str) -> None:
    """Breaks if a choice moves past what mixes its positions, or what others read whole."""
    op, step, choose, tensors = STAYS[name]
    before, after = sliced(chosen(step, choose), *tensors, ROWS)
    assert shapes(before, op) == shapes(after, op)


def cost(shape: tuple[str, ...]) -> int:
    """How many sizes are symbols, factors of a size each: choices leave 1 or 2."""
    return sum(size.count("s") for size in shape)


@pytest.mark.parametrize("choose", [lambda y: y[:, :, -1], lambda y: y[:, :, 2], lambda y: y[:, :, 1:3]])
def test_causal_queries_get_the_rows_of_a_mask(choose: Step) -> None:
    """Breaks if few queries count as the first ones; the last one needs no mask."""
    causal = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    _, after = sliced(lambda *x: choose(causal(*x)), Q, K, V)
    (node,) = (n for n in after.graph.nodes if n.op == "call_function" and op_name(n.target) == "attention")
    assert node.kwargs["is_causal"] is False
    assert (node.args[3] is None) == (choose(Q).equal(Q[:, :, -1]))


def test_causal_queries_of_each_sample() -> None:
    """Rows below 0 count from the end in the mask too."""

    def picked(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return mixed[torch.arange(q.shape[0]), rows]

    _, after = sliced(picked, Q, K, V, torch.tensor([-1, 0, -3]))
    assert all(shape[2] == "1" for shape in shapes(after, "attention"))


def test_what_is_asked_for_stays_whole() -> None:
    """A latent is every position of it; what comes behind is still computed at the chosen one."""
    before = traced(lambda x, w: F.linear(x.exp(), w)[:, 0], X, W)
    after = demanded(before, whole=["exp"])
    assert shapes(after, "exp") == shapes(before, "exp")
    assert shapes(after, "linear")[0][1] == "1"


def test_what_nothing_reads_is_gone() -> None:
    """Other outputs, other elements of a tuple's users, and checks that would keep them alive."""

    def several(x: Tensor, w: Tensor) -> Tensor:
        first, second = F.linear(x, w).split(3, -1)
        torch.ops.aten._assert_tensor_metadata.default(second.sin(), None, None, torch.float64)
        return first.exp()

    module = traced(several, X, W)
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    (only,) = output.args[0]
    with graph.inserting_before(output):
        other = graph.call_function(torch.ops.aten.cos.default, (only,))
        other.meta["val"] = only.meta["val"]
    output.args = ((only, other),)
    left = {op_name(n.target) for n in only_outputs(module, [0]).graph.nodes if n.op == "call_function"}
    assert {"exp", "split", "linear"} <= left and not {"sin", "cos", "assert_tensor_metadata"} & left


# -- whole models ----------------------------------------------------------------------------------------


def explained(
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    demand: bool,
    target: Any = None,
    **inputs: Tensor,
) -> tuple[fxlrp.Explainer, fxlrp.Explanation]:
    with monkeypatch.context() as patched:
        patched.setattr("fxlrp.explainer.build", functools.partial(build, demand=demand))
        explainer = fxlrp.lrp_compile(model)
        return explainer, explainer(**inputs, target=target)


def products(explainer: fxlrp.Explainer) -> list[Tensor]:
    """What products with weights, and attentions, compute."""
    names = ("linear", "addmm", "attention")
    nodes = [n for n in explainer.rule_graph.graph.nodes if n.op == "call_function"]
    return [n.meta["val"] for n in nodes if op_name(getattr(n.target, "op", n.target)) in names]


def whole_products(explainer: fxlrp.Explainer) -> int:
    """How many of these run over all positions."""
    values = products(explainer)
    return sum(v.dim() > 2 - str(v.shape[0]).count("*") and str(v.shape[-2]) != "1" for v in values)


def by_input(explanation: fxlrp.Explanation) -> dict[str, Tensor]:
    found = explanation.relevance
    return found if isinstance(found, dict) else {"": found}


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("Llama", 7),  # of the last block q, attention, o and the MLP's three, and the head
        ("GPT-2", 5),  # attention, its output, the MLP's two, and the head: q is one product with k and v
        ("BERT classifier", 5),
        ("ViT", 5),
        ("T5", 9),  # of the decoder's last block q, attention and o twice
    ],
)
def test_relevance_stays_the_same(name: str, gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if slicing changes relevance, the ledger no longer closes, or the last block runs whole."""
    chosen = case(name)
    model, inputs = chosen.model(dtype=torch.float64), chosen.example(dtype=torch.float64)
    (plain, expected), (few, found) = (
        explained(model, monkeypatch, demand, **inputs) for demand in (False, True)
    )
    torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=1e-12)
    for key, relevance in by_input(expected).items():
        torch.testing.assert_close(by_input(found)[key], relevance, rtol=1e-12, atol=1e-12)
    assert float(found.ledger.gap.abs().max()) < 1e-12
    assert whole_products(plain) - whole_products(few) == gone


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_several_targets(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target's row passes the last attention by itself: breaks if rows share what they must not."""
    model = case("Llama").model(dtype=torch.float64)
    inputs = case("Llama").example()
    if side == "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    target = fxlrp.Logit(torch.tensor([[5, 7, 9], [1, 5, 2]]), position=torch.tensor([[3, 5, 4], [5, 4, 3]]))
    (_, expected), (few, found) = (
        explained(model, monkeypatch, demand, target, **inputs) for demand in (False, True)
    )
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-12, atol=1e-12)
    assert float(found.ledger.gap.abs().max()) < 1e-12
    rows = [str(v.shape[-2]) for v in products(few)]
    assert set(rows[-6:]) == {rows[-1]} != {rows[0]}  # from the last attention on
    for k in range(3):
        single = fxlrp.Logit(target.index[:, k], position=target.position[:, k])
        alone = fxlrp.lrp_compile(model)(**inputs, target=single)
        torch.testing.assert_close(found.relevance[:, k], alone.relevance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_that_picks_the_last_token(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own choice, computed of its ids, moves past its head, its last MLP and attention."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        pad_token_id=0,
        num_labels=3,
    )
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    ids = torch.tensor([[3, 5, 7, 2, 11], [1, 4, 9, 0, 0]])
    ids[1] = ids[1].roll(2) if side == "left" else ids[1]
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    (plain, expected), (few, found) = (
        explained(model, monkeypatch, demand, **inputs) for demand in (False, True)
    )
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-12, atol=1e-12)
    assert whole_products(plain) - whole_products(few) == 7


# -- frozen attention ------------------------------------------------------------------------------------

FROZEN: dict[str, tuple[dict[str, Any], Tensor | None, int]] = {
    "plain": ({}, None, 2),
    "scaled": ({"scale": 0.3}, None, 2),
    "causal": ({"is_causal": True}, None, 2),
    "grouped": ({"enable_gqa": True, "is_causal": True}, None, 1),
    "masked": ({}, KEEP, 2),
    "a row without keys": ({}, KEEP & (torch.arange(5) > 1), 2),
    "one mask": ({"enable_gqa": True}, KEEP[0, 0], 1),
}


@pytest.mark.parametrize("name", FROZEN)
def test_values_get_the_weights_transposed(name: str) -> None:
    """``G_V = A^T G``, as the definition has it: breaks if the exchanged softmax is not undone."""
    options, keep, heads = FROZEN[name]
    key, value, cotangent = K[:, :heads], V[:, :heads], normal(*Q.shape)
    step = attention_of_values(Call(attention, (Q, key, value, keep), options, (2,)))
    groups = Q.shape[1] // heads
    scores = Q @ key.repeat_interleave(groups, 1).mT * options.get("scale", Q.shape[-1] ** -0.5)
    if options.get("is_causal"):
        keep = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = (scores if keep is None else scores.masked_fill(~keep, -math.inf)).softmax(-1).nan_to_num()
    expected = (weights.mT @ cotangent).unflatten(1, (heads, groups)).sum(2)
    mixed = weights @ value.repeat_interleave(groups, 1)
    torch.testing.assert_close(step.output, mixed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.pullback(cotangent)[0], expected, rtol=1e-12, atol=1e-12)


def test_added_masks_take_the_ordinary_backward() -> None:
    """A mask of large finite numbers leaves no log-sum-exp to go by."""
    bias = torch.full((5, 5), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    bias[0] = torch.finfo(torch.float64).min
    call = Call(attention, (Q, K, V, bias), {}, (2,))
    found, expected = (step(call).pullback(Q)[0] for step in (attention_of_values, vjp))
    assert found is not None and expected is not None and found.equal(expected)


def test_frozen_attention_takes_no_fused_backward() -> None:
    """Breaks if coefficients of q and k are computed and dropped."""
    explainer = fxlrp.lrp_compile(case("ViT").model())
    backward = {}
    for composite in ("attnlrp", "cp"):
        one = explainer.with_composite(composite)
        one(**case("ViT").example())
        names = [str(n.target) for n in one.relevance_graph.graph.nodes if n.op == "call_function"]
        backward[composite] = sum("attention" in name and "backward" in name for name in names)
    assert backward == {"attnlrp": 2, "cp": 0}
