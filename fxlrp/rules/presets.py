"""Presets: the composites of the literature by name, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import CompositeError
from .activation import Identity
from .attention import AttentionRule, FrozenAttention, GradientAttention
from .base import Freeze, Gradient, Rule, Taylor, WinnerTakesAll
from .first_layer import Box, Flat
from .linear import Epsilon, Structural
from .norm import NormRule
from .product import FreezeDenominator, Uniform
from .selectors import Op, Selector, first, nearest, op
from .softmax import SoftmaxTaylor
from .solve import Substitution
from .split import AlphaBeta, Gamma, ZPlus
from .table import KINDS


@dataclass(frozen=True)
class Preset:
    """A named set of rules: one per kind, and what kinds alone cannot say.

    Attributes:
        title: its name.
        source: where it comes from.
        rules: a rule for every kind.
        entries: pairs of a selector and a rule that go before the rules by kind.
        freezes_gates: the activation in ``act(gate) * up`` counts as a constant.
        freezes_gated: a product with an activation as a factor counts as a constant as a whole.
        positional: rotary tables and position embeddings are explained beside the inputs.
        freezes_scans: decay, step size, B and C of a selective scan count as constants.
        allows_any_op: ops without a row in the table are differentiated as they are.
    """

    title: str
    source: str
    rules: Mapping[str, Rule] = field(hash=False)
    entries: tuple[tuple[Selector, Rule], ...] = ()
    freezes_gates: bool = False
    freezes_gated: bool = False
    freezes_scans: bool = False
    positional: bool = False
    allows_any_op: bool = False


def _rules(base: Mapping[str, Rule], **changed: Rule) -> Mapping[str, Rule]:
    return MappingProxyType({**base, **changed})


_GRADIENT = _rules(
    {kind: Gradient() for kind in KINDS},
    linear=Epsilon(),
    conv=Epsilon(),
    add=Structural(),
    structural=Structural(),
    attention=GradientAttention(),
)

_ATTNLRP = _rules(
    {},
    linear=Epsilon(),
    conv=Epsilon(),
    add=Structural(),
    structural=Structural(),
    product=Uniform(),
    matmul=Uniform(),
    division=FreezeDenominator(),
    attention=AttentionRule(),
    attention_weights=SoftmaxTaylor(),
    softmax=SoftmaxTaylor(),
    norm=NormRule(),
    activation=Identity(),
    gate=Freeze(),
    nonlinear=Taylor(),
    solve=Substitution(),
    selection=WinnerTakesAll(),
)

#: The layers that read the explained input, whether they are convolutions or not.
_FIRST = first(op("conv") | (op("linear") & ~Op("aten::batch_norm")))
#: The stabiliser of linear layers in zennit's composites.
_STABLE = Epsilon(1e-6)

_ALL = (
    Preset("attnlrp", "Achtibat et al. 2024", _ATTNLRP),
    Preset(
        "attnlrp-gamma",
        "Achtibat et al. 2024 for vision Transformers: the gamma rule for convolutions and linear layers",
        _rules(_ATTNLRP, conv=Gamma(0.25), linear=Gamma(0.05)),
    ),
    Preset(
        "cp",
        "Ali et al. 2022 as evaluated in Achtibat et al. 2024: attention weights and gates frozen",
        _rules(_ATTNLRP, attention=FrozenAttention(), attention_weights=Freeze(), softmax=Freeze()),
        freezes_gates=True,
    ),
    Preset(
        "ali",
        "Ali et al. 2022, AH+LN: attention weights and norm factors frozen, nothing else",
        _rules(_GRADIENT, attention=FrozenAttention(), attention_weights=Freeze(), norm=NormRule()),
        allows_any_op=True,
    ),
    Preset(
        "relp",
        "RelP (arXiv 2508.21258): LN-rule, identity rule, half rule; attention by its gradient",
        _rules(_GRADIENT, norm=NormRule(), activation=Identity(), product=Uniform()),
        allows_any_op=True,
    ),
    Preset(
        "libra",
        "LibraGrad (arXiv 2411.16760): attention weights frozen, identity rule, half rule, LN-rule",
        _rules(
            _GRADIENT,
            attention=FrozenAttention(),
            attention_weights=Freeze(),
            norm=NormRule(),
            activation=Identity(),
            product=Uniform(),
        ),
        allows_any_op=True,
    ),
    Preset(
        "pa",
        "PA-LRP (Bakish et al. 2025): attnlrp with relevance of positions",
        _ATTNLRP,
        positional=True,
    ),
    Preset(
        "mamba",
        "MambaLRP (Jafari et al. 2024): selective scans linear in their input, identity and half rules",
        _ATTNLRP,
        entries=((Op("aten::exp"), Freeze()), (Op("aten::softplus"), Freeze())),
        freezes_scans=True,
    ),
    Preset(
        "attribution-graph",
        "Ameisen et al. 2025: attention weights and norm factors frozen, MLPs skipped",
        _rules(
            _GRADIENT,
            attention=FrozenAttention(),
            attention_weights=Freeze(),
            softmax=Freeze(),
            norm=NormRule(),
            activation=Freeze(),
            gate=Freeze(),
        ),
        freezes_gated=True,
        allows_any_op=True,
    ),
    Preset(
        "epsilon-plus",
        "zennit's EpsilonPlus: z+ for convolutions, epsilon for linear layers; the rest as attnlrp",
        _rules(_ATTNLRP, conv=ZPlus(), linear=_STABLE),
    ),
    Preset(
        "epsilon-plus-flat",
        "zennit's EpsilonPlusFlat: epsilon-plus with the flat rule in the first layer",
        _rules(_ATTNLRP, conv=ZPlus(), linear=_STABLE),
        entries=((_FIRST, Flat()),),
    ),
    Preset(
        "epsilon-gamma-box",
        "zennit's EpsilonGammaBox: gamma for convolutions, the first by the box -3 to 3, epsilon for linear",
        _rules(_ATTNLRP, conv=Gamma(0.25), linear=_STABLE),
        entries=((first(op("conv")), Box(-3.0, 3.0)),),
    ),
    Preset(
        "epsilon-alpha2-beta1",
        "zennit's EpsilonAlpha2Beta1: alpha 2, beta 1 for convolutions, epsilon for linear layers",
        _rules(_ATTNLRP, conv=AlphaBeta(2.0, 1.0), linear=_STABLE),
    ),
    Preset("gradient", "Gradient x Input: no rules", _GRADIENT, allows_any_op=True),
)

#: All presets by name.
PRESETS: Mapping[str, Preset] = MappingProxyType({p.title: p for p in _ALL})


def preset(title: str) -> Preset:
    """A preset by name.

    Raises:
        CompositeError: there is none of that name.
    """
    if title not in PRESETS:
        raise CompositeError(
            f"There is no composite {title!r}{nearest(title, PRESETS)}. Presets: {', '.join(PRESETS)}."
        )
    return PRESETS[title]
