"""Kernels in explanations: which are chosen, and what is refused."""

from __future__ import annotations

import pytest
import torch
from oracles.models import GatedBlock
from torch import nn

import fxlrp
from fxlrp.rules import AlphaBeta, AttentionRule, Epsilon, Gamma, Identity, NormRule, SoftmaxTaylor, ZPlus


def test_rules_without_stabiliser_need_no_kernel() -> None:
    """Epsilon(0) is a matrix product already: the kernel for its factor is not asked."""
    explainer = fxlrp.lrp_compile(GatedBlock().eval(), backend="eager", kernels="auto")
    explainer(torch.randn(2, 7, 16))
    assert not any("linear" in note for note in explainer.plan.notes if note.startswith("kernel"))


def test_auto_says_why_it_takes_references() -> None:
    """The plan's notes tell whoever expects a kernel."""
    explainer = fxlrp.lrp_compile(GatedBlock().eval(), backend="eager")
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
    model = GatedBlock().eval().double()
    with pytest.raises(fxlrp.errors.KernelError, match=r"'softmax' cannot run at node 'softmax'.*"):
        fxlrp.lrp_compile(model, backend="eager", kernels="softmax")(torch.randn(2, 7, 16).double())


def test_the_table_and_the_rules_know_each_other() -> None:
    """Rules that derive from a served one compute something else and are not taken for it."""
    from fxlrp.compiler.served import SERVED as rows

    taken = {rule for row in rows for rule in row.rules}
    assert {Epsilon, Gamma, AlphaBeta, ZPlus, SoftmaxTaylor, NormRule, Identity, AttentionRule} <= taken
    assert not any(row.takes(fxlrp.rules.IdentityNorm(), torch.ops.aten.layer_norm.default) for row in rows)
