"""Plots as SVG that is drawn once, here, and follows the reader's light or dark scheme.

Charts are drawn with stand-in colours, which then become the page's colour variables.  Data are
few numbers (bins, points), never rows of tables.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

import altair as alt
import vl_convert

from retune.report.page import Html

WIDTH = 460  # of a whole chart, so that its letters are still legible on a phone
COLOURS = ("ink", "soft", "rule", "base", "tuned", "merged", "good", "bad", "other")
STAND_IN = {name: f"#0f0e{number:02x}" for number, name in enumerate(COLOURS, 1)}

Rows = Sequence[Mapping[str, object]]


def lines(
    rows: Rows, x: str, y: str, *, x_title: str, y_title: str, colour: str = "tuned", height: int = 220,
    zero: bool = False, y_format: str = "",
) -> Html:  # fmt: skip
    """A curve through `rows`, with points where they are few."""
    point = alt.OverlayMarkDef(size=18, color=STAND_IN[colour]) if len(rows) <= 60 else False
    axis = alt.Axis(format=y_format) if y_format else alt.Axis()
    chart = alt.Chart(_data(rows)).mark_line(strokeWidth=2, point=point, color=STAND_IN[colour])
    chart = chart.encode(
        alt.X(f"{x}:Q", title=x_title, scale=alt.Scale(nice=False)),
        alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=zero), axis=axis),
    )
    return _svg(chart, height, f"{y_title} by {x_title}")


def histogram(
    rows: Rows, *, x_title: str, y_title: str, colours: Mapping[str, str] | None = None, height: int = 220,
    y_format: str = "",
) -> Html:  # fmt: skip
    """Bars from `low` to `high` of height `value`; with several `kind`s, their outlines over one another.

    Args:
        rows: {"low", "high", "value"} and, with `colours`, "kind"; of each kind every bin, empty ones too.
        colours: colour of each kind, in the legend's order.
    """
    axis = alt.Axis(format=y_format) if y_format else alt.Axis()
    x = alt.X("low:Q", title=x_title, scale=alt.Scale(zero=False, nice=False))
    y = alt.Y("value:Q", title=y_title, stack=None, axis=axis)
    if colours is None:
        chart = alt.Chart(_data(rows)).mark_bar(opacity=0.9, binSpacing=0, color=STAND_IN["tuned"])
        return _svg(chart.encode(x, alt.X2("high"), y, alt.Y2(datum=0)), height, f"Histogram of {x_title}")
    last = {row["kind"]: row for row in rows}
    closed = [*rows, *({"kind": kind, "low": row["high"], "value": 0} for kind, row in last.items())]
    line = alt.OverlayMarkDef(strokeWidth=1.5)
    chart = alt.Chart(_data(closed)).mark_area(interpolate="step-after", fillOpacity=0.22, line=line)
    chart = chart.encode(x, y, alt.Color("kind:N", title=None, scale=_scale(colours)))
    return _svg(chart, height, f"Histogram of {x_title}")


def intervals(rows: Rows, *, colours: Mapping[str, str], x_title: str, groups: Sequence[str]) -> Html:
    """Dots with their intervals, one row a model within a group (a measure).

    Args:
        rows: {"group", "kind", "value", "low", "high"}; the interval's ends may be null.
        colours: colour of each kind, in order.
        groups: the groups from top to bottom.
    """
    base = alt.Chart(_data(rows)).encode(
        alt.Y("kind:N", title=None, sort=list(colours), axis=None, scale=alt.Scale(paddingInner=0.6, paddingOuter=0.6)),
        alt.Color("kind:N", title=None, scale=_scale(colours)),
    )
    x = alt.Scale(zero=False, nice=False, padding=8)
    bars = base.mark_rule(strokeWidth=2).encode(alt.X("low:Q", title=x_title, scale=x), alt.X2("high"))
    dots = base.mark_circle(size=75, opacity=1).encode(alt.X("value:Q", title=x_title, scale=x))
    height = 20 * len(colours) + 8
    # no room of its own for the row's label is reckoned in, so the width is that of the inner part
    chart = alt.layer(bars, dots).properties(width=WIDTH - 100, height=height)
    header = alt.Header(labelAngle=0, labelAlign="left", labelFontSize=12, labelFontWeight="bold", title=None)
    row = alt.Row("group:N", sort=list(groups), header=header)
    return _svg(chart.facet(row=row, spacing=6), None, f"{x_title} with 95% intervals")


def scatter(rows: Rows, *, colours: Mapping[str, str], x_title: str, y_title: str, height: int = 400) -> Html:
    """Bubbles within the unit square, with its diagonal; the area of one says how many it stands for.

    Args:
        rows: {"x", "y", "n", "kind", "said"}; what is said of a bubble stands under the pointer.  The last is on top.
        colours: colour of each kind, in the legend's order.
    """
    ends = alt.Scale(domain=[0, 1], nice=False, padding=9)
    x, y = alt.X("x:Q", title=x_title, scale=ends), alt.Y("y:Q", title=y_title, scale=ends)
    line = alt.Chart(_data([{"x": 0, "y": 0}, {"x": 1, "y": 1}])).mark_line(
        color=STAND_IN["soft"], strokeDash=[4, 4], strokeWidth=1
    )
    most = max(10, *(row["n"] for row in rows))
    area = alt.Scale(domain=[1, most], range=[28, 28 + 12 * min(most, 70)])
    dots = alt.Chart(_data(rows)).mark_circle(opacity=0.72)
    dots = dots.encode(
        x, y, alt.Size("n:Q", scale=area, legend=None), alt.Description("said:N"),
        alt.Color("kind:N", title=None, scale=_scale(colours)),
    )  # fmt: skip
    return _svg(alt.layer(line.encode(x, y), dots), height, f"{y_title} by {x_title}, a bubble for the queries there")


def _scale(colours: Mapping[str, str]) -> alt.Scale:
    return alt.Scale(domain=list(colours), range=[STAND_IN[colour] for colour in colours.values()])


def _data(rows: Rows) -> alt.Data:
    return alt.Data(values=[dict(row) for row in rows])


MARK = re.compile(
    r'<path aria-label="([^"]*)" (role="graphics-symbol" aria-roledescription="(?:point|circle|bar)"[^>]*)/>'
)


def _titled(svg: str) -> str:
    """What a mark is said to be, as a title: browsers show that under the pointer, and it needs no script."""

    def mark(found: re.Match) -> str:
        return f"<path {found[2]}><title>{html.escape(html.unescape(found[1]), quote=False)}</title></path>"

    return MARK.sub(mark, svg)


def _svg(chart: alt.Chart | alt.LayerChart | alt.FacetChart, height: int | None, label: str) -> Html:
    """The chart as inline SVG; `height` None: the chart has its own size."""
    if height is not None:
        whole = alt.AutoSizeParams(type="fit", contains="padding")
        chart = chart.properties(width=WIDTH, height=height, autosize=whole)
    ink, soft, rule = (STAND_IN[name] for name in ("ink", "soft", "rule"))
    chart = (
        chart.configure(background="transparent", font="sans-serif", padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=soft, titleColor=soft, gridColor=rule, domainColor=rule, tickColor=rule, labelFontSize=12,
            titleFontSize=12, titleFontWeight="normal", tickCount=6,
        )
        .configure_axisX(grid=False)
        .configure_header(labelColor=ink)
        .configure_legend(orient="top", labelColor=ink, labelFontSize=12, symbolType="square", offset=6)
    )  # fmt: skip
    svg = _titled(vl_convert.vegalite_to_svg(chart.to_dict(validate=False)))
    for name, colour in STAND_IN.items():
        svg = svg.replace(colour, f"var(--{name})")
    start, rest = svg.split(">", 1)
    size = re.search(r'viewBox="[^"]*"', start)[0]  # without width and height: the page decides
    return Html(f'<svg class="plot" role="img" aria-label="{html.escape(label, quote=True)}" {size}>{rest}')
