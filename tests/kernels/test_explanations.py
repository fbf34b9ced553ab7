"""Explanations by kernels: which rule nodes they serve, and that they only round differently."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles.models import GatedBlock
from torch import Tensor

pytest.importorskip("triton")
import fxlrp
from bench.gpu.attention import CASES as benchmarks
from fxlrp.compiler.fused import KERNELS
from fxlrp.rules import AlphaBeta, AttentionRule, Epsilon, FrozenAttention, Gamma, ZPlus


@pytest.fixture(autouse=True)
def tensor_cores() -> Iterator[None]:
    """TensorFloat-32 is allowed, without which kernels of products in float32 are not launched."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def built(device: torch.device) -> tuple[GatedBlock, Tensor]:
    """The model and an input."""
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    return GatedBlock().eval().to(device), x.to(device)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Up to rounding: the interpreter multiplies in float32, a device in TensorFloat-32."""
    limit = 1e-2 if found.is_cuda else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=limit * float(expected.abs().max()))


def by_kernels(
    device: torch.device, kernels: tuple[str, ...], composite: str | fxlrp.Composite, **options: Any
) -> tuple[Tensor, Tensor]:
    """Relevance with kernels and without."""
    model, x = built(device)
    fused = fxlrp.lrp_compile(model, composite, backend="eager", kernels=kernels)
    found = fused(x, **options)
    for name in kernels:
        assert any(note.startswith(f"kernel {name}: ") for note in fused.plan.notes), fused.plan.notes
    assert found.ledger.residual < (1e-2 if found.relevance.is_cuda else 1e-4)
    reference = fxlrp.lrp_compile(model, composite, backend="eager", kernels="reference")
    return found.relevance, reference(x, **options).relevance


SERVED = {
    "linear_epsilon": fxlrp.Composite([(fxlrp.op("linear"), Epsilon(0.1))]),
    "linear_split": fxlrp.Composite([(fxlrp.op("linear"), Gamma(0.25))]),
    "softmax": "attnlrp",
    "norm": "attnlrp",
    "gate": "attnlrp",
    "attention": "attnlrp",
}


@pytest.mark.parametrize("kernel", SERVED)
def test_a_kernel_changes_nothing_but_rounding(
    device: torch.device, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel alone, in a model with several nodes that it serves. Breaks, too, if an op that is named
    leaves the work to its own reference.
    """
    expected = by_kernels(device, (kernel,), SERVED[kernel])[1]
    reference = importlib.import_module(f"fxlrp.kernels.{kernel}.reference")

    def refused(*given: Any) -> Any:
        raise AssertionError("the reference ran")

    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__ == reference.__name__:
            monkeypatch.setattr(reference, name, refused)
    model, x = built(device)
    found = fxlrp.lrp_compile(model, SERVED[kernel], backend="eager", kernels=kernel)(x)
    assert_same(found.relevance, expected)


@pytest.mark.parametrize(
    "composite",
    [
        "cp",
        "gradient",
        fxlrp.Composite([(fxlrp.op("linear"), AlphaBeta(2, 1))]),
        fxlrp.Composite([(fxlrp.op("linear"), ZPlus())]),
        fxlrp.Composite([(fxlrp.op("linear"), Epsilon(0.1, relative=True))]),
        fxlrp.Composite([(fxlrp.op("attention"), AttentionRule(0.1, 0.2))]),
    ],
    ids=["cp", "gradient", "alpha-beta", "z-plus", "relative", "stabilised attention"],
)
def test_every_rule_that_is_served_is_its_reference(
    device: torch.device, composite: str | fxlrp.Composite
) -> None:
    """All kernels where they apply, for the other rules of the table."""
    model, x = built(device)
    reference = fxlrp.lrp_compile(model, composite, backend="eager", kernels="reference")
    fused = fxlrp.lrp_compile(model, composite, backend="eager", kernels=KERNELS)
    assert_same(fused(x).relevance, reference(x).relevance)


def test_several_targets_by_kernels(device: torch.device) -> None:
    """K coefficients go through the kernels' leading dimension."""
    kernels = ("softmax", "norm", "gate", "attention")
    found, expected = by_kernels(device, kernels, "attnlrp", target=[0, 3])
    assert found.shape[:2] == (2, 2)
    assert_same(found, expected)


def test_a_kernel_of_few_rows_says_so(device: torch.device) -> None:
    """Breaks if the plan let believe that more rows than it is launched for go through it."""
    model, x = built(device)
    explainer = fxlrp.lrp_compile(model, SERVED["linear_epsilon"], kernels="linear_epsilon")
    explainer(x)
    assert any("up to 64 rows; with more, the reference" in note for note in explainer.plan.notes)


def test_without_tensor_cores_a_kernel_of_products_is_refused(device: torch.device) -> None:
    """Breaks if it were named, silently not run, and said to have."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    model, x = built(device)
    explainer = fxlrp.lrp_compile(model, SERVED["linear_split"], kernels="linear_split")
    with pytest.raises(fxlrp.errors.KernelError, match="without TensorFloat-32"):
        explainer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norms_epsilon_by_default_is_pytorchs(device: torch.device, dtype: torch.dtype) -> None:
    """Breaks if that of the input's dtype is taken, which is 65,536 times as large in bfloat16."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.RMSNorm(16), torch.nn.Linear(16, 3)).to(device, dtype).eval()
    x = 0.02 * torch.randn(5, 16, device=device).to(dtype)
    found, expected = (
        fxlrp.lrp_compile(model, backend="eager", kernels=kernels)(x, target=1)
        for kernels in ("norm", "reference")
    )
    torch.testing.assert_close(found.value, expected.value, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=0.05, atol=0.02)


def test_a_gated_product_is_one_node(device: torch.device) -> None:
    """The activation and its product are served together, and the activation alone elsewhere."""
    model, x = built(device)
    explainer = fxlrp.lrp_compile(model, backend="eager", kernels="gate")
    explainer(x)
    names = [str(n.target) for n in explainer.relevance_graph.graph.nodes]
    assert names.count("fxlrp.gate_relevance.default") == 1
    assert names.count("fxlrp.activation_relevance.default") == 1


class Broadcast(torch.nn.Module):
    """A gate of one column, which the kernel of gates does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = torch.nn.Linear(8, 6), torch.nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.gate(x)) * self.up(x)


def test_two_that_cannot_be_one_are_served_each(device: torch.device) -> None:
    """Breaks if a pair that the kernel does not take keeps it from the activation, or raises."""
    model, x = Broadcast().eval().to(device), torch.randn(3, 8, device=device)
    explainer = fxlrp.lrp_compile(model, backend="eager", kernels="gate")
    found = explainer(x, target=1).relevance
    names = [str(n.target) for n in explainer.relevance_graph.graph.nodes]
    assert "fxlrp.gate_relevance.default" not in names
    assert names.count("fxlrp.activation_relevance.default") == 1
    reference = fxlrp.lrp_compile(model, backend="eager", kernels="reference")
    assert_same(found, reference(x, target=1).relevance)


def test_a_residual_sum_is_one_node_with_its_norm(device: torch.device) -> None:
    """The sum before the second norm goes with it; the first norm reads the input and stands alone."""
    model, x = built(device)
    explainer = fxlrp.lrp_compile(model, backend="eager", kernels="norm")
    explainer(x)
    names = [str(n.target) for n in explainer.relevance_graph.graph.nodes]
    assert names.count("fxlrp.add_norm.default") == 1
    assert names.count("fxlrp.norm.default") == 1
    assert names.count("fxlrp.norm_relevance.default") == 2


def test_a_latent_inside_a_gate_keeps_its_own_node(device: torch.device) -> None:
    """What is asked for by name is not fused away."""
    model, x = built(device)
    found, expected = (
        fxlrp.lrp_compile(model, backend="eager", latents=("silu",), kernels=kernels)(x).latents["silu"]
        for kernels in ("gate", "reference")
    )
    assert_same(found, expected)


CASES = {
    "attention": AttentionRule(),
    "attention_epsilon": AttentionRule(epsilon=0.1),
    "attention_frozen": FrozenAttention(),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_chosen_by_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a case of attention that was measured to be slower took the others with it, or if benchmarks
    decided about cases by other names.
    """
    assert set(CASES) == {entry for case in benchmarks for entry in case.cases or (case.kernel,)}
    asked = set()

    def slower(case: str, device: torch.device) -> str:
        asked.add(case)
        return "" if case == name else "it was measured to be slower"

    monkeypatch.setattr("fxlrp.compiler.fused._slower", slower)
    for case, rule in CASES.items():
        asked.clear()
        explainer = fxlrp.lrp_compile(GatedBlock().eval(), fxlrp.Composite([(fxlrp.op("attention"), rule)]))
        x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
        explainer(x)
        assert case in asked and not asked & (set(CASES) - {case})
        used = [note for note in explainer.plan.notes if note.startswith("kernel attention: 1 nodes")]
        assert bool(used) == (case == name)
