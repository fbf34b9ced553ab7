"""Random graphs: fxlrp against the oracle engine, against autograd, and against its own ledger."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import engine
from oracles.engine import ACTIVATIONS, EngineRules, Step, StepModule
from torch import Tensor

import fxlrp
from fxlrp.rules import Epsilon, Freeze, FrozenAttention, Structural, Uniform

SIZE, INPUTS, CLASSES = 8, 2, 3
MOVES = ("view", "transpose", "slice", "scale")
POINTWISE = (*ACTIVATIONS, "scale", "add_constant", "add", "mul")


def below(steps: Sequence[Step], value: int, through: Sequence[str]) -> set[int]:
    """The values that this one is made of, as far as ops of these names lead."""
    found, stack = {value}, [value]
    while stack:
        i = stack.pop()
        if i >= INPUTS and steps[i - INPUTS].op in through:
            stack += [j for j in steps[i - INPUTS].operands if j not in found]
            found |= set(stack)
    return found


def plain(seed: int) -> bool:
    """Whether the steps are their own canonical form.

    fxlrp counts the factors of nested products through what only moves or scales them, and takes ``x g(x)``
    for an activation; the engine explains products as the steps group them.
    """
    _, steps = engine.random_graph(seed, SIZE)
    for step in (s for s in steps if s.op == "mul"):
        for i in step.operands:
            if any(j >= INPUTS and steps[j - INPUTS].op in ("mul", "matmul") for j in below(steps, i, MOVES)):
                return False
            others = below(steps, i, POINTWISE) - {i}
            if any(others & below(steps, j, ("scale",)) for j in step.operands if j != i):
                return False
    return True


seeds = st.integers(0, 9999).filter(plain)


def explain(
    seed: int, composite: str | fxlrp.Composite, target: int
) -> tuple[fxlrp.Explanation, list[Tensor]]:
    """fxlrp's relevance of both inputs; 0 for one that the output does not depend on."""
    inputs, steps = engine.random_graph(seed, SIZE)
    found = fxlrp.lrp_compile(StepModule(steps), composite=composite)(*inputs, target=target)
    if isinstance(found.relevance, Tensor):
        names = list(found.ledger.inputs)
        by_name = {names[0]: found.relevance}
    else:
        by_name = dict(found.relevance)
    order = {name.replace(".", "_"): R for name, R in by_name.items()}
    return found, [order.get(f"args_{i}", torch.zeros_like(x)) for i, x in enumerate(inputs)]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry of all."""
    scale = max(float(R.abs().max()) for R in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / max(scale, 1e-12)


EPSILON = fxlrp.Composite(
    (
        (fxlrp.op("linear"), Epsilon(1e-2)),
        (fxlrp.op("add"), Structural(1e-3)),
        (fxlrp.op("matmul"), Uniform(1e-1)),
    )
)
FROZEN = fxlrp.Composite(
    (
        (fxlrp.op("attention"), FrozenAttention()),
        (fxlrp.op("attention_weights"), Freeze()),
        (fxlrp.op("softmax"), Freeze()),
    )
)
CASES: dict[str, tuple[str | fxlrp.Composite, EngineRules]] = {
    "attnlrp": ("attnlrp", EngineRules()),
    "epsilon": (EPSILON, EngineRules(eps_linear=1e-2, eps_add=1e-3, eps_matmul=1e-1)),
    "frozen": (FROZEN, EngineRules(softmax="frozen")),
}


@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(seed=seeds, target=st.integers(0, CLASSES - 1))
def test_relevance_is_the_oracles(name: str, seed: int, target: int) -> None:
    """Breaks if a rule, a share, the activity, the transposition or a sum over a value's uses is wrong.

    The ledger's part breaks if something is lost unbooked, or the emitted graph is not what the ledger walks.
    """
    composite, how = CASES[name]
    found, relevance = explain(seed, composite, target)
    inputs, steps = engine.random_graph(seed, SIZE)
    one_hot = torch.zeros(2, CLASSES, dtype=torch.float64)
    one_hot[:, target] = 1
    expected = engine.explain(inputs, steps, one_hot, how)
    assert float((found.value - expected.output[:, target]).abs().max()) <= 1e-10
    assert error(relevance, expected.relevance) <= 1e-8

    ledger = found.ledger
    scale = max(float(R.abs().sum()) for R in expected.latents)
    assert float(ledger.gap.abs().max()) <= 1e-9 * scale
    lost = float(expected.total_absorbed())
    assert abs(float(ledger.absorbed.sum()) - lost) <= 1e-8 * scale


@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 9999), target=st.integers(0, CLASSES - 1))
def test_gradient_times_input(seed: int, target: int) -> None:
    """Breaks if the composite without rules still has one, or the transposition is no derivative."""
    found, relevance = explain(seed, "gradient", target)
    inputs, steps = engine.random_graph(seed, SIZE)
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = StepModule(steps)(*leaves)[:, target]
    gradients = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    value = value.detach()
    assert error(relevance, [x.detach() * g for x, g in zip(leaves, gradients, strict=True)]) <= 1e-9
    assert float((found.value - value).abs().max()) <= 1e-10
    scale = max(float(R.abs().sum()) for R in relevance) + float(found.value.abs().max())
    assert float(found.ledger.gap.abs().max()) <= 1e-9 * scale
