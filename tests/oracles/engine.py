r"""A small interpreter that explains a list of steps with the relevance-domain rules of :mod:`.rules`.

A graph is a list of :class:`Step`. Values are numbered: 0 .. n-1 are the inputs, every step appends one more.
The forward pass computes them in float64, the backward pass walks the steps in reverse, hands every output's
relevance to the rule of its operation, and *adds relevance up* where a value is used more than once.

The explained scalar is :math:`F = \sum_k G_k y_k` over the last value y, with a seed G (ones by default, a
one-hot explains one entry), so relevance starts as y * G. Inputs + absorbed = F.

=================  ===================================================  ======================================
op                 constants                                            rule
=================  ===================================================  ======================================
linear             W, b (optional)                                      epsilon (``eps_linear``)
conv1d, conv2d     W, b, stride, padding, dilation, groups (optional)   epsilon (``eps_linear``)
add                                                                     epsilon (``eps_add``), may broadcast
add_constant       c                                                    the same; the constant absorbs
mul                active (optional)                                    uniform (n-ary), or gradient
div                                                                     all to the numerator
matmul             active (optional)                                    epsilon (``eps_matmul``) and uniform
softmax            dim, mask (optional, boolean)                        Taylor, or frozen
attention          scale, mask, bias (optional)                         composition (``eps_attention``)
layer_norm         weight, bias, norm_eps                               LN-rule, or gradient
rms_norm           weight, norm_eps                                     LN-rule, or gradient
gelu, gelu_tanh,
silu, relu, tanh                                                        identity, or gradient
max, topk          dim; k                                               winner takes all
view               shape                                                moves with its element
transpose          dim0, dim1                                           moves with its element
slice              dim, start, stop, step                               moves with its element
cat                dim                                                  moves with its element
scale              c (number, or tensor that broadcasts to the value)   moves with its element
sum                dim, keepdim                                         share of the sum
=================  ===================================================  ======================================

``active`` (one bool an operand) freezes factors by hand: a frozen factor gets nothing, the others share it
all. Inputs can be declared inactive; what depends on none of the active ones is a constant. What a rule
freezes is a constant too, for whoever reads it: behind a frozen softmax, P V is a product with one active
factor, and V gets all.

Products are explained as the steps group them. :func:`merge_products` rewrites nested products into one n-ary
one, which is DESIGN.md's canonical form.

Exact zeros: relevance forms R/x need x != 0. See :mod:`.rules`: 0/0 counts as 0, which is right where all
contributions vanish (ReLU off, masked row) and wrong only if non-zero contributions cancel exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import rules


@dataclass(frozen=True)
class Step:
    """One operation on earlier values."""

    op: str
    operands: tuple[int, ...]
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRules:
    """Which rules the walk uses; the default is AttnLRP with epsilon 0."""

    eps_linear: float = 0.0
    eps_add: float = 0.0
    eps_matmul: float = 0.0
    eps_attention: float = 0.0
    softmax: Literal["taylor", "frozen"] = "taylor"
    activation: Literal["identity", "gradient"] = "identity"
    norm: Literal["ln", "gradient"] = "ln"
    product: Literal["uniform", "gradient"] = "uniform"


@dataclass(frozen=True)
class EngineResult:
    """``relevance`` by input, ``latents`` by value number, ``absorbed`` by step: what was lost to what
    (sums)."""

    value: Tensor
    output: Tensor
    relevance: list[Tensor]
    latents: list[Tensor]
    absorbed: list[dict[str, Tensor]]

    def total_absorbed(self) -> Tensor:
        """The sum of everything that did not reach an input."""
        parts = [amount for step in self.absorbed for amount in step.values()]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------
# forward


def _conv_options(c: dict[str, Any]) -> dict[str, Any]:
    return {name: c[name] for name in ("stride", "padding", "dilation", "groups") if name in c}


def _index(x: Tensor, c: dict[str, Any]) -> tuple[slice, ...]:
    before: int = c["dim"] % x.dim()
    return (slice(None),) * before + (slice(c["start"], c["stop"], c.get("step")),)


def _activation(op: str, x: Tensor) -> Tensor:
    if op == "gelu":
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if op == "gelu_tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if op == "silu":
        return x * torch.sigmoid(x)
    return torch.relu(x) if op == "relu" else torch.tanh(x)


ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "tanh")


def _layer_norm(x: Tensor, c: dict[str, Any]) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + c.get("norm_eps", 1e-5))
    y = y if c.get("weight") is None else y * c["weight"]
    return y if c.get("bias") is None else y + c["bias"]


def _rms_norm(x: Tensor, c: dict[str, Any]) -> Tensor:
    y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + c.get("norm_eps", 1e-6))
    return y if c.get("weight") is None else y * c["weight"]


def _logits(x: Tensor, c: dict[str, Any]) -> Tensor:
    return x if c.get("mask") is None else x.masked_fill(~c["mask"], -math.inf)


def apply(step: Step, values: Sequence[Tensor]) -> Tensor:
    """The forward of one step, in plain torch."""
    out: Tensor = _forward(step, [values[i] for i in step.operands])
    return out


def _forward(step: Step, x: list[Tensor]) -> Any:
    c = step.constants
    match step.op:
        case "linear":
            return torch.nn.functional.linear(x[0], c["W"], c.get("b"))
        case "conv1d":
            return torch.nn.functional.conv1d(x[0], c["W"], c.get("b"), **_conv_options(c))
        case "conv2d":
            return torch.nn.functional.conv2d(x[0], c["W"], c.get("b"), **_conv_options(c))
        case "add":
            return x[0] + x[1]
        case "add_constant":
            return x[0] + c["c"]
        case "mul":
            out = x[0]
            for factor in x[1:]:
                out = out * factor
            return out
        case "div":
            return x[0] / x[1]
        case "matmul":
            return x[0] @ x[1]
        case "softmax":
            return torch.softmax(_logits(x[0], c), c.get("dim", -1))
        case "attention":
            mask, groups = c.get("mask"), x[0].shape[1] // x[1].shape[1]
            if c.get("bias") is not None:
                bias = c["bias"]
                mask = bias if mask is None else bias.expand(mask.shape).masked_fill(~mask, -math.inf)
            k, v = (t.repeat_interleave(groups, 1) for t in x[1:])
            return torch.nn.functional.scaled_dot_product_attention(x[0], k, v, mask, scale=c.get("scale"))
        case "layer_norm":
            return torch.nn.functional.layer_norm(
                x[0], x[0].shape[-1:], c.get("weight"), c.get("bias"), c.get("norm_eps", 1e-5)
            )
        case "rms_norm":
            return _rms_norm(x[0], c)
        case "gelu":
            return torch.nn.functional.gelu(x[0])
        case "gelu_tanh":
            return torch.nn.functional.gelu(x[0], approximate="tanh")
        case "silu":
            return torch.nn.functional.silu(x[0])
        case "relu":
            return torch.relu(x[0])
        case "tanh":
            return torch.tanh(x[0])
        case "max":
            return x[0].amax(c["dim"])
        case "topk":
            return x[0].topk(c["k"], c["dim"]).values
        case "view":
            return x[0].reshape(c["shape"])
        case "transpose":
            return x[0].transpose(c["dim0"], c["dim1"])
        case "slice":
            return x[0][_index(x[0], c)]
        case "cat":
            return torch.cat(x, c["dim"])
        case "scale":
            return x[0] * c["c"]
        case "sum":
            return x[0].sum(c["dim"], keepdim=c.get("keepdim", False))
    raise ValueError(f"unknown op {step.op!r}")


def run(inputs: Sequence[Tensor], steps: Sequence[Step]) -> list[Tensor]:
    """Forward: all values, inputs first."""
    values = list(inputs)
    for step in steps:
        values.append(apply(step, values))
    return values


class StepModule(nn.Module):
    """The same steps as an ``nn.Module`` in plain torch, for a library under test. Constants become
    buffers."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = list(steps)
        for n, step in enumerate(steps):
            for name, constant in step.constants.items():
                if isinstance(constant, Tensor):
                    self.register_buffer(f"step{n}_{name}", constant)

    def forward(self, *inputs: Tensor) -> Tensor:
        values = list(inputs)
        for n, step in enumerate(self.steps):
            constants = {
                name: getattr(self, f"step{n}_{name}") if isinstance(constant, Tensor) else constant
                for name, constant in step.constants.items()
            }
            values.append(apply(replace(step, constants=constants), values))
        return values[-1]


# ----------------------------------------------------------------------------------------------------
# backward


def explain(
    inputs: Sequence[Tensor],
    steps: Sequence[Step],
    seed: Tensor | None = None,
    engine_rules: EngineRules | None = None,
    active_inputs: Sequence[bool] | None = None,
) -> EngineResult:
    """Relevance of the inputs for F = sum(seed * last value)."""
    how = EngineRules() if engine_rules is None else engine_rules
    values = run(inputs, steps)
    active = [True] * len(inputs) if active_inputs is None else list(active_inputs)
    for step in steps:
        active.append(_carries_on(step, [active[i] for i in step.operands], how))
    output = values[-1]
    start = output * (torch.ones_like(output) if seed is None else seed)
    latents = [torch.zeros_like(value) for value in values]
    latents[-1] = start.clone()
    absorbed: list[dict[str, Tensor]] = []
    for n, step in reversed(list(enumerate(steps, start=len(inputs)))):
        if not active[n]:
            absorbed.append({})  # what arrived here was booked where it left
            continue
        operands = [values[i] for i in step.operands]
        flags = [active[i] for i in step.operands]
        shares, lost = _backward(step, operands, flags, values[n], latents[n], how)
        for i, flag, R in zip(step.operands, flags, shares, strict=True):
            if flag:
                latents[i] = latents[i] + R
            elif bool((R != 0).any()):
                lost = lost | {"constant": lost.get("constant", R.new_zeros(())) + R.sum()}
        absorbed.append(lost)
    absorbed.reverse()
    if not active[-1]:  # the explained value is a constant
        absorbed[-1] = {"constant": start.sum()}
    return EngineResult(start.sum(), output, latents[: len(inputs)], latents, absorbed)


def _carries_on(step: Step, flags: list[bool], how: EngineRules) -> bool:
    """Whether a step's output carries relevance: some operand does, and the rule freezes none of the ways to
    it."""
    match step.op:
        case "softmax":
            return flags[0] and how.softmax != "frozen"
        case "attention":
            return flags[2] or (how.softmax != "frozen" and (flags[0] or flags[1]))
        case "mul" | "matmul":
            return any(_factors(step, flags))
        case "div":
            return flags[0]
    return any(flags)


def _factors(step: Step, flags: Sequence[bool]) -> list[bool]:
    """Which factors of a product carry relevance: those that are active and not frozen by hand."""
    declared = step.constants.get("active", (True,) * len(flags))
    return [a and b for a, b in zip(flags, declared, strict=True)]


def _backward(
    step: Step, x: list[Tensor], flags: list[bool], z: Tensor, R: Tensor, how: EngineRules
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Relevance of every operand, and what was absorbed."""
    c, op = step.constants, step.op
    match op:
        case "linear" | "conv1d" | "conv2d":
            if op == "linear":
                found = rules.epsilon_linear(x[0], c["W"], c.get("b"), R, how.eps_linear)
            else:
                rule = rules.epsilon_conv1d if op == "conv1d" else rules.epsilon_conv2d
                found = rule(x[0], c["W"], c.get("b"), R, how.eps_linear, **_conv_options(c))
            return [found.R_x], {"bias": found.R_bias.sum(), "eps": found.R_eps.sum()}
        case "add":
            R_a, R_b, R_eps = rules.epsilon_add(x[0], x[1], R, how.eps_add)
            return [R_a, R_b], {"eps": R_eps.sum()}
        case "add_constant":
            R_a, R_b, R_eps = rules.epsilon_add(x[0], c["c"], R, how.eps_add)
            return [R_a], {"constant": R_b.sum(), "eps": R_eps.sum()}
        case "mul":
            carries = _factors(step, flags)
            if how.product == "gradient":
                full = [
                    rules.sum_to(R, t.shape) if a else torch.zeros_like(t)
                    for t, a in zip(x, carries, strict=True)
                ]
                return full, {"product": R.sum() * (1 - sum(carries))}
            found_shares = iter(rules.uniform_product([t for t, a in zip(x, carries, strict=True) if a], R))
            return [
                next(found_shares) if a else torch.zeros_like(t) for t, a in zip(x, carries, strict=True)
            ], {}
        case "div":
            return list(rules.divide_all_to_numerator(x[0], x[1], R)), {}
        case "matmul":
            carries = _factors(step, flags)
            R_A, R_B, R_eps = rules.matmul_uniform(x[0], x[1], R, how.eps_matmul, (carries[0], carries[1]))
            return [R_A, R_B], {"eps": R_eps.sum()}
        case "softmax":
            R_x, R_bias = rules.softmax_taylor(_logits(x[0], c), R, c.get("dim", -1))
            return [R_x], {"softmax": R_bias.sum()}
        case "attention":
            probs: rules.Probs = "frozen" if how.softmax == "frozen" else "attnlrp"
            R_q, R_k, R_v, lost = rules.attention(
                x[0], x[1], x[2], R, c.get("scale"), c.get("mask"), c.get("bias"), how.eps_attention, probs,
                (flags[0], flags[1], flags[2]),
            )  # fmt: skip
            return [R_q, R_k, R_v], {name: amount.sum() for name, amount in lost.items()}
        case "layer_norm" | "rms_norm" if how.norm == "gradient":
            (R_x,) = rules.gradient_times_input(
                lambda t: _layer_norm(t, c) if op == "layer_norm" else _rms_norm(t, c), x, R
            )
            return [R_x], {"taylor": R.sum() - R_x.sum()}
        case "layer_norm":
            R_x, R_bias = rules.layer_norm(x[0], c.get("weight"), c.get("bias"), R, c.get("norm_eps", 1e-5))
            return [R_x], {"bias": R_bias.sum()}
        case "rms_norm":
            return [rules.rms_norm(x[0], c.get("weight"), R, c.get("norm_eps", 1e-6))], {}
        case _ if op in ACTIVATIONS:
            if how.activation == "identity":
                return [rules.identity(R)], {}
            (R_x,) = rules.gradient_times_input(lambda t: _activation(op, t), x, R)
            return [R_x], {"taylor": R.sum() - R_x.sum()}
        case "max":
            return [rules.winner_takes_all_max(x[0], R, c["dim"])], {}
        case "topk":
            return [rules.winner_takes_all_topk(x[0], R, c["k"], c["dim"])], {}
        case "view":
            return [R.reshape(x[0].shape)], {}
        case "transpose":
            return [R.transpose(c["dim0"], c["dim1"])], {}
        case "slice":
            R_x = torch.zeros_like(x[0])
            R_x[_index(x[0], c)] = R
            return [R_x], {}
        case "cat":
            return list(R.split([t.shape[c["dim"]] for t in x], c["dim"])), {}
        case "scale":
            return [R.clone()], {}
        case "sum":
            keep = c.get("keepdim", False)
            part = rules.share(R, z)
            return [x[0] * (part if keep else part.unsqueeze(c["dim"]))], {}
    raise ValueError(f"unknown op {op!r}")


# ----------------------------------------------------------------------------------------------------
# canonical products and random graphs


def merge_products(steps: Sequence[Step], inputs: int) -> list[Step]:
    """Nested products as one n-ary product: a factor that is itself a ``mul`` step is replaced by its
    factors.

    The inner product stays for whoever else reads it (unread, it gets no relevance). Products that declare
    ``active`` are left alone.
    """
    merged: list[Step] = []
    for step in steps:
        if step.op == "mul" and "active" not in step.constants:
            operands: list[int] = []
            for i in step.operands:
                inner = merged[i - inputs] if i >= inputs else None
                plain = inner is not None and inner.op == "mul" and "active" not in inner.constants
                operands += inner.operands if plain and inner is not None else (i,)
            step = Step("mul", tuple(operands), step.constants)
        merged.append(step)
    return merged


def random_graph(
    seed: int, size: int = 8, batch: int = 2, length: int = 3, width: int = 4, classes: int = 3
) -> tuple[list[Tensor], list[Step]]:
    """A random graph: two inputs [batch, length, width], about ``size`` steps, and a head that gives [batch,
    classes].

    Every op of the table but convolutions, div, max and topk can occur; values are used more than once;
    products are never nested directly, so grouping is no question. Every few steps a norm keeps magnitudes of
    order 1.
    """
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [randn(batch, length, width), randn(batch, length, width)]
    shapes: list[tuple[int, ...]] = [tuple(t.shape) for t in inputs]
    steps: list[Step] = []
    full = (batch, length, width)

    def emit(op: str, operands: tuple[int, ...], size_: tuple[int, ...], /, **constants: Any) -> int:
        steps.append(Step(op, operands, constants))
        shapes.append(size_)
        return len(shapes) - 1

    def pick(no_product: bool = False) -> int:
        recent = [i for i, shape in enumerate(shapes) if shape == full][-5:]
        if no_product:
            recent = [i for i in recent if i < 2 or steps[i - 2].op != "mul"]
        return choose.choice(recent or [0])

    def linear(i: int, width_out: int = width) -> int:
        bias = randn(width_out) if choose.random() < 0.7 else None
        return emit("linear", (i,), (*shapes[i][:-1], width_out), W=randn(width_out, shapes[i][-1]), b=bias)

    def transpose(i: int, a: int, b: int) -> int:
        shape = list(shapes[i])
        shape[a], shape[b] = shape[b], shape[a]
        return emit("transpose", (i,), tuple(shape), dim0=a, dim1=b)

    def norm(i: int) -> int:
        if choose.random() < 0.5:
            return emit("layer_norm", (i,), full, weight=randn(width), bias=randn(width), norm_eps=1e-5)
        return emit("rms_norm", (i,), full, weight=randn(width), norm_eps=1e-6)

    kinds = [
        "linear",
        "add",
        "add_constant",
        "mul",
        "activation",
        "norm",
        "attention",
        "self_attention",
        "cut",
        "scale",
    ]
    for n in range(size):
        kind = choose.choice(kinds)
        if kind == "linear":
            linear(pick())
        elif kind == "add":
            emit("add", (pick(), pick()), full)
        elif kind == "add_constant":
            emit("add_constant", (pick(),), full, c=randn(length, width))
        elif kind == "mul":
            emit("mul", tuple(pick(no_product=True) for _ in range(choose.choice([2, 2, 3]))), full)
        elif kind == "activation":
            emit(choose.choice(ACTIVATIONS), (linear(pick()),), full)
        elif kind == "norm":
            norm(pick())
        elif kind == "attention":  # by hand: matmul, scale, softmax, matmul
            scores = emit(
                "matmul", (linear(pick()), transpose(linear(pick()), 1, 2)), (batch, length, length)
            )
            scaled = emit("scale", (scores,), (batch, length, length), c=width**-0.5)
            mask = torch.ones(length, length, dtype=torch.bool).tril() if choose.random() < 0.5 else None
            probs = emit("softmax", (scaled,), (batch, length, length), dim=-1, mask=mask)
            emit("matmul", (probs, linear(pick())), full)
        elif kind == "self_attention":  # two heads, fused
            split = (batch, length, 2, width // 2)
            q, k, v = (transpose(emit("view", (linear(pick()),), split, shape=split), 1, 2) for _ in range(3))
            mask = torch.ones(length, length, dtype=torch.bool).tril() if choose.random() < 0.5 else None
            out = emit("attention", (q, k, v), (batch, 2, length, width // 2), mask=mask)
            emit("view", (transpose(out, 1, 2),), full, shape=full)
        elif kind == "cut":
            i, at = pick(), choose.randrange(1, width)
            left = emit("slice", (i,), (batch, length, at), dim=2, start=0, stop=at)
            right = emit("slice", (pick(),), (batch, length, width - at), dim=2, start=at, stop=width)
            emit("cat", (right, left), full, dim=2)
        else:
            emit("scale", (pick(),), full, c=choose.choice([-1.5, 0.5, 2.0]))
        if n % 3 == 2:
            norm(len(shapes) - 1)
    last = emit("add", (len(shapes) - 1, pick()), full)
    row = emit("slice", (last,), (batch, 1, width), dim=1, start=length - 1, stop=length)
    linear(emit("view", (row,), (batch, width), shape=(batch, width)), classes)
    return inputs, steps
