"""Linear maps by oneDNN: the op, where a graph gets it, and that explanations are the same with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxlrp
from fxlrp.compiler.products import by_onednn
from fxlrp.kernels import measured, onednn

WIDE = 512
onednn_linear = torch.ops.fxlrp.onednn_linear.default
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_gaps(matrix: Tensor) -> Tensor:
    """The same numbers, every other column of a wider matrix."""
    return torch.stack([matrix, torch.full_like(matrix, torch.nan)], -1).flatten(-2)[:, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": lambda w: w.t().contiguous().t(),
    "with gaps": with_gaps,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3,), (2, 5), (3, 1, 64)])
def test_the_op_is_the_linear_map(
    lead: tuple[int, ...], transposed: bool, has_bias: bool, layout: str
) -> None:
    """Breaks if the op were another function, for any rows or layout. oneDNN adds up one by one, MKL parts:
    its error is 1.7 to 2.3 times as large in the mean (of squares), and both are rounding.
    """
    ins, outs = 520, 509
    x, bias = numbers(*lead, ins), numbers(outs) if has_bias else None
    weight = LAYOUTS[layout](numbers(ins, outs) if transposed else numbers(outs, ins))
    matrix = weight.t() if transposed else weight
    expected = nn.functional.linear(x.double(), matrix.double(), None if bias is None else bias.double())
    usual = nn.functional.linear(x, matrix, bias)
    found = onednn_linear(x, weight, bias, transposed)
    assert found.shape == usual.shape
    assert found.is_contiguous()
    assert torch.linalg.norm(found - expected) <= 3 * torch.linalg.norm(usual - expected)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_obeys_pytorch(rows: int, transposed: bool) -> None:
    """Breaks if its fake version had other shapes or strides, or what it returns were one of its operands."""
    weight, bias = numbers(WIDE, WIDE), numbers(WIDE)
    torch.library.opcheck(onednn_linear, (numbers(2, rows, WIDE), weight, bias, transposed))


@needs_onednn
def test_precision_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if reduced precision that PyTorch was told to use, or not to, were another in the op."""
    x, weight = numbers(64, WIDE), numbers(WIDE, WIDE)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            usual = nn.functional.linear(x, weight)
            found = onednn_linear(x, weight, None, False)
            torch.testing.assert_close(found, usual, rtol=0, atol=1e-5 * float(usual.abs().max()))
    finally:
        torch.set_float32_matmul_precision(before)


def graph_of(function: Callable[..., Any], *example: Tensor) -> fx.GraphModule:
    """An ATen graph of a function, with fake values."""

    class Model(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    exported = torch.export.export(Model(), example)
    return exported.module(check_guards=False)  # type: ignore[return-value]


def served(module: fx.GraphModule) -> int:
    return sum(node.target is onednn_linear for node in by_onednn(module).graph.nodes)


aten = torch.ops.aten
X, W, B = numbers(6, WIDE), numbers(WIDE, WIDE), numbers(WIDE)
TAKEN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (nn.functional.linear, (X, W)),
    "linear with bias": (nn.functional.linear, (X[None], W, B)),
    "matmul": (torch.matmul, (X[None], W)),
    "mm": (torch.mm, (X, W)),
    "addmm of a bias": (torch.addmm, (B, X, W)),
}
LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a small weight": (nn.functional.linear, (X, W[:100])),
    "float64": (nn.functional.linear, (X.double(), W.double())),
    "bfloat16": (nn.functional.linear, (X.bfloat16(), W.bfloat16())),
    "a batch of weights": (torch.matmul, (X[None], W[None])),
    "addmm of a matrix": (torch.addmm, (X, X, W)),
    "addmm with factors": (functools.partial(torch.addmm, beta=0.5), (B, X, W)),
}


@needs_onednn
@pytest.mark.parametrize("name", TAKEN)
def test_graphs_get_it(name: str) -> None:
    """Breaks if a linear map were missed, or the graph that was given changed."""
    function, example = TAKEN[name]
    graph = graph_of(function, *example)
    assert served(graph) == 1
    assert not any(node.target is onednn_linear for node in graph.graph.nodes)
    (found,) = by_onednn(graph)(*example)
    torch.testing.assert_close(found, function(*example), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LEFT)
def test_graphs_keep_the_rest(name: str) -> None:
    """Breaks if the op were given what it does not take, or what is not its function."""
    function, example = LEFT[name]
    graph = graph_of(function, *example)
    assert by_onednn(graph) is graph


class Mixer(nn.Module):
    """Two layers wide enough for oneDNN and one that is not, over the features of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(WIDE, 600), nn.Linear(600, WIDE), nn.Linear(WIDE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.down(nn.functional.silu(self.up(x)))).mean(1))


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which oneDNN was measured to be faster."""
    rows = {measured.processor(): {"onednn": True}}
    monkeypatch.setattr("fxlrp.kernels.measured.MEASURED", rows)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@needs_onednn
@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_explanations_are_the_same(backend: str) -> None:
    """Breaks if explanations by oneDNN differed by more than rounding, for one target or several, or if the
    notes did not say that they are.
    """
    model, x = Mixer().eval(), numbers(2, 7, WIDE)
    explainer = fxlrp.lrp_compile(model, backend=backend)
    plain = fxlrp.lrp_compile(model, backend="eager", kernels="reference")
    for target in (None, [0, 3]):
        assert_same(explainer(x, target=target).relevance, plain(x, target=target).relevance)
    (note,) = [note for note in explainer.plan.notes if "oneDNN" in note]
    assert "4 products" in note
    assert measured.processor() in note
    assert not any("oneDNN" in note for note in plain.plan.notes)


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_other_composites_vjps_and_artifacts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if rules that split weights, products between nodes, or a loaded graph, which knows no values of
    nodes, were another function by oneDNN, or if the loaded graph did without it.
    """
    model, x = Mixer().eval(), numbers(2, 7, WIDE)
    vectors = numbers(3, 2, 5)
    found = fxlrp.lrp_compile(model, "attnlrp-gamma", backend="eager")
    plain = fxlrp.lrp_compile(model, "attnlrp-gamma", backend="eager", kernels="reference")
    assert_same(found(x).relevance, plain(x).relevance)
    fast, usual = (e.vjp("output", vectors, x, wrt="up").coefficients for e in (found, plain))
    assert_same(fast["up"], usual["up"])
    found.save(tmp_path / "mixer.fxlrp")
    calls = []
    monkeypatch.setattr(
        "fxlrp.compiler.lower.by_onednn", lambda graph: calls.append(graph) or by_onednn(graph)
    )
    loaded = fxlrp.load(tmp_path / "mixer.fxlrp", backend="eager")
    assert sum(map(served, calls)) >= 4
    assert_same(loaded(x).relevance, plain(x).relevance)


def test_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the choice were made where nothing was measured, or where PyTorch's own was faster."""
    called: list[fx.GraphModule] = []
    monkeypatch.setattr("fxlrp.compiler.lower.by_onednn", lambda graph: called.append(graph) or graph)
    for rows in ({}, {measured.processor(): {"onednn": False}}):
        monkeypatch.setattr("fxlrp.kernels.measured.MEASURED", rows)
        explainer = fxlrp.lrp_compile(Mixer().eval(), backend="eager")
        explainer(numbers(2, 7, WIDE))
        assert not any("oneDNN" in note for note in explainer.plan.notes)
    assert not called


def test_the_processor_has_a_name() -> None:
    """Breaks if measurements could not be told apart by the machine."""
    maker, instructions = measured.processor().split(maxsplit=1)
    assert maker
    assert instructions == torch.backends.cpu.get_cpu_capability()


def test_can_run_says_why_not() -> None:
    """Breaks if a refusal had no reason."""
    assert "float32" in onednn.can_run(W.double())[1] or not torch.backends.mkldnn.is_available()
    assert "matrices" in onednn.can_run(W[:100])[1] or not torch.backends.mkldnn.is_available()
