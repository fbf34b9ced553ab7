"""What an explainer returns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .ledger import Ledger

#: One tensor where one input is explained, a dict by input name where there are several.
Relevance = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Relevance of the inputs for one scalar of the output, or for each of several.

    Of K targets all tensors have K behind the batch: relevance ``[batch, K, sequence]``.

    Attributes:
        relevance: for token ids ``[batch, sequence]`` (summed over the hidden size), for float inputs their
            own shape; a dict by input name where several inputs are explained.
        value: the explained scalars, ``[batch]``.
        coefficients: what relevance is a product with: ``relevance = (input or embedding) * coefficient``; as
            ``relevance``, but ``[batch, sequence, hidden]`` for token ids. Relevance by rules for the first
            layer (``Box``, ``Flat``, ``WSquare``) is no such product and not in the coefficients, which
            are 0 where there is no other.
        latents: relevance by name, as asked for by ``lrp_compile(latents=…)``; without those that no
            relevance reaches.
        positions: under the composite ``pa`` relevance of positions, ``[batch, sequence]`` each: of rotary
            tables, ``"cos @ layer"`` and ``"sin @ layer"``, and of position embeddings, by module or
            parameter.
        latent_coefficients: those of the latents, by the same names.
        parameters: relevance of parameters by name, as asked for by ``lrp_compile(parameters=…)``, in their
            shapes and summed over the batch; without those that no relevance reaches.
    """

    relevance: Relevance
    value: Tensor
    coefficients: Relevance
    latents: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    positions: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    latent_coefficients: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    parameters: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    _output: Callable[[], Any] | None = field(default=None, repr=False)
    _ledger: Callable[[], Ledger] | None = field(default=None, repr=False)

    @cached_property
    def output(self) -> Any:
        """The model's own output, computed when first read: the graph skips what no target needs."""
        if self._output is None:
            raise RuntimeError(
                "An explanation made inside torch.compile does not hold its inputs; call the model."
            )
        return self._output()

    @cached_property
    def ledger(self) -> Ledger:
        """Where the relevance went: one more forward and, per sample, backward pass when first read."""
        if self._ledger is None:
            raise RuntimeError(
                "An explanation made inside torch.compile does not hold its inputs; explain once outside."
            )
        return self._ledger()

    def heads(self, latent: str, count: int | None = None) -> Tensor:
        """Relevance of each head at a latent, summed over positions and features: ``[batch, heads]``.

        Args:
            latent: a name in ``latents``: an attention op, ``[batch, heads, positions, features]``, as
                ``latents=(fxlrp.op("attention"),)`` gives it; or with ``count`` a module's output whose last
                dimension holds that many heads one behind the other, such as what ``o_proj`` reads.
            count: of heads.

        Raises:
            InputError: there is no such latent, or it has no such heads.
        """
        relevance, batched = self._latent(latent), self.value.dim()
        if count is not None:
            if relevance.shape[-1] % count:
                raise InputError(f"'{latent}' has size {relevance.shape[-1]}, which is not {count} heads.")
            relevance = relevance.unflatten(-1, (count, -1)).movedim(-2, batched)
        elif relevance.dim() - batched != 3:
            raise InputError(
                f"'{latent}' has shape {tuple(relevance.shape)}, not [batch, heads, positions, features]: "
                "take an attention op, latents=(fxlrp.op('attention'),), or say how many heads it holds, "
                "count=…"
            )
        return relevance.flatten(batched + 1).sum(-1)

    def neurons(self, latent: str) -> Tensor:
        """Relevance of each unit of a latent's last dimension, summed over positions: ``[batch, size]``.

        Raises:
            InputError: there is no such latent.
        """
        relevance, batched = self._latent(latent), self.value.dim()
        return relevance.flatten(batched, -2).sum(batched) if relevance.dim() > batched + 1 else relevance

    def _latent(self, name: str) -> Tensor:
        if name not in self.latents:
            near = difflib.get_close_matches(name, self.latents, 3, cutoff=0.4)
            raise InputError(
                f"There is no latent {name!r}; near: {', '.join(near) or 'none'}. It was not asked for, "
                "lrp_compile(model, latents=(…,)), or no relevance reaches it under this composite."
            )
        return self.latents[name]

    def position_aware(self) -> Tensor:
        """Relevance of tokens and of their positions in one, ``[batch, sequence]``, at most 1 in magnitude.

        With the relevance r_t of each rotary table (cosine and sine of each layer) and |.| the largest
        magnitude of a sample: ``P = sum_t abs(r_t) / |r_t|``, ``R = R_tokens / |R_tokens| + P / |P|``, over
        ``|R|``. Position embeddings are summands of the tokens' own embeddings: their relevance adds to that
        of the tokens as it is.

        Raises:
            InputError: there is no relevance of positions, or not of one sequence of tokens.

        Source: Bakish et al. 2025 (PA-LRP, arXiv 2506.02138).
        """
        if not self.positions or not isinstance(self.relevance, Tensor):
            raise InputError(
                "There is no relevance of positions. It is for one sequence of tokens, under composite='pa', "
                "where rotary tables are computed by cosine and sine in the model's forward or position "
                "embeddings are summed with the tokens'; tables held as buffers are not found."
            )
        tokens, rotary = self.relevance, torch.zeros_like(self.relevance)
        for label, found in self.positions.items():
            if " @ " in label:
                rotary = rotary + _scaled(found).abs()
            else:
                tokens = tokens + found
        return _scaled(_scaled(tokens) + _scaled(rotary))

    def of(self, index: int) -> Explanation:
        """The explanation of one of several targets, as if it had been explained by itself."""
        if self.value.dim() < 2:
            raise IndexError("This is the explanation of one target; several have value [batch, K].")

        def one(tensors: Relevance) -> Relevance:
            if isinstance(tensors, Tensor):
                return tensors[:, index]
            return {name: tensor[:, index] for name, tensor in tensors.items()}

        return Explanation(
            one(self.relevance),
            self.value[:, index],
            one(self.coefficients),
            {name: tensor[:, index] for name, tensor in self.latents.items()},
            {name: tensor[:, index] for name, tensor in self.positions.items()},
            {name: tensor[:, index] for name, tensor in self.latent_coefficients.items()},
            {},
            self._output,
            None if self._ledger is None else lambda: self.ledger.of(index),
        )

    def __repr__(self) -> str:
        def shape(value: Relevance) -> str:
            if isinstance(value, Tensor):
                return str(list(value.shape))
            return "{" + ", ".join(f"{name}: {list(t.shape)}" for name, t in value.items()) + "}"

        scalars = ", ".join(f"{v:.4g}" for v in self.value.detach().float().flatten()[:4].tolist())
        dots = ", …" if self.value.numel() > 4 else ""
        return f"Explanation(value=[{scalars}{dots}], relevance={shape(self.relevance)})"


def _scaled(relevance: Tensor) -> Tensor:
    largest = relevance.abs().amax(-1, keepdim=True)
    return relevance / largest.clamp_min(torch.finfo(relevance.dtype).tiny)


def one_or_many(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Relevance:
    """A tensor by itself, several as a dict by name."""
    return tensors[0] if len(tensors) == 1 else dict(zip(names, tensors, strict=True))
