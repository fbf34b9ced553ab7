"""The demo models: what they know, and that padding and batching change nothing."""

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxlrp.demo import (
    SentimentTokenizer,
    SentimentTransformer,
    load_digits,
    load_digits_data,
    load_sentiment,
)

pytest.importorskip("safetensors", reason="safetensors is not installed")

REPO = Path(__file__).resolve().parents[1]
SST2 = REPO.parent / "shared/data/sst2_glue/test.tsv"
WEIGHTS = REPO / "fxlrp/demo/weights"


@pytest.fixture(scope="module")
def sentiment() -> tuple[SentimentTransformer, SentimentTokenizer]:
    return load_sentiment()


Sentiment = tuple[SentimentTransformer, SentimentTokenizer]


def natural(text: str) -> str:
    """Undo the treebank's spelling of brackets and quotes."""
    for treebank, typed in (("-lrb-", "("), ("-rrb-", ")"), ("``", '"'), ("''", '"')):
        text = text.replace(treebank, typed)
    return text.strip()


@torch.no_grad()
def logits(sentiment: Sentiment, texts: list[str]) -> Tensor:
    model, tokenizer = sentiment
    encoding = tokenizer(texts)
    out: Tensor = model(encoding.input_ids, encoding.attention_mask)
    return out


def test_sentiment_accuracy_on_sst2(sentiment: Sentiment) -> None:
    if not SST2.exists():
        pytest.skip("the SST-2 sentences are not at ../shared/data/sst2_glue")
    with SST2.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 872
    predicted = logits(sentiment, [natural(row["sentence"]) for row in rows]).argmax(dim=1)
    hits = predicted == torch.tensor([int(row["label"]) for row in rows])
    assert hits.float().mean().item() >= 0.80


@pytest.mark.parametrize(
    ("text", "positive"),
    [
        ("A gorgeous, witty, seductive movie.", True),
        ("It's a dull and lifeless mess.", False),
        ("An unforgettable story, beautifully told.", True),
        ("What a waste of time!", False),
    ],
)
def test_sentiment_of_plain_sentences(sentiment: Sentiment, text: str, positive: bool) -> None:
    assert logits(sentiment, [text]).argmax().item() == int(positive)


def test_padding_and_batch_change_nothing(sentiment: Sentiment) -> None:
    texts = ["Fine.", "A gorgeous, witty, seductive movie that never once feels dull.", "It didn't work"]
    together = logits(sentiment, texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row : row + 1], logits(sentiment, [text]), atol=1e-5, rtol=1e-5)


def test_what_stands_under_padding_changes_nothing(sentiment: Sentiment) -> None:
    model, tokenizer = sentiment
    encoding = tokenizer(["Fine.", "A gorgeous movie."])
    other = encoding.input_ids.masked_fill(encoding.attention_mask == 0, 17)
    with torch.no_grad():
        expected = model(encoding.input_ids, encoding.attention_mask)
        torch.testing.assert_close(model(other, encoding.attention_mask), expected)


@pytest.mark.parametrize(
    "text",
    [
        "It didn't work.",
        "A caf\u00e9, na\u00efve \u2014 and \u201cwell-made\u201d!",
        "  Two  spaces",
        "\U0001f600 zyxwvutian",
    ],
)
def test_pieces_join_to_the_text(sentiment: Sentiment, text: str) -> None:
    encoding = sentiment[1](text)
    assert "".join(encoding.pieces[0]) == text
    assert len(encoding.pieces[0]) == encoding.input_ids.shape[1]


def test_unknown_words_keep_their_spelling(sentiment: Sentiment) -> None:
    tokenizer = sentiment[1]
    first, second = (tokenizer(word).input_ids[0].tolist() for word in ("zyxwvu", "qwrtzp"))
    assert first != second
    assert 1 not in first + second


def test_encoding_pads_and_cuts(sentiment: Sentiment) -> None:
    encoding = sentiment[1](["good", "good " * 100], max_length=8)
    assert encoding.input_ids.shape == encoding.attention_mask.shape == (2, 8)
    assert encoding.attention_mask.sum(dim=1).tolist() == [1, 8]
    assert [len(row) for row in encoding.pieces] == [1, 8]
    assert (encoding.input_ids[0, 1:] == 0).all()


@pytest.mark.parametrize("texts", ["", "  ", ["fine", ""], []])
def test_empty_text_is_refused(sentiment: Sentiment, texts: str | list[str]) -> None:
    with pytest.raises(ValueError, match="empty text"):
        sentiment[1](texts)


def test_digits_accuracy_on_held_out_images() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    images, labels = load_digits_data("held_out")
    assert images.shape == (360, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    with torch.no_grad():
        hits = load_digits()(images).argmax(dim=1) == labels
    assert hits.float().mean().item() >= 0.95


def test_digits_splits_are_all_images_once() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    train, held_out = load_digits_data("train"), load_digits_data("held_out")
    assert len(train[0]) + len(held_out[0]) == 1797
    assert len(train[1]) == 1437


def test_digits_batch_changes_nothing() -> None:
    model = load_digits()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-5)


def test_no_bias_is_zero(sentiment: Sentiment) -> None:
    for model in (sentiment[0], load_digits()):
        biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
        assert biases
        assert all(bias.abs().max() > 0 for bias in biases)


def test_shipped_files_are_small() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 3_000_000
