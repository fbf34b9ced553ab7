"""Targets and inputs: what is explained, in which shape, and that each row is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import models
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp
from fxlrp import Logit, LogitDifference, Predicted


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    return models.tiny_llama(0).float()


@pytest.fixture(scope="module")
def explainer(language_model: nn.Module) -> fxlrp.Explainer:
    return fxlrp.lrp_compile(language_model)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    ids, mask = models.token_batch(1, (7, 4, 5), "right")
    return {"input_ids": ids, "attention_mask": mask}


def last(mask: Tensor) -> Tensor:
    return mask.sum(1) - 1


def test_the_default_is_the_predicted_next_token(
    language_model: nn.Module, explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    logits = language_model(**batch).logits[torch.arange(3), last(batch["attention_mask"])]
    explanation = explainer(**batch)
    torch.testing.assert_close(explanation.value, logits.max(-1).values)
    same = explainer(**batch, target=logits.argmax(-1))
    torch.testing.assert_close(same.relevance, explanation.relevance)
    torch.testing.assert_close(explainer(**batch, target=Predicted()).relevance, explanation.relevance)


def test_classes_and_positions(
    language_model: nn.Module, explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    logits = language_model(**batch).logits
    rows = torch.arange(3)
    end = last(batch["attention_mask"])
    index, position = torch.tensor([3, 1, 4]), torch.tensor([2, 0, 3])
    for target, expected in [
        (7, logits[rows, end, 7]),
        (-1, logits[rows, end, -1]),
        (index, logits[rows, end, index]),
        (Logit(7, position=1), logits[:, 1, 7]),
        (Logit(index, position=position), logits[rows, position, index]),
        (LogitDifference(index, 5), logits[rows, end, index] - logits[rows, end, 5]),
        (LogitDifference(2, 5, position=1), logits[:, 1, 2] - logits[:, 1, 5]),
        (
            lambda output: output.logits[:, 1, 7] - output.logits[:, 0].mean(-1),
            logits[:, 1, 7] - logits[:, 0].mean(-1),
        ),
    ]:
        explanation = explainer(**batch, target=target)
        torch.testing.assert_close(explanation.value, expected, rtol=1e-5, atol=1e-5)
        assert explanation.ledger.residual < 1e-4


def test_contrast_is_linear(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    """LRP at epsilon 0 is linear in the target for fixed rules: a difference explains as the difference."""
    difference = explainer(**batch, target=LogitDifference(3, 5)).relevance
    first, second = (explainer(**batch, target=i).relevance for i in (3, 5))
    torch.testing.assert_close(difference, first - second, rtol=1e-4, atol=1e-5)


def test_a_function_is_the_same_as_its_target_object(
    explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    """Without demand slicing: full logits, the same relevance."""
    torch.testing.assert_close(
        explainer(**batch, target=lambda output: output.logits[:, 1, 7]).relevance,
        explainer(**batch, target=Logit(7, position=1)).relevance,
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_nonlinear_target_function_is_booked(explainer: fxlrp.Explainer, batch: dict[str, Tensor]) -> None:
    explanation = explainer(**batch, target=lambda output: output.logits[:, 0].log_softmax(-1)[:, 3])
    assert "target" in explanation.ledger.by_cause()
    assert explanation.ledger.residual < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_explained_as_alone(
    language_model: nn.Module, explainer: fxlrp.Explainer, side: str
) -> None:
    """Would break: padding in the softmax, in the position, in a norm over the batch."""
    ids, mask = models.token_batch(1, (7, 4, 5), side)
    together = explainer(input_ids=ids, attention_mask=mask)
    for row, length in enumerate((7, 4, 5)):
        kept = mask[row] == 1
        alone = explainer(input_ids=ids[row : row + 1, kept], attention_mask=mask[row : row + 1, kept])
        assert alone.relevance.shape == (1, length)
        torch.testing.assert_close(together.relevance[row, kept], alone.relevance[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.value[row], alone.value[0], rtol=1e-5, atol=1e-6)


def test_output_is_the_models_own(
    language_model: nn.Module, explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    output = explainer(**batch).output
    assert type(output) is type(language_model(**batch))
    torch.testing.assert_close(output.logits, language_model(**batch).logits)


def test_relevance_is_embedding_times_coefficient(
    language_model: nn.Module, explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    explanation = explainer(**batch)
    embedding = language_model.get_input_embeddings()(batch["input_ids"])
    assert explanation.coefficients.shape == embedding.shape
    torch.testing.assert_close((embedding * explanation.coefficients).sum(-1), explanation.relevance)


def test_embeddings_as_input_explain_as_their_ids(
    language_model: nn.Module, explainer: fxlrp.Explainer, batch: dict[str, Tensor]
) -> None:
    embedding = language_model.get_input_embeddings()(batch["input_ids"]).detach()
    found = explainer(inputs_embeds=embedding, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(found.relevance.sum(-1), explainer(**batch).relevance, rtol=1e-4, atol=1e-6)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.types, self.image = nn.Embedding(20, 8), nn.Embedding(2, 8), nn.Linear(12, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(
        self, ids: Tensor, pixels: Tensor, types: Tensor, attention_bias: Tensor
    ) -> dict[str, Tensor]:
        h = self.text(ids) + self.types(types)
        scores = h @ self.mix(h).transpose(1, 2) + attention_bias
        h = scores.softmax(-1) @ h
        return {"logits": self.head(h.mean(1) + self.image(pixels.flatten(1)))}


def test_several_inputs_give_a_dict() -> None:
    """Text and pixels are explained; type ids count as constants."""
    model = TwoTowers().eval()
    ids, types = torch.randint(0, 20, (2, 5)), torch.randint(0, 2, (2, 5))
    explanation = fxlrp.lrp_compile(model)(
        ids, torch.randn(2, 3, 4), types, attention_bias=torch.zeros(2, 5, 5)
    )
    assert {"ids", "pixels"} <= set(explanation.relevance)
    assert "types" not in explanation.relevance
    assert explanation.relevance["pixels"].shape == (2, 3, 4)
    assert explanation.ledger.residual < 1e-4
    assert "constant" in explanation.ledger.by_cause()


class Shifted(nn.Module):
    """Ids that are shifted right inside, as decoders do with labels, and read by two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Embedding(20, 8), nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        shifted = torch.zeros_like(ids)
        shifted[:, 1:] = ids[:, :-1].clone()
        return self.head(self.first(shifted).relu().mean(1) + self.second(ids.clamp(min=3)).mean(1))


@pytest.mark.parametrize("step", ["cat", "stack", "where"])
def test_ids_that_one_step_takes_twice(step: str) -> None:
    """Would break: only the first of the places that a step gives the same ids gets relevance."""
    steps = {
        "cat": lambda ids: torch.cat([ids, ids], 1),
        "stack": lambda ids: torch.stack([ids] * 3, 1).flatten(1),
        "where": lambda ids: torch.where(ids > 5, ids, ids),
    }

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(steps[step](ids)).cumsum(1))[:, -1])

    model, ids = Repeats().eval(), torch.tensor([[9, 6, 3, 5], [4, 2, 7, 8]])
    explanation = fxlrp.lrp_compile(model, "gradient")(ids, target=1)
    read = steps[step](ids)
    leaf = model.table(read).detach().requires_grad_()
    score = model.head(torch.tanh(leaf.cumsum(1))[:, -1])[:, 1].sum()
    by_place = (torch.autograd.grad(score, leaf)[0] * leaf).sum(-1).detach()
    expected = ((ids[:, :, None] == read[:, None]) * by_place[:, None]).sum(-1)
    torch.testing.assert_close(explanation.relevance, expected)
    assert explanation.ledger.by_cause().get("constant", torch.zeros(2)).abs().max() < 1e-6


def test_relevance_returns_to_the_ids_own_positions() -> None:
    """Would break: relevance of looked-up positions handed out as that of input positions."""
    model = Shifted().eval()
    ids = torch.randint(3, 20, (2, 5))
    explanation = fxlrp.lrp_compile(model, "gradient")(ids, target=1)
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.long), ids[:, :-1]], 1)
    first = model.first(shifted).detach().requires_grad_()
    second = model.second(ids).detach().requires_grad_()
    score = model.head(first.relu().mean(1) + second.mean(1))[:, 1]
    g1, g2 = torch.autograd.grad(score.sum(), (first, second))
    expected = (second * g2).sum(-1)
    expected[:, :-1] += (first * g1).sum(-1)[:, 1:]
    torch.testing.assert_close(explanation.relevance, expected.detach(), rtol=1e-4, atol=1e-6)


def test_latents_by_module_path(language_model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Relevance at every layer, without hooks: bias-free residual streams hand all of it on."""
    explainer = fxlrp.lrp_compile(language_model, latents=("model.layers.*",))
    explanation = explainer(**batch)
    assert "model.layers.0" in explanation.latents
    assert explanation.latents["model.layers.0"].shape[:2] == batch["input_ids"].shape
    plain = fxlrp.lrp_compile(language_model)(**batch)
    torch.testing.assert_close(explanation.relevance, plain.relevance, rtol=1e-4, atol=1e-6)
    with pytest.raises(fxlrp.InputError, match="matches"):
        fxlrp.lrp_compile(language_model, latents=("nowhere.*",))(**batch)


def test_a_target_function_that_reads_tensors_of_its_batch(
    explainer: fxlrp.Explainer, language_model: nn.Module
) -> None:
    """Would break: the batch size of a closed-over tensor baked into what later calls of other sizes use."""
    for batch in (2, 3, 2):
        ids, mask = models.token_batch(batch, (6,) * batch, "right")
        weights = torch.randn(batch, 6, 1)
        explanation = explainer(
            input_ids=ids,
            attention_mask=mask,
            target=lambda output, w=weights: (output.logits * w)[:, :, 3].sum(1),
        )
        logits = language_model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(
            explanation.value, (logits * weights)[:, :, 3].sum(1), rtol=1e-4, atol=1e-5
        )
        assert explanation.ledger.residual < 1e-4
        torch.testing.assert_close(
            explainer(input_ids=ids, attention_mask=mask).value, logits[:, -1].max(-1).values
        )


def test_a_target_function_that_branches_on_sizes(
    explainer: fxlrp.Explainer, language_model: nn.Module
) -> None:
    """Would break: the first call's branch taken for all lengths."""

    def late(output: object) -> Tensor:
        logits = output.logits
        return logits[:, 0, 1] if logits.shape[1] > 6 else logits[:, -1, 2] * 2.0

    for length in (8, 5, 7):
        ids, mask = models.token_batch(length, (length, length), "right")
        expected = late(language_model(input_ids=ids, attention_mask=mask))
        explanation = explainer(input_ids=ids, attention_mask=mask, target=late)
        torch.testing.assert_close(explanation.value, expected, rtol=1e-4, atol=1e-5)


def test_a_target_function_that_fails_says_so(explainer: fxlrp.Explainer) -> None:
    ids, mask = models.token_batch(1, (7, 4), "right")
    with pytest.raises(fxlrp.TargetError, match=r"target function failed.*nowhere"):
        explainer(input_ids=ids, attention_mask=mask, target=lambda output: output.nowhere)


class Hashed(nn.Module):
    """Embeddings of hashed ids with an offset, and of shifted ids beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hashed, self.shifted, self.head = nn.Embedding(16, 8), nn.Embedding(32, 8), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        hashed = self.hashed((input_ids + 1) * 31 % 16)
        x = torch.cat([hashed, self.shifted(input_ids + torch.tensor([0, 10]).repeat(3))], -1)
        return self.head(torch.tanh(x).sum(1))


def test_ids_that_are_computed_with_are_explained_where_they_stood() -> None:
    """Would break: no path through arithmetic on ids, or relevance scaled by the arithmetic's derivative."""
    model, ids = Hashed().eval(), torch.randint(0, 20, (2, 6))
    tables = {name: getattr(model, name).weight for name in ("hashed", "shifted")}
    places = {"hashed": (ids + 1) * 31 % 16, "shifted": ids + torch.tensor([0, 10] * 3)}
    looked_up = {name: tables[name][places[name]].detach().requires_grad_() for name in tables}
    scores = model.head(torch.tanh(torch.cat([looked_up["hashed"], looked_up["shifted"]], -1)).sum(1))
    gradients = torch.autograd.grad(scores.max(-1).values.sum(), list(looked_up.values()))
    expected = sum((x * g).sum(-1) for x, g in zip(looked_up.values(), gradients, strict=True))
    explanation = fxlrp.lrp_compile(model, "gradient")(ids)
    torch.testing.assert_close(explanation.relevance, expected.detach())
    assert fxlrp.lrp_compile(model)(ids).ledger.residual < 1e-5


class HashedWindows(Hashed):
    """Embeddings of a hash of each three ids in a row, behind two that are padding."""

    @staticmethod
    def hash(input_ids: Tensor) -> Tensor:
        windows = torch.cat([input_ids.new_zeros(len(input_ids), 2), input_ids], 1).unfold(1, 3, 1)
        return (windows * 31 ** torch.arange(3)).sum(-1) % 16

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.cat([self.hashed(self.hash(input_ids)), self.shifted(input_ids)], -1)
        return self.head(torch.tanh(x).sum(1))


def test_ids_that_are_hashed_together_share_alike() -> None:
    """Would break: hashes of several ids counted as constants, or each id given all of the relevance."""
    model, ids = HashedWindows().eval(), torch.randint(0, 20, (2, 6))
    looked_up = [model.hashed.weight[model.hash(ids)], model.shifted.weight[ids]]
    looked_up = [x.detach().requires_grad_() for x in looked_up]
    scores = model.head(torch.tanh(torch.cat(looked_up, -1)).sum(1))
    gradients = torch.autograd.grad(scores.max(-1).values.sum(), looked_up)
    hashed, single = ((x * g).sum(-1).detach() for x, g in zip(looked_up, gradients, strict=True))
    padded = F.pad(hashed, (0, 2)) / 3  # a hash at place i is of the ids at i - 2, i - 1 and i
    expected = single + padded[:, :6] + padded[:, 1:7] + padded[:, 2:]
    explanation = fxlrp.lrp_compile(model, "gradient")(ids)
    torch.testing.assert_close(explanation.relevance, expected)
    assert fxlrp.lrp_compile(model)(ids).ledger.residual < 1e-5


class Turned(nn.Module):
    """Reads its own ids one place later, behind a start token, as decoders of classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Embedding(20, 8), nn.Embedding(20, 8), nn.Linear(8, 3)

    @staticmethod
    def shift(input_ids: Tensor) -> Tensor:
        shifted = input_ids.new_zeros(input_ids.shape)
        shifted[:, 1:] = input_ids[:, :-1].clone()
        shifted[:, 0] = 1
        return shifted.masked_fill_(shifted == -100, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        left, right = input_ids.chunk(2, 1)
        ids = torch.cat([right, left], 1)
        return self.head(torch.tanh(self.first(self.shift(input_ids)) + self.second(ids)).sum(1))


def test_shifted_and_split_ids_are_explained_where_they_stood() -> None:
    """Would break: a path through a tensor of which only the shape was read; half of a split lost."""
    model, ids = Turned().eval(), torch.randint(3, 20, (2, 6))
    first = model.first(model.shift(ids)).detach().requires_grad_()
    second = model.second(ids.roll(3, 1)).detach().requires_grad_()
    scores = model.head(torch.tanh(first + second).sum(1)).max(-1).values.sum()
    moved, rolled = (
        (x * g).sum(-1).detach()
        for x, g in zip((first, second), torch.autograd.grad(scores, (first, second)), strict=True)
    )
    expected = nn.functional.pad(moved[:, 1:], (0, 1)) + rolled.roll(3, 1)
    torch.testing.assert_close(fxlrp.lrp_compile(model, "gradient")(ids).relevance, expected)


class Replaced(nn.Module):
    """Looks ids up after some were written over, and in another order."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.step = nn.Embedding(20, 8), nn.Linear(8, 3), step

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(self.step(input_ids))).cumsum(1)[:, -2])


def _placeholder_out(ids: Tensor) -> Tensor:
    found = ids.clone()
    found[ids == 7] = 0
    return found


@pytest.mark.parametrize(
    "step",
    [
        _placeholder_out,
        lambda ids: ids[:, torch.tensor([2, 0, 1, 3])],
        lambda ids: torch.gather(ids, 1, ids.argsort(1)),
        lambda ids: ids.masked_scatter(ids == 7, torch.zeros_like(ids)),
        lambda ids: torch.zeros_like(ids).scatter(1, ids.argsort(1), ids),
        lambda ids: ids.index_fill(1, torch.tensor([0]), 19),
        lambda ids: torch.zeros_like(ids).copy_(ids),
    ],
    ids=["index_put", "index", "gather", "masked_scatter", "scatter", "index_fill", "copy"],
)
def test_replaced_and_reordered_ids_are_explained_where_they_stood(step: Callable[[Tensor], Tensor]) -> None:
    """Would break: no path through a write at a mask or a reordering; relevance of what was written over."""
    model, ids = Replaced(step).eval(), torch.tensor([[9, 7, 3, 5], [4, 2, 7, 8]])
    explanation = fxlrp.lrp_compile(model, "gradient")(ids)
    looked_up = model.table(step(ids)).detach().requires_grad_()
    score = model.head(torch.tanh(looked_up).cumsum(1)[:, -2]).max(-1).values.sum()
    parts = (torch.autograd.grad(score, looked_up)[0] * looked_up).sum(-1)
    same = ids[:, :, None] == step(ids)[:, None, :]  # no id is there twice
    torch.testing.assert_close(explanation.relevance, (same * parts[:, None, :]).sum(-1).detach())
    assert explanation.ledger.residual < 1e-5


class Packed(nn.Module):
    """Patches of all images in one row, as models for images of any size take them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.table, self.head = nn.Linear(6, 8), nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, patches: Tensor) -> Tensor:
        x = self.table(input_ids)
        places = (input_ids == 0)[..., None].expand_as(x)
        return self.head(torch.tanh(x.masked_scatter(places, self.embed(patches))).sum(1))


@pytest.mark.parametrize("composite", ["gradient", "attnlrp"])
def test_an_input_without_a_batch_has_one_account_for_all_samples(composite: str) -> None:
    """Would break: relevance of packed patches taken for that of samples."""
    model, ids = Packed().eval(), torch.tensor([[3, 0, 0, 5], [0, 4, 6, 0]])
    patches = torch.randn(4, 6)
    explanation = fxlrp.lrp_compile(model, composite)(ids, patches)
    assert explanation.ledger.residual < 1e-5
    assert explanation.ledger.value.shape == (1,)
    if composite == "gradient":
        leaf = patches.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(ids, leaf).max(-1).values.sum(), leaf)
        torch.testing.assert_close(explanation.relevance["patches"], leaf.detach() * gradient)


class TwoIds(nn.Module):
    """One lookup of two inputs' ids, one after the other; and a weight that is called as an input is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        x = self.table(torch.cat([first, second], 1)) * self.scale
        return self.head(torch.tanh(x).sum(1) * scale)


def test_a_lookup_of_two_inputs_and_a_weight_named_as_an_input() -> None:
    """Would break: the other input's tokens booked as constants; an input overwritten by a weight."""
    model, first, second = TwoIds().eval(), torch.randint(0, 20, (2, 3)), torch.randint(0, 20, (2, 4))
    explanation = fxlrp.lrp_compile(model)(first, second, torch.rand(2, 8))
    assert set(explanation.relevance) == {"first", "second", "scale"}
    assert explanation.ledger.residual < 1e-5
