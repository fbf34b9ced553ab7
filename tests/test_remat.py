"""Memory budgets: what is kept, what is computed again, and what an explanation is estimated to take."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxlrp
from fxlrp.compiler.liveness import Sizes, peak, steps_of
from fxlrp.compiler.parts import Parts
from fxlrp.compiler.shapes import integers
from fxlrp.memory import advised

LENGTH, WIDTH = 160, 32
BUDGETS = (0.9, 0.75, 0.6, 10**9)


class Block(nn.Module):
    """A gated block beside attention, as decoders have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = (
            nn.Linear(width, 4 * width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in split)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Deep(nn.Module):
    """Blocks, the mean over positions, classes."""

    def __init__(self, layers: int, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def example(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep(4).eval()


@pytest.fixture(scope="module")
def usual(deep: nn.Module) -> fxlrp.Explainer:
    explainer = fxlrp.lrp_compile(deep, backend="eager")
    explainer(example())
    return explainer


def budgeted(explainer: fxlrp.Explainer, budget: float | int) -> fxlrp.Explainer:
    """The same with a budget, on the same trace of the model."""
    return dataclasses.replace(explainer, memory_budget=budget, _programs={}, _last=None)


def again(explainer: fxlrp.Explainer) -> list[str]:
    """Names of ops that are computed again."""
    return [
        n.target.overloadpacket.__name__
        for n in explainer.relevance_graph.graph.nodes
        if n.meta.get("made_by") == "remat" and hasattr(n.target, "overloadpacket")
    ]


class Allocated(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made in the region."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = (torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def measured(explainer: fxlrp.Explainer, x: Tensor) -> int:
    """Bytes above inputs and weights that running the relevance graph op by op takes at most."""
    gc.collect()
    index = torch.zeros(len(x), dtype=torch.long)
    operands = [p for p in explainer.relevance_graph.graph.nodes if p.op == "placeholder"][1:]
    with torch.no_grad(), Allocated() as seen:
        explainer.relevance_graph(x, *[index] * len(operands))
    return seen.most


@pytest.mark.parametrize("composite", ["attnlrp", "gradient", "cp"])
def test_relevance_is_that_of_the_default(usual: fxlrp.Explainer, composite: str) -> None:
    """Breaks if a recomputed value is another one, or is taken for one of another layer."""
    x = example()
    plain = usual.with_composite(composite)
    expected = plain(x)
    for budget in (*BUDGETS, plain.memory.least_share):
        try:
            explainer = budgeted(plain, budget)
            found = explainer(x)
        except fxlrp.InputError:
            assert budget < plain.memory.least_share
            continue
        assert torch.equal(found.relevance, expected.relevance), budget
        assert torch.equal(found.value, expected.value)
        assert explainer.memory.chosen.peak <= explainer.memory.limit


def test_the_estimate_is_what_running_takes(deep: nn.Module, usual: fxlrp.Explainer) -> None:
    """Breaks if a view counts as memory of its own, or a value is freed late."""
    x = example()
    least = budgeted(usual, usual.memory.least_share)
    least(x)
    for explainer in (usual, least):
        estimate, real = explainer.memory.chosen.peak, measured(explainer, x)
        assert 0.8 < estimate / real < 1.25, (estimate, real)


def test_a_smaller_budget_takes_less_and_computes_more(deep: nn.Module, usual: fxlrp.Explainer) -> None:
    """Breaks if a tighter budget may end in a worse plan."""
    low = usual.memory.least_share
    shares = [low + (1 - low) * i / 6 for i in range(7)]
    plans = []
    for share in shares:
        explainer = budgeted(usual, float(share))
        explainer(example())
        plans.append(explainer.memory.chosen)
    peaks, costs = [p.peak for p in plans], [p.cost for p in plans]
    assert peaks == sorted(peaks) and peaks[0] < 0.75 * peaks[-1]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_only_what_is_next_to_free_is_computed_again_by_default(usual: fxlrp.Explainer) -> None:
    """Fires on the activation beside a gate, whose input is kept anyway; not on products or attention."""
    found = again(usual)
    assert "silu" in found
    assert not {"linear", "matmul", "mm", "addmm", "native_layer_norm"} & set(found)
    assert not any("attention" in name for name in found)
    before = peak(steps_of(usual.memory.chooser.parts.graph), usual.memory.chooser.parts.sizes)
    assert usual.memory.default.peak < before


def test_small_values_are_kept() -> None:
    """Does not fire where starting an op takes longer than its bytes are worth."""
    explainer = fxlrp.lrp_compile(Deep(2).eval(), backend="eager")
    explainer(example(length=4))
    assert again(explainer) == []


def test_blocks_are_alike(deep: nn.Module, usual: fxlrp.Explainer) -> None:
    """Breaks if equal layers are decided differently, which would keep them from being compiled once."""
    explainer = budgeted(usual, usual.memory.least_share + 0.05)
    explainer(example())
    parts = explainer.memory.chooser.parts
    assert len(parts.cuts) >= 7
    by_layer: dict[str, list[str]] = {}
    for node in explainer.relevance_graph.graph.nodes:
        if node.meta.get("made_by") == "remat":
            paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            layer = next((p.split(".")[-1] for p in paths if p.rsplit(".", 1)[0].endswith("blocks")), "")
            by_layer.setdefault(layer, []).append(str(node.target))
    assert by_layer["1"] and by_layer["1"] == by_layer["2"]


def test_no_product_runs_more_than_once_more(deep: nn.Module, usual: fxlrp.Explainer) -> None:
    """Breaks if recomputation starts over from the input for every layer."""
    explainer = budgeted(usual, usual.memory.least_share)
    explainer(example())
    found = [s.node for s in explainer.memory.chosen.steps if s.again]
    products = [n for n in found if "linear" in str(n.target) or "attention" in str(n.target)]
    assert products and len(products) == len(set(products))


@pytest.mark.slow
def test_memory_grows_with_the_root_of_the_depth() -> None:
    """Breaks if every layer keeps something at the lowest budget; by default every layer does."""
    least, default = {}, {}
    for layers in (4, 16, 64):
        explainer = fxlrp.lrp_compile(Deep(layers, 8).eval(), backend="eager")
        explainer(torch.randn(2, 6, 8))
        parts = explainer.memory.chooser.parts
        symbols = [p.meta["val"].shape[1].node.expr for p in parts.graph.nodes if p.op == "placeholder"][:1]
        known = type(explainer.memory.chooser)(Parts(parts.graph, Sizes(integers({symbols[0]: 4096}))))
        memory = type(explainer.memory)(known)
        least[layers], default[layers] = memory.least.peak, memory.default.peak
    assert default[64] > 12 * default[4]
    assert least[16] < 2.6 * least[4] and least[64] < 2.6 * least[16]


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, True, "0.5", float("nan")])
def test_budgets_that_are_none_are_refused(budget: Any) -> None:
    """Breaks if a budget of a wrong kind is found out only at the first call, or taken for another."""
    with pytest.raises(fxlrp.InputError, match=r"a float in \(0, 1\].*an int above 0"):
        fxlrp.lrp_compile(nn.Linear(2, 2), memory_budget=budget)


@pytest.mark.parametrize("budget", [1, 0.01])
def test_a_budget_that_cannot_be_met_says_what_can(usual: fxlrp.Explainer, budget: float) -> None:
    """Breaks if it is ignored, or if what the message says does not work either."""
    with pytest.raises(fxlrp.InputError, match=r"the least .* is \d+\.\d MiB") as caught:
        budgeted(usual, budget)(example())
    said = float(str(caught.value).split("weights: memory_budget=")[1].split(",")[0])
    budgeted(usual, said)(example())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
]


def failing(error: Exception) -> Any:
    """A function that raises."""

    def fail(*given: Any, **settings: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_running_out_of_memory_names_the_setting(
    usual: fxlrp.Explainer, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if the one who runs out of memory is not told of the setting, or the error changes its class."""
    error = type(error)(*error.args)
    explainer, least = budgeted(usual, 1.0), usual.memory.least_share
    monkeypatch.setattr("fxlrp.explainer.lower", lambda *given, **settings: failing(error))
    for target in (None, [1, 2]):
        with pytest.raises(type(error)) as caught:
            explainer(example(), target=target)
        assert caught.value is error and f"memory_budget={least}" in error.__notes__[0]
    tight = budgeted(usual, least)
    with pytest.raises(type(error)):
        tight(example())
    assert "the least that can be" in error.__notes__[-1] and "shorter inputs" in error.__notes__[-1]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("place", ["call_model", "compare", "compare_gradients"])
def test_running_out_of_memory_while_capturing_says_so(
    place: str, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if it is taken for the model's fault, or for that of a step of the ladder."""
    error = type(error)(*error.args)
    if place == "call_model":
        model = nn.Identity()
        model.forward = failing(error)  # type: ignore[method-assign]
    else:
        model = nn.Linear(3, 2)
        monkeypatch.setattr(f"fxlrp.compiler.capture.{place}", failing(error))
    with pytest.raises(type(error)) as caught:
        fxlrp.lrp_compile(model.eval())(torch.randn(2, 3), target=1)
    assert caught.value is error
    assert "shorter input" in error.__notes__[0] and "memory_budget" in error.__notes__[0]


def test_other_errors_are_left_alone(usual: fxlrp.Explainer) -> None:
    """Does not fire on what has nothing to do with memory."""
    with pytest.raises(RuntimeError) as caught, advised(lambda: usual.memory):
        raise RuntimeError("shapes do not fit")
    assert not hasattr(caught.value, "__notes__")


def test_bytes_hold_for_inputs_that_come_later(usual: fxlrp.Explainer) -> None:
    """Breaks if a budget in bytes is one of the first call's sizes alone."""
    long = example(length=2 * LENGTH)
    free = budgeted(usual, 1.0)
    free(long)
    least, default = free.memory.least.peak, free.memory.default.peak
    between = (usual.memory.default.peak + default) // 2
    assert least < between < default
    explainer = budgeted(usual, between)
    explainer(example())
    assert again(explainer) == again(usual)
    found = explainer(long)
    assert len(again(explainer)) > len(again(usual))
    assert explainer.memory.chosen.peak <= explainer.memory_budget
    torch.testing.assert_close(found.relevance, free(long).relevance)
    small = budgeted(usual, least - 1)
    small(example())
    with pytest.raises(fxlrp.InputError, match="the least that this explanation can take at these sizes"):
        small(long)


def test_latents_parameters_and_several_targets(deep: nn.Module, usual: fxlrp.Explainer) -> None:
    """Breaks if what is returned is freed or computed again as another value."""
    x, asked = example(), {"latents": ("blocks.1", "blocks.2.gate"), "parameters": ("blocks.0.up.weight",)}
    plain = fxlrp.lrp_compile(deep, backend="eager", **asked)
    expected = plain(x)
    tight = budgeted(plain, plain.memory.least_share)
    found = tight(x)
    for name in expected.latents:
        assert torch.equal(found.latents[name], expected.latents[name])
        assert torch.equal(found.latent_coefficients[name], expected.latent_coefficients[name])
    for name in expected.parameters:
        assert torch.equal(found.parameters[name], expected.parameters[name])
    several = usual(x, target=[0, 3])
    few = budgeted(usual, usual.memory.least_share)
    usual(x)
    assert torch.equal(few(x, target=[0, 3]).relevance, several.relevance)


def test_one_program_for_all_sizes() -> None:
    """Breaks if figures at the first call's sizes become conditions of the trace."""
    model, ids = models.tiny_llama().float(), torch.arange(40).reshape(2, 20)
    plain = fxlrp.lrp_compile(model, backend="eager")
    plain(ids)
    explainer = budgeted(plain, plain.memory.least_share)
    explainer(ids)
    first = explainer.relevance_graph
    other = torch.arange(36).reshape(3, 12)
    assert torch.equal(explainer(other).relevance, plain(other).relevance)
    assert explainer.relevance_graph is first


def test_compilers_leave_recomputation_alone(deep: nn.Module, usual: fxlrp.Explainer) -> None:
    """Breaks if tracing by torch.compile merges a recomputed product with the forward's own."""
    from torch._dynamo.backends.common import aot_autograd

    explainer = budgeted(usual, usual.memory.least_share)
    explainer(example())
    counts: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        counts.append(sum("mm" in str(n.target) for n in graph.graph.nodes))
        return graph

    for program in (usual.relevance_graph, explainer.relevance_graph):
        torch._dynamo.reset()
        compiled = torch.compile(program, backend=aot_autograd(fw_compiler=count), dynamic=True)
        operands = [p for p in program.graph.nodes if p.op == "placeholder"][1:]
        with torch.no_grad():
            compiled(example(), *[torch.zeros(2, dtype=torch.long)] * len(operands))
    once, twice = counts
    repeated = sum("linear" in name for name in again(explainer))
    assert repeated > 0 and twice == once + repeated
