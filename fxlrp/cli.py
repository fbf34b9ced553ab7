"""The ``fxlrp`` command: ``demo`` explains with shipped models, ``composites``, ``inspect`` show files."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxlrp import (
    ArtifactError,
    Composite,
    CompositeError,
    Explanation,
    Ledger,
    __version__,
    lrp_compile,
)
from fxlrp.artifact import inspect
from fxlrp.demo import Encoding, SentimentTokenizer, load_digits, load_digits_data, load_sentiment
from fxlrp.demo.digits import HELD_OUT
from fxlrp.demo.sentiment import MAX_LENGTH
from fxlrp.report import Scale, print_image, print_tokens, save_image, write_html
from fxlrp.rules import PRESETS, as_composite
from fxlrp.rules.describe import listing, matrix

DEFAULT_TEXT = "A warm, witty and beautifully acted film, even if the ending drags."
DEFAULT_DIGIT = 262
SENTIMENTS = ("negative", "positive")

#: The first of each is the one whose ledger is shown.
SENTENCE_METHODS = ("attnlrp", "cp", "gradient")
DIGIT_METHODS = ("attnlrp", "cp")

#: Each method has a colour scale of its own: what is compared is which tokens or pixels matter, and
#: Gradient x Input conserves nothing, so its sizes say little.
SCALE: Scale = "method"


class UsageError(ValueError):
    """What the user gave cannot be explained; the message says why and what to give instead."""


@dataclass(frozen=True, eq=False)
class Explained:
    """One prediction, explained by several methods.

    Attributes:
        label: the predicted class.
        probability: its probability.
        value: its logit, which is what is explained.
        relevance: the input's relevance by method, without the batch dimension.
        ledger: where the first method's relevance went.
    """

    label: int
    probability: float
    value: float
    relevance: dict[str, Tensor]
    ledger: Ledger


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 where a file or a package cannot be had, or 2 for wrong arguments."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        arguments.run(arguments)
    except (UsageError, CompositeError) as error:
        return _fail(str(error), 2)
    except (ArtifactError, ImportError, OSError) as error:
        return _fail(str(error), 1)
    return 0


def composites(name: str | None, *, markdown: bool = False) -> str:
    """All presets as a list or a Markdown table, or one preset or composite in a JSON file as a table.

    Raises CompositeError for a name that is neither.
    """
    if name is None:
        return matrix() if markdown else listing()
    if name not in PRESETS and Path(name).is_file():
        return str(Composite.from_json(Path(name).read_text(encoding="utf-8")))
    return str(as_composite(name))


def inspection(path: Path) -> str:
    """What a saved explainer holds, and the plan of its first program.

    Raises ArtifactError for what is none, ImportError where safetensors is missing.
    """
    header = inspect(path)
    text = f"{header}\n\n{header.programs[0].plan}"
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def demo(text: str | None, out: Path, digit: int) -> None:
    """Explain a sentence and a held-out digit with the shipped models, on the terminal and as files in `out`.

    Raises UsageError for a text that the model cannot read, ImportError where an extra is missing, OSError
    where `out` cannot be written.
    """
    sentence = choose_text(text)
    model, tokenizer = load_sentiment()
    encoding = encode(tokenizer, sentence)
    out.mkdir(parents=True, exist_ok=True)
    page = show_sentence(model, encoding, out / "sentence.html")
    print()
    picture = show_digit(digit, out / "digit.png")
    print(f"\nWritten: {page} (open it in a browser) and {picture}")


def choose_text(given: str | None) -> str:
    """The text as given, else that of the environment's FXLRP_TEXT, else a default sentence.

    Raises UsageError for a text without any visible character.
    """
    text = (os.environ.get("FXLRP_TEXT") or DEFAULT_TEXT) if given is None else given
    # Bytes that are no UTF-8 come in as lone surrogates, which cannot be written out again.
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    if not text.strip():
        raise UsageError("the text is empty: give a sentence, as in --text 'A warm and witty film.'")
    return text


def encode(tokenizer: SentimentTokenizer, text: str) -> Encoding:
    """The text as the model reads it. Raises UsageError for a text that is longer than the model reads."""
    pieces = [piece for _, piece in itertools.islice(tokenizer.encode(text), MAX_LENGTH + 1)]
    if len(pieces) > MAX_LENGTH:
        end = "".join(pieces[:MAX_LENGTH])[-32:].strip()
        raise UsageError(
            f"the text is too long: the shipped model reads {MAX_LENGTH} tokens (words, marks, parts of rare "
            f"words) and would stop after '… {end}'. Give a shorter one."
        )
    return tokenizer(text)


def show_sentence(model: nn.Module, encoding: Encoding, path: Path) -> Path:
    """Explain a sentence, print its heatmaps and ledger, and write them as a page to `path`."""
    tokens = encoding.pieces[0]
    found = explain("sentence", model, (encoding.input_ids, encoding.attention_mask), SENTENCE_METHODS)
    verdict = f"{SENTIMENTS[found.label]} ({found.probability:.1%})"
    title = f"Sentiment: {verdict}, logit {found.value:+.4g}; relevance of each token for it"
    print_tokens(tokens, found.relevance, scale=SCALE, title=title)
    _print_ledger(found.ledger, SENTENCE_METHODS[0])
    return write_html(
        path,
        tokens,
        found.relevance,
        scale=SCALE,
        title="Why this sentiment?",
        predicted=verdict,
        explained=found.value,
        ledger=_ledger_rows(found.ledger),
        ledger_header=(
            f"where the relevance of {SENTENCE_METHODS[0]} went",
            "cause",
            "relevance",
            "% of the value",
        ),
    )


def show_digit(number: int, path: Path) -> Path:
    """Explain a held-out digit, print its heatmaps and ledger, and write a picture of them to `path`."""
    images, labels = load_digits_data("held_out")
    image = images[number]
    found = explain("digit", load_digits(), (image.unsqueeze(0),), DIGIT_METHODS)
    verdict = f"Digit: {found.label} ({found.probability:.1%}), logit {found.value:+.4g}"
    title = f"{verdict}, written as a {labels[number].item()}; relevance of each pixel for it"
    print_image(found.relevance, image=image, scale=SCALE, title=title)
    _print_ledger(found.ledger, DIGIT_METHODS[0])
    return save_image(path, image, found.relevance, scale=SCALE, title=verdict)


def explain(what: str, model: nn.Module, inputs: Sequence[Tensor], methods: Sequence[str]) -> Explained:
    """Explain the predicted class of a batch of one with each of the methods."""
    explainer = lrp_compile(model)
    explanations: dict[str, Explanation] = {}
    for method in methods:
        _progress(f"compiling {method} for the {what} …")
        explanations[method] = explainer.with_composite(method)(*inputs)
    first = explanations[methods[0]]
    with torch.no_grad():
        probabilities = model(*inputs).softmax(dim=-1)[0]
    return Explained(
        label=int(probabilities.argmax()),
        probability=float(probabilities.max()),
        value=float(first.value[0]),
        relevance={method: _only(explanation)[0] for method, explanation in explanations.items()},
        ledger=first.ledger,
    )


def _only(explanation: Explanation) -> Tensor:
    """The relevance of a model with one explained input."""
    if not isinstance(explanation.relevance, Tensor):
        raise TypeError(f"one explained input was expected, not {list(explanation.relevance)}")
    return explanation.relevance


def _print_ledger(ledger: Ledger, method: str) -> None:
    print(f"\nLedger of {method}: relevance of the inputs + what the model absorbed = explained value\n")
    print(ledger.table())


def _ledger_rows(ledger: Ledger) -> list[tuple[str, str, float, float]]:
    return [(where, cause, amount, 100 * share) for where, cause, amount, share in ledger.rows()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxlrp", description="Layer-wise relevance propagation for Transformers."
    )
    parser.add_argument("--version", action="version", version=f"fxlrp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="explain a sentence and a digit with the shipped models",
        description="Explain a sentence and a digit with the shipped models; writes a page and a picture.",
    )
    command.add_argument("--text", help="the sentence (default: $FXLRP_TEXT, else one of ours)")
    command.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (default: out)")
    command.add_argument(
        "--digit",
        type=_held_out,
        default=DEFAULT_DIGIT,
        metavar="N",
        help=f"number of the held-out image, 0 to {HELD_OUT - 1} (default: {DEFAULT_DIGIT})",
    )
    command.set_defaults(run=lambda given: demo(given.text, given.out, given.digit))
    command = commands.add_parser(
        "composites",
        help="list the presets, or show one or a composite's file",
        description="List the presets, or show what one of them, or a composite in a JSON file, is made of.",
    )
    command.add_argument("name", nargs="?", help="a preset's name or a JSON file (default: list all)")
    command.add_argument("--markdown", action="store_true", help="all presets as one Markdown table")
    command.set_defaults(run=lambda given: print(composites(given.name, markdown=given.markdown)))
    command = commands.add_parser(
        "inspect",
        help="show what a saved explainer holds",
        description="Show inputs, targets and plan of a file of Explainer.save; its weights are not read.",
    )
    command.add_argument("path", type=Path, help="the file")
    command.set_defaults(run=lambda given: print(inspection(given.path)))
    return parser


def _held_out(text: str) -> int:
    if text not in map(str, range(HELD_OUT)):
        raise argparse.ArgumentTypeError(
            f"there is no held-out image {text!r}: give a number from 0 to {HELD_OUT - 1}"
        )
    return int(text)


def _progress(message: str) -> None:
    print(f"fxlrp: {message}", file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    print(f"fxlrp: error: {message}", file=sys.stderr)
    return code
