"""Bad input gets a clear error from the catalogue, and nothing half-done."""

from __future__ import annotations

import pytest
import torch
from oracles import models
from torch import Tensor, nn

import fxlrp
from fxlrp import Logit


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.tiny_llama(0).float()


@pytest.fixture(scope="module")
def explainer(model: nn.Module) -> fxlrp.Explainer:
    return fxlrp.lrp_compile(model)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    ids, mask = models.token_batch(1, (7, 4), "right")
    return {"input_ids": ids, "attention_mask": mask}


class Head(nn.Module):
    """A linear model around one op."""

    def __init__(self, op: object) -> None:
        super().__init__()
        self.first, self.last, self.op = nn.Linear(4, 4), nn.Linear(4, 3), op

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x)))


def bessel(x: Tensor) -> Tensor:
    return torch.special.i0(x)


def test_uncovered_nonlinear_op() -> None:
    model = Head(bessel).eval()
    with pytest.raises(fxlrp.UncoveredOpError) as error:
        fxlrp.lrp_compile(model)(torch.randn(2, 4))
    message = str(error.value)
    for part in ("i0", "test_errors.py", "strict=False"):
        assert part in message
    loose = fxlrp.lrp_compile(model, strict=False)
    explanation = loose(torch.randn(2, 4))
    assert "taylor" in loose.plan.counts()
    assert "no rule covers it" in str(loose.plan)
    assert explanation.ledger.residual < 1e-4
    assert "remainder" in explanation.ledger.by_cause()


@pytest.mark.parametrize(
    ("target", "part"),
    [
        (10**6, "out of range"),
        (-(10**6), "out of range"),
        (torch.tensor([1, 10**6]), "out of range"),
        (torch.tensor([1, 2, 3]), r"shape \(3,\)"),
        (torch.tensor([[1], [2], [3]]), r"shape \(3, 1\)"),
        (torch.tensor([0.5, 1.0]), "LongTensor"),
        (True, "LongTensor"),
        ("cat", "target"),
        (1.5, "target"),
        (Logit(1, position=7), "out of range"),
        (Logit(1, position=torch.tensor([6, 6])), "padding"),
        (Logit(1, position=torch.tensor([6])), "shape"),
        (lambda output: output.logits[:, -1], "one scalar per sample"),
        (lambda output: 3.0, "one scalar per sample"),
    ],
)
def test_targets(explainer: fxlrp.Explainer, batch: dict[str, Tensor], target: object, part: str) -> None:
    with pytest.raises(fxlrp.TargetError, match=part):
        explainer(**batch, target=target)


def test_floats_where_ids_belong_and_the_other_way_round(
    explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    with pytest.raises(fxlrp.InputError, match="ids"):
        explainer(input_ids=batch["input_ids"].float(), attention_mask=batch["attention_mask"])
    with pytest.raises(fxlrp.InputError, match="dtype"):
        fxlrp.lrp_compile(Head(torch.relu).eval())(torch.randint(0, 3, (2, 4)))


def test_no_differentiable_path() -> None:
    with pytest.raises(fxlrp.NoPathError, match="No differentiable path"):
        fxlrp.lrp_compile(Head(torch.detach).eval())(torch.randn(2, 4))
    with pytest.raises(fxlrp.NoPathError):
        fxlrp.lrp_compile(Head(lambda x: (x > 0).to(x.dtype)).eval())(torch.randn(2, 4))


def test_active_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(fxlrp.StochasticModelError, match=r"model\.eval\(\)"):
        fxlrp.lrp_compile(model)(torch.randn(2, 4))
    with pytest.raises(fxlrp.StochasticModelError, match="random"):
        fxlrp.lrp_compile(Head(lambda x: nn.functional.dropout(x, 0.5, True)).eval())(torch.randn(2, 4))
    with pytest.raises(fxlrp.StochasticModelError, match="random"):
        fxlrp.lrp_compile(Head(lambda x: x + torch.randn_like(x)).eval())(torch.randn(2, 4))
    model[1].p = 0.0
    assert fxlrp.lrp_compile(model)(torch.randn(2, 4)).relevance.shape == (2, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity(bad: float) -> None:
    x = torch.randn(2, 4)
    x[1, 2] = bad
    with pytest.raises(fxlrp.NonFiniteError, match="Input 'x'"):
        fxlrp.lrp_compile(Head(torch.relu).eval())(x)
    with pytest.raises(fxlrp.NonFiniteError, match=r"output is NaN or infinite.*first at"):
        fxlrp.lrp_compile(Head(lambda x: x / 0.0).eval())(torch.randn(2, 4))


def test_another_device_than_the_weights(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    with pytest.raises(fxlrp.InputError, match=r"is on meta.*weights are on cpu"):
        explainer(**{k: v.to("meta") for k, v in batch.items()})


class NoLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.layer(x), "pooled": self.layer(x).mean(1)}


def test_no_logits() -> None:
    explainer = fxlrp.lrp_compile(NoLogits().eval())
    with pytest.raises(fxlrp.TargetError, match=r"hidden.*function of the output"):
        explainer(torch.randn(2, 4))
    explanation = explainer(torch.randn(2, 4), target=lambda output: output["hidden"][:, 1])
    assert explanation.relevance.shape == (2, 4)


def test_empty_batch_and_missing_arguments(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    with pytest.raises(fxlrp.InputError, match="empty"):
        explainer(input_ids=torch.empty(0, 5, dtype=torch.long))
    with pytest.raises(fxlrp.InputError, match="do not fit"):
        fxlrp.lrp_compile(Head(torch.relu).eval())(torch.randn(2, 4), nonsense=torch.randn(2))
    with pytest.raises(fxlrp.InputError, match="No tensor"):
        fxlrp.lrp_compile(Head(torch.relu).eval())(3)
    with pytest.raises(fxlrp.InputError, match="itself fails"):
        fxlrp.lrp_compile(Head(torch.relu).eval())(torch.randn(2, 5))


def test_settings() -> None:
    with pytest.raises(fxlrp.CompositeError, match="attnlrp"):
        fxlrp.lrp_compile(Head(torch.relu), "no-such-preset")
    with pytest.raises(fxlrp.InputError, match="inductor"):
        fxlrp.lrp_compile(Head(torch.relu), backend="no-such-backend")
    with pytest.raises(fxlrp.InputError, match="Module"):
        fxlrp.lrp_compile(lambda x: x)
    with pytest.raises(fxlrp.CaptureError, match="first call"):
        _ = fxlrp.lrp_compile(Head(torch.relu)).plan


def test_an_error_leaves_the_explainer_usable(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    expected = explainer(**batch).relevance
    with pytest.raises(fxlrp.TargetError):
        explainer(**batch, target=10**6)
    with pytest.raises(fxlrp.InputError):
        explainer(input_ids=batch["input_ids"].float())
    torch.testing.assert_close(explainer(**batch).relevance, expected)
