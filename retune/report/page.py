"""HTML of the page's parts.  Every text from data goes through `escape`; `Html` marks what has.

Knows markup alone: nothing of retrieval, tables or plots.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from retune.report.style import STYLE


class Html(str):
    """Markup that is safe as it stands; any other string is a text, to be escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with its place in the navigation."""

    anchor: str
    title: str
    body: Html


def escape(value: object) -> Html:
    """`value` as markup: `Html` as it is, everything else escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(escape(part) for part in parts))


def tag(name: str, *content: object, css: str = "") -> Html:
    """An element around `content`."""
    return Html(f"<{name}{_css(css)}>{join(content)}</{name}>")


def _css(name: str) -> str:
    return f' class="{html.escape(name, quote=True)}"' if name else ""


def paragraph(*content: object, css: str = "") -> Html:
    return tag("p", *content, css=css)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> Html:
    """A table that scrolls sideways where it must; the first cell of a row is its heading.

    Args:
        head: headings of the columns.
        rows: cells.
        numbers: indices of columns that are set to the right.
    """
    right = set(numbers)

    def cell(name: str, index: int, content: object, scope: str = "") -> str:
        return f"<{name}{_css('n' if index in right else '')}{scope}>{escape(content)}</{name}>"

    top = "".join(cell("th", i, content, ' scope="col"') for i, content in enumerate(head))
    lines = []
    for row in rows:
        first = cell("th", 0, row[0], ' scope="row"')
        lines.append(f"<tr>{first}{''.join(cell('td', i, row[i]) for i in range(1, len(row)))}</tr>")
    body = "\n".join(lines)
    return Html(f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>')


def figure(title: object, drawing: Html, caption: object = "") -> Html:
    """A plot with what it shows above and what to see in it below."""
    return tag("figure", tag("b", title), drawing, tag("figcaption", caption) if caption else "")


def cards(items: Iterable[tuple[str, object, object, str]]) -> Html:
    """Boxes of (name, value, note, CSS class)."""
    boxes = [tag("div", tag("span", name, css="name"), tag("b", value), tag("span", note), css=f"card {css}".strip())
             for name, value, note, css in items]  # fmt: skip
    return tag("div", *boxes, css="cards by-three" if len(boxes) % 3 == 0 else "cards")


def details(title: object, *content: object, css: str = "", opened: bool = False) -> Html:
    """Content that is folded away until asked for."""
    start = f"<details{_css(css)}{' open' if opened else ''}>"
    return Html(f"{start}<summary>{escape(title)}</summary>{join(content)}</details>")


def page(title: str, subtitle: object, sections: Sequence[Section], footer: object) -> str:
    """The whole self-contained document: no script, no font and no picture from elsewhere."""
    links = join(Html(f'<li><a href="#{escape(s.anchor)}">{escape(s.title)}</a></li>') for s in sections)
    body = "\n".join(
        f'<section id="{escape(s.anchor)}">\n<h2>{escape(s.title)}</h2>\n{escape(s.body)}\n</section>' for s in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header class="top"><h1>{escape(title)}</h1>{escape(subtitle)}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""


# ---- numbers ------------------------------------------------------------------------------------


def count(value: float) -> str:
    return f"{value:,.0f}"


def plural(value: int, noun: str, nouns: str | None = None) -> str:
    """`1 query`, `2,000 queries`."""
    return f"{count(value)} {noun if value == 1 else nouns or noun + 's'}"


def percent(part: float, whole: float) -> str:
    return "–" if not whole else f"{100 * part / whole:.1f}%"


def decimal(value: float | None, places: int = 3) -> str:
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")


def signed(value: float, places: int = 3) -> str:
    """With its sign, and without one where it rounds to 0."""
    shown = decimal(value, places)
    return shown.removeprefix("−") if float(f"{value:.{places}f}") == 0 else shown if value < 0 else f"+{shown}"


def probability(p: float) -> str:
    """On one line wherever it stands."""
    return ("p < 0.001" if p < 0.001 else f"p = {p:.3f}").replace(" ", "\u00a0")


def cut(text: str, length: int) -> str:
    """`text` on one line, cut to about `length` characters at a word's end."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length].rsplit(' ', 1)[0]} …"
