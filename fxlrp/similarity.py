"""Similarity of two inputs under one encoder, explained on both sides and by pairs of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .explainer import Explainer, lrp_compile
from .explanation import Explanation
from .pooling import Pooling, Projected, as_pooling
from .progress import progress
from .rules import Composite


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths: Tensor = a.norm(dim=-1) * b.norm(dim=-1)
    return lengths.reciprocal()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.ones_like(a[:, 0])


#: Scores by name: what the product ``<e(a), e(b)>`` is multiplied with, ``[batch]``.
SCORES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"cosine": _cosine, "dot": _dot})


@dataclass(frozen=True, eq=False)
class SimilarityExplanation:
    """A score of two inputs, ``y = s <e(a), e(b)>``, explained on both sides.

    Attributes:
        value: y, ``[batch]``.
        relevance: of the first and of the second side's inputs: ``[batch, tokens]`` for token ids, their own
            shape for float inputs.
        embeddings: e(a) and e(b), ``[batch, size]``.
        explanations: each side's half of the score, y/2, with its ledger and coefficients.
    """

    value: Tensor
    relevance: tuple[Tensor, Tensor]
    embeddings: tuple[Tensor, Tensor]
    explanations: tuple[Explanation, Explanation]
    _scale: Tensor = field(repr=False)
    _parts: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = field(repr=False)

    @property
    def absorbed(self) -> tuple[Tensor, Tensor]:
        """What each side's half kept on the way (biases, position embeddings): ``y/2 - sum(R)``, [batch]."""
        first, second = (self.value / 2 - r.flatten(1).sum(1) for r in self.relevance)
        return first, second

    def pairs(
        self,
        *,
        chunk: int = 64,
        reduce: Callable[[Tensor], Tensor] | None = None,
        progress_bar: bool = True,
    ) -> Tensor:
        """BiLRP: relevance of each pair of a token of one side and a token of the other.

        ``R_ij = s * sum_m R_i(e_m(a)) * R_j(e_m(b))``, with ``R_i(e_m(a))`` the relevance of token i for the
        m-th component of the embedding. Both factors conserve what they explain, so the pairs sum to y, less
        what biases and the like absorbed: ``sum_ij R_ij = s * sum_m (e_m(a) - absorbed_m(a)) *
        (e_m(b) - absorbed_m(b))``.

        Args:
            chunk: how many components share one forward and one batched backward pass a side; memory grows
                with it.
            reduce: a linear function of each side's relevance ``[batch, components, *shape]``, such as the
                sum over each patch of an image, whose pixels would make too many pairs.
            progress_bar: show one on stderr where it takes more than a second.

        Returns:
            ``[batch, tokens_a, tokens_b]``; ``[batch, *shape_a, *shape_b]`` for other inputs.

        Raises:
            InputError: chunk is no number of components.

        Source: Eberle et al. 2020, Building and interpreting deep similarity models: BiLRP as a sum of outer
        products of two LRP passes.
        """
        if type(chunk) is not int or chunk < 1:
            raise InputError(f"chunk is a number of components, an int of 1 or more; got {chunk!r}.")
        size = self.embeddings[0].shape[-1]
        total: Tensor | None = None
        shapes: list[torch.Size] = []
        for start in progress(range(0, size, chunk), "pairs", shown=progress_bar):
            components = torch.arange(start, min(start + chunk, size))
            sides = [relevance(components) for relevance in self._parts]
            sides = sides if reduce is None else [reduce(side) for side in sides]
            shapes = [side.shape[2:] for side in sides]
            part = torch.einsum("bmi,bmj->bij", *(side.flatten(2) for side in sides))
            total = part if total is None else total + part
        assert total is not None
        return (total * self._scale[:, None, None]).reshape(len(total), *shapes[0], *shapes[1])


@dataclass(frozen=True, eq=False)
class Similarity:
    """Explains how alike an encoder finds two inputs.

    ``y = s <e(a), e(b)>``, with s = 1 (``"dot"``) or ``s = 1 / (|e(a)| |e(b)|)`` (``"cosine"``). The score is
    bilinear in the embeddings, so by the uniform rule (AttnLRP, Prop. 3.3) each side gets half of it: its
    embedding has the coefficient ``s e(other) / 2``. The norms in s are held fixed, as the deviation is in
    the rule of a norm (Ali et al. 2022). From the embedding back to the inputs the composite's rules hold.

    Call it with each side's inputs, as a tokenizer gives them; one tracing serves both sides, all batch sizes
    and lengths. A call takes a plain forward pass of each side, for the embeddings, and then a forward and a
    backward pass of each::

        similarity = fxlrp.Similarity(encoder)
        explanation = similarity(
            tokenizer("a film", return_tensors="pt"), tokenizer("a movie", return_tensors="pt")
        )
        explanation.relevance  # of each side's tokens
        explanation.pairs()  # of pairs of tokens

    Attributes:
        encoder: a model of one side's inputs, in evaluation mode. It is traced at the first call and left as
            it is.
        pooling: how its token vectors ``[batch, tokens, size]``, the first such tensor of its output, become
            one: ``"mean"``, ``"cls"`` (the first) or ``"last"`` of those that are not padding; or a function
            of the encoder's own output and the mask, which returns ``[batch, size]``.
        score: ``"cosine"`` or ``"dot"``.
        composite: see :func:`fxlrp.lrp_compile`, as for all that follow. Module paths in it begin with
            ``encoder.``.
        mask: name of the input that is nonzero where there is no padding; without that input nothing is.
        inputs: the explained input, where there are several.
        explainer: of the embedding's components and, as the last class, of the score's half.

    Raises:
        InputError: there is no such pooling or score.
    """

    encoder: nn.Module
    pooling: str | Pooling = "mean"
    score: str = "cosine"
    composite: str | Composite = "attnlrp"
    _: KW_ONLY
    mask: str = "attention_mask"
    backend: str = "auto"
    dynamic: bool = True
    strict: bool = True
    inputs: tuple[str, ...] = ()
    explainer: Explainer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise InputError(f"There is no score {self.score!r}. Scores: {', '.join(SCORES)}.")
        explainer = lrp_compile(
            Projected(self.encoder, as_pooling(self.pooling), self.mask),
            self.composite,
            backend=self.backend,
            dynamic=self.dynamic,
            strict=self.strict,
            inputs=self.inputs,
        )
        object.__setattr__(self, "explainer", explainer)

    def __call__(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> SimilarityExplanation:
        """Explain the score of each pair of rows: the first with the first, and so on.

        Args:
            first: the first side's inputs by the names of the encoder's ``forward``; lengths may differ
                between the sides, batch sizes must not.
            second: the second side's.

        Raises:
            InputError: no mapping, batch sizes that differ, an embedding of another shape than
                ``[batch, size]`` or without direction, or several explained inputs; and as an explainer's
                call.
        """
        sides = tuple(_named(side) for side in (first, second))
        a, b = (self._embedded(side) for side in sides)
        if len(a) != len(b):
            raise InputError(
                f"The first side has {len(a)} rows and the second {len(b)}; row i is compared with row i, so "
                "they need as many. Repeat one side to compare it with many."
            )
        scale = SCORES[self.score](a, b)
        if not bool(torch.isfinite(scale).all()) or not bool(torch.isfinite(a * b).all()):
            raise InputError(
                f"An embedding is 0, NaN or infinite, so its {self.score} score is not defined. Is a row all "
                "padding?"
            )
        halves = [scale[:, None] * other / 2 for other in (b, a)]
        explanations = [
            self.explainer(half, **side, target=a.shape[-1]) for half, side in zip(halves, sides, strict=True)
        ]
        relevance = [_only(explanation) for explanation in explanations]

        def parts(half: Tensor, side: dict[str, Any]) -> Callable[[Tensor], Tensor]:
            def of_components(components: Tensor) -> Tensor:
                wanted = components.to(half.device).expand(len(half), -1)
                return _only(self.explainer(half, **side, target=wanted))

            return of_components

        return SimilarityExplanation(
            value=scale * (a * b).sum(-1),
            relevance=(relevance[0], relevance[1]),
            embeddings=(a, b),
            explanations=(explanations[0], explanations[1]),
            _scale=scale,
            _parts=(parts(halves[0], sides[0]), parts(halves[1], sides[1])),
        )

    def _embedded(self, side: dict[str, Any]) -> Tensor:
        model = self.explainer.model
        assert isinstance(model, Projected)
        with torch.no_grad():
            return model.embed(side)


def _named(side: Any) -> dict[str, Any]:
    if not isinstance(side, Mapping):
        raise InputError(
            "Each side is a mapping from the names of the encoder's inputs to tensors, as a tokenizer gives "
            f"it: {{'input_ids': …}}; got {type(side).__name__}."
        )
    return dict(side)


def _only(explanation: Explanation) -> Tensor:
    if not isinstance(explanation.relevance, Tensor):
        raise InputError(
            f"Several inputs are explained ({', '.join(explanation.relevance)}); name the one that counts: "
            "Similarity(…, inputs=('…',))."
        )
    return explanation.relevance
