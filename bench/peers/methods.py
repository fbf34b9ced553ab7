"""What each contender does for one explanation, as its own documentation has it.

A method is prepared with a workload (patches of classes come before the model is built) and gives a function
without arguments that returns relevance ``[batch, ...]`` of the predicted class or next token.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .describe import Workload, inputs_of, logits_of

Run = Callable[[], Tensor]
#: Models take embeddings under this name in place of ids.
_EMBEDDED = "inputs_embeds"


def _leaf(model: nn.Module, workload: Workload) -> tuple[str, Tensor]:
    """The float input by name: token ids as their embeddings."""
    ((name, value),) = inputs_of(workload).items()
    if value.is_floating_point():
        return name, value
    embed: Any = model.get_input_embeddings()  # type: ignore[operator]
    return _EMBEDDED, embed(value).detach()


def _caller(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    def logits(x: Tensor) -> Tensor:
        return logits_of(model(x) if name == "input" else model(**{name: x}))

    return logits


def _per_token(name: str, relevance: Tensor) -> Tensor:
    return relevance.sum(-1) if name == _EMBEDDED else relevance


def forward(model: nn.Module, workload: Workload) -> Run:
    """A forward pass, which explains nothing: the unit of time."""
    inputs = inputs_of(workload)

    def run() -> Tensor:
        with torch.no_grad():
            return logits_of(model(*inputs.values()) if "input" in inputs else model(**inputs))

    return run


def gradient_times_input(model: nn.Module, workload: Workload, *, frozen: bool = True) -> Run:
    """Embeddings times the gradient of the largest logit, by autograd. With LXT's patches this is LXT.

    Not ``frozen``: weights ask for gradients, as they do in a model that nobody told otherwise.
    """
    name, value = _leaf(model, workload)
    model.requires_grad_(not frozen)
    logits = _caller(model, name)

    def run() -> Tensor:
        leaf = value.clone().requires_grad_()
        model.zero_grad()
        logits(leaf).max(-1).values.sum().backward()
        assert leaf.grad is not None
        return _per_token(name, leaf.detach() * leaf.grad)

    return run


def fxlrp(composite: Any, backend: str, *, least: bool = False) -> Callable[[nn.Module, Workload], Run]:
    """fxlrp with a composite and a backend; ``least``: in the least memory that it can."""

    def prepared(model: nn.Module, workload: Workload) -> Run:
        library = importlib.import_module("fxlrp")
        rules = composite(library) if callable(composite) else composite
        explainer = library.lrp_compile(model, rules, backend=backend)
        inputs = inputs_of(workload)
        if least:
            explainer(**inputs)
            share = explainer.memory.least_share
            explainer = library.lrp_compile(model, rules, backend=backend, memory_budget=share)

        def run() -> Tensor:
            found: Tensor = explainer(**inputs).relevance
            return found

        return run

    return prepared


def captum_gradient(model: nn.Module, workload: Workload) -> Run:
    """Captum's InputXGradient."""
    from captum.attr import InputXGradient

    name, value = _leaf(model, workload)
    logits = _caller(model, name)
    method = InputXGradient(lambda x: logits(x).max(-1).values)
    return lambda: _per_token(name, method.attribute(value.clone().requires_grad_()).detach())


def captum_integrated(model: nn.Module, workload: Workload) -> Run:
    """Captum's IntegratedGradients in 20 steps from zero, all steps in one batch as it does by default."""
    from captum.attr import IntegratedGradients

    name, value = _leaf(model, workload)
    logits = _caller(model, name)
    method = IntegratedGradients(logits)

    def run() -> Tensor:
        with torch.no_grad():
            target = logits(value).argmax(-1)
        return _per_token(name, method.attribute(value, target=target, n_steps=20).detach())

    return run


def zennit(rule: str, **settings: float) -> Callable[[nn.Module, Workload], Run]:
    """A rule of zennit's on all linear layers, activations passed, by its composites."""

    def prepared(model: nn.Module, workload: Workload) -> Run:
        rules = importlib.import_module("zennit.rules")
        composites = importlib.import_module("zennit.composites")
        ((_, value),) = inputs_of(workload).items()
        layers = [(nn.Linear, getattr(rules, rule)(**settings)), (nn.ReLU, rules.Pass())]
        composite = composites.LayerMapComposite(layers)

        def run() -> Tensor:
            leaf = value.clone().requires_grad_()
            with composite.context(model) as hooked:
                logits = hooked(leaf)
                chosen = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
                (relevance,) = torch.autograd.grad(logits, leaf, logits.detach() * chosen)
            return relevance

        return run

    return prepared


def patch_lxt(workload: Workload) -> None:
    """LXT's patches of the classes of a model, in place."""
    patch = importlib.import_module("lxt.efficient").monkey_patch
    shape = workload.shape
    patch(importlib.import_module(f"transformers.models.{shape}.modeling_{shape}"))


def _rule(name: str, *settings: float) -> Callable[[Any], Any]:
    """A composite of one rule for all linear layers."""
    return lambda library: library.Composite(
        [(library.op("linear"), getattr(importlib.import_module("fxlrp.rules"), name)(*settings))]
    )


#: Contenders by name: what prepares a run, and what comes before the model is built.
METHODS: dict[str, tuple[Callable[[nn.Module, Workload], Run], Callable[[Workload], None] | None]] = {
    "forward": (forward, None),
    "gradient x input": (gradient_times_input, None),
    "fxlrp": (fxlrp("attnlrp", "eager"), None),
    "fxlrp inductor": (fxlrp("attnlrp", "inductor"), None),
    "fxlrp, least memory": (fxlrp("attnlrp", "eager", least=True), None),
    "fxlrp gradient": (fxlrp("gradient", "eager"), None),
    "fxlrp epsilon": (fxlrp(_rule("Epsilon", 1e-6), "eager"), None),
    "fxlrp gamma": (fxlrp(_rule("Gamma", 0.25), "eager"), None),
    "LXT": (functools.partial(gradient_times_input, frozen=False), patch_lxt),
    "LXT, frozen": (gradient_times_input, patch_lxt),
    "Captum InputXGradient": (captum_gradient, None),
    "Captum IntegratedGradients(20)": (captum_integrated, None),
    "zennit epsilon": (zennit("Epsilon", epsilon=1e-6), None),
    "zennit gamma": (zennit("Gamma", gamma=0.25), None),
}
