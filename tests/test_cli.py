"""The command: what it prints and writes, and what it refuses."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

import fxlrp
from fxlrp.cli import DEFAULT_TEXT, DIGIT_METHODS, SENTENCE_METHODS, choose_text, main
from fxlrp.demo.sentiment import MAX_LENGTH

for package in ("safetensors", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed")

TEXT = 'it\'s a <b>"great"</b> & $5 film'


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of the demo, with its text from the environment, as make gives it."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("FXLRP_TEXT", TEXT)
        code = main(["demo", "--out", str(folder), "--digit", "0"])
    return Run(code, out.getvalue(), err.getvalue(), folder)


def test_the_demo_succeeds_and_says_where_its_files_are(demo: Run) -> None:
    assert demo.code == 0
    for name in ("sentence.html", "digit.png"):
        assert (demo.folder / name).stat().st_size > 1000
        assert str(demo.folder / name) in demo.out
    assert (demo.folder / "digit.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_prints_prediction_methods_and_ledgers(demo: Run) -> None:
    assert "Sentiment: positive" in demo.out
    assert "Digit: 2" in demo.out
    assert "great" in demo.out
    for method in {*SENTENCE_METHODS, *DIGIT_METHODS}:
        assert method in demo.out
    for row in ("input_ids", "pixel_values", "remainder", "bias", "gap"):
        assert row in demo.out
    assert (
        demo.out.count("explained value") == 2 * 2
    )  # the ledger's row and the line above it, for both models


def test_progress_goes_to_stderr(demo: Run) -> None:
    assert demo.err.count("compiling") == len(SENTENCE_METHODS) + len(DIGIT_METHODS)
    assert "compiling" not in demo.out


def test_text_is_escaped_in_the_page(demo: Run) -> None:
    page = (demo.folder / "sentence.html").read_text(encoding="utf-8")
    assert "<b>" not in page.split('class="tokens"')[1].split("</p>")[0]
    assert "&lt;" in page
    assert "&amp;" in page
    assert "&quot;" in page
    assert ">great<" in unescape(page)


def test_the_page_is_self_contained_and_has_the_ledger(demo: Run) -> None:
    page = (demo.folder / "sentence.html").read_text(encoding="utf-8")
    assert page.count('class="tokens"') == len(SENTENCE_METHODS)
    assert "<td>input_ids</td>" in page
    assert "<td>gap</td>" in page
    for outside in ("<script", "<link", "src=", "url(", "http"):
        assert outside not in page


def test_text_comes_from_the_option_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXLRP_TEXT", raising=False)
    assert choose_text(None) == DEFAULT_TEXT
    monkeypatch.setenv("FXLRP_TEXT", "")
    assert choose_text(None) == DEFAULT_TEXT
    monkeypatch.setenv("FXLRP_TEXT", "from outside")
    assert choose_text(None) == "from outside"
    assert choose_text("given") == "given"


def test_bytes_that_are_no_text_can_be_written_out_again() -> None:
    assert choose_text(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\ufffd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        (" \t\n\u2003", "the text is empty"),
        ("good " * (MAX_LENGTH + 1), f"reads {MAX_LENGTH} tokens"),
        ("z" * 100_000, f"reads {MAX_LENGTH} tokens"),
    ],
)
def test_text_that_cannot_be_explained_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--text", text, "--out", str(tmp_path / "out")]) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.err.startswith("fxlrp: error: ")
    assert len(streams.err) < 300
    assert streams.out == ""
    assert not (tmp_path / "out").exists()


def test_spaces_from_the_environment_are_refused_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXLRP_TEXT", "   ")
    assert main(["demo"]) == 2
    assert "the text is empty" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["-1", "360", "seven"])
def test_a_digit_that_does_not_exist_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["demo", f"--digit={number}"])
    assert refusal.value.code == 2
    assert "give a number from 0 to 359" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("taken")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fxlrp {fxlrp.__version__}\n"


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "usage: fxlrp" in capsys.readouterr().err


def test_composites_are_listed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All presets with their sources, one as a table, and a composite from its file."""
    assert main(["composites"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(fxlrp.composites)
    assert main(["composites", "cp"]) == 0
    assert "FrozenAttention()" in capsys.readouterr().out
    file = tmp_path / "mine.json"
    file.write_text(fxlrp.Composite([(fxlrp.op("softmax"), fxlrp.rules.Freeze())], title="mine").to_json())
    assert main(["composites", str(file)]) == 0
    assert capsys.readouterr().out.startswith("mine, on top of attnlrp")


def test_a_composite_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names what there is, and the exit status tells scripts."""
    assert main(["composites", "attnlpr"]) == 2
    assert "did you mean 'attnlrp'" in capsys.readouterr().err
