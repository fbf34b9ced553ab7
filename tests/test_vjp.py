"""Coefficients and tangents between named nodes: each the other's transpose, and both the rules' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxlrp

COMPOSITES = ("attnlrp", "cp", "gradient")


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.query, self.key = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(self.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A hand-written language model of two blocks, with position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    return GPT().double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "GPT": (GPT, ("input_ids", "blocks.0", "blocks.1.up", "blocks.1.value")),
    "Llama": (
        models.tiny_llama,
        ("input_ids", "model.layers.0", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"),
    ),
}


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", MODELS)
def test_jvp_is_the_transpose_of_vjp(name: str, composite: str, ids: Tensor) -> None:
    """``<vjp(G), T> = <G, jvp(T)>`` from any nodes to any, several on either side, with one program each."""
    make, nodes = MODELS[name]
    model = make().double().eval().requires_grad_(False)
    explainer = fxlrp.lrp_compile(model, composite, backend="eager")
    middle = nodes[2]
    for given, count in ((ids, 3), (ids[:1, :5], 1)):
        classes = explainer.vjp(
            "output", randn(1, *given.shape, 41 if name == "Llama" else 20), given, wrt=middle
        )
        logits = classes.values["output"]
        cotangents = [randn(count, *logits.shape), randn(count, *classes.values[middle].shape)]
        pulled = explainer.vjp(("output", middle), cotangents, given, wrt=nodes)
        tangents = [randn(count, *pulled.values[node].shape) for node in nodes]
        pushed = explainer.jvp(nodes, tangents, given, outputs=("output", middle))
        left = sum(
            pulled[node][k].flatten() @ t[k].flatten()
            for node, t in zip(nodes, tangents, strict=True)
            for k in range(count)
        )
        right = sum(
            pushed[node][k].flatten() @ g[k].flatten()
            for node, g in zip(("output", middle), cotangents, strict=True)
            for k in range(count)
        )
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
        assert float(left.abs()) > 1e-3
    assert len(explainer._maps) == 3


@pytest.mark.parametrize("composite", COMPOSITES)
def test_vjp_from_a_logit_is_the_explanation(gpt: nn.Module, ids: Tensor, composite: str) -> None:
    """Would break: rules between the nodes that are not those of the plan."""
    explainer = fxlrp.lrp_compile(gpt, composite, latents=("blocks.0",), backend="eager")
    explanation = explainer(ids, target=3)
    cotangent = torch.zeros(1, 2, 6, 20, dtype=torch.float64)
    cotangent[0, :, -1, 3] = 1
    for output in ("output", "logits", "head"):
        found = explainer.vjp(output, cotangent, ids, wrt=("input_ids", "blocks.0"))
        torch.testing.assert_close(found["input_ids"][0], explanation.coefficients)
        relevance = found.values["blocks.0"] * found["blocks.0"][0]
        torch.testing.assert_close(relevance, explanation.latents["blocks.0"])


def test_the_gradients_own(gpt: nn.Module, ids: Tensor) -> None:
    """Under ``gradient`` vjp and jvp are PyTorch's: a hook's gradient, and the directional derivative."""
    explainer = fxlrp.lrp_compile(gpt, "gradient", backend="eager")
    start = gpt.blocks[0](gpt.tokens(ids) + gpt.places(torch.arange(6)))
    cotangent, tangent = randn(2, 2, 6, 20), randn(2, 2, 6, 8)

    def rest(x: Tensor) -> Tensor:
        return gpt.head(gpt.blocks[1](x))

    pulled = explainer.vjp("output", cotangent, ids, wrt="blocks.0")
    pushed = explainer.jvp("blocks.0", tangent, ids, outputs="output")
    torch.testing.assert_close(pulled.values["blocks.0"], start)
    for k in range(2):
        _, expected = torch.autograd.functional.vjp(rest, start, cotangent[k])
        torch.testing.assert_close(pulled["blocks.0"][k], expected)
        with sdpa_kernel(SDPBackend.MATH):  # the fused backward has no derivative
            _, expected = torch.autograd.functional.jvp(rest, start, tangent[k])
        torch.testing.assert_close(pushed["output"][k], expected)
    torch.testing.assert_close(pushed.values["output"], rest(start))


def test_what_is_frozen_lets_nothing_through(gpt: nn.Module, ids: Tensor) -> None:
    """Under CP no coefficient reaches queries, under AttnLRP it does; a node behind the output gets 0."""
    cotangent = randn(1, 2, 6, 8)
    for composite, passes in (("cp", False), ("attnlrp", True)):
        explainer = fxlrp.lrp_compile(gpt, composite, backend="eager")
        found = explainer.vjp(
            "blocks.0", cotangent, ids, wrt=("blocks.0.query", "blocks.0.value", "blocks.1")
        )
        assert bool(found["blocks.0.query"].any()) is passes
        assert bool(found["blocks.0.value"].any())
        assert found["blocks.1"].shape == (1, 2, 6, 8)
        assert not found["blocks.1"].any()


def test_only_the_stretch_between_is_computed(gpt: nn.Module, ids: Tensor) -> None:
    """Would break: a head that runs for a vjp inside the model, or pullbacks before the nodes asked for."""
    explainer = fxlrp.lrp_compile(gpt, backend="eager")
    explainer.vjp("blocks.1", randn(1, 2, 6, 8), ids, wrt="blocks.1.up")
    (found,) = explainer._maps.values()
    used = {str(n.target) for n in found.graph.graph.nodes if n.op == "get_attr"}
    assert not any("head" in name for name in used)
    back = [n for n in found.graph.graph.nodes if n.meta.get("relevance_of")]
    products = [n for n in back if n.target is torch.ops.aten.matmul.default]
    assert len(products) == 1, "back through down only"


def test_wildcards_and_nodes_of_the_rule_graph(gpt: nn.Module, ids: Tensor) -> None:
    """A path with wildcards names all that match; a node of the rule graph is named as it is there."""
    explainer = fxlrp.lrp_compile(gpt, backend="eager")
    explainer(ids)
    node = next(n.name for n in explainer.rule_graph.graph.nodes if "gelu" in n.name)
    found = explainer.vjp("output", randn(2, 2, 6, 20), ids, wrt=("blocks.?", node))
    assert set(found.coefficients) == {"blocks.0", "blocks.1", node}
    assert found[node].shape == (2, 2, 6, 16)


@pytest.mark.parametrize(
    ("outputs", "wrt", "shape", "message"),
    [
        ("output", "blocks.0.valu", (1, 2, 6, 20), r"Did you mean 'blocks\.0\.value'"),
        ("outptu", "input_ids", (1, 2, 6, 20), "Did you mean 'output'"),
        ("output", "places", (1, 2, 6, 20), "counts as a constant"),
        ("output", "input_ids", (2, 6, 20), r"its tensor is \[K, 2, 6, 20\]; got \(2, 6, 20\)"),
        ("output", "input_ids", (0, 2, 6, 20), "1 or more"),
        (("output", "blocks.0"), "input_ids", (1, 2, 6, 20), "2 nodes are named"),
        ("output", (), (1, 2, 6, 20), "a name or several"),
    ],
)
def test_bad_names_and_shapes_say_what_is_there(
    gpt: nn.Module, ids: Tensor, outputs: Any, wrt: Any, shape: tuple[int, ...], message: str
) -> None:
    explainer = fxlrp.lrp_compile(gpt, backend="eager")
    with pytest.raises(fxlrp.InputError, match=message):
        explainer.vjp(outputs, randn(*shape), ids, wrt=wrt)
