"""Layers that are alike become calls of one graph, which is compiled once; and the backends."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxlrp
import fxlrp.explainer
from fxlrp.compiler.blocks import Outlined, outline
from fxlrp.compiler.cudagraphs import Replayed
from fxlrp.compiler.graphs import is_op
from fxlrp.compiler.inductor import Layout
from fxlrp.compiler.lower import direct
from fxlrp.compiler.repeats import Run, runs


def tokens(*lengths: int) -> dict[str, Tensor]:
    ids, mask = models.token_batch(1, lengths, "right")
    return {"input_ids": ids, "attention_mask": mask}


def decoded(*lengths: int) -> dict[str, Tensor]:
    return {**tokens(*lengths), "decoder_input_ids": torch.randint(1, 41, (len(lengths), 4))}


def pixels(*lengths: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(lengths), 3, 12, 12)}


def mixture(first_dense: int) -> nn.Module:
    """A decoder whose first layers are dense and whose others are mixtures of experts."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=first_dense + 4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        mlp_only_layers=list(range(first_dense)),
    )
    return AutoModelForCausalLM.from_config(config).eval()


def alternating() -> nn.Module:
    """A decoder whose layers see a window or everything, by turns."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * 4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def explained(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: dict[str, Tensor], **settings: Any
) -> tuple[list[Outlined], fxlrp.Explanation]:
    """An explanation by blocks that run eagerly, and the blocks."""
    found: list[Outlined] = []

    def lowered(graph: fx.GraphModule | None, *rest: Any, **settings: Any) -> Any:
        if graph is None:
            return None
        made = outline(graph)
        assert made is not None
        found.append(made)
        calls = [getattr(made.graph, n.target) for n in made.graph.graph.nodes if n.op == "call_module"]
        return functools.partial(direct(made.graph), *calls)

    with monkeypatch.context() as patch:
        patch.setattr(fxlrp.explainer, "lower", lowered)
        return found, fxlrp.lrp_compile(model)(**inputs, **settings)


def assert_same(found: fxlrp.Explanation, expected: fxlrp.Explanation) -> None:
    for ours, theirs in (
        (found.relevance, expected.relevance),
        (found.coefficients, expected.coefficients),
        (found.value, expected.value),
    ):
        for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


# The last layer computes one row and is a block of its own.
CASES: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Tensor]], Any, list[int]]] = {
    "decoder": (lambda: models.tiny_llama(num_hidden_layers=6), tokens, None, [5, 5]),
    "decoder, 3 targets": (lambda: models.tiny_llama(num_hidden_layers=6), tokens, [1, 2, 3], [5, 5]),
    "encoder": (lambda: models.tiny_bert(num_hidden_layers=6), tokens, None, [5, 5]),
    "fused projections": (lambda: models.tiny_gpt2(n_layer=6), tokens, None, [5, 5]),
    "images": (lambda: models.tiny_vit(num_hidden_layers=6), pixels, 1, [5, 5]),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_alike_are_one_block(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Would break where a mask, a shared table or the order of nodes tells equal layers apart."""
    build, given, target, counts = CASES[name]
    model, inputs = build().float(), given(7, 4)
    blocks, found = explained(monkeypatch, model, inputs, target=target)
    assert sorted(blocks[0].calls.values()) == counts
    assert_same(found, fxlrp.lrp_compile(model, backend="eager")(**inputs, target=target))


def test_two_stacks_have_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and decoder, forward and relevance: four kinds; coefficients of the memory go across blocks."""
    model, inputs = models.tiny_t5(num_layers=5).float(), decoded(7, 4)
    blocks, found = explained(monkeypatch, model, inputs)
    assert len(blocks[0].calls) == 4
    assert min(blocks[0].calls.values()) >= 4
    assert_same(found, fxlrp.lrp_compile(model, backend="eager")(**inputs))


@pytest.mark.parametrize(
    ("build", "kinds"), [(lambda: mixture(0), 2), (lambda: mixture(4), 4), (alternating, 2)]
)
def test_kinds_of_layers_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], kinds: int
) -> None:
    """Dense layers and mixtures are different blocks; a mask is an input, whose kind makes no other block."""
    model, inputs = build(), tokens(7, 4)
    blocks, found = explained(monkeypatch, model, inputs)
    assert len(blocks[0].calls) == kinds
    assert_same(found, fxlrp.lrp_compile(model, backend="eager")(**inputs))


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_stay_one_graph(layers: int) -> None:
    """Does not fire: of two layers none is repeated often enough."""
    explainer = fxlrp.lrp_compile(models.tiny_bert(num_hidden_layers=layers))
    explainer(**tokens(7, 4))
    assert outline(explainer.relevance_graph) is None


def test_layers_of_different_widths_stay_one_graph() -> None:
    """Does not fire: the same ops at other shapes are no repetition."""
    widths = [16, 12, 20, 8, 24, 4]
    layers = [
        nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU()) for a, b in itertools.pairwise(widths)
    ]
    explainer = fxlrp.lrp_compile(nn.Sequential(*layers).eval())
    explainer(torch.randn(3, 16), target=1)
    assert outline(explainer.relevance_graph, size=4) is None


def test_recomputed_pieces_are_parts_of_blocks() -> None:
    """A graph in which the relevance of each layer computes something again, as less memory asks for."""
    explainer = fxlrp.lrp_compile(models.tiny_llama(num_hidden_layers=6), backend="eager")
    inputs = tokens(7, 4)
    explainer(**inputs)
    graph = explainer.relevance_graph
    expected = pytree.tree_leaves(graph(**inputs))
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    again = 0
    for node in [n for n in graph.graph.nodes if is_op(n, "silu")]:
        late = [user for user in node.users if place[user] > place[node] + 5]
        with graph.graph.inserting_before(min(late, key=place.__getitem__)):
            copied = graph.graph.node_copy(node, lambda n: n)
        for user in late:
            user.replace_input_with(node, copied)
        again += 1
    assert again == 6
    graph.recompile()
    made = outline(graph)
    assert made is not None and sorted(made.calls.values()) == [5, 5]
    for found, wanted in zip(pytree.tree_leaves(made.graph(**inputs)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_runs_of_a_sequence() -> None:
    """The run that saves most wins, then what is left of and right of it; cut where least crosses."""

    def flat(start: int, period: int) -> list[int]:
        return [1] * period

    def narrow(start: int, period: int) -> list[int]:
        return [int((start + s) % 3 != 1) for s in range(period)]

    assert runs("abcdxyxyxyxyxyz", flat, times=3, size=2) == [Run(4, 2, 5)]
    assert runs("ababab" + "q" + "xyzxyzxyzxyz", flat, times=3, size=2) == [Run(0, 2, 3), Run(7, 3, 4)]
    assert runs("abcabcabcabca", narrow, times=3, size=2) == [Run(1, 3, 4)]
    assert runs("abcabc", flat, times=3, size=2) == []
    assert runs("aaaaaa", flat, times=3, size=2) == []


def test_layouts_hold_for_any_sizes() -> None:
    """Strides are derived from sizes: permuted, expanded and contiguous; of slices they are not."""
    for tensor in (
        torch.empty(2, 3, 4),
        torch.empty(2, 5, 3, 4).transpose(1, 2),
        torch.empty(1, 5, 3, 4).transpose(1, 2),
        torch.empty(2, 1, 4).expand(2, 3, 4),
        torch.empty(0),
    ):
        found = Layout.of(tensor).strides(tensor.shape)
        assert all(s == t or n == 1 for s, t, n in zip(found, tensor.stride(), tensor.shape, strict=True))
    assert Layout.of(torch.empty(2, 6)[:, :3]).order is None


def deep() -> nn.Module:
    return models.tiny_llama(num_hidden_layers=5, exact=False).float()


@pytest.mark.slow
def test_each_block_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks and what is between compile once for all layers, batches and lengths.

    Would break by guards on strides, a size taken for a constant, or a kernel for each layer.
    """
    compiled = []
    original = torch._inductor.compile
    monkeypatch.setattr(torch._inductor, "compile", lambda *a: compiled.append(1) or original(*a))
    model = deep()
    eager, inductor = (fxlrp.lrp_compile(model, backend=b) for b in ("eager", "inductor"))
    for inputs in (tokens(7, 4), tokens(5, 9, 3), tokens(6, 6, 6, 6, 6, 6)):
        expected, found = eager(**inputs), inductor(**inputs)
        torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-6)
        assert len(compiled) == 4


_SECOND = """
import sys
sys.path[:0] = sys.argv[1:]
import torch, fxlrp
from torch import nn
from fxlrp.compiler.blocks import outline

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        gate, up, down, *others = self.maps
        h = self.norms[0](x)
        x = x + down(nn.functional.silu(gate(h)) * up(h))
        gate, up, down = others
        h = self.norms[1](x)
        return x + down(nn.functional.gelu(gate(h)) * up(h))

torch.manual_seed(0)
explainer = fxlrp.lrp_compile(nn.Sequential(*[Block() for _ in range(5)]).eval(), backend="inductor")
explainer(torch.randn(3, 8), target=1)
assert outline(explainer.relevance_graph) is not None
found = torch._dynamo.utils.counters["inductor"]
print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    """Would break by weights as constants, or by anything in a graph that differs between processes."""
    here = Path(__file__).parent
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _SECOND, str(here), str(here.parent)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        )
        counts.append(tuple(map(int, done.stdout.split()[-2:])))
    (first_hits, first_misses), (hits, misses) = counts
    assert first_misses > 2  # layers and what is between them, forward and relevance
    assert misses == 0
    assert hits == first_hits + first_misses


class Tape:
    """Stands in for CUDA's recorder: a replay runs again and writes into the same results."""

    def __init__(self) -> None:
        self.warm, self.recorded, self.turns, self.busy = 0, 0, 0, False

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        assert not self.busy
        self.busy = True
        yield
        self.busy = False

    def warm_up(self, run: Callable[[], Any]) -> None:
        assert self.busy
        self.warm += 1
        run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        results = run()

        def replay() -> None:
            for mine, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(run()), strict=True):
                mine.copy_(new)

        return replay, results


def test_a_recording_serves_its_shapes() -> None:
    """Once for each shape; inputs are copied in, and no later replay writes over earlier results."""
    tape = Tape()
    replayed = Replayed(lambda x: ((2 * x,), x.sum()), tape)
    first, second, other = torch.ones(3), torch.arange(3.0), torch.ones(2, 2)
    (doubled,), total = replayed(first)
    (again,), sum_again = replayed(second)
    assert (tape.warm, tape.recorded, tape.turns) == (1, 1, 2)
    assert doubled.tolist() == [2, 2, 2] and float(total) == 3
    assert again.tolist() == [0, 2, 4] and float(sum_again) == 3
    assert first.tolist() == [1, 1, 1]
    assert float(replayed(other)[1]) == 4
    assert tape.recorded == 2


def test_few_recordings_are_kept() -> None:
    """Each holds the memory of a run; the oldest goes first and is recorded anew when it comes back."""
    tape = Tape()
    replayed = Replayed(lambda x: x + 1, tape)
    for size in (*range(1, 40), 39, 1):
        assert replayed(torch.zeros(size)).tolist() == [1] * size
    assert tape.recorded == 40
    assert len(replayed.known) < 20


def test_what_cannot_be_recorded_says_so() -> None:
    """A runner that waits for the host fails while it is recorded, as CUDA does then."""

    class Refusing(Tape):
        def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(fxlrp.InputError, match=r"stream is capturing.*inductor"):
        Replayed(lambda x: x, Refusing())(torch.ones(2))


def test_cudagraphs_needs_a_gpu() -> None:
    """Elsewhere it would fail deep inside of CUDA."""
    explainer = fxlrp.lrp_compile(nn.Linear(3, 2).eval(), backend="cudagraphs")
    with pytest.raises(fxlrp.InputError, match="on cpu"):
        explainer(torch.randn(2, 3), target=1)


def test_an_unknown_backend_lists_all() -> None:
    """Would break if a new backend were left out of what the error names."""
    with pytest.raises(fxlrp.InputError, match="auto, eager, inductor, cudagraphs"):
        fxlrp.lrp_compile(nn.Linear(3, 2), backend="cuda")


@pytest.mark.gpu
def test_a_recorded_explanation_on_a_gpu() -> None:
    """Replays equal eager runs, for inputs that came later too."""
    model = deep().cuda()
    eager, recorded = (fxlrp.lrp_compile(model, backend=b) for b in ("eager", "cudagraphs"))
    for seed in (0, 1):
        ids = models.token_batch(seed, (7, 7))[0].cuda()
        torch.testing.assert_close(
            recorded(input_ids=ids).relevance, eager(input_ids=ids).relevance, rtol=1e-4, atol=1e-5
        )
