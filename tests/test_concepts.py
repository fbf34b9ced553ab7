"""Concepts: reference samples against brute force over a whole data set, conditional relevance likewise."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor, nn

import fxlrp
from fxlrp.concepts import References, conditional, reference_samples
from fxlrp.rules import Flat

Batch = dict[str, Any]


def texts() -> Batch:
    ids, mask = models.token_batch(1, (7, 4, 5), "right")
    return {"input_ids": ids, "attention_mask": mask}


def images() -> Batch:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.float64)}


#: A model, its inputs, a latent that all relevance passes, one beside a residual, one inside an MLP.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Batch], str, str, str]] = {
    "Llama": (models.tiny_llama, texts, "model.layers.0", "model.layers.1.mlp", "model.layers.1.mlp.up_proj"),
    "ViT": (models.tiny_vit, images, "vit.layers.0", "vit.layers.1.mlp", "vit.layers.0.mlp.fc1"),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Any, Batch, str, str, str]:
    make, inputs, *latents = CASES[request.param]
    return (make(), inputs(), *latents)


@contextmanager
def replaced(model: nn.Module, path: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it runs, a module's output is edited."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def only(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The same values, of which all but the mask's units count as constants."""
    return lambda x: x * mask + (x * (1 - mask)).detach()


# -- conditional relevance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", ["attnlrp", "cp", "gradient"])
def test_all_units_of_a_latent_that_all_passes_are_the_whole(case: Any, composite: str) -> None:
    """Would break: relevance lost or counted twice between the latent and the inputs."""
    model, inputs, stream, *_ = case
    explainer = fxlrp.lrp_compile(model, composite, latents=(stream,))
    found = conditional(explainer, stream, range(16), **inputs, target=1)
    whole = explainer(**inputs, target=1)
    torch.testing.assert_close(found.relevance, whole.relevance)
    torch.testing.assert_close(found.explanation.relevance, whole.relevance)
    torch.testing.assert_close(found.value, whole.latents[stream].flatten(1).sum(1))
    torch.testing.assert_close(whole.latents[stream], values(model, stream, inputs) * g(whole, stream))


def g(explanation: fxlrp.Explanation, latent: str) -> Tensor:
    return explanation.latent_coefficients[latent]


def values(model: Any, path: str, inputs: Batch) -> Tensor:
    kept: list[Tensor] = []
    with replaced(model, path, lambda x: kept.append(x) or x), torch.no_grad():
        model(**inputs)
    return kept[0]


@pytest.mark.parametrize("composite", ["attnlrp", "cp", "gradient"])
def test_chosen_units_of_the_residual_stream(case: Any, composite: str) -> None:
    """Equal to the explanation of a model in which all other units of the latent are constants."""
    model, inputs, stream, *_ = case
    units = (3, 7, -1)
    mask = torch.zeros(16, dtype=torch.float64)
    mask[list(units)] = 1
    explainer = fxlrp.lrp_compile(model, composite, latents=(stream,))
    found = conditional(explainer, stream, units, **inputs, target=1)
    with replaced(model, stream, only(mask)):
        expected = fxlrp.lrp_compile(model, composite)(**inputs, target=1)
    torch.testing.assert_close(found.relevance, expected.relevance)


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
def test_what_goes_round_the_latent_is_left_out(case: Any, composite: str) -> None:
    """A latent beside a residual: with its units, less with none of them, in a model with constants."""
    model, inputs, _, beside, _ = case
    units = [0, 5, 6]
    explainer = fxlrp.lrp_compile(model, composite, latents=(beside,))
    found = conditional(explainer, beside, units, **inputs, target=1)
    relevance = []
    for chosen in (units, []):
        mask = torch.zeros(16, dtype=torch.float64)
        mask[chosen] = 1
        edit = only(mask) if chosen else Tensor.detach
        with replaced(model, beside, edit):
            relevance.append(fxlrp.lrp_compile(model, composite)(**inputs, target=1).relevance)
    torch.testing.assert_close(found.relevance, relevance[0] - relevance[1])


def test_chosen_neurons_by_autograd(case: Any) -> None:
    """Gradient x Input through neurons inside an MLP, written with autograd alone."""
    model, inputs, *_, inside = case
    units = [2, 11]
    explainer = fxlrp.lrp_compile(model, "gradient", latents=(inside,))
    found = conditional(explainer, inside, units, **inputs, target=1)
    given = dict(inputs)
    if "input_ids" in given:
        leaf = model.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
        given["inputs_embeds"] = leaf
    else:
        leaf = given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
    kept: list[Tensor] = []
    with replaced(model, inside, lambda x: kept.append(x) or x):
        logits = model(**given).logits
    if logits.dim() == 3:
        logits = logits[torch.arange(3), inputs["attention_mask"].sum(1) - 1]
    (coefficient,) = torch.autograd.grad(logits[:, 1].sum(), kept[0], retain_graph=True)
    masked = torch.zeros_like(coefficient)
    masked[..., units] = coefficient[..., units]
    (gradient,) = torch.autograd.grad(kept[0], leaf, masked)
    expected = (leaf * gradient).detach()
    torch.testing.assert_close(found.relevance, expected.sum(-1) if expected.dim() == 3 else expected)
    torch.testing.assert_close(found.value, (kept[0] * masked).detach().flatten(1).sum(1))


def test_each_unit_and_each_target_by_itself(case: Any) -> None:
    """Would break: units and targets interchanged, or a batch that is no longer in front."""
    model, inputs, stream, *_ = case
    explainer = fxlrp.lrp_compile(model, latents=(stream,), chunk=4)
    units, targets = [1, 4, 9], [2, 0]
    found = conditional(explainer, stream, units, **inputs, target=targets, each=True)
    assert found.value.shape == (3, 2, 3)
    whole = found.explanation
    torch.testing.assert_close(g(whole.of(1), stream), g(explainer(**inputs, target=0), stream))
    together = conditional(explainer, stream, units, **inputs, target=targets)
    torch.testing.assert_close(together.relevance, found.relevance.sum(2))
    for i, target in enumerate(targets):
        for j, unit in enumerate(units):
            alone = conditional(explainer, stream, unit, **inputs, target=target)
            torch.testing.assert_close(found.relevance[:, i, j], alone.relevance)
            torch.testing.assert_close(found.value[:, i, j], alone.value)


def test_units_that_do_nothing_get_exactly_nothing() -> None:
    """Would break: other units' relevance leaking through the mask."""
    model = models.tiny_llama(0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] = 0
        model.model.layers[0].mlp.down_proj.bias[3] = 0
    explainer = fxlrp.lrp_compile(model, latents=("model.layers.0.mlp",))
    found = conditional(explainer, "model.layers.0.mlp", 3, **texts(), target=1)
    assert bool((found.relevance == 0).all()) and bool((found.value == 0).all())
    assert bool((conditional(explainer, "model.layers.0.mlp", 4, **texts(), target=1).relevance != 0).any())


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu().mean((2, 3))


def test_channels_of_a_convolution() -> None:
    """Would break: units counted in the width of an image."""
    model, x = Convolution().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    explainer = fxlrp.lrp_compile(model, latents=("first",))
    found = conditional(explainer, "first", range(4), x, target=2, dim=1, each=True)
    assert found.relevance.shape == (2, 4, 3, 8, 8)
    torch.testing.assert_close(found.relevance.sum(1), found.explanation.relevance)
    best = reference_samples(explainer, "first", [x], by="activation", dim=1, k=2)
    activation = model.first(x).detach().flatten(2)
    torch.testing.assert_close(best.scores, activation.amax(2).sort(0, descending=True).values.T)


def test_rules_for_the_first_layer() -> None:
    """They give no coefficients to hand on: conditions are refused, and activations need no rule at all."""
    model, x = Convolution().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    explainer = fxlrp.lrp_compile(
        model, fxlrp.Composite([(fxlrp.name("first"), Flat())]), latents=("second",)
    )
    with pytest.raises(fxlrp.InputError, match="without rules for the first layer"):
        conditional(explainer, "second", [0], x, target=2, dim=1)
    expected = model.second(model.first(x).relu()).detach()
    torch.testing.assert_close(explainer.values("second", x)["second"], expected)


class TwoTables(nn.Module):
    """Ids that are looked up in two tables at their own place, and in one at the next."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.mix = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(8, 4)
        self.head, self.shift = nn.Linear(4, 3), shift

    def forward(self, ids: Tensor) -> Tensor:
        moved = torch.roll(ids, self.shift, 1) if self.shift else ids
        return self.head(self.mix(torch.cat([self.first(ids), self.second(moved)], -1)).relu().mean(1))


def test_ids_that_are_looked_up_twice() -> None:
    """Would break: one table's part left out; another place's relevance handed out as one's own."""
    ids = torch.tensor([[1, 2, 3]])
    explainer = fxlrp.lrp_compile(TwoTables(0).double().eval(), latents=("mix",))
    found = conditional(explainer, "mix", range(4), ids, target=1)
    torch.testing.assert_close(found.relevance, found.explanation.relevance)
    moved = fxlrp.lrp_compile(TwoTables(1).double().eval(), latents=("mix",))
    with pytest.raises(fxlrp.InputError, match="moves or computes"):
        conditional(moved, "mix", range(4), ids, target=1)


def test_bad_conditions_are_refused() -> None:
    """Would break: an error from deep inside, or a unit that is silently another."""
    model, inputs = models.tiny_llama(0), texts()
    with pytest.raises(fxlrp.InputError, match=r"latents=\('model.norm',\)"):
        conditional(fxlrp.lrp_compile(model), "model.norm", 0, **inputs)
    explainer = fxlrp.lrp_compile(model, latents=("model.layers.*.mlp",))
    with pytest.raises(fxlrp.InputError, match=r"no latent 'model.norm'.*'model.layers.0.mlp'"):
        conditional(explainer, "model.norm", 0, **inputs)
    for units in (16, -17, [], [0, "1"], True):
        with pytest.raises(fxlrp.InputError, match="units are ints from 0 to 15"):
            conditional(explainer, "model.layers.0.mlp", units, **inputs)  # type: ignore[arg-type]
    with pytest.raises(fxlrp.InputError, match=r"'pa' explains positions"):
        conditional(explainer.with_composite("pa"), "model.layers.0.mlp", 0, **inputs)
    for dim in (0, 3, -3):
        with pytest.raises(fxlrp.InputError, match="3 dimensions"):
            conditional(explainer, "model.layers.0.mlp", 0, dim=dim, **inputs)


# -- reference samples ---------------------------------------------------------------------------------------

LATENT = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny_llama(0)


@pytest.fixture(scope="module")
def explainer(llama: Any) -> fxlrp.Explainer:
    return fxlrp.lrp_compile(llama, latents=(LATENT,))


@pytest.fixture(scope="module")
def data() -> Batch:
    ids, mask = models.token_batch(3, (7, 4, 5, 1, 6, 2, 7, 3), "right")
    return {"input_ids": ids, "attention_mask": mask}


def split(batch: Batch, size: int) -> list[Batch]:
    return [
        {name: t[i : i + size] for name, t in batch.items()} for i in range(0, len(batch["input_ids"]), size)
    ]


def one_by_one(explainer: fxlrp.Explainer, data: Batch, by: str, target: int) -> list[Tensor]:
    """The latent of every sample by itself and without padding, ``[positions, units]``."""
    found = []
    for row, mask in zip(data["input_ids"], data["attention_mask"], strict=True):
        alone = {"input_ids": row[None, mask == 1], "attention_mask": mask[None, mask == 1]}
        if by == "activation":
            found.append(values(explainer.model, LATENT, alone)[0])
        else:
            found.append(explainer(**alone, target=target).latents[LATENT][0])
    return found


@pytest.mark.parametrize("pool", ["max", "sum"])
@pytest.mark.parametrize("by", ["activation", "relevance"])
def test_references_are_those_of_a_search_through_all_samples(
    explainer: fxlrp.Explainer, data: Batch, by: str, pool: str
) -> None:
    """Would break: a wrong order, samples of another batch, positions of padding."""
    found = reference_samples(explainer, LATENT, split(data, 3), by=by, pool=pool, k=3, target=5)
    rows = one_by_one(explainer, data, by, 5)
    for unit in range(28):
        scores = [float(getattr(row[:, unit], pool)()) for row in rows]
        best = sorted(range(8), key=lambda i: (-scores[i], i))[:3]
        torch.testing.assert_close(found.scores[unit], torch.tensor([scores[i] for i in best]).double())
        for index, position in zip(found.indices[unit].tolist(), found.positions[unit].tolist(), strict=True):
            row = rows[index][:, unit]
            torch.testing.assert_close(row[position], row.max())
        # Samples whose scores are equal but for rounding may change places.
        torch.testing.assert_close(
            torch.tensor([scores[i] for i in found.indices[unit]]), torch.tensor([scores[i] for i in best])
        )
    assert (found.samples, found.by, found.pool, found.latent) == (8, by, pool, LATENT)


@pytest.mark.parametrize("by", ["activation", "relevance"])
def test_streaming_is_the_same_as_all_at_once(explainer: fxlrp.Explainer, data: Batch, by: str) -> None:
    """Would break: a best sample forgotten, or indices that begin anew with each batch."""
    whole = reference_samples(explainer, LATENT, [data], by=by, k=3, target=5)
    for size in (1, 3):
        streamed = reference_samples(explainer, LATENT, iter(split(data, size)), by=by, k=3, target=5)
        torch.testing.assert_close(streamed.scores, whole.scores)
        clear = whole.scores.diff(dim=-1).abs().amin(-1) > 1e-9
        assert torch.equal(streamed.indices[clear], whole.indices[clear])
        assert torch.equal(streamed.positions[clear], whole.positions[clear])


def test_of_equal_samples_the_earlier_comes_first(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: an order that depends on how the data are split."""
    (first, *_) = split(data, 1)
    for copies in ([first] * 4, [{name: t.repeat(4, 1) for name, t in first.items()}]):
        found = reference_samples(explainer, LATENT, copies, by="activation", k=3)
        assert torch.equal(found.indices, torch.arange(3).expand(28, -1))


def test_fewer_samples_than_asked_for(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: places that no sample fills."""
    found = reference_samples(explainer, LATENT, split(data, 3), by="activation", k=100)
    assert found.indices.shape == (28, 8)
    assert torch.equal(found.indices.sort(-1).values, torch.arange(8).expand(28, -1))


def test_chosen_units(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: rows that belong to other units than they say."""
    whole = reference_samples(explainer, LATENT, [data], k=2, target=5)
    found = reference_samples(explainer, LATENT, [data], k=2, target=5, units=[4, -1])
    assert found.units.tolist() == [4, 27]
    assert torch.equal(found.scores, whole.scores[[4, 27]])


def test_several_targets_have_a_table_each(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: targets mixed in one table."""
    found = reference_samples(explainer, LATENT, split(data, 3), k=2, target=[5, 9])
    assert found.indices.shape == (2, 28, 2)
    for i, target in enumerate((5, 9)):
        alone = reference_samples(explainer, LATENT, split(data, 3), k=2, target=target)
        torch.testing.assert_close(found.scores[i], alone.scores)
        assert found.table(target=i) == alone.table()


def test_batches_bring_their_own_targets(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: labels that are left aside, or handed to the model."""
    labels = torch.arange(8) % 3
    batches = [
        {**batch, "target": label} for batch, label in zip(split(data, 3), labels.split(3), strict=True)
    ]
    found = reference_samples(explainer, LATENT, batches, k=8)
    rows = torch.stack(
        [one_by_one(explainer, data, "relevance", int(t))[i].amax(0) for i, t in enumerate(labels)]
    )
    torch.testing.assert_close(found.scores, rows.sort(0, descending=True).values.T)
    torch.testing.assert_close(
        reference_samples(explainer, LATENT, batches, by="activation").scores,
        reference_samples(explainer, LATENT, [data], by="activation").scores,
    )


def test_batches_as_tuples_and_tensors(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: positional arguments dropped."""
    ids = data["input_ids"]
    named = reference_samples(explainer, LATENT, [{"input_ids": ids}], by="activation")
    for batch in (ids, (ids,), [ids]):
        found = reference_samples(explainer, LATENT, [batch], by="activation")
        assert torch.equal(found.scores, named.scores)


def test_values_are_what_the_modules_compute(llama: Any, explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: another node under a module's name, or rows that a target left out."""
    found = explainer.values(("model.layers.*.mlp", "lm_head"), **data)
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]
    for path, tensor in found.items():
        torch.testing.assert_close(tensor, values(llama, path, data))


def test_save_and_load(explainer: fxlrp.Explainer, data: Batch, tmp_path: Path) -> None:
    """Would break: numbers that change on the way, or a file of something else taken for one of ours."""
    found = reference_samples(explainer, LATENT, [data], k=3, target=[5, 9], units=[3, 1])
    path = found.save(tmp_path / "references.json")
    read = References.load(path)
    for field in dataclasses.fields(References):
        mine, its = getattr(found, field.name), getattr(read, field.name)
        if isinstance(mine, Tensor):
            assert torch.equal(mine, its) and mine.dtype == its.dtype
        else:
            assert mine == its
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.by = "activation"  # type: ignore[misc]
    written = json.loads(path.read_text())
    for content in (
        "{",
        "[]",
        json.dumps({**written, "format": "other"}),
        json.dumps({**written, "units": "a"}),
    ):
        path.write_text(content)
        with pytest.raises(fxlrp.InputError, match="no reference samples"):
            References.load(path)


def test_prints_as_a_table(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: units out of order, or samples that cannot be told from positions."""
    found = reference_samples(explainer, LATENT, [data], by="activation", k=3)
    title, head, first, *rows = str(found).splitlines()
    assert LATENT in title and "activation" in title and "8 samples" in title
    assert head.split() == ["unit", "sample@position", "score"]
    best = int(found.scores[:, 0].argmax())
    index, position = int(found.indices[best, 0]), int(found.positions[best, 0])
    assert first.split()[:2] == [str(best), f"{index}@{position}"]
    assert len(rows) == 10 and rows[-1] == "18 more units"
    assert "28 units" in repr(found) and "3 of 8" in repr(found)


def test_the_page_on_concepts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break: names and shapes on the page that are no longer so."""
    page = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert names["explanation"].pairs().shape == (2, 6, 9)
    assert names["relevant"].indices.shape == (64, 3)
    assert names["each"].relevance.shape == (2, 5, 12)


def test_bad_arguments_are_refused(explainer: fxlrp.Explainer, data: Batch) -> None:
    """Would break: an error from deep inside, or an empty table."""
    for arguments, message in (
        ({"by": "weight"}, r"'activation', 'relevance'; got 'weight'"),
        ({"pool": "mean"}, r"'max', 'sum'; got 'mean'"),
        ({"k": 0}, "k is a number of samples"),
        ({"units": [28]}, "units are ints from 0 to 27"),
        ({"dim": 0}, "the first of them the batch"),
        ({"latent": "nowhere", "by": "activation"}, "nowhere"),
        ({"latent": "model.norm"}, r"no latent 'model.norm'"),
        ({"latent": "model.layers.*", "by": "activation"}, r"no latent 'model.layers.\*'"),
        ({"data": []}, "no data"),
        ({"data": ["text"]}, "got str"),
        ({"data": [{**data, "target": 1}, {**data, "target": [1, 2]}]}, "number of targets"),
    ):
        given = {"latent": LATENT, "data": [data], "target": 1, **arguments}
        with pytest.raises(fxlrp.InputError, match=message):
            reference_samples(explainer, **given)
