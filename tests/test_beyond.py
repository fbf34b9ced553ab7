"""Models that are not as a library built them: adapted, quantised, split, under autocast, written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.models import case
from bench.reference import gradient_times_input


@pytest.fixture
def llama() -> nn.Module:
    return case("Llama").model()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return case("Llama").example()


def assert_explained(model: nn.Module, inputs: dict[str, Tensor], tolerance: float = 1e-5) -> fxlrp.Explainer:
    """The gradient composite equals autograd on the model as it stands, and the ledgers close."""
    _, expected = gradient_times_input(model, inputs)
    explainer = fxlrp.lrp_compile(model, "gradient")
    found = explainer(**inputs).relevance
    reference = expected["input_ids"]
    assert float((found - reference).abs().max()) <= tolerance * float(reference.abs().max())
    for composite in ("attnlrp", "cp"):
        explainer = explainer.with_composite(composite)
        assert explainer(**inputs).ledger.residual < 1e-4
    return explainer


def test_lora(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Would break: the adapter's path is left out, or its own weights are taken for inputs."""
    peft = pytest.importorskip("peft")
    plain = fxlrp.lrp_compile(llama)(**inputs).relevance
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama, config).eval()
    explainer = assert_explained(adapted, inputs)
    assert not torch.allclose(explainer.with_composite("attnlrp")(**inputs).relevance, plain)


def test_int8_weights(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Would break: a tensor subclass lost in the trace, or another derivative than its values'."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(llama, quantization.Int8WeightOnlyConfig())
    assert_explained(llama, inputs)


def test_hooks_that_move_data_between_devices(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Would break: a forward that hooks replaced is captured without them, or wrongly."""
    accelerate = pytest.importorskip("accelerate")
    devices = dict.fromkeys(name for name, _ in llama.named_children()) | {"model": "cpu", "lm_head": "cpu"}
    split = accelerate.dispatch_model(llama, device_map=dict.fromkeys(devices, "cpu"), force_hooks=True)
    assert_explained(split, inputs)


def test_autocast(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    ids = inputs["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = llama(ids).logits[:, -1].max(-1).values
        explanation = fxlrp.lrp_compile(llama)(ids)
    torch.testing.assert_close(explanation.value, expected.detach())
    assert explanation.value.dtype is torch.bfloat16
    assert explanation.ledger.residual < 5e-2  # bfloat16 has 8 bits


class Block(nn.Module):
    """A block as papers' own code has it: chunked qkv, rearranged by hand, einsum or fused attention."""

    def __init__(self, spelling: str, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.heads = spelling, heads
        self.qkv, self.out, self.head = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.Linear(width, 3),
        )
        self.scale = nn.Parameter(torch.randn(width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling == "fused":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        if self.spelling == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(later, -torch.finfo(q.dtype).max).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if self.spelling == "baddbmm":
            flat = [x.flatten(0, 1) for x in (q, k, v)]
            mask = torch.zeros(later.shape).masked_fill(later, float("-inf")).expand(len(flat[0]), -1, -1)
            scores = torch.baddbmm(mask, flat[0], flat[1].transpose(1, 2), alpha=q.shape[-1] ** -0.5)
            return torch.bmm(scores.softmax(-1), flat[2]).view_as(q)
        scores = torch.where(later, float("-inf"), (q * q.shape[-1] ** -0.5) @ k.mT)
        return torch.softmax(scores, -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        h = F.normalize(x, dim=-1) * self.scale * 4
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


@pytest.mark.parametrize("composite", ["attnlrp", "cp", "gradient"])
@pytest.mark.parametrize("spelling", ["einsum", "baddbmm", "where"])
def test_attention_by_hand_is_explained_as_the_fused_op(spelling: str, composite: str) -> None:
    """Would break: shares that depend on how attention is spelled."""
    x = torch.randn(2, 6, 16)
    expected = fxlrp.lrp_compile(Block("fused").eval(), composite)(x)
    found = fxlrp.lrp_compile(Block(spelling).eval(), composite)(x)
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-6)
    assert found.ledger.residual < 1e-5


def test_rows_masked_throughout_by_a_finite_number() -> None:
    """Would break: a padded query's scores, all of them the least float, drown the ledger in rounding."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.value, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            scores = self.score(x) @ x.mT
            both = real[:, None] & real[:, :, None]
            scores = scores.masked_fill(~both, torch.finfo(scores.dtype).min)
            weights = (scores + 0.1 * x[:, :, :1]).softmax(-1)
            return self.head((weights @ self.value(x)).mean(1))

    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    x = torch.randn(2, 6, 16)
    for composite in ("attnlrp", "gradient"):
        assert fxlrp.lrp_compile(Padded().eval(), composite)(x, real).ledger.residual < 1e-5


def test_einops(llama: nn.Module) -> None:
    einops = pytest.importorskip("einops")

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            patches = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4)
            return self.head(einops.reduce(F.gelu(self.embed(patches)), "b n d -> b d", "mean"))

    model, x = Patches().eval(), torch.randn(2, 1, 8, 8)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).max(-1).values.sum(), leaf)
    torch.testing.assert_close(fxlrp.lrp_compile(model, "gradient")(x).relevance, x * gradient)
    assert fxlrp.lrp_compile(model)(x).ledger.residual < 1e-5
