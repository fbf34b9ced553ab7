"""The progress bar: hands all items on, says something where it takes long, and nothing where it does not."""

from __future__ import annotations

import io

import pytest

from fxlrp import progress as module
from fxlrp.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_all_items_in_order_and_nothing_shown_where_it_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Would break: items lost, or a bar for a loop of a moment."""
    assert list(progress(range(5), "loop")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("abc"), "loop")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_what_takes_long_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would break: no sign of life in a long loop whose end is not known, or in a log file."""
    monkeypatch.setattr(module, "_LOG", 0.0)
    assert list(progress([1, 2], "loop")) == [1, 2]
    assert [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()] == [
        "loop: 0/2",
        "loop: 1/2",
    ]
    list(progress(iter([1, 2]), "loop"))
    assert capsys.readouterr().err.splitlines()[1].startswith("loop: 1, ")
    list(progress([1, 2], "loop", shown=False))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_line_moves_and_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break: a bar that leaves itself behind, or that fills the screen line by line."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(module, "_DELAY", 0.0)
    monkeypatch.setattr(module, "_TERMINAL", 0.0)
    list(progress(range(4), "loop"))
    shown = terminal.getvalue()
    assert "\n" not in shown and "loop: 3/4 [" in shown
    assert shown.endswith("\r" + " " * 79 + "\r")
