"""Linear maps by oneDNN: the op, where a graph gets it, and that explanations are the same with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fxlrp
from fxlrp.compiler.products import by_onednn
from fxlrp.errors import KernelError
from fxlrp.kernels import measured, onednn

WIDE = 512
onednn_linear = torch.ops.fxlrp.onednn_linear.default
needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="needs oneDNN, and MKL that it is measured against",
)


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
@pytest.mark.parametrize("lead", [(), (0,), (63,), (64,), (67,), (7, 19), (3, 1, 67), (1000,)])
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


ODD_BIASES: dict[str, Callable[[int], Tensor]] = {
    "strided": lambda n: numbers(2 * n)[::2],
    "a column": lambda n: numbers(n, 2)[:, 1],
    "expanded": lambda n: numbers(1).expand(n),
    "a number": lambda n: numbers(1)[0],
    "one": lambda n: numbers(1),
    "a row": lambda n: numbers(1, n),
    "a matrix": lambda n: numbers(70, n),
    "with an offset": lambda n: numbers(n + 1)[1:],
}


@pytest.mark.parametrize("bias", ODD_BIASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_bias_is_read_as_pytorch_reads_it(bias: str, transposed: bool) -> None:
    """Breaks if oneDNN, which neither looks at a bias's strides nor broadcasts it, were given such a one."""
    x, weight, given = numbers(70, WIDE), numbers(WIDE, WIDE), ODD_BIASES[bias](WIDE)
    usual = nn.functional.linear(x, weight.t() if transposed else weight, given)
    found = onednn_linear(x, weight, given, transposed)
    torch.testing.assert_close(found, usual, rtol=0, atol=1e-5 * float(usual.abs().max()))


def profiled(function: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages()}


@needs_onednn
def test_when_it_is_called() -> None:
    """Breaks if oneDNN ran on few rows, which it is slower on, where the user switched it off, or never."""
    weight, called = numbers(WIDE, WIDE), "mkldnn::_linear_pointwise"
    many, few = numbers(64, WIDE), numbers(63, WIDE)
    assert called in profiled(lambda: onednn_linear(many, weight, None, False))
    assert called not in profiled(lambda: onednn_linear(few, weight, None, False))
    with torch.backends.mkldnn.flags(enabled=False):
        assert called not in profiled(lambda: onednn_linear(many, weight, None, False))


@needs_onednn
def test_many_lengths_share_code() -> None:
    """Breaks if each number of rows were a shape of its own to oneDNN, which keeps code for each."""
    from fxlrp.kernels.onednn import _linear

    given: set[tuple[int, ...]] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "linear_pointwise" in str(op):
                given.add(tuple(args[0].shape))
            return op(*args, **kwargs or {})

    weight = numbers(WIDE, WIDE)
    with Seen():
        for rows in range(64, 512):
            assert _linear(numbers(rows, WIDE), weight, None, False).shape == (rows, WIDE)
    assert 3 * 16 <= len(given) <= 3 * 16 + 1


def test_it_has_the_reference_s_derivatives() -> None:
    """Breaks if a gradient or a tangent that passes the op were lost without a word."""
    x, weight = numbers(70, WIDE), numbers(WIDE, WIDE)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(onednn_linear(leaf, weight, None, False).sum(), leaf)
    torch.testing.assert_close(found, torch.ones(70, WIDE) @ weight, rtol=1e-4, atol=1e-3)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            _, tangent = torch.func.jvp(lambda x: onednn_linear(x, weight, None, False), (x,), (x,))
        torch.testing.assert_close(tangent, x @ weight.t(), rtol=1e-4, atol=1e-3)


def test_its_flops_are_counted() -> None:
    """Breaks if PyTorch's counter took products of the op for nothing."""
    x, weight = numbers(2, 35, WIDE), numbers(WIDE, 600)
    with FlopCounterMode(display=False) as counter:
        onednn_linear(x, weight, None, True)
    assert counter.get_total_flops() == 2 * 70 * WIDE * 600


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_obeys_pytorch(rows: int, transposed: bool) -> None:
    """Breaks if its fake version had other shapes or strides, or what it returns were one of its operands."""
    weight, bias = numbers(WIDE, WIDE), numbers(WIDE)
    torch.library.opcheck(onednn_linear, (numbers(2, rows, WIDE), weight, bias, transposed))


@needs_onednn
def test_precision_is_the_users_choice() -> None:
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


X, W, B = numbers(6, WIDE), numbers(WIDE, WIDE), numbers(WIDE)
TAKEN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (nn.functional.linear, (X, W)),
    "linear with bias": (nn.functional.linear, (X[None], W, B)),
    "matmul": (torch.matmul, (X[None], W)),
    "mm": (torch.mm, (X, W)),
    "addmm of a bias": (torch.addmm, (B, X, W)),
}
LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a small weight": (nn.functional.linear, (X, W[:500])),
    "a narrow weight": (nn.functional.linear, (numbers(6, 2048), numbers(128, 2048))),
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
    model, x = Mixer().eval(), numbers(2, 40, WIDE)
    explainer = fxlrp.lrp_compile(model, backend=backend)
    plain = fxlrp.lrp_compile(model, backend="eager", kernels="reference")
    for target in (None, [0, 3]):
        assert_same(explainer(x, target=target).relevance, plain(x, target=target).relevance)
    (note,) = explainer.plan.here
    assert "4 products" in note
    assert measured.processor() in note
    assert note in str(explainer.plan)
    assert not plain.plan.here


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_other_composites_vjps_and_artifacts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if rules that split weights, products between nodes, or a loaded graph, which knows no values of
    nodes, were another function by oneDNN, or if the loaded graph did without it.
    """
    model, x = Mixer().eval(), numbers(2, 40, WIDE)
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
    assert "oneDNN" not in str(loaded.plan)
    calls.clear()
    usual = fxlrp.load(tmp_path / "mixer.fxlrp", backend="eager", kernels="reference")
    assert not calls
    assert_same(usual(x).relevance, plain(x).relevance)
    with pytest.raises(KernelError, match="chosen already"):
        fxlrp.load(tmp_path / "mixer.fxlrp", kernels="softmax")


class Pairs(nn.Module):
    """A product of two tensors of symbolic sizes, whose second has the size of a large weight at times."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.t()) @ x


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_sizes_are_not_looked_at(tmp_path: Path) -> None:
    """Breaks if the choice were a condition on symbolic sizes, which a saved explainer would keep."""
    explainer = fxlrp.lrp_compile(Pairs(), backend="eager")
    explainer(numbers(10, WIDE))
    explainer.save(tmp_path / "pairs.fxlrp")
    loaded = fxlrp.load(tmp_path / "pairs.fxlrp")
    for rows in (10, 700):
        found = loaded(numbers(rows, WIDE)).relevance
        assert_same(found, explainer(numbers(rows, WIDE)).relevance)


class Wrapped(Tensor):
    """A weight that is more than its numbers."""


def test_can_run_takes_plain_weights_only() -> None:
    """Breaks if a weight of a class of its own, or of another layout, were read as numbers."""
    assert not onednn.can_run(W.as_subclass(Wrapped))[0]
    assert not onednn.can_run(W.to_sparse())[0]
    assert onednn.can_run(nn.Parameter(W))[0] == torch.backends.mkldnn.is_available()


def test_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the choice were made where nothing was measured, or where PyTorch's own was faster."""
    called: list[fx.GraphModule] = []
    monkeypatch.setattr("fxlrp.compiler.lower.by_onednn", lambda graph: called.append(graph) or graph)
    for rows in ({}, {measured.processor(): {"onednn": False}}):
        monkeypatch.setattr("fxlrp.kernels.measured.MEASURED", rows)
        explainer = fxlrp.lrp_compile(Mixer().eval(), backend="eager")
        explainer(numbers(2, 40, WIDE))
        assert not explainer.plan.here
    assert not called


def test_the_processor_has_a_name() -> None:
    """Breaks if measurements could not be told apart by the machine."""
    maker, instructions = measured.processor().split(maxsplit=1)
    assert maker
    assert instructions == torch.backends.cpu.get_cpu_capability()


def test_can_run_says_why_not() -> None:
    """Breaks if a refusal had no reason."""
    assert "float32" in onednn.can_run(W.double())[1] or not torch.backends.mkldnn.is_available()
    assert "matrices" in onednn.can_run(W[:500])[1] or not torch.backends.mkldnn.is_available()
