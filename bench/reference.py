"""Gradient x Input by autograd, through a model as it is: what fxlrp's ``gradient`` composite must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_EMBEDDED = ("input_ids", "decoder_input_ids", "ids")


def gradient_times_input(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The predicted class's or next token's logit, and its gradient times input.

    Integer ids are explained at the output of their embedding, summed over the hidden size; the lookups are
    told by the ids that they are called with.

    Returns:
        The explained scalars ``[batch]`` and relevance by input name.
    """
    floats = {name: x.clone().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    lookups: dict[str, Tensor] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        for name in _EMBEDDED:
            if (
                name in inputs
                and name not in lookups
                and args[0].shape == inputs[name].shape
                and torch.equal(args[0], inputs[name])
            ):
                lookups[name] = output.detach().requires_grad_()
                return lookups[name]
        return None

    handles = [m.register_forward_hook(catch) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.enable_grad():
            logits = logits_of(model(**{**inputs, **floats}))
            scalar = predicted(logits, inputs)
            sources = {**floats, **lookups}
            gradients = torch.autograd.grad(scalar.sum(), list(sources.values()))
    finally:
        for handle in handles:
            handle.remove()
    relevance = {name: (x * g).detach() for (name, x), g in zip(sources.items(), gradients, strict=True)}
    return scalar.detach(), {name: r if name in floats else r.sum(-1) for name, r in relevance.items()}


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output."""
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def predicted(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The largest logit, for sequences at the last position that is not padding: ``[batch]``."""
    if logits.dim() == 3:
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
        if mask is None or mask.shape != logits.shape[:2]:
            logits = logits[:, -1]
        else:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
            logits = logits[torch.arange(len(logits), device=logits.device), last]
    return logits.max(-1).values
