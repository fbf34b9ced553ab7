"""The relevance graph is one plain fx graph: compiled, exported, called in users' compiled functions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from oracles import models
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxlrp


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.tiny_llama(0).float()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    ids, mask = models.token_batch(1, (7, 4), "right")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def explainer(model: nn.Module, inputs: dict[str, Tensor]) -> fxlrp.Explainer:
    explainer = fxlrp.lrp_compile(model, backend="eager")
    explainer(**inputs)
    return explainer


def other_inputs() -> dict[str, Tensor]:
    ids, mask = models.token_batch(5, (6, 9, 3), "right")
    return {"input_ids": ids, "attention_mask": mask}


def test_the_graphs_are_plain_and_without_autograd(
    explainer: fxlrp.Explainer, inputs: dict[str, Tensor]
) -> None:
    explainer(**inputs)
    graph = explainer.relevance_graph
    assert type(graph).__bases__ == (fx.GraphModule,) or isinstance(graph, fx.GraphModule)
    assert not any("autograd" in str(n.target) for n in graph.graph.nodes)
    assert not any(t.requires_grad for t in (*graph.parameters(), *graph.buffers()))
    output = graph(**inputs)
    assert not any(t.requires_grad for t in pytree.tree_leaves(output))


def test_rule_graph_computes_what_the_model_computes(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    explainer = fxlrp.lrp_compile(model)
    explainer(**inputs, target=lambda output: output.logits[:, -1, 3])
    torch.testing.assert_close(
        explainer.rule_graph(**inputs)[0], model(**inputs).logits, rtol=1e-5, atol=1e-5
    )


def test_inductor_compiles_it_with_dynamic_sizes(
    explainer: fxlrp.Explainer, inputs: dict[str, Tensor]
) -> None:
    """fullgraph, dynamic, another batch and length; would break by a graph break or a baked-in size."""
    explainer(**inputs)
    graph = explainer.relevance_graph
    compiled = torch.compile(graph, fullgraph=True, dynamic=True)
    for given in (inputs, other_inputs()):
        for found, expected in zip(
            pytree.tree_leaves(compiled(**given)), pytree.tree_leaves(graph(**given)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_inductor_backend_explains_alike(
    model: nn.Module, explainer: fxlrp.Explainer, inputs: dict[str, Tensor]
) -> None:
    compiled = fxlrp.lrp_compile(model, backend="inductor")
    for given in (inputs, other_inputs()):
        torch.testing.assert_close(
            compiled(**given).relevance, explainer(**given).relevance, rtol=1e-4, atol=1e-6
        )


def test_export_takes_it_again(explainer: fxlrp.Explainer, inputs: dict[str, Tensor]) -> None:
    explainer(**inputs)
    graph = explainer.relevance_graph
    program = torch.export.export(graph, (), inputs, strict=False)
    for found, expected in zip(
        pytree.tree_leaves(program.module()(**inputs)), pytree.tree_leaves(graph(**inputs)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_users_function_compiles_around_the_explainer(
    explainer: fxlrp.Explainer, inputs: dict[str, Tensor]
) -> None:
    """fullgraph=True around a call of the explainer, by keywords in any order, and with a target."""

    def normalised(attention_mask: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        explanation = explainer(attention_mask=attention_mask, input_ids=input_ids)
        return explanation.relevance / explanation.relevance.abs().amax(-1, keepdim=True), explanation.value

    expected = explainer(**inputs)
    relevance, value = torch.compile(normalised, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(
        relevance, expected.relevance / expected.relevance.abs().amax(-1, keepdim=True)
    )
    torch.testing.assert_close(value, expected.value)

    def of_class(input_ids: Tensor, attention_mask: Tensor, index: Tensor) -> Tensor:
        return explainer(input_ids, attention_mask=attention_mask, target=index).relevance

    index = torch.tensor([3, 4])
    expected = explainer(**inputs, target=index)
    found = torch.compile(of_class, fullgraph=True, backend="aot_eager")(**inputs, index=index)
    torch.testing.assert_close(found, expected.relevance)
    explainer(**inputs)


def test_an_untraced_explainer_inside_compile_says_what_to_do(
    model: nn.Module, inputs: dict[str, Tensor]
) -> None:
    fresh = fxlrp.lrp_compile(model)
    with pytest.raises(Exception, match="Call the explainer once"):
        torch.compile(lambda **kw: fresh(**kw).relevance, fullgraph=True, backend="eager")(**inputs)


def test_importing_fxlrp_patches_nothing() -> None:
    """In a fresh process: torch's classes and functions are the same objects after an explanation."""
    code = """
import torch
from torch.nn import functional as F
before = dict(vars(F)), dict(vars(torch.nn.LayerNorm)), torch.Tensor.__mul__
import fxlrp
nn = torch.nn
model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).eval()
fxlrp.lrp_compile(model)(torch.randn(2, 4))
assert before[0] == dict(vars(F))
assert before[1] == dict(vars(torch.nn.LayerNorm))
assert before[2] is torch.Tensor.__mul__
"""
    subprocess.run([sys.executable, "-c", code], check=True)
