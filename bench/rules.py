"""What a rule costs: time with it on all linear layers and convolutions over time with Epsilon().

    python -m bench.rules [--vit] [--rounds 25] [--device cuda] [--out results.json]

By layer and number of rows, or with ``--vit`` end to end on a ViT-B/16 with random weights, where Gamma is
also run by zennit if that can be imported. Contenders run interleaved in one process, after a correctness
gate; reported are medians of ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxlrp
from fxlrp.rules import AlphaBeta, Box, Epsilon, Flat, Gamma, Rule, WSquare, ZPlus

from .timing import interleaved, ratio, save, versions

_RESULTS = Path(__file__).parent / "results"
BASELINE = "Epsilon()"
#: Rules by how tables call them.
RULES: dict[str, Rule] = {
    BASELINE: Epsilon(),
    "Epsilon(1e-6)": Epsilon(1e-6),
    "Epsilon(0.25, relative=True)": Epsilon(0.25, relative=True),
    "Gamma(0.25)": Gamma(0.25),
    "AlphaBeta(2, 1)": AlphaBeta(2, 1),
    "ZPlus()": ZPlus(),
}
FIRST_LAYER: dict[str, Rule] = {"Box(-3, 3)": Box(-3, 3), "Flat()": Flat(), "WSquare()": WSquare()}
#: The most that a rule by sign may cost over Epsilon() end to end, and the least that zennit may cost over
#: Gamma.
LIMIT, LIMIT_ZENNIT = 2.2, 3.0
#: Relevance at the output of every block too, and the most that it may cost.
LATENTS, LIMIT_LATENTS = "Epsilon(), latents of all blocks", 1.1


def layers() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Layers of a ViT-B/16 with inputs of one and of eight images."""

    def linear(inputs: int, outputs: int, images: int) -> tuple[nn.Module, Tensor]:
        return nn.Linear(inputs, outputs), torch.randn(images, 197, inputs)

    def patches(images: int) -> tuple[nn.Module, Tensor]:
        return nn.Conv2d(3, 768, 16, stride=16), torch.randn(images, 3, 224, 224)

    found: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {}
    for images in (1, 8):
        for inputs, outputs in ((768, 768), (768, 3072), (3072, 768)):
            found[f"linear {inputs}→{outputs}, {images}x197"] = (
                lambda i=inputs, o=outputs, n=images: linear(i, o, n)  # type: ignore[misc]
            )
        found[f"patches 3→768, {images}x224 px"] = lambda n=images: patches(n)  # type: ignore[misc]
    return found


def whole(output: Tensor) -> Tensor:
    """All of an output, one scalar per sample."""
    return output.flatten(1).sum(1)


def composite(rule: Rule) -> fxlrp.Composite:
    """A rule for all linear layers and convolutions."""
    return fxlrp.Composite([(fxlrp.op("linear") | fxlrp.op("conv"), rule)])


def explainers(
    model: nn.Module, inputs: Mapping[str, Tensor], rules: Mapping[str, Rule], target: Any
) -> dict[str, Callable[[], Any]]:
    """What each rule does for one explanation, once its ledger has been seen to close."""
    base = fxlrp.lrp_compile(model, backend="eager")
    made: dict[str, Callable[[], Any]] = {}
    for name, rule in rules.items():
        explainer = base.with_composite(composite(rule))
        residual = explainer(**inputs, target=target).ledger.residual
        if residual > 1e-3:
            raise AssertionError(f"{name}: the ledger does not close: {residual:.1e}")
        made[name] = lambda explainer=explainer: explainer(**inputs, target=target)  # type: ignore[misc]
    return made


def medians(run: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of seconds, and of ratios over the baseline within a round."""
    for function in run.values():
        function()
    times = interleaved(run, rounds)
    return {
        name: {"seconds": statistics.median(t), "ratio": ratio(t, times[BASELINE])}
        for name, t in times.items()
    }


def by_layer(rounds: int, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """Every rule on every layer."""
    results = {}
    for name, build in layers().items():
        print(name, file=sys.stderr, flush=True)
        torch.manual_seed(0)
        layer, x = build()
        layer = layer.to(device).eval().requires_grad_(False)
        run = explainers(layer, {"input": x.to(device)}, {**RULES, **FIRST_LAYER}, whole)
        results[name] = medians(run, rounds)
    return results


def vit() -> tuple[nn.Module, Tensor]:
    """ViT-B/16 from its configuration, with random weights, and one image."""
    from transformers import AutoModelForImageClassification, ViTConfig

    torch.manual_seed(0)
    config = ViTConfig(num_labels=1000)
    model: nn.Module = AutoModelForImageClassification.from_config(config, attn_implementation="sdpa")
    return model.eval().requires_grad_(False), torch.randn(1, 3, 224, 224)


def zennit_gamma(model: nn.Module, x: Tensor) -> Callable[[], Any] | None:
    """Gamma by zennit's hooks on the same layers, the gradient everywhere else; None without zennit."""
    try:
        from zennit.rules import Gamma as Reference
    except ImportError:
        return None

    def run() -> Tensor:
        handles = [
            Reference(0.25).register(module)
            for module in model.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ]
        try:
            leaf = x.clone().requires_grad_()
            logits = model(pixel_values=leaf).logits
            seeds = torch.zeros_like(logits)
            seeds[:, 0] = logits[:, 0].detach()
            (relevance,) = torch.autograd.grad(logits, leaf, seeds)
        finally:
            for handle in handles:
                handle.remove()
        return relevance

    return run


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that a model holds in lists."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return tuple(
        name
        for name, _ in model.named_modules()
        if any(name.startswith(at) and name.removeprefix(at).isdigit() for at in lists)
    )


def end_to_end(rounds: int, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """Every rule on the whole model, and Gamma by zennit."""
    model, x = vit()
    model, x = model.to(device), x.to(device)
    run = explainers(model, {"pixel_values": x}, RULES, 0)
    watched = fxlrp.lrp_compile(model, composite(Epsilon()), backend="eager", latents=blocks(model))
    run[LATENTS] = lambda: watched(pixel_values=x, target=0)
    peer = zennit_gamma(model, x)
    if peer is None:
        print("zennit cannot be imported: left out", file=sys.stderr)
    else:
        run["zennit: Gamma(0.25)"] = peer
    return {"ViT-B/16, 1x224 px": medians(run, rounds)}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Times over Epsilon()'s as a Markdown table, a row for each workload."""
    names = list(next(iter(results.values())))
    lines = [
        f"| | {BASELINE}, ms | " + " | ".join(names[1:]) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for workload, row in results.items():
        ratios = " | ".join(f"{row[name]['ratio']:.2f}" for name in names[1:])
        lines.append(f"| {workload} | {1e3 * row[BASELINE]['seconds']:.1f} | {ratios} |")
    return "\n".join(lines)


def verdict(row: dict[str, dict[str, float]]) -> list[str]:
    """Which limits hold end to end."""
    limits = dict.fromkeys(("Gamma(0.25)", "AlphaBeta(2, 1)", "ZPlus()"), LIMIT) | {LATENTS: LIMIT_LATENTS}
    lines = [
        f"{name}: {row[name]['ratio']:.2f} x {BASELINE}, limit {limit}: "
        f"{'holds' if row[name]['ratio'] <= limit else 'DOES NOT HOLD'}"
        for name, limit in limits.items()
    ]
    if "zennit: Gamma(0.25)" in row:
        faster = row["zennit: Gamma(0.25)"]["ratio"] / row["Gamma(0.25)"]["ratio"]
        lines.append(
            f"Gamma(0.25): {faster:.1f} x as fast as zennit's, at least {LIMIT_ZENNIT}: "
            f"{'holds' if faster >= LIMIT_ZENNIT else 'DOES NOT HOLD'}"
        )
    return lines


def main() -> None:
    """Run the benchmark, print its table, write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vit", action="store_true", help="a whole ViT-B/16 instead of single layers")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write JSON here instead of under bench/results")
    options = parser.parse_args()
    measured = versions()
    results = (end_to_end if options.vit else by_layer)(options.rounds, options.device)
    is_gpu = options.device != "cpu"
    measured["device"] = versions()["device"]  # known once a GPU is in use
    print(table(results))
    print(", ".join(f"{k} {v}" for k, v in measured.items()))
    for line in verdict(next(iter(results.values()))) if options.vit else []:
        print(line)
    name = f"rules{'_vit' if options.vit else ''}_{'gpu' if is_gpu else 'cpu'}.json"
    out = options.out or _RESULTS / name
    save(out, {"versions": measured, "results": results})


if __name__ == "__main__":
    main()
