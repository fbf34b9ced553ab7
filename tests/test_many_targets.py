"""Several targets at once: each is explained as by itself, from one forward pass and one program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxlrp
from fxlrp import Logit, LogitDifference, LogProb, Span, TopK
from fxlrp.compiler.choice import select_index
from fxlrp.rules import AttentionRule, Epsilon, IdentityNorm, Linearization, Rule
from fxlrp.rules.base import Call, vjp
from fxlrp.rules.batched_attention import attention_of_many
from fxlrp.rules.ops import attention
from fxlrp.rules.stacked import vjp_many

COMPOSITES = ("attnlrp", "cp", "gradient")
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    ids, mask = models.token_batch(length, tuple(max(length - i, 2) for i in range(batch)), "right")
    return {"input_ids": ids, "attention_mask": mask}


def decoded(batch: int, length: int) -> dict[str, Tensor]:
    return {**tokens(batch, length), "decoder_input_ids": torch.randint(1, 41, (batch, 4))}


def pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 12, 12, dtype=torch.float64)}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[int, int], dict[str, Tensor]], int]] = {
    "Llama": (models.tiny_llama, tokens, 41),
    "BERT": (models.tiny_bert, tokens, 3),
    "T5": (models.tiny_t5, decoded, 41),
    "ViT": (models.tiny_vit, pixels, 3),
}


def as_dict(relevance: Any) -> dict[str, Tensor]:
    return dict(relevance) if isinstance(relevance, dict) else {"": relevance}


def assert_same(several: fxlrp.Explanation, singles: list[fxlrp.Explanation], tolerance: float) -> None:
    """Relevance, coefficients and values of each target are those of its own explanation."""
    assert several.value.shape == (len(singles[0].value), len(singles))
    for j, single in enumerate(singles):
        torch.testing.assert_close(several.value[:, j], single.value, rtol=tolerance, atol=tolerance)
        for found, expected in (
            (several.relevance, single.relevance),
            (several.coefficients, single.coefficients),
            (several.of(j).relevance, single.relevance),
        ):
            for name, tensor in as_dict(expected).items():
                own = as_dict(found)[name]
                own = own if found is not several.relevance and own.shape == tensor.shape else own[:, j]
                torch.testing.assert_close(own, tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_classes_of_a_sample_are_explained_as_by_themselves(family: str, composite: str) -> None:
    """Would break: targets that mix, a size of K or the batch that is baked in, a wrong row."""
    make, inputs, classes = FAMILIES[family]
    explainer = fxlrp.lrp_compile(make(), composite, backend="eager")
    for batch, length, count in ((2, 7, 3), (3, 6, 2), (1, 5, 4), (2, 4, 1)):
        given = inputs(batch, length)
        classes_of = torch.randint(0, classes, (batch, count))
        several = explainer(**given, target=classes_of)
        assert_same(several, [explainer(**given, target=classes_of[:, j]) for j in range(count)], 1e-10)
    assert len(explainer._programs) == 2, "one program for any number of targets, one for single ones"
    assert several.ledger.residual < 1e-6
    assert several.ledger.value.shape == several.value.shape


STABILISED = fxlrp.Composite(
    [
        (fxlrp.op("attention"), AttentionRule(0.1, 0.2, 2.0)),
        (fxlrp.op("norm"), IdentityNorm(1e-2)),
        (fxlrp.op("linear"), Epsilon(0.25, relative=True)),
    ]
)


@pytest.mark.parametrize(
    ("family", "composite"),
    [
        ("Llama", "pa"),
        ("Llama", "attnlrp-gamma"),
        ("Llama", "attribution-graph"),
        ("BERT", STABILISED),
        ("ViT", "epsilon-plus-flat"),
        ("ViT", "epsilon-gamma-box"),
        ("ViT", "epsilon-alpha2-beta1"),
    ],
)
def test_every_rule_takes_several_targets(family: str, composite: str | fxlrp.Composite) -> None:
    """Would break: a rule whose pullback mixes targets, relevance that is carried to the input but of one
    target, positions of the wrong one.
    """
    make, inputs, classes = FAMILIES[family]
    explainer = fxlrp.lrp_compile(make(), composite, backend="eager")
    for batch, length, count in ((2, 7, 3), (3, 6, 2)):
        given = inputs(batch, length)
        classes_of = torch.randint(0, classes, (batch, count))
        several = explainer(**given, target=classes_of)
        singles = [explainer(**given, target=classes_of[:, j]) for j in range(count)]
        assert_same(several, singles, 1e-9)
        for label, found in several.positions.items():
            for j, single in enumerate(singles):
                torch.testing.assert_close(found[:, j], single.positions[label])
    assert several.ledger.residual < 1e-6
    assert bool(several.positions) == (composite == "pa")


def test_experts_of_a_mixture() -> None:
    """Would break: rows of several targets that go to the wrong expert."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    explainer = fxlrp.lrp_compile(model, backend="eager")
    for batch, length, count in ((2, 7, 3), (3, 6, 4)):
        given = tokens(batch, length)
        index = torch.randint(0, 41, (batch, count))
        several = explainer(**given, target=index)
        # float32, which is all that the experts' kernels take
        assert_same(several, [explainer(**given, target=index[:, j]) for j in range(count)], 2e-5)
    assert len(explainer._programs) == 2


@pytest.fixture(scope="module")
def explainer() -> fxlrp.Explainer:
    return fxlrp.lrp_compile(models.tiny_llama(), backend="eager")


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    ids, mask = models.token_batch(1, (7, 7, 7), "right")
    return {"input_ids": ids, "attention_mask": mask}


def test_a_list_of_targets_of_any_kind_and_position(
    explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    """Would break: scores of mixed kinds in the wrong order, or of another target's row."""
    index = torch.tensor([3, 1, 4])
    for targets in (
        [3, 5],
        [7, index, None, -1],
        [Logit(3, position=1), LogitDifference(index, 5), LogProb(2, position=-1), None],
        [Logit(3, position=2), Logit(4, position=2)],
        (LogProb(3), LogProb(index, position=torch.tensor([0, 3, 2]))),
        [LogitDifference(2, 5, position=0)],
    ):
        several = explainer(**batch, target=targets)
        assert_same(several, [explainer(**batch, target=t) for t in targets], 1e-10)
        assert several.ledger.residual < 1e-6


def test_a_list_reads_the_last_unpadded_row_where_it_names_none(explainer: fxlrp.Explainer) -> None:
    """Would break: the last position in place of the last unpadded one, beside targets with a position."""
    ids, mask = models.token_batch(1, (7, 4), "right")
    given = {"input_ids": ids, "attention_mask": mask}
    several = explainer(**given, target=[3, Logit(5, position=1)])
    assert_same(several, [explainer(**given, target=t) for t in (3, Logit(5, position=1))], 1e-10)


def test_top_k(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    """The largest logits in order, whatever k; the first of them is the default target."""
    for k, position in ((1, None), (3, None), (4, 2)):
        found = explainer(**batch, target=TopK(k, position=position))
        logits = found.output.logits[:, -1 if position is None else position]
        torch.testing.assert_close(found.value, logits.topk(k).values, rtol=1e-10, atol=1e-10)
        classes = logits.topk(k).indices
        singles = [explainer(**batch, target=Logit(classes[:, j], position=position)) for j in range(k)]
        assert_same(found, singles, 1e-10)


def test_log_probabilities(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    """Their value is the log-softmax; what is not linear in the logits is booked as the target's."""
    found = explainer(**batch, target=LogProb(3))
    expected = found.output.logits[:, -1].log_softmax(-1)[:, 3]
    torch.testing.assert_close(found.value, expected, rtol=1e-10, atol=1e-10)
    as_function = explainer(**batch, target=lambda output: output.logits[:, -1].log_softmax(-1)[:, 3])
    torch.testing.assert_close(found.relevance, as_function.relevance, rtol=1e-10, atol=1e-10)
    logits = found.output.logits[:, -1]
    first_order = logits[:, 3] - (logits.softmax(-1) * logits).sum(-1)
    torch.testing.assert_close(
        found.ledger.by_cause()["target"], expected - first_order, rtol=1e-8, atol=1e-8
    )


class Counted(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in MATMULS
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> int:
    with Counted() as mode:
        run()
    return mode.count


@pytest.mark.parametrize("composite", COMPOSITES)
def test_a_span_is_its_tokens_from_one_forward(composite: str) -> None:
    """Would break: a token off by one, rows of the head for other targets, or a pass for each token."""
    model = models.tiny_llama()
    explainer = fxlrp.lrp_compile(model, composite, backend="eager")
    ids = torch.randint(1, 41, (2, 20))
    several = explainer(ids, target=Span(3, 19))
    singles = [explainer(ids, target=Logit(ids[:, p], position=p - 1)) for p in range(3, 19)]
    assert_same(several, singles, 1e-10)
    logits = model(ids).logits.gather(-1, ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(several.value, logits[:, 2:18], rtol=1e-6, atol=1e-6)
    single = counted(lambda: explainer(ids, target=Logit(3, position=1)))
    counts = [counted(lambda end=end: explainer(ids, target=Span(3, end))) for end in (5, 19)]
    assert counts[0] == counts[1], "the number of matrix products does not depend on that of targets"
    linears = [
        sum(n.target is torch.ops.aten.linear.default for n in explainer.relevance_graph.graph.nodes)
        for _ in (explainer(ids, target=Span(3, 19)), explainer(ids, target=Logit(3, position=1)))
    ]
    assert linears[0] == linears[1], "the forward runs once"
    assert counts[0] < 2 * single


def test_a_span_of_log_probabilities(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    ids = batch["input_ids"]
    several = explainer(**batch, target=Span(2, 5, log_prob=True))
    singles = [explainer(**batch, target=LogProb(ids[:, p], position=p - 1)) for p in (2, 3, 4)]
    assert_same(several, singles, 1e-10)
    assert "target" in several.ledger.by_cause()


def test_a_span_of_a_decoder_names_its_own_ids() -> None:
    """Would break: tokens of the encoder's ids, where both are equally long."""
    explainer = fxlrp.lrp_compile(models.tiny_t5(), backend="eager")
    given = decoded(2, 4)
    several = explainer(**given, target=Span(1, 3))
    ids = given["decoder_input_ids"]
    singles = [explainer(**given, target=Logit(ids[:, p], position=p - 1)) for p in (1, 2)]
    assert_same(several, singles, 1e-10)


def test_latents_of_several_targets(batch: dict[str, Tensor]) -> None:
    """Each target's relevance at each layer, K behind the batch."""
    explainer = fxlrp.lrp_compile(models.tiny_llama(), latents=("model.layers.*",), backend="eager")
    several = explainer(**batch, target=[3, Logit(5, position=2)])
    for j, target in enumerate((3, Logit(5, position=2))):
        single = explainer(**batch, target=target)
        for path, relevance in single.latents.items():
            torch.testing.assert_close(several.latents[path][:, j], relevance, rtol=1e-10, atol=1e-10)


def test_the_ledger_of_each_target_is_its_own(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    """Would break: amounts booked to another target or sample."""
    several = explainer(**batch, target=[3, LogProb(5, position=2)])
    for j, target in enumerate((3, LogProb(5, position=2))):
        single = explainer(**batch, target=target).ledger
        own = several.of(j).ledger
        torch.testing.assert_close(own.value, single.value)
        torch.testing.assert_close(own.absorbed, single.absorbed, rtol=1e-8, atol=1e-8)
        assert own.rows(1) == several.ledger.of(j).rows(1)
    assert "target 0 of 2" in str(several.ledger)
    with pytest.raises(IndexError, match="one target"):
        explainer(**batch).of(0)


@pytest.mark.parametrize("chunk", [1, 2, 99])
def test_chunks_join_to_the_whole(explainer: fxlrp.Explainer, batch: dict[str, Tensor], chunk: int) -> None:
    """Would break: the last, shorter chunk; kinds or positions cut elsewhere than indices."""
    parts = fxlrp.lrp_compile(explainer.model, backend="eager", chunk=chunk)
    for target in (
        torch.randint(0, 41, (3, 5)),
        Span(1, 6),
        TopK(5),
        [3, LogProb(4, position=2), LogitDifference(1, 2)],
    ):
        whole, joined = explainer(**batch, target=target), parts(**batch, target=target)
        torch.testing.assert_close(joined.relevance, whole.relevance, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(joined.value, whole.value, rtol=1e-10, atol=1e-10)
        assert joined.ledger.residual < 1e-6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_where_memory_runs_out_half_as_many_are_explained(
    explainer: fxlrp.Explainer,
    batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """Would break: a crash, targets left out or explained twice."""
    index = torch.randint(0, 41, (3, 7))
    expected = explainer(**batch, target=index)
    sizes: list[int] = []

    class Small:
        """Runs two targets at most."""

        def __init__(self, run: Any) -> None:
            self.run = run

        def __call__(self, *given: Tensor) -> Any:
            sizes.append(given[-1].shape[1])
            if sizes[-1] > 2:
                raise error
            return self.run(*given)

    for compiled in explainer._programs.values():
        run = compiled.runner
        monkeypatch.setitem(vars(compiled), "runner", Small(run))
    found = explainer(**batch, target=index)
    torch.testing.assert_close(found.relevance, expected.relevance)
    assert sizes == [7, 4, 2, 2, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    from fxlrp.memory import in_chunks

    def run(start: int, stop: int) -> Any:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        in_chunks(run, 4, None)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([], "empty"),
        ([3, lambda output: output.logits[:, 0, 0]], "one scalar per sample"),
        ([3, Span(1, 2)], "one scalar per sample"),
        ([3, torch.zeros(3, 2, dtype=torch.long)], "one scalar per sample"),
        ([3, 41], "out of range"),
        ([3, Logit(3, position=7)], "out of range"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(3,\), or \(3, 2\)"),
        (torch.zeros(3, 2), "LongTensor"),
        (torch.zeros(3, 2, 1, dtype=torch.long), "shape"),
        (TopK(42), "41 classes"),
        (Span(5, 8), "end is 7 at most"),
    ],
)
def test_bad_targets_say_what_is_allowed(
    explainer: fxlrp.Explainer, batch: dict[str, Tensor], target: Any, message: str
) -> None:
    with pytest.raises(fxlrp.TargetError, match=message):
        explainer(**batch, target=target)


def test_bad_spans_chunks_and_ks() -> None:
    with pytest.raises(fxlrp.TargetError, match="start is 1 or more"):
        Span(0, 3)
    with pytest.raises(fxlrp.TargetError, match="at least start"):
        Span(3, 3)
    with pytest.raises(fxlrp.TargetError, match="ints"):
        Span(1, 2.5)  # type: ignore[arg-type]
    with pytest.raises(fxlrp.TargetError, match="1 or more"):
        TopK(0)
    with pytest.raises(fxlrp.InputError, match="chunk"):
        fxlrp.lrp_compile(nn.Linear(2, 2), chunk=0)


def test_spans_need_ids_positions_and_no_padding(
    explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    """Each refusal names what is missing: ids, a sequence of logits, tokens that are not padding."""
    embedded = explainer.model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(fxlrp.TargetError, match="no ids"):
        explainer(inputs_embeds=embedded, target=Span(1, 3))
    classifier = fxlrp.lrp_compile(models.tiny_bert(), backend="eager")
    with pytest.raises(fxlrp.TargetError, match="a span needs"):
        classifier(**batch, target=Span(1, 3))
    with pytest.raises(fxlrp.TargetError, match="no positions"):
        classifier(**batch, target=[Logit(1, position=2), 2])
    ids, mask = models.token_batch(1, (7, 4), "right")
    with pytest.raises(fxlrp.TargetError, match="of row 1 is padding"):
        explainer(input_ids=ids, attention_mask=mask, target=Span(2, 6))


def test_the_graph_of_several_targets_compiles(batch: dict[str, Tensor]) -> None:
    """fullgraph, dynamic, other sizes and another number of targets; would break by a graph break."""
    model = models.tiny_llama(num_hidden_layers=1).float()
    explainer = fxlrp.lrp_compile(model, backend="eager")
    explainer(**batch, target=torch.zeros(3, 2, dtype=torch.long))
    graph = explainer.relevance_graph
    compiled = torch.compile(graph, fullgraph=True, dynamic=True)
    for given, count in ((batch, 3), (tokens(2, 5), 4)):
        operands = (*given.values(), torch.randint(0, 41, (len(given["input_ids"]), count)))
        for found, expected in zip(
            pytree.tree_leaves(compiled(*operands)), pytree.tree_leaves(graph(*operands)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_graph_of_one_target_is_as_it_was(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    """Would break: what several targets need (attention written out, a leading size) in one's graph."""
    fresh = fxlrp.lrp_compile(explainer.model, backend="eager")
    fresh(**batch, target=3)
    alone = fresh.relevance_graph.code
    shared = fxlrp.lrp_compile(explainer.model, backend="eager")
    shared(**batch, target=[3, 4])
    shared(**batch, target=3)
    assert shared.relevance_graph.code == alone
    assert "flash_attention_for_cpu_backward" in alone
    shared(**batch, target=[3, 4])
    assert "flash_attention_for_cpu_backward" not in shared.relevance_graph.code


def masks(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 1, 5, 6, generator=generator) > 0.4
    keep[..., 0] = True
    keep[0, 0, 2] = False  # a query that sees nothing
    bias = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    return {"bool": {"mask": keep}, "bias": {"mask": bias, "scale": 0.7}, "none": {}}[kind]


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["none", "bool", "bias", "causal"])
def test_attention_written_out_is_the_fused_one(kind: str, heads: int) -> None:
    """Output and coefficients of q, k, v, with masks, grouped heads and rows that see nothing."""
    keys = 5 if kind == "causal" else 6
    options = {"is_causal": True} if kind == "causal" else masks(kind)
    options["enable_gqa"] = heads < 4
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    key, value = (torch.randn(2, heads, keys, width, dtype=torch.float64) for width in (3, 3))
    for active in ((0, 1, 2), (2,), (0,), (1, 2)):
        call = Call(attention, (query, key, value), options, active)
        one, several = vjp(call), attention_of_many(call)
        torch.testing.assert_close(several.output, one.output)
        cotangents = torch.randn(3, *one.output.shape, dtype=torch.float64)
        found = several.pullback(cotangents)
        for k, cotangent in enumerate(cotangents):
            for own, expected in zip(found, one.pullback(cotangent), strict=True):
                assert own is not None
                torch.testing.assert_close(own[k], expected)


ATEN = torch.ops.aten
X = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
AT = torch.tensor([0, 2, 2])
OPS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "slice": (ATEN.slice.Tensor, (X, 1, 1, 4), {}),
    "select": (ATEN.select.int, (X, -1, 2), {}),
    "split": (ATEN.split.Tensor, (X, 2, 1), {}),
    "diagonal": (ATEN.diagonal.default, (X, 0, 1, 2), {}),
    "index": (ATEN.index.Tensor, (X, [None, AT]), {}),
    "index apart": (ATEN.index.Tensor, (X, [AT, None, AT]), {}),
    "gather": (ATEN.gather.default, (X, 1, torch.zeros(4, 2, 6, dtype=torch.long)), {}),
    "index_select": (ATEN.index_select.default, (X, -1, AT), {}),
    "select_index": (select_index, (X, 1, AT - 4), {}),
    "scatter_add": (ATEN.scatter_add.default, (X, 1, torch.zeros(4, 2, 6, dtype=torch.long), X[:, 1:3]), {}),
    "index_add": (ATEN.index_add.default, (X, 1, AT, X[:, :3]), {}),
    "max": (ATEN.max.dim, (X, 1), {}),
    "topk": (ATEN.topk.default, (X, 2), {}),
    "gelu": (ATEN.gelu.default, (X,), {}),
    "layer_norm": (ATEN.layer_norm.default, (X, [6]), {}),
    "conv1d": (ATEN.conv1d.default, (X, torch.randn(3, 5, 2, dtype=torch.float64)), {}),
    "avg_pool1d without a batch": (ATEN.avg_pool1d.default, (X[0], [2]), {}),
    "softmax": (ATEN.softmax.int, (X, -1), {}),
    "cat": (ATEN.cat.default, ([X, X], 1), {}),
}


@pytest.mark.parametrize("name", OPS)
def test_pullbacks_of_many_are_those_of_one(name: str) -> None:
    """Would break: a dimension that is not shifted, K folded into the wrong place."""
    op, args, kwargs = OPS[name]
    leaves = pytree.tree_leaves((args, kwargs))
    floats = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    for active in {(0,), tuple(floats) if name in ("scatter_add", "index_add", "cat") else (0,)}:
        call = Call(op, args, kwargs, active)
        one, several = vjp(call), vjp_many(call)
        outputs = pytree.tree_leaves(one.output)
        grads = [torch.randn(3, *z.shape, dtype=z.dtype) if z.is_floating_point() else None for z in outputs]
        spec = pytree.tree_structure(one.output)
        found = several.pullback(pytree.tree_unflatten(grads, spec))
        for k in range(3):
            single = one.pullback(pytree.tree_unflatten([None if g is None else g[k] for g in grads], spec))
            for own, expected in zip(found, single, strict=True):
                assert own is not None
                torch.testing.assert_close(own[k], expected)


@torch.library.custom_op("many_targets::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return 0.5 * x


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class Halving(Rule):
    """A rule whose pullback calls an op that PyTorch cannot batch for symbolic sizes."""

    def linearize(self, call: Call) -> Linearization:
        return Linearization(call.run(), lambda cotangent: (halved(cotangent),))


def test_a_rule_that_cannot_be_batched_goes_one_by_one() -> None:
    """Would break: an error, or sizes of the trace that stay fixed; the plan says what it costs."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double().eval()
    composite = fxlrp.Composite([(fxlrp.op("activation"), Halving())])
    explainer = fxlrp.lrp_compile(model, composite, backend="eager")
    for batch, targets in ((3, [0, 2]), (5, [1, 3, 0]), (2, [1, 1])):
        x = torch.randn(batch, 6, dtype=torch.float64)
        several = explainer(x, target=targets)
        assert any("one program for each number of targets" in note for note in explainer.plan.notes)
        assert_same(several, [explainer(x, target=t) for t in targets], 1e-10)
    assert len(explainer._programs) == 3, "two numbers of targets, and one target"
    assert sum(map(len, explainer._traces.values())) == 1
