"""Gated activations ``f(a) * b``, plain ones, and their relevance: both coefficients in one pass.

Predicted on an H200, unmeasured: all are bound by memory. The gate moves 3 tensors (a, b in, product out),
its relevance 5 (G, a, b in, both coefficients out), for K coefficients 2 + 3K; an activation 2, its
relevance 3, for K coefficients 1 + 2K. Values are read once for all K. At 4.3 TB/s of copy bandwidth, the
relevance of 64 Mi elements in bfloat16 (671 MB) takes 156 us, at the 85 % aimed at 184 us. Work is an
exponential and a division an element (for GELU an erf, about 25 operations), below half of what the time of
the traffic allows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import runs_triton, unavailable
from ..rows import fits
from . import reference
from .reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "activation",
    "activation_relevance",
    "can_run",
    "gate",
    "gate_relevance",
    "packed_gate",
    "packed_gate_relevance",
]


@torch.library.triton_op("fxlrp::activation", mutates_args={})
def activation(x: Tensor, activation: str) -> Tensor:
    """``f(x)``, computed in float32 (float64 for float64).

    Its derivative is the identity rule's, ``G f(x)/x`` (:func:`activation_relevance`).

    Args:
        x: of any shape.
        activation: f, a name in ``ACTIVATIONS``: relu, silu, gelu (erf), gelu_tanh, quick_gelu
            (``x sigmoid(1.702 x)``), mish, hardswish, softsign.

    Returns:
        f(x) in the shape and dtype of x, contiguous.

    Raises:
        KeyError: no such activation.

    Source: AttnLRP, eq. 9, for the derivative.
    """
    if runs_triton(x) and can_run(activation, x)[0]:
        from . import kernel

        return kernel.run_activation(x, activation)
    return reference.activation(x, activation)


def _fake_activation(x: Tensor, activation: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.triton_op("fxlrp::activation_relevance", mutates_args={})
def activation_relevance(coefficient: Tensor, x: Tensor, activation: str) -> Tensor:
    """``G f(x)/x``, the ratio in closed form: SiLU gives ``sigmoid(x)``, GELU ``Phi(x)``, ReLU its step.

    Args:
        coefficient: G, in the shape of x or ``[K, *shape]``.
        x: of any shape.
        activation: f, as in :func:`activation`.

    Returns:
        The coefficient of x in G's shape and dtype, contiguous.

    Source: AttnLRP, eq. 9.
    """
    if (
        runs_triton(coefficient, x)
        and can_run(activation, x, coefficient)[0]
        and fits(coefficient.shape, x.shape)
    ):
        from . import kernel

        return kernel.run_activation_relevance(coefficient, x, activation)
    return reference.activation_relevance(coefficient, x, activation)


def _fake_activation_relevance(coefficient: Tensor, x: Tensor, activation: str) -> Tensor:
    return _like(coefficient)


@torch.library.triton_op("fxlrp::gate", mutates_args={})
def gate(a: Tensor, b: Tensor, activation: str) -> Tensor:
    """``f(a) * b``, computed in float32: SwiGLU, GeGLU, ReGLU by the activation's name.

    With G in place of b it is the relevance of a gate whose f(a) is frozen (CP-LRP), ``f(a) G``; so b may
    have a leading size K that a has not. The derivative gives both coefficients by the uniform rule, 1/2
    each (:func:`gate_relevance`).

    Args:
        a: ``[..., columns]``; halves of a packed tensor are read in place.
        b: in the shape of a or ``[K, *shape]``.
        activation: f, as in :func:`activation`.

    Returns:
        The product in the shape and dtype of b, contiguous.

    Source: Shazeer 2020; AttnLRP, Prop. 3.2 and eq. 9, for the derivative.
    """
    if runs_triton(a, b) and can_run(activation, a, b)[0] and fits(b.shape, a.shape):
        from . import kernel

        return kernel.run_gate(a, b, activation)
    return reference.gate(a, b, activation)


def _fake_gate(a: Tensor, b: Tensor, activation: str) -> Tensor:
    return _like(b)


@torch.library.triton_op("fxlrp::gate_relevance", mutates_args={})
def gate_relevance(
    coefficient: Tensor,
    a: Tensor,
    b: Tensor,
    activation: str,
    share_a: float = 0.5,
    share_b: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """``share_a G b f(a)/a`` and ``share_b G f(a)``: the uniform rule, then the identity rule for f.

    Args:
        coefficient: G of the product, in the shape of a or ``[K, *shape]``.
        a: ``[..., columns]``; halves of a packed tensor are read in place.
        b: in the shape of a.
        activation: f, as in :func:`activation`.
        share_a: of the factor f(a).
        share_b: of the factor b.

    Returns:
        The coefficients of a and of b in G's shape and dtype, contiguous.

    Source: AttnLRP, Prop. 3.2 and eq. 9.
    """
    ok = can_run(activation, coefficient, a, b)[0] and a.dim() == b.dim()
    if runs_triton(coefficient, a, b) and ok and fits(coefficient.shape, a.shape):
        from . import kernel

        return kernel.run_gate_relevance(coefficient, a, b, activation, share_a, share_b)
    return reference.gate_relevance(coefficient, a, b, activation, share_a, share_b)


def _fake_gate_relevance(
    coefficient: Tensor,
    a: Tensor,
    b: Tensor,
    activation: str,
    share_a: float = 0.5,
    share_b: float = 0.5,
) -> tuple[Tensor, Tensor]:
    return _like(coefficient), _like(coefficient)


@torch.library.triton_op("fxlrp::packed_gate", mutates_args={})
def packed_gate(packed: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    """``f(a) * b`` of ``packed = [a, b]``, or ``[b, a]`` unless ``gate_first``, along the last dimension.

    Args:
        packed: ``[..., 2 * columns]``.
        activation: f, as in :func:`activation`.
        gate_first: whether a is the first half.

    Returns:
        ``[..., columns]`` in the dtype of ``packed``, contiguous.
    """
    a, b = reference.halves(packed, gate_first)
    if runs_triton(packed) and can_run(activation, packed)[0]:
        from . import kernel

        return kernel.run_gate(a, b, activation)
    return reference.gate(a, b, activation)


def _fake_packed_gate(packed: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    return _like(reference.halves(packed, gate_first)[0])


@torch.library.triton_op("fxlrp::packed_gate_relevance", mutates_args={})
def packed_gate_relevance(
    coefficient: Tensor,
    packed: Tensor,
    activation: str,
    gate_first: bool = True,
    share_a: float = 0.5,
    share_b: float = 0.5,
) -> Tensor:
    """Both coefficients of :func:`gate_relevance` in the places of a and b in one tensor.

    With ``share_a = 0`` and ``share_b = 1`` the gate is frozen (CP-LRP): b is then not read, and a gets 0.

    Args:
        coefficient: G of the product, ``[..., columns]`` or ``[K, ..., columns]``.
        packed: ``[..., 2 * columns]``.
        activation: f, as in :func:`activation`.
        gate_first: whether a is the first half.
        share_a: of the factor f(a).
        share_b: of the factor b.

    Returns:
        ``[..., 2 * columns]``, or with K before it, in G's dtype, contiguous.
    """
    half, _ = reference.halves(packed, gate_first)
    if runs_triton(coefficient, packed) and can_run(activation, coefficient, half)[0]:
        from . import kernel

        return kernel.run_packed_gate_relevance(coefficient, packed, activation, gate_first, share_a, share_b)
    return reference.packed_gate_relevance(coefficient, packed, activation, gate_first, share_a, share_b)


def _fake_packed_gate_relevance(
    coefficient: Tensor,
    packed: Tensor,
    activation: str,
    gate_first: bool = True,
    share_a: float = 0.5,
    share_b: float = 0.5,
) -> Tensor:
    shape = (*coefficient.shape[:-1], packed.shape[-1])
    return torch.empty(shape, dtype=coefficient.dtype, device=coefficient.device)


def can_run(activation: str, *tensors: Tensor) -> tuple[bool, str]:
    """Whether the kernels run for this activation on these (fake) tensors; why not."""
    reason = unavailable(tensors[0].device, *(t.dtype for t in tensors))
    if not reason and activation not in ACTIVATIONS:
        reason = f"no kernel for the activation '{activation}', only for {', '.join(ACTIVATIONS)}"
    if not reason and not all(fits(t.shape, min(tensors, key=Tensor.dim).shape) for t in tensors):
        reason = f"no kernel for shapes that differ: {', '.join(str(tuple(t.shape)) for t in tensors)}"
    return not reason, reason


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [i for i in inputs if isinstance(i, Tensor)]
    ctx.settings = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _pull_activation(ctx: Any, coefficient: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return activation_relevance(coefficient, x, *ctx.settings), None


def _pull_gate(ctx: Any, coefficient: Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    if b.dim() > a.dim():
        raise NotImplementedError("fxlrp::gate has no derivative where b has a leading size K that a has not")
    of_a, of_b = gate_relevance(coefficient, a, b, *ctx.settings)
    return of_a.to(a.dtype), of_b, None


def _pull_packed_gate(ctx: Any, coefficient: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    return packed_gate_relevance(coefficient, packed, *ctx.settings), None, None


def _transpose_activation(ctx: Any, coefficient: Tensor) -> tuple[Any, ...]:
    _, x = ctx.saved_tensors
    return activation_relevance(coefficient, x, *ctx.settings), None, None


def _transpose_gate(ctx: Any, of_a: Tensor, of_b: Tensor) -> tuple[Any, ...]:
    _, a, b = ctx.saved_tensors
    name, share_a, share_b = ctx.settings
    from_a, _ = gate_relevance(of_a, a, b, name, share_a, 0.0)
    _, from_b = gate_relevance(of_b, a, b, name, 0.0, share_b)
    return from_a + from_b, *(None,) * 5


def _transpose_packed_gate(ctx: Any, coefficient: Tensor) -> tuple[Any, ...]:
    _, packed = ctx.saved_tensors
    name, gate_first, share_a, share_b = ctx.settings
    a, b = reference.halves(packed, gate_first)
    of_a, of_b = reference.halves(coefficient, gate_first)
    from_a, _ = gate_relevance(of_a, a, b, name, share_a, 0.0)
    _, from_b = gate_relevance(of_b, a, b, name, 0.0, share_b)
    return from_a + from_b, *(None,) * 5


activation.register_fake(_fake_activation)
activation_relevance.register_fake(_fake_activation_relevance)
gate.register_fake(_fake_gate)
gate_relevance.register_fake(_fake_gate_relevance)
packed_gate.register_fake(_fake_packed_gate)
packed_gate_relevance.register_fake(_fake_packed_gate_relevance)
activation.register_autograd(_pull_activation, setup_context=_remember)
activation_relevance.register_autograd(_transpose_activation, setup_context=_remember)
gate.register_autograd(_pull_gate, setup_context=_remember)
gate_relevance.register_autograd(_transpose_gate, setup_context=_remember)
packed_gate.register_autograd(_pull_packed_gate, setup_context=_remember)
packed_gate_relevance.register_autograd(_transpose_packed_gate, setup_context=_remember)
