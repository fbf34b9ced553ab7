"""A model in, an explanation out: run it from anywhere, it needs no network.

    python examples/quickstart.py

It takes the sentiment Transformer that fxlrp ships; any other `torch.nn.Module` goes the same way.
"""

import torch

import fxlrp
from fxlrp.demo import load_sentiment
from fxlrp.report import print_tokens
from fxlrp.rules import Epsilon

TEXTS = ["A warm, witty and beautifully acted film, even if the ending drags.", "What a waste of time!"]
NEGATIVE, POSITIVE = 0, 1


def main() -> None:
    model, tokenizer = load_sentiment()
    batch = tokenizer(TEXTS)

    # 1. Compile once, call as often as wanted, with what the model itself takes. The first call traces.
    explainer = fxlrp.lrp_compile(model, composite="attnlrp")
    explanation = explainer(batch.input_ids, batch.attention_mask)
    predicted = explanation.output.argmax(dim=-1).tolist()
    for row, pieces in enumerate(batch.pieces):
        title = f"class {predicted[row]}, logit {explanation.value[row]:+.3f}"
        print_tokens(pieces, {"attnlrp": explanation.relevance[row, : len(pieces)]}, title=title)
        print()

    # 2. The plan: which node got which rule, and why.
    print("Plan:", explainer.plan.counts())
    lines = explainer.plan.table().splitlines()
    print("\n".join([*lines[:12], f"… {len(lines) - 14} more rows", *lines[-2:]]), "\n")

    # 3. The ledger: what the inputs got + what biases, position embeddings and the like absorbed = the logit.
    print(explanation.ledger, "\n")

    # 4. Contrastive: why positive rather than negative, for both sentences.
    contrast = explainer(
        batch.input_ids, batch.attention_mask, target=fxlrp.LogitDifference(POSITIVE, NEGATIVE)
    )
    pieces = batch.pieces[0]
    print_tokens(pieces, {"positive − negative": contrast.relevance[0, : len(pieces)]})
    print()

    # 5. Rules of your own: the first selector that matches wins, the base decides the rest.
    composite = fxlrp.Composite(
        [
            (fxlrp.op("linear") & fxlrp.name("blocks.*.mlp.*"), Epsilon(1e-2)),
            (fxlrp.op("linear"), Epsilon(1e-6)),
        ],
        base="cp",
    )
    # The same trace serves every composite.
    custom = explainer.with_composite(composite)(batch.input_ids, batch.attention_mask, target=POSITIVE)
    causes = {cause: round(amount[0].item(), 4) for cause, amount in custom.ledger.by_cause().items()}
    print("Absorbed by cause with a composite of our own:", causes)

    total = explanation.relevance.sum(dim=-1).double() + explanation.ledger.absorbed
    torch.testing.assert_close(total, explanation.value.double(), atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
