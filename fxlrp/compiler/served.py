"""Which rules on which ops a kernel serves, and how: the table that :mod:`fxlrp.compiler.fused` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels import attention, gate, linear_epsilon, linear_split, norm, softmax
from ..rules import Rule
from ..rules.activation import Identity, op_name
from ..rules.attention import AttentionRule, FrozenAttention, GradientAttention
from ..rules.base import Call, Cotangent, Linearization
from ..rules.linear import Epsilon, deviation
from ..rules.norm import NormRule
from ..rules.softmax import SoftmaxTaylor
from ..rules.split import AlphaBeta, Gamma, ZPlus


@dataclass(frozen=True)
class Served:
    """One row: a kernel, and what it takes.

    Attributes:
        kernel: its name.
        rules: classes of rules, these and no others that derive from them.
        ops: names of ops.
        applies: whether a rule with such parameters has anything that the kernel does better.
        refusal: why the kernel cannot run on a call of fake tensors; empty where it can.
        linearize: the rule by the kernel; its pullback takes one coefficient, or K of them.
        limit: of a call's sizes, up to which the kernel is launched, for notes; nothing where there is none.
        case: by what name a rule's case is measured, where a kernel has several; its own name otherwise.
    """

    kernel: str
    rules: tuple[type[Rule], ...]
    ops: frozenset[str]
    applies: Callable[[Any], bool]
    refusal: Callable[[Any, Call], str]
    linearize: Callable[[Any, Call], Linearization]
    limit: str = ""
    case: Callable[[Any], str] | None = None

    def measured_as(self, rule: Rule) -> str:
        """What :mod:`fxlrp.kernels.measured` calls the kernel under a rule."""
        return self.kernel if self.case is None else self.case(rule)

    def takes(self, rule: Rule, op: Any) -> bool:
        """Whether this row is for a rule on an op."""
        return type(rule) in self.rules and op_name(op) in self.ops and self.applies(rule)


def _named(call: Call, names: Sequence[str]) -> dict[str, Any]:
    """A call's arguments by name; None where one is left out."""
    return {**dict.fromkeys(names), **dict(zip(names, call.args, strict=False)), **call.kwargs}


def _always(rule: Rule) -> bool:
    return True


# -- linear --------------------------------------------------------------------------------------------------


def _linear_refusal(call: Call) -> str:
    if call.active != (0,):
        return "the weight carries relevance"
    return "" if call.args[1].dim() == 2 else "the weight is no matrix"


def _is_tf32() -> bool:
    """Whether PyTorch may round float32 products to TensorFloat-32, as the user set it."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _epsilon_refusal(rule: Epsilon, call: Call) -> str:
    weight, z = call.args[1], call.run()
    return _linear_refusal(call) or linear_epsilon.can_run(z, z, weight, rule.epsilon, tf32=_is_tf32())[1]


def _epsilon(rule: Epsilon, call: Call) -> Linearization:
    weight, z = call.args[1], call.run()
    rows = rule.epsilon * deviation(call, z) if rule.relative else None
    epsilon, tf32 = 0.0 if rule.relative else rule.epsilon, _is_tf32()

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        found = torch.ops.fxlrp.linear_epsilon_relevance(cotangent, z, weight, epsilon, rows, None, tf32)
        return (found,)

    return Linearization(z, pullback)


def _strengths(rule: Gamma | AlphaBeta) -> tuple[str, list[float]]:
    return ("gamma", [rule.gamma]) if isinstance(rule, Gamma) else ("alpha_beta", [rule.alpha, rule.beta])


def _split_refusal(rule: Gamma | AlphaBeta, call: Call) -> str:
    x, weight = call.args[:2]
    bias = call.args[2] if len(call.args) > 2 else None
    return _linear_refusal(call) or linear_split.can_run(x, weight, bias, tf32=_is_tf32())[1]


def _split(rule: Gamma | AlphaBeta, call: Call) -> Linearization:
    x, weight = call.args[:2]
    bias = call.args[2] if len(call.args) > 2 else None
    name, strengths = _strengths(rule)
    settings = (name, strengths, rule.epsilon)
    tf32 = _is_tf32()
    z, absolute = torch.ops.fxlrp.linear_split(x, weight, bias, *settings, tf32)

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        found = torch.ops.fxlrp.linear_split_relevance(
            cotangent, z, absolute, x, weight, *settings, False, tf32
        )
        return (found,)

    return Linearization(z, pullback)


# -- rows ----------------------------------------------------------------------------------------------------


def _softmax_refusal(rule: SoftmaxTaylor, call: Call) -> str:
    scores, dim = call.args[:2]
    if dim not in (-1, scores.dim() - 1):
        return f"the softmax runs over dimension {dim}, not over the last one"
    return softmax.can_run(scores)[1]


def _softmax(rule: SoftmaxTaylor, call: Call) -> Linearization:
    (scores,), output = call.operands(), call.run()

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        return (torch.ops.fxlrp.softmax_relevance(cotangent, output).to(scores.dtype),)

    return Linearization(output, pullback)


_LAYER_NORM = ("x", "shape", "weight", "bias", "eps")
_RMS_NORM = ("x", "shape", "weight", "eps")


def norm_arguments(call: Call) -> tuple[dict[str, Any], bool]:
    """Of a LayerNorm or RMSNorm: its arguments by name, and whether it takes the mean away."""
    centred = op_name(call.op) == "layer_norm"
    given = _named(call, _LAYER_NORM if centred else _RMS_NORM)
    if given["eps"] is None:
        # PyTorch takes that of the dtype in which it computes.
        wide = torch.promote_types(given["x"].dtype, torch.float32)
        given["eps"] = 1e-5 if centred else torch.finfo(wide).eps
    return given, centred


def norm_refusal(rule: NormRule, call: Call) -> str:
    """Why the kernel cannot run on a norm; empty where it can."""
    given, _ = norm_arguments(call)
    if len(given["shape"]) != 1:
        return f"the norm runs over {len(given['shape'])} dimensions, not over the last one"
    return norm.can_run(given["x"], given["weight"], given.get("bias"))[1]


def _norm(rule: NormRule, call: Call) -> Linearization:
    given, centred = norm_arguments(call)
    weight = given["weight"]
    y, rstd = torch.ops.fxlrp.norm(given["x"], weight, given.get("bias"), given["eps"], 0.0, centred)

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        found = torch.ops.fxlrp.norm_relevance(cotangent, rstd, weight, None, 1.0, 0.0, centred)
        return (found,)

    return Linearization(y, pullback)


# -- activations and gates -----------------------------------------------------------------------------------


def activation_name(op: Any, args: Sequence[Any], kwargs: Any) -> str:
    """What the kernel calls an activation; the op's own name where it has none."""
    name = op_name(op)
    form = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
    return "gelu_tanh" if name == "gelu" and form == "tanh" else name


def _activation_refusal(rule: Identity, call: Call) -> str:
    return gate.can_run(activation_name(call.op, call.args, call.kwargs), call.args[0])[1]


def _activation(rule: Identity, call: Call) -> Linearization:
    (x,), output = call.operands(), call.run()
    name = activation_name(call.op, call.args, call.kwargs)

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        return (torch.ops.fxlrp.activation_relevance(cotangent, x, name),)

    return Linearization(output, pullback)


# -- attention -----------------------------------------------------------------------------------------------

_ATTENTION = ("query", "key", "value", "mask", "is_causal", "scale", "enable_gqa")


def _attention_refusal(rule: Rule, call: Call) -> str:
    given = _named(call, _ATTENTION)
    temperature = rule.temperature if isinstance(rule, AttentionRule) else 1.0
    q, k, v, mask = (given[name] for name in _ATTENTION[:4])
    if not given["enable_gqa"] and q.dim() == k.dim() == 4 and q.shape[1] != k.shape[1]:
        return "keys are spread over the heads of queries without being grouped"
    return attention.can_run(q, k, v, mask, temperature=temperature)[1]


def _attention(rule: Rule, call: Call) -> Linearization:
    given = _named(call, _ATTENTION)
    q, k, v, mask = (given[name] for name in _ATTENTION[:4])
    causal, scale = bool(given["is_causal"]), given["scale"]
    out, lse = torch.ops.fxlrp.attention_forward(q, k, v, mask, None, causal, 0, None, scale)
    if isinstance(rule, FrozenAttention):

        def frozen(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            found = torch.ops.fxlrp.attention_frozen_relevance(
                q, k, lse, cotangent, mask, causal, 0, None, scale
            )
            return tuple(found if i == _VALUE else None for i in call.active)

        return Linearization(out, frozen if _VALUE in call.active else _nothing(call))
    shares, stabilisers = (1.0,) * len(call.active), (0.0, 0.0)
    if isinstance(rule, AttentionRule):
        shares, stabilisers = rule.shares(call), (rule.epsilon, rule.score_epsilon)
    by_operand = dict(zip(call.active, shares, strict=True))
    every = [by_operand.get(i, 0.0) for i in range(3)]

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        found = torch.ops.fxlrp.attention_relevance(
            q,
            k,
            v,
            out,
            lse,
            cotangent,
            every,
            mask,
            causal,
            0,
            None,
            scale,
            None,
            False,
            *stabilisers,
        )
        return tuple(found[i] for i in call.active)

    return Linearization(out, pullback)


def _attention_case(rule: Rule) -> str:
    """Without stabilisers the kernel replaces PyTorch's own backward; with them, or frozen, more."""
    if isinstance(rule, FrozenAttention):
        return "attention_frozen"
    is_stabilised = isinstance(rule, AttentionRule) and bool(rule.epsilon or rule.score_epsilon)
    return "attention_epsilon" if is_stabilised else "attention"


def _nothing(call: Call) -> Callable[[Cotangent], tuple[Tensor | None, ...]]:
    return lambda cotangent: (None,) * len(call.active)


_VALUE = 2

SERVED: Final[tuple[Served, ...]] = (
    Served(
        "linear_epsilon",
        (Epsilon,),
        frozenset({"linear"}),
        lambda rule: rule.epsilon > 0,
        _epsilon_refusal,
        _epsilon,
        f"up to {linear_epsilon.MOST_ROWS} rows",
    ),
    Served(
        "linear_split",
        (Gamma, AlphaBeta, ZPlus),
        frozenset({"linear"}),
        lambda rule: not isinstance(rule, Gamma) or rule.gamma > 0,
        _split_refusal,
        _split,
        f"up to {linear_split.MOST_ROWS[2]} rows, {linear_split.MOST_ROWS[4]} in TensorFloat-32",
    ),
    Served(
        "softmax",
        (SoftmaxTaylor,),
        frozenset({"softmax", "safe_softmax"}),
        lambda rule: rule.temperature == 1,
        _softmax_refusal,
        _softmax,
    ),
    Served("norm", (NormRule,), frozenset({"layer_norm", "rms_norm"}), _always, norm_refusal, _norm),
    Served(
        "gate",
        (Identity,),
        frozenset({"relu", "silu", "gelu", "mish", "hardswish", "softsign"}),
        _always,
        _activation_refusal,
        _activation,
    ),
    Served(
        "attention",
        (AttentionRule, FrozenAttention, GradientAttention),
        frozenset({"attention"}),
        _always,
        _attention_refusal,
        _attention,
        case=_attention_case,
    ),
)
