"""Relevance patching: which parts of a language model carry a prediction, in one backward pass.

    python examples/relp_patching.py --model ../shared/data/stories260k/hf

Two prompts that differ in one word lead a language model to different next tokens. Activation patching finds
what carries the difference: it puts a component's clean output at one position into the corrupted run and
sees how much of the clean prediction comes back, a forward pass for each component and position. Attribution
patching estimates all of them at once, as (a_clean - a_corrupted) . G with G the gradient at the corrupted
run. Relevance patching (RelP, Rezaei Jafari et al. 2025, arXiv 2508.21258) takes coefficients of layer-wise
relevance propagation for G.

The prediction is measured by the difference of the two next tokens' logits. The tables show Pearson's
correlation of each method's estimates with activation patching, over all layers and positions: of each prompt
by itself, and, as in the paper, of the mean over prompts (here those of equal length).

On stories260k, a Llama of five layers, RelP's mean over prompts correlates with 0.97 over all components,
the gradient's with 0.88. As in the paper the gain is in the residual stream (0.96 against 0.86) and the MLPs
(0.96 against 0.91), and for heads the gradient is the better one (1.00 against 0.97). Prompt by prompt the
order is the same, and freezing attention too helps most (0.92 against RelP's 0.86 and the gradient's 0.79).
Where a head or an MLP is patched at all positions at once, RelP is no better than the gradient on this model
(0.89 against 0.90 over heads and MLPs).
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fxlrp
from fxlrp.rules import FrozenAttention

T = TypeVar("T")

REPO = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("FXLRP_DATA") or REPO.parent / "shared" / "data")

TEMPLATES = (
    "Once upon a time, there was a little {}. One day,",
    "Once upon a time, there was a little {} named",
    "Once upon a time, there was a little {} who loved to play with",
    "{} was a happy child. One day,",
    "{} went to the park with",
    "{} had a big ball. One day,",
    "The {} was sad because",
    "One day, {} saw a big tree. The tree was very tall, so",
    "The little {} liked to play with",
    "{} was tired and went home to see",
)
#: Words of equal length in tokens; every pair of them is tried in every template, both ways round.
WORDS = (
    ("girl", "boy"),
    ("Lily", "Tim", "Timmy", "mom"),
    ("Sue", "Mia", "Max", "woman"),
    ("Tom", "Ben", "dad"),
)
#: Prompts are kept where the difference of the two next tokens' logits changes by this much.
CLEAR = 2.0

METHODS: Mapping[str, str | fxlrp.Composite] = {
    "gradient": "gradient",
    "relp": "relp",
    "relp, frozen attention": fxlrp.Composite(
        [(fxlrp.op("attention"), FrozenAttention())], base="relp", title="relp, AH"
    ),
    "attnlrp": "attnlrp",
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts of equal length: token ids ``[P, S]``, and the next tokens ``[P]`` that they lead to."""

    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor

    def metric(self, logits: Tensor) -> Tensor:
        """The logit of the clean prompt's next token less that of the corrupted one's: ``[P, n]`` of logits
        ``[P * n, S, V]``.
        """
        last = logits[:, -1].unflatten(0, (len(self.right), -1))
        right, wrong = (last[torch.arange(len(last)), :, token] for token in (self.right, self.wrong))
        return right - wrong

    def cotangent(self, vocabulary: int) -> Tensor:
        """The metric's coefficients at the logits, ``[1, P, S, V]``: 1 at one token of the last row, -1 at
        the other.
        """
        found = torch.zeros(1, *self.clean.shape, vocabulary)
        rows = torch.arange(len(self.right))
        found[0, rows, -1, self.right] = 1
        found[0, rows, -1, self.wrong] = -1
        return found


@dataclass(frozen=True, eq=False)
class Sites:
    """Where a model's components are: modules by name, one a layer.

    Attributes:
        residual: modules whose output is the residual stream; that after the last layer is left out.
        mixed: modules whose input is the heads' output side by side.
        mlps: modules whose output is the MLP's.
        heads: heads in a layer.
    """

    residual: tuple[str, ...]
    mixed: tuple[str, ...]
    mlps: tuple[str, ...]
    heads: int

    @staticmethod
    def of(model: Any) -> "Sites":
        layers = range(model.config.num_hidden_layers)
        return Sites(
            tuple(f"model.layers.{i}" for i in layers[:-1]),
            tuple(f"model.layers.{i}.self_attn.o_proj" for i in layers),
            tuple(f"model.layers.{i}.mlp" for i in layers),
            model.config.num_attention_heads,
        )

    def components(self) -> list[tuple[str, slice]]:
        """Each component as a module and its share of the module's tensor, in the order of all scores."""
        whole = [(name, slice(0, 1)) for name in self.residual]
        heads = [(name, slice(h, h + 1)) for name in self.mixed for h in range(self.heads)]
        return [*whole, *heads, *((name, slice(0, 1)) for name in self.mlps)]

    def parts(self) -> dict[str, slice]:
        """Kinds of components, and which they are."""
        first, last = len(self.residual), len(self.residual) + len(self.mixed) * self.heads
        return {"residual": slice(0, first), "heads": slice(first, last), "MLPs": slice(last, None)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Relevance patching against activation patching.")
    parser.add_argument(
        "--model", type=Path, default=DATA / "stories260k" / "hf", help="a transformers folder of a Llama"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args(argv)
    try:
        import transformers
    except ImportError:
        print("This example loads its model with transformers: pip install transformers", file=sys.stderr)
        return 1
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    except (OSError, ValueError) as error:
        print(f"transformers cannot load {str(arguments.model)!r}: {error}", file=sys.stderr)
        return 1
    groups = find_pairs(model, tokenizer)
    print(f"{sum(len(g.clean) for g in groups)} pairs of prompts of {len(groups)} lengths; such as")
    for group in groups[:3]:
        texts = [tokenizer.decode(t[0], skip_special_tokens=True) for t in (group.clean, group.corrupted)]
        tokens = [tokenizer.decode(t[:1]) for t in (group.right, group.wrong)]
        print("  " + ", ".join(f"{text!r} -> {token!r}" for text, token in zip(texts, tokens, strict=True)))
    print()

    exact = timed("activation patching", lambda: [patched(model, group) for group in groups])
    explainer = fxlrp.lrp_compile(model)
    found = {
        name: timed(name, lambda c=composite: estimated(explainer.with_composite(c), groups))
        for name, composite in METHODS.items()
    }
    parts = Sites.of(model).parts()
    print("\nCorrelation with activation patching, each prompt by itself\n" + table(exact, found, parts))
    exact, found = means(exact), {name: means(scores) for name, scores in found.items()}
    print("\nCorrelation with activation patching, means over prompts\n" + table(exact, found, parts))
    path = arguments.out / "relp_patching.png"
    save_picture(path, exact, found, parts)
    print(f"\nWritten: {path}")
    return 0


def timed(name: str, run: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = run()
    print(f"{name + ':':<24}{time.perf_counter() - start:5.1f} s")
    return result


def find_pairs(model: Any, tokenizer: Any) -> list[Pairs]:
    """Prompts of the templates whose next tokens differ clearly, by length."""
    rows: dict[int, list[tuple[list[int], list[int], int, int]]] = {}
    for template, words in itertools.product(TEMPLATES, WORDS):
        ids = {word: tokenizer(template.format(word)).input_ids for word in words}
        with torch.no_grad():
            logits = {word: model(torch.tensor([row])).logits[0, -1] for word, row in ids.items()}
        for clean, corrupted in itertools.permutations(words, 2):
            right, wrong = int(logits[clean].argmax()), int(logits[corrupted].argmax())
            change = logits[clean] - logits[corrupted]
            if len(ids[clean]) == len(ids[corrupted]) and change[right] - change[wrong] > CLEAR:
                rows.setdefault(len(ids[clean]), []).append((ids[clean], ids[corrupted], right, wrong))
    return [Pairs(*(torch.tensor(column) for column in zip(*found, strict=True))) for found in rows.values()]


# -- activation patching -----------------------------------------------------------------------------------


@torch.no_grad()
def patched(model: Any, pairs: Pairs) -> Tensor:
    """What each component's clean output at one position, put into the corrupted run, adds to the metric.

    ``[P, components, S]``: ``metric(corrupted with a_clean) - metric(corrupted)``. All positions go through
    the model together, as a batch of P x S.
    """
    sites, length = Sites.of(model), pairs.clean.shape[1]
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        kept[name] = value
        return value

    with edited(model, sites, keep):
        model(pairs.clean)
    copies = pairs.corrupted.repeat_interleave(length, 0)
    before = pairs.metric(model(pairs.corrupted).logits)
    here = torch.eye(length, dtype=torch.bool)[None, :, :, None, None]  # of copy s, position s

    def effect(name: str, share: slice) -> Tensor:
        def put(at: str, value: Tensor) -> Tensor:
            if at != name:
                return value
            heads = sites.heads if at in sites.mixed else 1
            old = value.unflatten(0, (-1, length)).unflatten(-1, (heads, -1)).clone()
            new = kept[at].unsqueeze(1).unflatten(-1, (heads, -1))
            old[..., share, :] = torch.where(here, new[..., share, :], old[..., share, :])
            return old.flatten(-2).flatten(0, 1)

        with edited(model, sites, put):
            return pairs.metric(model(copies).logits) - before

    return torch.stack([effect(name, share) for name, share in sites.components()], 1)


@contextmanager
def edited(model: nn.Module, sites: Sites, edit: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """While the model runs, ``edit(name, value)`` takes the place of each component's output."""
    with ExitStack() as stack:
        for name in sites.mixed:
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: (edit(name, args[0]),)
            )
            stack.callback(hook.remove)
        for name in (*sites.residual, *sites.mlps):
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: edit(name, output)
            )
            stack.callback(hook.remove)
        yield


# -- relevance patching ------------------------------------------------------------------------------------


def estimated(explainer: fxlrp.Explainer, groups: Sequence[Pairs]) -> list[Tensor]:
    """``(a_clean - a_corrupted) . G`` of each component and position, G at the corrupted run.

    For each group shaped as :func:`patched`, of two forward passes and a backward one.
    """
    model: Any = explainer.model
    sites = Sites.of(model)
    explainer(groups[0].corrupted, target=0)  # traces the model: the plan knows where attention is
    attention = [row.node for row in explainer.plan if row.kind == "attention"]
    names = [*sites.residual, *attention, *sites.mlps]
    scores = []
    for pairs in groups:
        found = explainer.vjp("output", pairs.cotangent(model.config.vocab_size), pairs.corrupted, wrt=names)
        clean = explainer.values(names, pairs.clean)
        of = {name: ((clean[name] - found.values[name]) * found[name][0]).sum(-1) for name in names}
        # Attention's output is [P, heads, S, size], that of modules [P, S, size].
        whole = [of[name].unsqueeze(1) if of[name].dim() == 2 else of[name] for name in names]
        scores.append(torch.cat(whole, 1))
    return scores


# -- reports -----------------------------------------------------------------------------------------------


def means(groups: Sequence[Tensor]) -> list[Tensor]:
    """Over the prompts of each group."""
    return [scores.mean(0, keepdim=True) for scores in groups]


def flat(groups: Sequence[Tensor], part: slice) -> Tensor:
    return torch.cat([scores[:, part].flatten() for scores in groups])


def pearson(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()


def table(exact: Sequence[Tensor], found: Mapping[str, Sequence[Tensor]], parts: Mapping[str, slice]) -> str:
    parts = {**parts, "all": slice(None)}
    lines = [" " * 24 + "".join(f"{name:>10}" for name in parts)]
    for method, scores in found.items():
        values = [pearson(flat(exact, part), flat(scores, part)) for part in parts.values()]
        lines.append(f"{method:<24}" + "".join(f"{value:>10.3f}" for value in values))
    return "\n".join(lines)


def save_picture(
    path: Path,
    exact: Sequence[Tensor],
    found: Mapping[str, Sequence[Tensor]],
    parts: Mapping[str, slice],
) -> None:
    """A scatter plot of each method's estimates against activation patching."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(found), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    every = flat(exact, slice(None))
    ends = [every.min().item(), every.max().item()]
    for axis, (method, scores) in zip(axes, found.items(), strict=True):
        axis.plot(ends, ends, color="0.75", linewidth=1, zorder=0)
        for (kind, part), color in zip(parts.items(), ("#7f7f7f", "#1f54c4", "#ca1829"), strict=True):
            of = flat(exact, part), flat(scores, part)
            axis.scatter(
                *of, s=8, color=color, alpha=0.6, linewidths=0, label=f"{kind}, r = {pearson(*of):.2f}"
            )
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("activation patching", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.legend(frameon=False, fontsize=8, loc="upper left", handletextpad=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("estimate", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
