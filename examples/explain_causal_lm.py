"""Explain a language model's next token: what speaks for it, and for it rather than another.

    python examples/explain_causal_lm.py --model path/to/a/transformers/folder --text "Once upon a time"

Any causal language model that transformers loads will do; fxlrp itself never imports transformers.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fxlrp
from fxlrp.report import print_tokens

PROMPT = "Tom had a red ball. He liked to play with his"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Explain the next token of a causal language model.")
    parser.add_argument("--model", required=True, help="a transformers folder with weights and tokenizer")
    parser.add_argument("--text", default=PROMPT, help="the prompt")
    parser.add_argument("--composite", default="attnlrp", choices=fxlrp.composites)
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
        print(f"transformers cannot load {arguments.model!r}: {error}", file=sys.stderr)
        return 1
    inputs = tokenizer(arguments.text, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        print("The prompt is empty: give some --text.", file=sys.stderr)
        return 2
    show(model, tokenizer, dict(inputs), arguments.composite)
    return 0


def show(model: Any, tokenizer: Any, inputs: dict[str, Tensor], composite: str) -> None:
    """Print the likeliest next tokens, and the relevance for the first, by itself and against the second."""
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    likely = logits.topk(5)
    names = [repr(tokenizer.decode([token])) for token in likely.indices.tolist()]
    shares = logits.softmax(dim=-1)[likely.indices]
    print(
        "Next token:",
        ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True)),
        "\n",
    )

    explainer = fxlrp.lrp_compile(model, composite)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])

    # Without a target the predicted next token after the last unpadded position is explained.
    why = explainer(**inputs)
    print_tokens(
        tokens, {composite: why.relevance[0]}, title=f"Why {names[0]}? logit {why.value.item():+.3f}"
    )
    print(f"\n{why.ledger}\n")

    first, second = likely.indices[:2].tolist()
    contrast = explainer(**inputs, target=fxlrp.LogitDifference(first, second))
    title = f"Why {names[0]} rather than {names[1]}? difference {contrast.value.item():+.3f}"
    print_tokens(tokens, {composite: contrast.relevance[0]}, title=title)


if __name__ == "__main__":
    sys.exit(main())
