"""A self-contained HTML page of tokens coloured by relevance: no script, no font, no file from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from fxlrp.report._values import BLUE, RED, Scale, is_dark, limits, number, pieces, rgb, token_values

Cell = str | int | float


def write_html(
    path: str | Path,
    tokens: Sequence[str],
    relevance: Mapping[str, Tensor],
    *,
    scale: Scale = "shared",
    title: str = "Relevance",
    predicted: str | None = None,
    explained: float | Mapping[str, float] | None = None,
    ledger: Sequence[Sequence[Cell]] | None = None,
    ledger_header: Sequence[str] = ("node", "relevance"),
) -> Path:
    """Write `render_html` to `path` and return it."""
    page = render_html(
        tokens,
        relevance,
        scale=scale,
        title=title,
        predicted=predicted,
        explained=explained,
        ledger=ledger,
        ledger_header=ledger_header,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def render_html(
    tokens: Sequence[str],
    relevance: Mapping[str, Tensor],
    *,
    scale: Scale = "shared",
    title: str = "Relevance",
    predicted: str | None = None,
    explained: float | Mapping[str, float] | None = None,
    ledger: Sequence[Sequence[Cell]] | None = None,
    ledger_header: Sequence[str] = ("node", "relevance"),
) -> str:
    """Return a page with the S tokens once per method, coloured by its relevance [S].

    - `predicted`: the class to name at the top.
    - `explained`: the explained value, one for all methods or one for each.
    - `ledger`: rows of a table under the heatmaps, such as the relevance that each node kept for itself;
      numbers are right-aligned, and every row is as long as `ledger_header`.

    Raises ValueError where a method's shape is not [S], a value is not finite or a row has another length.
    """
    values = token_values(tokens, relevance)
    peaks = limits(values, scale)
    shown = pieces(tokens)
    each = explained if isinstance(explained, Mapping) else {}
    if unknown := each.keys() - values.keys():
        raise ValueError(f"an explained value is given for {sorted(unknown)}, but there is no such method")
    facts = _facts(
        predicted, None if explained is None or isinstance(explained, Mapping) else float(explained)
    )
    cards = []
    for name, row in values.items():
        legend = _legend(peaks[name]) if scale == "method" else ""
        cards.append(_card(name, shown, row, peaks[name], each.get(name), legend))
    legend = _legend(next(iter(peaks.values()))) if scale == "shared" else ""
    table = "" if ledger is None else _table(ledger, ledger_header)
    return _PAGE.format(
        title=escape(title), style=_STYLE, facts=facts, cards="\n".join(cards), legend=legend, table=table
    )


def _facts(predicted: str | None, explained: float | None) -> str:
    facts = []
    if predicted is not None:
        facts.append(f"<div><dt>Predicted class</dt><dd>{escape(predicted)}</dd></div>")
    if explained is not None:
        facts.append(f"<div><dt>Explained value</dt><dd>{number(explained)}</dd></div>")
    return f'<dl class="facts">{"".join(facts)}</dl>' if facts else ""


def _card(
    name: str, shown: Sequence[str], row: Sequence[float], peak: float, explained: float | None, legend: str
) -> str:
    sums = f"&Sigma;R = {number(sum(row))}"
    if explained is not None:
        sums += f" &middot; explained {number(explained)}"
    text = "".join(_token(piece, value, value / peak) for piece, value in zip(shown, row, strict=True))
    head = f"<h2>{escape(name)} <small>{sums}</small></h2>"
    return f'<section>{head}\n<p class="tokens">{text}</p>{legend}</section>'


def _token(piece: str, value: float, share: float) -> str:
    # Colour over the page's own ground by opacity, so that 0 is the page itself, light or dark.
    kind = "p" if share > 0 else "n"
    strong = " s" if is_dark(rgb(share)) else ""
    space, word = (" ", piece[1:]) if piece.startswith(" ") else ("", piece)
    return (
        f'{space}<span class="t {kind}{strong}" style="--a:{min(abs(share), 1):.3f}" '
        f'data-r="{number(value)}" tabindex="0">{escape(word) or "&nbsp;"}</span>'
    )


def _legend(peak: float) -> str:
    return (
        f'<div class="legend"><span>speaks against</span><b>{number(-peak)}</b><i class="bar"></i>'
        f"<b>{number(peak)}</b><span>speaks for the explained value</span></div>"
    )


def _table(rows: Sequence[Sequence[Cell]], header: Sequence[str]) -> str:
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"ledger row {index} has {len(row)} cells, but the header has {len(header)}")
    columns = range(len(header))
    numeric = [all(isinstance(row[k], int | float) for row in rows) for k in columns]
    head = "".join(
        f"<th{_right(is_number)}>{escape(cell)}</th>" for cell, is_number in zip(header, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{_right(n)}>{escape(_cell(cell))}</td>" for cell, n in zip(row, numeric, strict=True))
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<section><h2>Ledger</h2>\n<div class="scroll">{table}</div></section>'


def _right(is_number: bool) -> str:
    return ' class="r"' if is_number else ""


def _cell(cell: Cell) -> str:
    return number(cell) if isinstance(cell, float) else str(cell)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{facts}
{cards}
{legend}
{table}
</main>
</body>
</html>
"""

_STYLE = (
    ":root{--red:" + ",".join(map(str, RED)) + ";--blue:" + ",".join(map(str, BLUE)) + ";"
    """--ground:#fff;--card:#fafafb;--ink:#17181c;--soft:#62656e;--line:#e2e3e8;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--red:226,62,72;--blue:72,122,238;
--ground:#131418;--card:#1a1c21;--ink:#eceef2;--soft:#9a9eaa;--line:#2c2f37}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.2rem 1.4rem 4rem}
h1{font-size:1.5rem;font-weight:650;margin:0 0 1rem;letter-spacing:-.01em}
h2{font-size:.95rem;font-weight:600;margin:0 0 .5rem}
h2 small{font-weight:400;color:var(--soft);margin-left:.6rem;font-variant-numeric:tabular-nums}
.facts{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem;margin:0 0 1.4rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.1rem;font-weight:600;font-variant-numeric:tabular-nums}
section{border:1px solid var(--line);background:var(--card);border-radius:10px;
padding:.9rem 1.1rem;margin:0 0 .9rem}
.tokens{margin:0;font-size:1.12rem;line-height:2.05;white-space:pre-wrap;overflow-wrap:anywhere}
.t{position:relative;padding:.22em .1em;margin:0 -.03em;border-radius:.25em;outline-offset:1px;cursor:default}
.p{background:rgba(var(--red),var(--a))}
.n{background:rgba(var(--blue),var(--a))}
.s{color:#fff}
.t:hover,.t:focus-visible{outline:2px solid var(--ink)}
.t:hover::after,.t:focus-visible::after{content:attr(data-r);position:absolute;left:50%;bottom:100%;
transform:translate(-50%,-5px);background:var(--ink);color:var(--ground);font-size:.8rem;line-height:1.5;
padding:.1em .55em;border-radius:.35em;white-space:nowrap;z-index:1;pointer-events:none;
font-variant-numeric:tabular-nums}
.legend{display:flex;align-items:center;flex-wrap:wrap;gap:.6rem;margin:.2rem 0 1.4rem;color:var(--soft);
font-size:.82rem;font-variant-numeric:tabular-nums}
section .legend{margin:.5rem 0 0}
.legend b{font-weight:500;color:var(--ink)}
.bar{width:11rem;height:.75rem;border-radius:3px;border:1px solid var(--line);
background:linear-gradient(90deg,rgb(var(--blue)),rgba(var(--blue),0) 50%,
rgba(var(--red),0) 50%,rgb(var(--red)))}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{padding:.35rem .8rem .35rem 0;text-align:left;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:500}
tbody tr:last-child td{border-bottom:0}
tr>:last-child{padding-right:0}
.r{text-align:right;font-variant-numeric:tabular-nums}
@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)
