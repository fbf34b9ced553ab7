"""The reports: what they show, what they escape, and what they refuse."""

import io
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxlrp.report import print_tokens, render_html, render_image, render_tokens, rgb, save_image, write_html
from fxlrp.report._values import is_dark, number, pieces
from fxlrp.report.terminal import wants_color

TOKENS = ["A", " fine", " film", "."]
RELEVANCE = {"first": torch.tensor([0.0, 2.0, -1.0, 0.5]), "second": torch.tensor([0.1, 0.2, -0.4, 0.0])}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_color_is_red_for_positive_blue_for_negative_and_white_at_zero() -> None:
    red, blue = rgb(1.0), rgb(-1.0)
    assert red[0] > 2 * max(red[1:])
    assert blue[2] > 1.5 * max(blue[:2])
    assert rgb(0.0) == (255, 255, 255)
    assert rgb(7.0) == red


@pytest.mark.parametrize("share", [step / 20 - 1 for step in range(41)])
def test_ink_is_readable_on_every_color(share: float) -> None:
    ground = [c / 255 for c in rgb(share)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    contrast = 1.05 / (luminance + 0.05) if is_dark(rgb(share)) else (luminance + 0.05) / 0.05
    assert contrast >= 4.5  # WCAG AA


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["a", "film", "##s", "."], "a films ."),
        (["▁a", "▁film", "s", "."], "a films."),
        (["a", "Ġfilm", "s"], "a films"),
        (["A", " film", "s", "."], "A films."),
        (["a\n", "\x1b[31m"], "a⏎ �[31m"),
    ],
)
def test_pieces_read_like_the_text(tokens: list[str], text: str) -> None:
    assert "".join(pieces(tokens)) == text


def test_terminal_paints_each_token_in_its_color() -> None:
    lines = render_tokens(TOKENS, RELEVANCE, title="title").splitlines()
    first = next(line for line in lines if line.startswith("first"))
    assert ANSI.sub("", first).split() == ["first", "A", "fine", "film."]
    red, blue = ";".join(map(str, rgb(1.0))), ";".join(map(str, rgb(-0.5)))
    assert f"48;2;{red}m fine" in first
    assert f"48;2;{blue}m film" in first


def test_terminal_scale_is_shared_or_per_method() -> None:
    full = f"48;2;{';'.join(map(str, rgb(-1.0)))}m film"
    assert full not in render_tokens(TOKENS, RELEVANCE)
    assert full in render_tokens(TOKENS, RELEVANCE, scale="method")
    with pytest.raises(ValueError, match="scale is 'shared' or 'method'"):
        render_tokens(TOKENS, RELEVANCE, scale="each")  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [40, 80])
def test_terminal_wraps_at_words_within_the_width(width: int) -> None:
    tokens = ["word", *[" word"] * 40, "s"]
    text = ANSI.sub("", render_tokens(tokens, {"method": torch.ones(42)}, width=width))
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("words") == 1
    assert text.count("word") == 41


def test_no_color_gives_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(Terminal())
    assert not wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_tokens(TOKENS, RELEVANCE, file=stream)
    plain = stream.getvalue()
    assert "\x1b" not in plain
    assert [line.split() for line in plain.splitlines()] == [
        ["token", "first", "second"],
        ["A", "+0.000", "+0.100"],
        ["fine", "+2.000", "+0.200"],
        ["film", "-1.000", "-0.400"],
        [".", "+0.500", "+0.000"],
        ["sum", "+1.500", "-0.100"],
    ]
    monkeypatch.setenv("NO_COLOR", "")
    assert wants_color(Terminal())


def test_terminal_image_shows_two_pixels_per_half_block() -> None:
    grid = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    text = render_image({"method": grid}, image=torch.eye(2), zoom=1)
    top, bottom = (";".join(map(str, rgb(share))) for share in (1.0, -1.0))
    assert f"\x1b[38;2;{top};48;2;{bottom}m▀" in text
    assert ANSI.sub("", text).splitlines()[0].split() == ["input", "method"]
    plain = render_image({"method": grid}, color=False)
    assert "\x1b" not in plain
    assert "-1.000 +0.500" in plain


class Page(HTMLParser):
    """Collects the text, the tags and the data-r of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.shown: list[tuple[str, str]] = []
        self.text = ""
        self._value: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        self._value = found.get("data-r")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._value is not None:
            self.shown.append((data, self._value))
            self._value = None


def test_html_shows_tokens_with_their_relevance() -> None:
    page = Page(render_html(TOKENS, RELEVANCE, predicted="positive", explained=torch.tensor(1.5).item()))
    assert page.shown == [
        (token.strip(), number(value))
        for values in RELEVANCE.values()
        for token, value in zip(TOKENS, values.tolist(), strict=True)
    ]
    assert "A fine film." in page.text
    assert "positive" in page.text
    assert "+1.5" in page.text


def test_html_escapes_everything_it_is_given() -> None:
    evil = "<script>alert('x')</script>&\""
    page = render_html(
        [evil, "b"],
        {evil: torch.ones(2)},
        title=evil,
        predicted=evil,
        ledger=[[evil, 1.0]],
        ledger_header=(evil, "relevance"),
    )
    assert "<script" not in page
    assert Page(page).text.count("alert('x')") == 7  # title twice, class, method, token, header, cell


def test_html_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_html(tmp_path / "new" / "page.html", TOKENS, RELEVANCE)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.addresses
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text


def test_html_ledger_is_a_table_of_equal_rows() -> None:
    page = render_html(TOKENS, RELEVANCE, ledger=[["bias", 0.25], ["softmax", -1.0]])
    assert '<td class="r">+0.25</td>' in page
    with pytest.raises(ValueError, match="ledger row 1 has 1 cells, but the header has 2"):
        render_html(TOKENS, RELEVANCE, ledger=[["bias", 0.25], ["softmax"]])


def test_html_explained_value_per_method() -> None:
    page = Page(render_html(TOKENS, RELEVANCE, explained={"first": 1.5}))
    assert "explained +1.5" in page.text
    with pytest.raises(ValueError, match="no such method"):
        render_html(TOKENS, RELEVANCE, explained={"third": 1.5})


Render = Callable[[list[str], dict[str, Tensor]], str]


@pytest.mark.parametrize("render", [render_tokens, render_html])
def test_tokens_and_relevance_must_match(render: Render) -> None:
    with pytest.raises(ValueError, match=r"'m' has shape \[3\], but there are 2 tokens"):
        render(["a", "b"], {"m": torch.ones(3)})
    with pytest.raises(ValueError, match=r"shape \[1, 2\]"):
        render(["a", "b"], {"m": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="1 values that are not finite"):
        render(["a", "b"], {"m": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ValueError, match="at least one method"):
        render(["a", "b"], {})
    with pytest.raises(ValueError, match="no tokens"):
        render([], {"m": torch.ones(0)})


@pytest.mark.parametrize("render", [render_tokens, render_html])
def test_relevance_of_zero_and_of_any_dtype_is_shown(render: Render) -> None:
    assert render(["a"], {"m": torch.zeros(1)})
    assert render(["a"], {"m": torch.ones(1, dtype=torch.bfloat16, requires_grad=True)})


def png(path: Path) -> Tensor:
    """Return a PNG as [H, W, 3] in [0, 1]."""
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    return torch.as_tensor(image.imread(path))[..., :3]


@pytest.mark.parametrize("scale", ["shared", "method"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8)])
def test_png_has_the_expected_size_and_colors(tmp_path: Path, scale: str, height: int, width: int) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    relevance = torch.zeros(1, height, width)
    relevance[0, 0, 0], relevance[0, -1, -1] = 1.0, -1.0
    maps = {"a": relevance, "b": relevance / 2}
    path = save_image(
        tmp_path / "a.png",
        torch.rand(1, height, width),
        maps,
        scale=scale,  # type: ignore[arg-type]
        panel=2.0,
        dpi=100,
    )
    pixels = png(path)
    bars = 2 if scale == "method" else 1
    # Edges of 0.2, gaps of 0.3, a bar of 0.85 and names of 0.35 inches.
    wide = 100 * (0.2 + 2.0 + 2 * (0.3 + 2.0) + bars * 0.85 + 0.2)
    high = 100 * (0.2 + 2.0 * height / width + 0.35)
    assert abs(pixels.shape[1] - wide) <= 1
    assert abs(pixels.shape[0] - high) <= 1

    # The first pixel of the first heatmap is red, the last one blue, between them white.
    left, top, cell = 250, 35, 200 / width
    corner = pixels[int(top + cell / 2), int(left + cell / 2)]
    end = pixels[int(top + (height - 0.5) * cell), int(left + 200 - cell / 2)]
    middle = pixels[int(top + (height - 0.5) * cell), int(left + cell / 2)]
    torch.testing.assert_close(corner, torch.tensor(rgb(1.0)) / 255, atol=0.02, rtol=0)
    torch.testing.assert_close(end, torch.tensor(rgb(-1.0)) / 255, atol=0.02, rtol=0)
    torch.testing.assert_close(middle, torch.ones(3), atol=0.02, rtol=0)


def test_png_refuses_other_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \[4, 4\], but there are 8 x 8 pixels"):
        save_image(tmp_path / "a.png", torch.rand(1, 8, 8), {"m": torch.rand(4, 4)})
    with pytest.raises(ValueError, match="1 or 3 channels"):
        save_image(tmp_path / "a.png", torch.rand(2, 8, 8), {"m": torch.rand(8, 8)})
    with pytest.raises(ValueError, match="give one image"):
        save_image(tmp_path / "a.png", torch.rand(1, 8, 8), {"m": torch.rand(1, 1, 8, 8)})


def test_png_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.colors", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install fxlrp\[report\]"):
        save_image(tmp_path / "a.png", torch.rand(2, 2), {"m": torch.rand(2, 2)})
