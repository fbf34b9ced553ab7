"""Rules for the layer that reads the input: the textbook forms, and relevance's way back to the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import dense, models
from test_rules import TOLERANCE, close, error, randn
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp
from fxlrp.rules import Box, Epsilon, Flat, Rule, WSquare
from fxlrp.rules.base import Call, dot
from fxlrp.rules.carry import Carry

aten = torch.ops.aten
LOW, HIGH = (-1.5, -2.0, -1.0, -3.0), (2.0, 1.0, 1.5, 0.5)


def layers(biased: bool) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    b = randn(6, seed=2) if biased else None
    image, W = randn(2, 4, 5, 6), randn(6, 4, 3, 2, seed=1)
    return {
        "linear": (aten.linear.default, (randn(2, 3, 4), randn(6, 4, seed=1), b)),
        "matmul": (aten.matmul.default, (randn(2, 3, 4), randn(4, 6, seed=1))),
        "conv1d": (aten.conv1d.default, (randn(2, 4, 7), randn(6, 4, 3, seed=1), b, [2], [2])),
        "conv2d": (aten.conv2d.default, (image, W, b, [2, 1], [1, 2])),
        "conv2d, one image": (aten.conv2d.default, (image[0], W, b)),
        "conv2d, groups": (aten.conv2d.default, (image, W[:, :2], b, [1, 1], [1, 1], [2, 1], 2)),
        "conv3d": (aten.conv3d.default, (randn(1, 4, 3, 3, 2), randn(6, 4, 2, 2, 2, seed=1), b)),
        "transposed": (aten.conv_transpose2d.input, (image[..., :3, :3], randn(4, 6, 2, 2, seed=1), b)),
    }


def by_channel(bound: tuple[float, ...], layer: str) -> Tensor:
    """Bounds in the shape that broadcasts against the input."""
    spatial = {"conv1d": 1, "conv3d": 3}.get(layer, 2 if "conv2d" in layer or layer == "transposed" else 0)
    return torch.tensor(bound, dtype=torch.float64).reshape(-1, *[1] * spatial)


def reach(op: Any, args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    """The op with weights of 1 and no bias."""
    rest = (None, *args[3:]) if len(args) > 2 else ()
    return lambda t: op(t, torch.ones_like(args[1]), *rest)


class TestAgainstTheTextbook:
    """Breaks if padding counts as input, a bias takes part, or bounds go to the wrong channel."""

    @pytest.mark.parametrize("biased", [True, False])
    @pytest.mark.parametrize("layer", layers(True))
    @pytest.mark.parametrize("name", ["box", "box by channel", "flat", "w square"])
    def test_layer(self, name: str, layer: str, biased: bool) -> None:
        op, args = layers(biased)[layer]
        x = args[0].clamp(-1, 0.5)  # inside of all bounds
        call = Call(op, (x, *args[1:]), {}, (0,))
        z = call.run()
        G = randn(*z.shape, seed=3)

        def function(t: Tensor) -> Tensor:
            return call.with_active([t]).run()

        low, high = (by_channel(bound, layer) for bound in (LOW, HIGH))
        rule, expected = {
            "box": lambda: (
                Box(-1.5, 2),
                dense.box(function, x, z * G, torch.tensor(-1.5), torch.tensor(2.0)),
            ),
            "box by channel": lambda: (Box(LOW, HIGH), dense.box(function, x, z * G, low, high)),
            "flat": lambda: (Flat(), dense.flat(reach(op, args), x, z * G)),
            "w square": lambda: (WSquare(), dense.w_square(function, x, z * G)),
        }[name]()
        assert rule.refusal(call) is None
        found = rule.linearize(call)
        (R,) = found.pullback(G)
        assert torch.equal(found.output, z)
        assert error(R, expected.R_x) < TOLERANCE
        kept = rule.absorbed(call, z, G, (R,))["empty"]
        close(kept, expected.R_empty, z * G)
        close(R.sum() + kept, (z * G).sum(), z * G)

    @pytest.mark.parametrize("rule", [Box(0, 1), WSquare()])
    def test_outputs_that_nothing_reaches(self, rule: Rule) -> None:
        """Breaks if 0/0 turns up: relevance of a bias alone stays at the layer."""
        x, W, b, G = torch.rand(2, 3).double(), torch.zeros(4, 3).double(), randn(4), randn(2, 4, seed=1)
        call = Call(aten.linear.default, (x, W, b), {}, (0,))
        (R,) = rule.linearize(call).pullback(G)
        assert not R.any()
        close(rule.absorbed(call, b.expand(2, 4), G, (R,))["empty"], (b * G).sum(), b * G)

    def test_an_input_on_the_edge_of_the_box(self) -> None:
        """Contributions are all 0 there: what rounding leaves of their sum is not divided by."""
        x, W = torch.full((2, 300), 0.1), torch.rand(5, 300)
        call = Call(aten.linear.default, (x, W, None), {}, (0,))
        (R,) = Box(0.1, 0.7).linearize(call).pullback(torch.ones(2, 5))
        assert not R.any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Box(1.0, 0.0), "low must not be above high"),
        (lambda: Box((0.0, 1.0), (1.0, 0.5)), "low must not be above high"),
        (lambda: Box((0.0, 1.0), (1.0, 1.0, 1.0)), "as many"),
    ],
)
def test_boxes_that_are_refused(make: Callable[[], Rule], says: str) -> None:
    with pytest.raises(fxlrp.CompositeError, match=says):
        make()


# ----------------------------------------------------------------------------------------------------
# the way back to the input


class Steps(nn.Module):
    """What lies between pixels and the first layer, that layer, and a head."""

    def __init__(self, before: Callable[[Tensor], Tensor], first: nn.Module) -> None:
        super().__init__()
        self.before, self.first = before, first
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(self.before(x))).flatten(1))


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor([0.4, 0.5, 0.6]).double().view(3, 1, 1)) / 0.25


def patches(x: Tensor) -> Tensor:
    """As linear patch embeddings have it."""
    return F.unfold(x, 2, stride=2).transpose(1, 2).contiguous()


def joined(x: Tensor) -> Tensor:
    """Both ways round, the second one shifted, with an edge of ones."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([second * -2.0, first.flip(-1) + 1.0], -1)
    return F.pad(torch.cat([x, turned], 1)[:, 1:], (1, 0, 0, 1), value=1.0)


def widened(x: Tensor) -> Tensor:
    return x[:, :1].expand(-1, 4, -1, -1).to(torch.float64).permute(0, 1, 3, 2)


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "normalised": (normalised, lambda: nn.Conv2d(3, 4, 3, padding=1)),
    "patches": (patches, lambda: nn.Linear(12, 5)),
    "joined": (joined, lambda: nn.Conv2d(5, 4, 3)),
    "widened": (widened, lambda: nn.Conv2d(4, 4, 3)),
}


def steps(way: str) -> tuple[Steps, Tensor]:
    torch.manual_seed(0)
    before, first = WAYS[way]
    model, x = Steps(before, first()).double(), randn(2, 3, 6, 6)
    model(x)
    return model.double().eval(), x


def at(path: str, rule: Rule) -> fxlrp.Composite:
    return fxlrp.Composite([(fxlrp.name(path), rule)])


class Mover:
    """Where each element of a step's output comes from, by finite differences: the way back, literally."""

    def __init__(self, before: Callable[[Tensor], Tensor], x: Tensor) -> None:
        origin = before(x)
        rows = []
        for i in range(x.numel()):
            moved = x.clone().reshape(-1)
            moved[i] += 1.0
            rows.append((before(moved.reshape(x.shape)) != origin).double().reshape(-1))
        self.reaches = torch.stack(rows)

    def back(self, R: Tensor, shape: torch.Size) -> Tensor:
        return (self.reaches @ R.reshape(-1)).reshape(shape)


@pytest.mark.parametrize("rule", [Flat(), WSquare(), Box(-8.0, 9.0)])
@pytest.mark.parametrize("way", WAYS)
def test_relevance_moves_with_its_element(way: str, rule: Rule) -> None:
    """Breaks if a step on the way scales, shifts, loses or doubles relevance; constants keep theirs."""
    model, x = steps(way)
    explainer = fxlrp.lrp_compile(model, at("first", rule), backend="eager")
    explanation = explainer(x, target=1)
    between = model.before(x).detach()
    layer = fxlrp.lrp_compile(Steps(torch.nn.Identity(), model.first), at("first", rule), backend="eager")
    layer.model.head = model.head
    after = layer(between, target=1).relevance
    expected = Mover(model.before, x).back(after, x.shape)
    assert error(explanation.relevance, expected) < TOLERANCE
    assert explanation.ledger.residual < TOLERANCE
    assert not explanation.coefficients.any()
    constant = explanation.ledger.by_cause().get("constant", torch.zeros(2).double())
    lost = (after.flatten(1).sum(1) - expected.flatten(1).sum(1)).detach()
    torch.testing.assert_close(constant, lost, rtol=1e-9, atol=1e-12)


def test_two_readers_of_one_input() -> None:
    """Relevance as a product and relevance that was carried add up at the input."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + torch.relu(self.b(x * 2.0))

    torch.manual_seed(0)
    model, x = Two().double().eval(), randn(5, 4)
    mixed = fxlrp.lrp_compile(model, at("b", Flat()), backend="eager")
    explanation = mixed(x, target=0)
    a, b = (torch.relu(layer(t))[:, :1] for layer, t in ((model.a, x), (model.b, x * 2)))
    product = x * model.a.weight[0] * (a > 0)
    assert error(explanation.coefficients, (model.a.weight[0] * (a > 0)).detach()) < TOLERANCE
    assert error(explanation.relevance, (product + b / 4).detach()) < TOLERANCE
    assert explanation.ledger.residual < TOLERANCE


def test_token_ids() -> None:
    """Relevance of an embedding's elements is summed over the hidden size, padding ids included."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            prompt = torch.cat([ids, ids.new_zeros(ids.shape[0], 1)], 1)
            return self.head(torch.relu(self.mix(self.table(prompt) * 3.0)).sum(1))

    torch.manual_seed(0)
    model, ids = Words().double().eval(), torch.tensor([[1, 5, 2], [3, 3, 9]])
    explanation = fxlrp.lrp_compile(model, at("mix", WSquare()), backend="eager")(ids, target=1)
    hidden = torch.relu(model.mix(model.table(ids) * 3.0))
    expected = (hidden * model.head.weight[1]).sum(-1)  # w^2 keeps all of each token's relevance there
    assert error(explanation.relevance, expected.detach()) < TOLERANCE
    assert explanation.ledger.residual < TOLERANCE


def test_latents_on_the_way() -> None:
    """A module's output between input and first layer reports the relevance that passes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    explainer = fxlrp.lrp_compile(model, at("1", Flat()), backend="eager", latents=("0", "1"))
    explanation = explainer(randn(2, 3, 4))
    torch.testing.assert_close(explanation.latents["0"], explanation.relevance.flatten(1))
    assert explanation.latents["1"].shape == (2, 5)


@pytest.mark.parametrize("rule", [Box((-4, -5, -6), (4, 5, 6)), Flat(), WSquare()])
def test_a_vision_transformer(rule: Rule) -> None:
    """The patch embedding gets the rule, everything after it the preset's; other batch sizes run too."""
    model = models.tiny_vit(0)
    size = model.config.image_size
    patch = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    explainer = fxlrp.lrp_compile(model, at(patch, rule), backend="eager")
    first = explainer(pixel_values=randn(2, 3, size, size))
    graph = explainer.relevance_graph
    second = explainer(pixel_values=randn(3, 3, size, size))
    assert explainer.relevance_graph is graph
    assert max(first.ledger.residual, second.ledger.residual) < TOLERANCE
    plain = explainer.with_composite("attnlrp")(pixel_values=randn(2, 3, size, size))
    # The patches' bias is a sink under the preset and none under these rules; nothing else differs in sum.
    sunk = plain.ledger.by_cause()["bias"] - first.ledger.by_cause()["bias"]
    gained = (first.relevance - plain.relevance).flatten(1).sum(1)
    close((gained - sunk).abs().max(), torch.zeros(()), plain.relevance)


@pytest.mark.parametrize("rule", [Box(-4.0, 4.0), Flat(), WSquare()])
def test_bfloat16(rule: Rule) -> None:
    """Breaks if quotients are taken in half precision."""
    model, x = steps("normalised")
    exact = fxlrp.lrp_compile(model, at("first", rule), backend="eager")(x, target=1).relevance
    half = model.to(torch.bfloat16)
    half.before = lambda t: (t - 0.5) / 0.25
    found = fxlrp.lrp_compile(half, at("first", rule), backend="eager")(x.bfloat16(), target=1)
    assert found.relevance.dtype == torch.bfloat16
    assert found.ledger.residual < 0.05
    assert found.relevance.shape == exact.shape


class Behind(nn.Module):
    """A first-layer rule's layer behind a step that mixes elements."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step, self.linear, self.norm, self.last = step, nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        before = {
            "linear": lambda: self.linear(x),
            "layer_norm": lambda: self.norm(x),
            "add": lambda: x + x.flip(0),
            "mul": lambda: x * x.flip(0),
            "mean": lambda: x - x.mean(-1, keepdim=True),
            "relu": lambda: torch.relu(x),
        }[self.step]()
        return self.last(before)


@pytest.mark.parametrize("step", ["linear", "layer_norm", "add", "mul", "mean", "relu"])
def test_a_layer_that_is_not_the_first_is_refused(step: str) -> None:
    """With both places and what to do; never carried back as if the step were not there."""
    explainer = fxlrp.lrp_compile(Behind(step).eval(), at("last", Flat()), backend="eager")
    with pytest.raises(fxlrp.CompositeError) as caught:
        explainer(torch.randn(3, 4))
    for part in ("Flat()", "module 'last'", "first layer", "fxlrp.name("):
        assert part in str(caught.value)


def test_bounds_for_other_channels_are_refused() -> None:
    """Two bounds for three channels: at plan time, with the numbers."""
    model, x = steps("normalised")
    with pytest.raises(fxlrp.CompositeError, match="2 bounds for 3 channels"):
        fxlrp.lrp_compile(model, at("first", Box((0, 0), (1, 1))), backend="eager")(x)
    batch = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)).eval()
    with pytest.raises(fxlrp.CompositeError, match="one number each"):
        fxlrp.lrp_compile(batch, at("0", Box((0, 0, 0), (1, 1, 1))), backend="eager")(torch.randn(2, 3, 6, 6))


def test_what_carry_books_is_what_constants_keep() -> None:
    """Padding by its own formula, not by difference."""
    x = randn(2, 3)
    call = Call(aten.constant_pad_nd.default, (x, [1, 2], 5.0), {}, (0,))
    R = randn(2, 6, seed=1)
    step = Carry().linearize(call)
    (back,) = step.pullback(R)
    assert torch.equal(back, R[:, 1:4])
    kept = Carry().absorbed(call, step.output, R, (back,))
    close(kept["constant"], R.sum() - R[:, 1:4].sum(), R)
    assert float(dot(torch.ones_like(x), back)) == pytest.approx(float(R[:, 1:4].sum()))
    assert Epsilon().direct is False
