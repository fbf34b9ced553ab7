"""Saved explainers: the same relevance without the model, and nothing but an error from a bad file."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import models
from torch import Tensor, nn

import fxlrp
from fxlrp import cli
from fxlrp.artifact import inspect, ops, weights
from fxlrp.artifact.graph import DTYPES
from fxlrp.artifact.header import MANIFEST, PROGRAM

IDS = torch.tensor([[3, 5, 7, 2, 11], [1, 4, 9, 8, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
REPOSITORY = Path(__file__).resolve().parents[1]


class Tied(nn.Module):
    """A classifier whose head is its embedding, by a transposed view, with a slice of a larger buffer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(48, width))
        self.register_buffer("scales", torch.randn(4, width))
        self.mix = nn.Linear(width, width).to(torch.bfloat16)

    def forward(self, ids: Tensor, power: float = 1.0) -> Tensor:
        h = nn.functional.embedding(ids, self.table) * self.scales[1]
        h = torch.relu(self.mix(h.bfloat16()).float()) * power
        return h.mean(1) @ self.table.t()


def same(found: Any, expected: Any) -> bool:
    """Whether two results are bit for bit the same, in tensors and dicts."""
    if isinstance(expected, Tensor):
        return found.dtype is expected.dtype and torch.equal(found, expected)
    return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)


def assert_same(found: fxlrp.Explanation, expected: fxlrp.Explanation) -> None:
    for name in (
        "relevance",
        "value",
        "coefficients",
        "latents",
        "latent_coefficients",
        "positions",
        "parameters",
    ):
        assert same(getattr(found, name), getattr(expected, name)), name


def saved(explainer: fxlrp.Explainer, path: Path, **options: Any) -> fxlrp.LoadedExplainer:
    explainer.save(path)
    return fxlrp.load(path, **options)


@pytest.fixture(scope="module")
def text() -> tuple[fxlrp.Explainer, fxlrp.Explanation]:
    explainer = fxlrp.lrp_compile(models.tiny_bert())
    return explainer, explainer(input_ids=IDS, attention_mask=MASK)


@pytest.fixture(scope="module")
def file(text: tuple[fxlrp.Explainer, fxlrp.Explanation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.fxlrp"
    text[0].save(path)
    return path


# -- round trip --------------------------------------------------------------------------------------------


def test_a_text_classifier_is_the_same_after_loading(
    text: tuple[fxlrp.Explainer, fxlrp.Explanation], file: Path
) -> None:
    """Breaks if a bit of relevance, value or coefficients changes, by position or name, or the plan."""
    loaded = fxlrp.load(file)
    assert_same(loaded(IDS, attention_mask=MASK), text[1])
    assert_same(loaded(attention_mask=MASK, input_ids=IDS), text[1])
    assert str(loaded.plan) == str(text[0].plan)
    assert "BertForSequenceClassification" in repr(loaded)


def test_all_kinds_of_targets_of_a_language_model(tmp_path: Path) -> None:
    """Breaks if one kind's program is missing, takes its operands in another order, or only one number of
    targets.
    """
    explainer = fxlrp.lrp_compile(models.tiny_llama(), latents=("model.layers.*.mlp",), chunk=2)
    targets = [
        None,
        7,
        fxlrp.LogitDifference(3, 4, position=2),
        [3, 7],
        fxlrp.TopK(2),
        fxlrp.Span(1, 4),
        [fxlrp.Logit(3), fxlrp.LogProb(5, position=1)],
    ]
    expected = [explainer(IDS, target=t) for t in targets]
    loaded = saved(explainer, tmp_path / "lm.fxlrp", chunk=2)
    for target, explanation in zip(targets, expected, strict=True):
        assert_same(loaded(IDS, target=target), explanation)
    assert_same(loaded(IDS, target=[3, 7, 8]), explainer(IDS, target=[3, 7, 8]))


@pytest.mark.parametrize(
    ("build", "inputs", "options"),
    [
        (models.tiny_vit, {"pixel_values": torch.randn(2, 3, 12, 12, dtype=torch.float64)}, {}),
        (models.tiny_t5, {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :3]}, {}),
        (models.tiny_gpt2, {"input_ids": IDS}, {"composite": "pa"}),
        (models.tiny_bert, {"input_ids": IDS}, {"parameters": ("bert.encoder.layer.0.*",)}),
    ],
    ids=["image", "several inputs", "positions", "parameters"],
)
def test_other_models_are_the_same(
    build: Callable[[], nn.Module], inputs: dict[str, Tensor], options: dict[str, Any], tmp_path: Path
) -> None:
    """Breaks if an op, a constant or a part of the result does not survive."""
    explainer = fxlrp.lrp_compile(build(), **options)
    expected = explainer(**inputs)
    assert_same(saved(explainer, tmp_path / "m.fxlrp")(**inputs), expected)


def test_an_input_with_the_name_of_a_builtin(tmp_path: Path) -> None:
    """Breaks if names that torch.fx changes in generated code, as ``input``, meet another input's."""
    explainer = fxlrp.lrp_compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval())
    x = torch.randn(2, 4)
    expected = explainer(x, target=1)
    assert_same(saved(explainer, tmp_path / "i.fxlrp")(input=x, target=1), expected)


def test_a_function_of_the_output_is_saved(tmp_path: Path) -> None:
    """Breaks if a traced function, or the tensor that it closes over, is lost."""
    weight = torch.randn(3, dtype=torch.float64)
    explainer = fxlrp.lrp_compile(models.tiny_bert())
    expected = explainer(IDS, target=lambda output: output.logits @ weight)
    loaded = saved(explainer, tmp_path / "f.fxlrp")
    assert_same(loaded(IDS), expected)
    with pytest.raises(fxlrp.TargetError, match="leave the target out"):
        loaded(IDS, target=lambda output: output.logits[:, 0])


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (1, 1), (3, 9)])
def test_sizes_stay_dynamic(
    shape: tuple[int, int], text: tuple[fxlrp.Explainer, fxlrp.Explanation], file: Path
) -> None:
    """Breaks if saving fixes sizes; a batch or length of 1 was compared with the model while saving."""
    ids = torch.randint(1, 41, shape)
    mask = torch.ones_like(ids)
    assert_same(fxlrp.load(file)(ids, mask), text[0](ids, mask))


def test_inductor_runs_a_loaded_graph(text: tuple[fxlrp.Explainer, fxlrp.Explanation], file: Path) -> None:
    """Breaks if a loaded graph lacks what the compiler asks of it."""
    found = fxlrp.load(file, backend="inductor")(IDS, MASK)
    torch.testing.assert_close(found.relevance, text[1].relevance)


def test_compiled_backends_find_symbolic_values(tmp_path: Path) -> None:
    """Breaks if nodes of a loaded graph have no dtype and shape, or a size that may change is fixed."""
    explainer = fxlrp.lrp_compile(models.tiny_llama())
    for target in (None, [3, 7], fxlrp.LogProb(2, position=1), fxlrp.Span(1, 3)):
        expected = explainer(IDS, MASK, target=target)
        graph = saved(explainer, tmp_path / "v.fxlrp", backend="inductor").relevance_graph
        original = {n.name: n.meta["val"] for n in explainer.relevance_graph.graph.nodes if "val" in n.meta}
        shapes = [(n, original[n.name], n.meta["val"]) for n in graph.graph.nodes if n.name in original]
        assert len(shapes) > 100
        for node, known, found in shapes:
            if isinstance(known, Tensor):
                assert found.dtype is known.dtype and found.dim() == known.dim(), node.name
                symbolic = [not str(size).isdigit() for size in found.shape]
                assert symbolic == [not str(size).isdigit() for size in known.shape], node.name
        assert expected.value.dtype is torch.float64


def test_other_arguments_are_part_of_the_artifact(tmp_path: Path) -> None:
    """Breaks if a loaded program runs for another constant than it was traced with."""
    explainer = fxlrp.lrp_compile(Tied().eval())
    expected = explainer(IDS, power=2.0)
    loaded = saved(explainer, tmp_path / "c.fxlrp")
    assert_same(loaded(IDS, power=2.0), expected)
    assert_same(loaded(IDS), expected)
    with pytest.raises(fxlrp.InputError, match=r"saved for power=2.0.*not for 3.0"):
        loaded(IDS, power=3.0)


# -- weights -----------------------------------------------------------------------------------------------


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """Breaks if a view of a weight is stored beside it, or comes back with other strides."""
    explainer = fxlrp.lrp_compile(Tied().eval())
    expected = explainer(IDS)
    path = tmp_path / "tied.fxlrp"
    loaded = saved(explainer, path)
    assert_same(loaded(IDS), expected)
    shapes = [s["shape"] for n, s in _raw(path)[0].items() if n != "__metadata__"]
    assert shapes.count([48, 32]) == 1
    assert sum(torch.Size(s).numel() for s in shapes) <= 48 * 32 + 4 * 32 + 32 * 32 + 32


def _on_file(path: Path, tensor: Tensor) -> bool:
    """Whether a tensor's memory is a mapping of a file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(None, 5) if len(line.split(None, 5)) == 6 else (line.split()[0], "")
        start, stop = (int(x, 16) for x in span.split("-"))
        if start <= address < stop:
            return name == str(path.resolve())
    return False


def test_weights_are_mapped_from_the_file(tmp_path: Path) -> None:
    """Breaks if loading reads weights into memory of its own, where their sizes are whole cache lines."""
    explainer = fxlrp.lrp_compile(Tied().eval())
    explainer(IDS)
    path = tmp_path / "mapped.fxlrp"
    graph = saved(explainer, path, verify=False).relevance_graph
    tensors = [getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    assert len(tensors) >= 4 and all(_on_file(path, t) for t in tensors)
    assert not _on_file(path, torch.randn(9))


def test_every_dtype_and_view_survives(tmp_path: Path) -> None:
    """Breaks if bytes, strides, overlaps or empty tensors change on the way through a file."""
    base = torch.randn(6, 8)
    given_tensors = {
        **{f"d{i}": torch.randint(0, 2, (3, 4)).to(d) for i, d in enumerate(DTYPES.values())},
        "base": base,
        "transposed": base.t(),
        "first": base[:3, 1:],
        "apart": torch.arange(100.0)[90:],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }
    collected = weights.Pieces()
    numbers = {name: collected.add(name, tensor) for name, tensor in given_tensors.items()}
    assert collected.add("again", base) == numbers["base"]
    views, pieces = collected.packed()
    weights.write(tmp_path / "w", pieces, {})
    stored = weights.read(tmp_path / "w")
    for name, tensor in given_tensors.items():
        view = weights.View.from_data(json.loads(json.dumps(views[numbers[name]].to_data())), name)
        found = view.of(stored.aligned(view.piece), name)
        assert found.dtype is tensor.dtype and found.shape == tensor.shape
        assert found.stride() == tensor.stride() and found.data_ptr() % tensor.dtype.itemsize == 0
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor.resolve_conj()))
        assert torch.equal(ours, theirs), name
    assert stored.tensor(views[numbers["apart"]].piece).numel() == 10


def test_the_file_is_a_safetensors_file(file: Path) -> None:
    """Breaks if the header that we write is not what other readers expect."""
    from safetensors.torch import load_file

    names = {"bert.pooler.dense.weight", "classifier.weight"}
    assert names <= load_file(file).keys()
    assert file.read_bytes()[8 + int.from_bytes(file.read_bytes()[:8], "little") - 1 :][:1] in (b" ", b"}")


def test_weights_that_are_no_plain_tensors_are_refused() -> None:
    """Breaks if a weight with a class of its own, or a sparse one, is written as if it were plain."""

    class Own(Tensor):
        pass

    with pytest.raises(fxlrp.ArtifactError, match="'w' is a Own, not a plain tensor"):
        weights.Pieces().add("w", torch.randn(2).as_subclass(Own))
    with pytest.raises(fxlrp.ArtifactError, match="sparse"):
        weights.Pieces().add("w", torch.eye(2).to_sparse())


# -- without the model -------------------------------------------------------------------------------------

_ELSEWHERE = """
import builtins, pickle, sys, _pickle
import torch
blocked = ("transformers", "oracles")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
def trip(*args, **kwargs):
    raise SystemExit("something was unpickled or run as code")
class Unpickler:
    __init__ = trip
import fxlrp
pickle.load = pickle.loads = _pickle.load = _pickle.loads = torch.load = trip
pickle.Unpickler = _pickle.Unpickler = pickle._Unpickler = Unpickler
import sympy
sympy.sympify = sympy.parse_expr = trip
loaded = fxlrp.load(sys.argv[1])
ids = torch.tensor([[3, 5, 7, 2, 11], [1, 4, 9, 8, 6]])
mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
found = loaded(input_ids=ids, attention_mask=mask)
assert not {"transformers", "oracles"} & set(sys.modules)
print([x.hex() for x in found.relevance.flatten().tolist() + found.value.tolist()])
"""


def test_another_process_without_the_model_explains_the_same(
    text: tuple[fxlrp.Explainer, fxlrp.Explanation], file: Path
) -> None:
    """Breaks if loading imports the model's library, unpickles, or has sympy read text as code."""
    result = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = text[1].relevance.flatten().tolist() + text[1].value.tolist()
    assert result.stdout.strip() == str([x.hex() for x in expected])


def test_without_safetensors_the_error_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if the missing extra shows as an import error of some module inside."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        fxlrp.load(file)


def test_what_a_loaded_explainer_cannot_give_says_why(file: Path) -> None:
    """Breaks if output or ledger are missing without a word."""
    found = fxlrp.load(file)(IDS, MASK)
    with pytest.raises(fxlrp.ArtifactError, match="holds no model"):
        _ = found.output
    with pytest.raises(fxlrp.ArtifactError, match="Read it where the model is"):
        _ = found.ledger


@pytest.mark.slow
def test_native_code_runs_on_request_only(tmp_path: Path) -> None:
    """Breaks if native code is lost, fixes sizes, holds weights a second time, or runs unasked."""
    explainer = fxlrp.lrp_compile(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 3)).eval())
    x = torch.randn(4, 256)
    explainer(x, target=1)
    path = tmp_path / "native.fxlrp"
    explainer.save(path)
    with pytest.raises(fxlrp.ArtifactError, match="holds no native code"):
        fxlrp.load(path, aot=True)
    explainer.save(path, aot=True)
    for batch in (x, torch.randn(7, 256)):
        found = fxlrp.load(path, aot=True)(batch, target=2)
        torch.testing.assert_close(found.relevance, explainer(batch, target=2).relevance)
    assert_same(fxlrp.load(path)(x, target=1), explainer(x, target=1))


# -- inputs and targets that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_ids": IDS}, "Input 'attention_mask' is missing"),
        (
            {"input_ids": IDS, "attention_mask": MASK, "position_ids": IDS},
            "saved without input 'position_ids'",
        ),
        ({"input_ids": IDS.int(), "attention_mask": MASK}, r"takes torch.int64: input_ids.to\(torch.int64\)"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :4]},
            "Size 1 of input 'attention_mask' is 4, but Size 1",
        ),
        ({"input_ids": IDS, "attention_mask": MASK[0]}, "takes 2 dimensions"),
        ({"input_ids": IDS[:0], "attention_mask": MASK[:0]}, "is empty"),
        ({"attention_mask": MASK, "inputs_embeds": IDS}, "'input_ids' is missing"),
        (
            {"input_ids": IDS, "attention_mask": MASK, "return_dict": True},
            "saved without argument 'return_dict'",
        ),
        ({"input_ids": IDS.to("meta"), "attention_mask": MASK}, "is on meta"),
    ],
)
def test_inputs_that_do_not_fit_are_told(inputs: dict[str, Any], says: str, file: Path) -> None:
    """Breaks if an input that the program was not traced for runs, or fails inside it."""
    with pytest.raises(fxlrp.InputError, match=says):
        fxlrp.load(file)(**inputs)


def test_targets_that_were_not_saved_are_told(file: Path) -> None:
    """Breaks if a target runs in another one's program."""
    loaded = fxlrp.load(file)
    with pytest.raises(fxlrp.TargetError, match=r"saved for Predicted, not for Logit\. Explain once"):
        loaded(IDS, MASK, target=1)
    with pytest.raises(fxlrp.TargetError, match="leave the target out"):
        loaded(IDS, MASK, target=lambda output: output.logits[:, 0])


def test_fixed_sizes_and_one_input_only(tmp_path: Path) -> None:
    """Breaks if a program for fixed sizes takes others, or a trace of one input is saved."""
    fixed = fxlrp.lrp_compile(models.tiny_bert(), dynamic=False)
    fixed(IDS)
    loaded = saved(fixed, tmp_path / "fixed.fxlrp")
    with pytest.raises(
        fxlrp.InputError, match="Size 0 of input 'input_ids' is 1; this artifact was saved for 2"
    ):
        loaded(IDS[:1])

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if bool(x.sum() > 0) else -self.linear(x)

    branching = fxlrp.lrp_compile(Branching().eval())
    with pytest.raises(fxlrp.CaptureError, match="Call the explainer once"):
        branching.save(tmp_path / "none.fxlrp")
    branching(torch.ones(2, 4))
    with pytest.raises(fxlrp.ArtifactError, match="a trace of that very input"):
        branching.save(tmp_path / "none.fxlrp")


def test_nonfinite_inputs_are_refused(tmp_path: Path) -> None:
    """Breaks if NaN passes through a loaded program in silence."""
    explainer = fxlrp.lrp_compile(nn.Linear(4, 3).eval())
    explainer(torch.ones(2, 4))
    with pytest.raises(fxlrp.NonFiniteError, match="contains NaN"):
        saved(explainer, tmp_path / "n.fxlrp")(torch.full((2, 4), float("nan")))


# -- bad files ---------------------------------------------------------------------------------------------


def _raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header and data."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _write(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _changed(path: Path, out: Path, program: str | None = None, manifest: Any = None) -> None:
    """A copy with another program, signed anew, or another manifest."""
    header, data = _raw(path)
    metadata = header["__metadata__"]
    if program is not None:
        signed = json.loads(metadata[MANIFEST])
        signed["program"] = hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest()
        metadata[PROGRAM], metadata[MANIFEST] = program, json.dumps(signed)
    if manifest is not None:
        metadata[MANIFEST] = manifest(metadata[MANIFEST])
    _write(out, header, data)


def _first_call(program: Any) -> Any:
    return next(n for n in program["programs"][0]["graph"]["nodes"] if "op" in n)


def _edit(*path: Any, to: Any) -> Callable[[Any], None]:
    def edit(program: Any) -> None:
        for part in path[:-1]:
            program = program[part]
        program[path[-1]] = to

    return edit


def _op(name: str) -> Callable[[Any], None]:
    return lambda program: _first_call(program).update(op=name)


GRAPH = ("programs", 0, "graph")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_op("aten::from_file.default"), "takes 'filename', a str"),
        (_op("aten::add_.Tensor"), "writes to an operand"),
        (_op("aten::set_.source_Storage"), "no artifact may call"),
        (_op("aten::no_such_op.default"), "which PyTorch .* does not have"),
        (_op("os.system"), "'os.system', which no artifact may call"),
        (_op("operator.attrgetter"), "no artifact may call"),
        (_op("builtins.eval"), "no artifact may call"),
        (_op("aten::__class__.mro"), "does not have"),
        (_op("mylib::add.Tensor"), "no artifact may call"),
        (_edit(*GRAPH, "nodes", 0, "name", to="x; import os"), "is no name"),
        (_edit(*GRAPH, "nodes", 0, "name", to="lambda"), "taken"),
        (_edit(*GRAPH, "nodes", 1, "name", to="input_ids"), "which is taken"),
        (_edit(*GRAPH, "nodes", 0, "name", to="../../etc/passwd"), "is no name"),
        (_edit(*GRAPH, "nodes", 0, "input", to=5), "is input 5"),
        (_edit(*GRAPH, "output", to={"tuple": []}), "does not have the parts"),
        (_edit(*GRAPH, "output", to={"node": "nowhere"}), "does not come before it"),
        (lambda p: _first_call(p).update(args=[{"eval": "1"}]), "is no argument: 'eval'"),
        (lambda p: _first_call(p).update(args=[{"dtype": "object"}]), "is no argument"),
        (lambda p: _first_call(p).update(args=[1] * 50), "arguments that it does not take"),
        (lambda p: _first_call(p).update(kwargs={"x y": 1}), "arguments that it does not take"),
        (lambda p: _first_call(p).update(more=1), "has or lacks the keys 'more'"),
        (lambda p: _first_call(p).update(args=[[[[[[[[[[[[1]]]]]]]]]]]]), "nested too deeply"),
        (_edit("surplus", to=1), "keys 'surplus'"),
        (_edit("programs", to=[]), "programs is empty"),
        (_edit("programs", 0, "target", "names", to=[]), "names no kind"),
        (_edit("programs", 0, "operands", to=-1), "operands is -1"),
        (_edit("programs", 0, "results", "names", to=["a", "a"]), "'a' twice"),
        (_edit("programs", 0, "plan", "rows", to=[["one"]]), "eight texts"),
        (_edit("constants", 0, "dtype", to="float64 "), "has the dtype"),
        (_edit("constants", 0, "dtype", to="float32"), "but its tensor is torch.float64"),
        (_edit("constants", 0, "shape", to=[10**6, 16]), "reads .* elements of a tensor"),
        (_edit("constants", 0, "stride", to=[1]), "no stride for each size"),
        (_edit("constants", 0, "offset", to=-8), "negative offset"),
        (_edit("constants", 0, "piece", to="../weights"), "which is not there"),
        (_edit("constants", 0, "offset", to=True), "is a bool, not int"),
        (_edit("inputs", "names", to=["input_ids", "input_ids"]), "twice"),
        (_edit("inputs", "dtypes", to=["int64"]), "a name, a dtype and a shape for each"),
        (_edit("inputs", "device", to="nowhere:0"), "'nowhere:0' is none"),
        (_edit("inputs", "parameters", to=[["a b", "VAR_KEYWORD", False]]), "inputs.parameters"),
        (_edit("inputs", "sizes", "conditions", to=[["eval", "s0"]]), "is no expression"),
        (_edit("inputs", "sizes", "conditions", to=["other"]), "which is no size of an input"),
        (_edit("inputs", "sizes", "conditions", to=[["pow", 2, 10**9]]), "exponent"),
        (_edit("inputs", "sizes", "ranges", to={"s0": [2]}), "ranges"),
        (_edit("inputs", "sizes", "ones", to=[[True]]), "one entry for each size"),
        (_edit("logits", "mask", to="elsewhere"), "which is no input"),
        (_edit("logits", "shape", to=[1] * 4), "has 4 dimensions"),
    ],
)
def test_programs_that_break_the_format_are_refused(
    edit: Callable[[Any], None], says: str, file: Path, tmp_path: Path
) -> None:
    """Breaks if anything outside of the format gets past the reader, even where checksums fit."""
    program = json.loads(_raw(file)[0]["__metadata__"][PROGRAM])
    edit(program)
    _changed(file, tmp_path / "bad", json.dumps(program))
    with pytest.raises(fxlrp.ArtifactError, match=says):
        fxlrp.load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("[" * 10**5, "nested too deeply"),
        ('{"inputs": {}, "inputs": {}}', "a key twice"),
        ('{"inputs": NaN}', "NaN is no JSON"),
        (f'{{"inputs": {2**64}}}', "more than 64 bits"),
        ("1" * 5000, "is not the JSON"),
        ("[]", "not an object"),
        ("", "is not the JSON"),
    ],
)
def test_json_that_breaks_the_format_is_refused(program: str, says: str, file: Path, tmp_path: Path) -> None:
    """Breaks if Python's own leniency or its errors come through."""
    _changed(file, tmp_path / "bad", program)
    with pytest.raises(fxlrp.ArtifactError, match=says):
        fxlrp.load(tmp_path / "bad")


def test_files_that_are_damaged_or_none_are_refused(file: Path, tmp_path: Path) -> None:
    """Breaks if a file that was cut, changed or never an artifact loads, or fails with another error."""
    content, bad = file.read_bytes(), tmp_path / "bad"

    def refused(says: str, **options: Any) -> None:
        with pytest.raises(fxlrp.ArtifactError, match=says):
            fxlrp.load(bad, **options)

    refused("There is no file")
    for stop in (0, 7, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:stop])
        refused("cut short or changed")
    bad.write_bytes(content + b"\0")
    refused("cut short or changed")
    bad.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    refused("is not what was saved")
    fxlrp.load(bad, verify=False)
    _changed(file, bad, manifest=lambda text: text.replace('"format":1', '"format":2'))
    refused("has format 2")
    _changed(file, bad, manifest=lambda text: text.replace('"format":1', '"format":true'))
    refused("format")
    _changed(file, bad, manifest=lambda text: "{}")
    refused("has format None")
    header, data = _raw(file)
    del header["__metadata__"][MANIFEST]
    _write(bad, header, data)
    refused("no artifact")
    header, data = _raw(file)
    header["__metadata__"]["more"] = "x"
    _write(bad, header, data)
    refused("metadata has the keys")
    header, data = _raw(file)
    header["surplus"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    _write(bad, header, data + b"abcd")
    refused("does not name the file's tensors")
    header, data = _raw(file)
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = [1, *header[name]["shape"][1:]]
    _write(bad, header, data)
    refused("cut short or changed")
    with pytest.raises(fxlrp.InputError, match="no backend"):
        fxlrp.load(file, backend="fast")


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_is_an_error_or_changes_nothing(
    place: float, flip: int, file: Path, text: tuple[fxlrp.Explainer, fxlrp.Explanation]
) -> None:
    """Breaks if a damaged file raises anything but ArtifactError, or explains something else."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= flip
    bad = file.with_suffix(".flipped")
    bad.write_bytes(content)
    try:
        loaded = fxlrp.load(bad)
    except fxlrp.ArtifactError:
        return
    assert_same(loaded(IDS, MASK), text[1])


@given(data=st.data())
def test_a_flipped_byte_of_a_signed_program_is_an_error_or_loads(data: st.DataObject, file: Path) -> None:
    """Breaks if a program that was changed on purpose raises anything but ArtifactError when loaded."""
    program = bytearray(_raw(file)[0]["__metadata__"][PROGRAM].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(program) - 1))
        program[place] = data.draw(st.sampled_from(b'{}[]",:0123456789-.eaintulfs '))
    bad = file.with_suffix(".signed")
    _changed(file, bad, program.decode())
    try:
        fxlrp.load(bad, verify=False)
    except fxlrp.ArtifactError:
        return


# -- the list of ops ---------------------------------------------------------------------------------------


def test_no_op_on_the_list_takes_files_or_writes() -> None:
    """Breaks if an op of this PyTorch that names a file, prints or writes to an operand can be called."""
    allowed = set()
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.partition(".")
        try:
            ops.resolve(f"{name}.{overload or 'default'}")
        except fxlrp.ArtifactError:
            continue
        allowed.add(full)
    assert {"aten::mm", "aten::linear", "aten::add.Tensor"} <= allowed
    files = {n for n in allowed if any(w in n for w in ("from_file", "_print", "set.source_Storage"))}
    assert not files and not {n for n in allowed if n.split(".")[0].endswith("_") and "__" not in n}
    assert not any(f in ops.FUNCTIONS.values() for f in (eval, exec, open, getattr, __import__))


def test_another_librarys_ops_are_told_while_saving(tmp_path: Path) -> None:
    """Breaks if an op whose code would not be there is written into a file that cannot be loaded."""
    with torch.library._scoped_library("artifact_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        with pytest.raises(fxlrp.ArtifactError, match="'artifact_test' is another library"):
            ops.name_of(torch.ops.artifact_test.twice.default)
    with pytest.raises(fxlrp.ArtifactError, match="no op of PyTorch's dispatcher"):
        ops.name_of(copy.copy)


# -- inspection --------------------------------------------------------------------------------------------


def test_inspect_shows_inputs_targets_and_plan(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the command shows less than the file says, or a traceback on what is no artifact."""
    assert cli.main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "BertForSequenceClassification, explained by attnlrp",
        "input_ids: int64",
        "target Predicted",
    ):
        assert part in shown
    assert "AttentionRule()" in shown and inspect(file).composite_json is not None
    (tmp_path / "none").write_text("no artifact")
    assert cli.main(["inspect", str(tmp_path / "none")]) == 1
    assert "is no artifact" in capsys.readouterr().err
