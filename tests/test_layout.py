"""What holds for the source as a whole: no architecture has a name in it, and little is imported."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "fxlrp"

FAMILIES = (
    "llama|mistral|mixtral|qwen|gemma|gpt2|gpt[-_]?neox?|gpt[-_]?j|gpt[-_]?oss|deepseek|olmo|falcon|bloom"
    "|bert|roberta|distilbert|albert|deberta|electra|xlnet|t5|bart|pegasus|opt-[0-9]+"
    "|vit|deit|swin|beit|convnext|dinov[0-9]|siglip|whisper|wav2vec2?"
)
# A name begins a word, or a hump of a CamelCase one, and no small letter follows it: Llama3, TinyLlama,
# XLMRoberta, bert_layer; but not vitamin, and not Hilbert.
WORD = re.compile(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]))(?i:{FAMILIES})(?![a-z])")
MODULE_PATH = re.compile(r"transformers\.models|\bmodeling_[a-z]")
BINARY = {".safetensors", ".pt", ".npz", ".png"}


def architecture_names(text: str) -> list[str]:
    return [match.group() for pattern in (WORD, MODULE_PATH) for match in pattern.finditer(text)]


def source_files() -> Iterator[Path]:
    """Every text file of the package but those of the demo, which may name the models it shows."""
    for path in sorted(PACKAGE.rglob("*")):
        parts = path.relative_to(PACKAGE).parts
        if path.is_file() and parts[0] != "demo" and "__pycache__" not in parts and path.suffix not in BINARY:
            yield path


@pytest.mark.parametrize(
    "text",
    [
        "llama",
        "if kind == 'LlamaRMSNorm':",
        "# as in Qwen2-MoE",
        "TinyLlama",
        "XLMRobertaLayer",
        "bert_layer",
        "BERT",
        "ModernBert",
        "ViTSelfAttention",
        "gpt_neox",
        "GPTNeoX",
        "T5Block",
        "SwinLayer",
        "from transformers.models.x import y",
        "modeling_utils",
    ],
)
def test_an_architecture_name_is_seen(text: str) -> None:
    assert architecture_names(text)


@pytest.mark.parametrize(
    "text", ["vitamin", "Hilbert space", "invites", "t = 5", "art5", "Φ(x), phi", "gelu", "modeling"]
)
def test_other_words_are_not_taken_for_one(text: str) -> None:
    assert not architecture_names(text)


def test_the_package_names_no_architecture() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {', '.join(names)}"
        for path in source_files()
        for number, line in enumerate([path.name, *path.read_text(encoding="utf-8").splitlines()])
        if (names := architecture_names(line))
    ]
    assert not found, "the compiler knows ops and patterns, not architectures (line 0: the file's name)"


def test_the_package_names_nothing_of_transformers() -> None:
    """No class of the library, and of its model types only those that are words of other meaning too."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    words = {
        word
        for path in source_files()
        for word in re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8"))
    }
    classes = {name for name in dir(transformers) if name[:1].isupper()}
    assert len(classes) > 1000
    assert not words & classes
    types = {name.replace("-", "_") for name in CONFIG_MAPPING_NAMES}
    preset = {"mamba"}  # composite="mamba" is a paper's rules, for whatever has such a scan
    assert {word.lower() for word in words} & types <= {"align", "clip", "phi"} | preset


def imported_packages(source: str) -> set[str]:
    """The top-level names of every import in the source, in functions and under conditions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value).split(".")[0])
    return names


def test_imports_are_seen_wherever_they_stand() -> None:
    assert imported_packages("def f():\n    import a.b as c\n    from d.e import g") == {"a", "d"}
    assert imported_packages("importlib.import_module('a.b')\n__import__('c')") == {"a", "c"}
    assert imported_packages("from . import x\nfrom .y import z\nimport_module(name)") == set()


def test_nothing_imports_transformers() -> None:
    found = [
        str(path.relative_to(REPOSITORY))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "transformers" in imported_packages(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_core_depends_on_torch_and_networkx_only() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in project["dependencies"]]
    assert sorted(names) == ["networkx", "torch"]


def test_only_the_code_of_kernels_imports_triton() -> None:
    """Would break if the package could not be imported, or its references run, without Triton."""
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "triton" in imported_packages(path.read_text(encoding="utf-8"))
    ]
    code = re.compile(r"kernels/\w+/(?!__init__|reference)\w+\.py")  # beside an op and its reference
    assert [path for path in found if not code.fullmatch(path)] == []


def test_importing_the_package_loads_no_extra() -> None:
    """What torch loads for itself is torch's affair: its tracer loads Triton where that is installed."""
    program = (
        "import sys, torch, torch.export, torch._dynamo; before = set(sys.modules)\n"
        "import fxlrp\n"
        "print(*sorted({'transformers', 'matplotlib', 'triton'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
