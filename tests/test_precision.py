"""Half precision: relevance errs no more than twice what Gradient x Input by autograd errs in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxlrp
from bench.models import case
from bench.precision import DTYPES, LIMIT, errors
from fxlrp.compiler.transpose import _token_relevance
from fxlrp.rules.base import Call
from fxlrp.rules.norm import NormRule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_the_error_is_that_of_half_precision(name: str, dtype: torch.dtype) -> None:
    """Breaks if a rule loses bits that the model's own ops do not."""
    ours, theirs = errors(case(name), dtype)
    assert 0 < ours <= LIMIT * theirs, (ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relevance_of_a_token_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Breaks if products are rounded, or overflow, before they are summed."""
    embedding = torch.tensor([[300.0, -300.0, 1.0]], dtype=dtype)
    coefficient = torch.tensor([[300.0, 300.0, 0.25]], dtype=dtype)
    found = _token_relevance(embedding, coefficient)
    assert found.dtype is dtype and float(found) == 0.25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "group_norm"])
def test_norms_centre_in_float32(op: str, dtype: torch.dtype) -> None:
    """Breaks if the mean of coefficients that nearly cancel is taken in half precision."""
    torch.manual_seed(0)
    x, g = torch.randn(4, 64).to(dtype), (3 + torch.randn(4, 64)).to(dtype)
    rule = NormRule()

    def pulled(x: Tensor, g: Tensor) -> Tensor:
        weight, bias = torch.ones(64, dtype=x.dtype), torch.zeros(64, dtype=x.dtype)
        args = (x, [64], weight, bias, 1e-5) if op == "layer_norm" else (x, 1, weight, bias, 1e-5)
        call = Call(getattr(torch.ops.aten, op).default, args, {}, (0,))
        return rule.linearize(call).pullback(g)[0]

    exact = pulled(x.double(), g.double())
    found = pulled(x, g)
    assert found.dtype is dtype
    assert (found.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_usual_magnitudes_do_not_overflow() -> None:
    """Breaks if sums over a wide model's positions or features leave float16's range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.SiLU(), nn.LayerNorm(512), nn.Linear(512, 5)).half().eval()
    explanation = fxlrp.lrp_compile(model, backend="eager")(30 * torch.randn(2, 512).half())
    assert explanation.relevance.dtype is torch.float16
    assert bool(torch.isfinite(explanation.relevance).all())
