"""Kernels in explanations: which rule nodes they serve, that they only round differently, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp
from fxlrp.compiler.fused import KERNELS
from fxlrp.kernels.launch import is_interpreted
from fxlrp.rules import AlphaBeta, AttentionRule, Epsilon, Gamma, Identity, NormRule, SoftmaxTaylor, ZPlus

interpreted = pytest.mark.skipif(
    not (is_interpreted() or torch.cuda.is_available()), reason="needs a GPU, or TRITON_INTERPRET=1"
)


class Block(nn.Module):
    """Attention with grouped keys, a gated MLP, norms of both kinds; a softmax of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(16), nn.RMSNorm(16)
        self.queries, self.keys, self.values = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.gate, self.up, self.down = (nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16))
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.queries, self.keys, self.values)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + mixed.transpose(1, 2).flatten(2)
        h = self.second(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        x = x + F.softmax(self.mix(x), -1) * x
        return self.head(F.gelu(x).mean(1))


def pair(
    kernels: tuple[str, ...], composite: str | fxlrp.Composite, **options: object
) -> tuple[Tensor, Tensor]:
    """Relevance with kernels and without."""
    model, x = Block().eval(), torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    reference = fxlrp.lrp_compile(model, composite, backend="eager", kernels="reference")
    by_kernels = fxlrp.lrp_compile(model, composite, backend="eager", kernels=kernels)
    found = by_kernels(x, **options)
    for name in kernels:
        assert any(note.startswith(f"kernel {name}: ") for note in by_kernels.plan.notes), (
            by_kernels.plan.notes
        )
    assert found.ledger.residual < 1e-4
    return found.relevance, reference(x, **options).relevance


SERVED = {
    "linear_epsilon": fxlrp.Composite([(fxlrp.op("linear"), Epsilon(0.1))]),
    "linear_split": fxlrp.Composite([(fxlrp.op("linear"), Gamma(0.25))]),
    "softmax": "attnlrp",
    "norm": "attnlrp",
    "gate": "attnlrp",
    "attention": "attnlrp",
}


@interpreted
@pytest.mark.parametrize("kernel", SERVED)
def test_a_kernel_changes_nothing_but_rounding(kernel: str) -> None:
    """Each kernel alone, in a model with several nodes that it serves."""
    found, expected = pair((kernel,), SERVED[kernel])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@interpreted
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
def test_every_rule_that_is_served_is_its_reference(composite: str | fxlrp.Composite) -> None:
    """All kernels where they apply, for the other rules of the table."""
    model, x = Block().eval(), torch.randn(2, 7, 16)
    reference = fxlrp.lrp_compile(model, composite, backend="eager", kernels="reference")
    fused = fxlrp.lrp_compile(model, composite, backend="eager", kernels=KERNELS)
    torch.testing.assert_close(fused(x).relevance, reference(x).relevance, rtol=1e-4, atol=1e-6)


@interpreted
def test_several_targets_by_kernels() -> None:
    """K coefficients go through the kernels' leading dimension."""
    found, expected = pair(("softmax", "norm", "gate", "attention"), "attnlrp", target=[0, 3])
    assert found.shape[:2] == (2, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@interpreted
def test_a_gated_product_is_one_node() -> None:
    """The activation and its product are served together, and the activation alone elsewhere."""
    explainer = fxlrp.lrp_compile(Block().eval(), backend="eager", kernels="gate")
    explainer(torch.randn(2, 7, 16))
    names = [str(n.target) for n in explainer.relevance_graph.graph.nodes]
    assert names.count("fxlrp.gate_relevance.default") == 1
    assert names.count("fxlrp.activation_relevance.default") == 1


@interpreted
def test_a_residual_sum_is_one_node_with_its_norm() -> None:
    """The sum before the second norm goes with it; the first norm reads the input and stands alone."""
    explainer = fxlrp.lrp_compile(Block().eval(), backend="eager", kernels="norm")
    explainer(torch.randn(2, 7, 16))
    names = [str(n.target) for n in explainer.relevance_graph.graph.nodes]
    assert names.count("fxlrp.add_norm.default") == 1
    assert names.count("fxlrp.norm.default") == 1
    assert names.count("fxlrp.norm_relevance.default") == 2


@interpreted
def test_a_latent_inside_a_gate_keeps_its_own_node() -> None:
    """What is asked for by name is not fused away."""
    options = {"backend": "eager", "latents": ("silu",)}
    model, x = Block().eval(), torch.randn(2, 7, 16)
    found = fxlrp.lrp_compile(model, kernels="gate", **options)(x).latents["silu"]
    expected = fxlrp.lrp_compile(model, kernels="reference", **options)(x).latents["silu"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_rules_without_stabiliser_need_no_kernel() -> None:
    """Epsilon(0) is a matrix product already: the kernel for its factor is not asked."""
    explainer = fxlrp.lrp_compile(Block().eval(), backend="eager", kernels="auto")
    explainer(torch.randn(2, 7, 16))
    assert not any("linear" in note for note in explainer.plan.notes if note.startswith("kernel"))


def test_auto_says_why_it_takes_references() -> None:
    """The plan's notes tell whoever expects a kernel."""
    explainer = fxlrp.lrp_compile(Block().eval(), backend="eager")
    explainer(torch.randn(2, 7, 16))
    assert any(note.startswith("kernels: references, since") for note in explainer.plan.notes)


def test_an_unknown_kernel_is_refused_at_once() -> None:
    """Names are checked before anything is traced."""
    with pytest.raises(fxlrp.errors.KernelError, match="'attention', 'gate'"):
        fxlrp.lrp_compile(nn.Linear(2, 2), kernels="atention")
    with pytest.raises(fxlrp.errors.KernelError, match="some of"):
        fxlrp.lrp_compile(nn.Linear(2, 2), kernels=())
    with pytest.raises(fxlrp.errors.KernelError, match="some of"):
        fxlrp.lrp_compile(nn.Linear(2, 2), kernels=("auto", "softmax"))


def test_a_kernel_that_cannot_run_is_refused_with_the_reason() -> None:
    """By name there is no fallback; the node and why are told."""
    model = Block().eval().double()
    with pytest.raises(fxlrp.errors.KernelError, match=r"'softmax' cannot run at node 'softmax'.*"):
        fxlrp.lrp_compile(model, backend="eager", kernels="softmax")(torch.randn(2, 7, 16).double())


def test_the_table_and_the_rules_know_each_other() -> None:
    """Rules that derive from a served one compute something else and are not taken for it."""
    from fxlrp.compiler.served import SERVED as rows

    taken = {rule for row in rows for rule in row.rules}
    assert {Epsilon, Gamma, AlphaBeta, ZPlus, SoftmaxTaylor, NormRule, Identity, AttentionRule} <= taken
    assert not any(row.takes(fxlrp.rules.IdentityNorm(), torch.ops.aten.layer_norm.default) for row in rows)
