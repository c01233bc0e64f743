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
    """Bars from `low` to `high` of height `value`; several `kind`s lie over one another, each see-through.

    Args:
        rows: {"low", "high", "value"} and, with `colours`, "kind".
        colours: colour of each kind, in the legend's order.
    """
    one = alt.value(STAND_IN["tuned"])
    axis = alt.Axis(format=y_format) if y_format else alt.Axis()
    chart = alt.Chart(_data(rows)).mark_bar(opacity=0.55 if colours else 0.9, binSpacing=0)
    chart = chart.encode(
        alt.X("low:Q", title=x_title, scale=alt.Scale(zero=False, nice=False)), alt.X2("high"),
        alt.Y("value:Q", title=y_title, stack=None, axis=axis), alt.Y2(datum=0),
        alt.Color("kind:N", title=None, scale=_scale(colours)) if colours else one,
    )  # fmt: skip
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
    x = alt.Scale(zero=False, nice=True, padding=6)
    bars = base.mark_rule(strokeWidth=2).encode(alt.X("low:Q", title=x_title, scale=x), alt.X2("high"))
    dots = base.mark_circle(size=75, opacity=1).encode(alt.X("value:Q", title=x_title, scale=x))
    height = 20 * len(colours) + 8
    # no room of its own for the row's label is reckoned in, so the width is that of the inner part
    chart = alt.layer(bars, dots).properties(width=WIDTH - 100, height=height)
    header = alt.Header(labelAngle=0, labelAlign="left", labelFontSize=12, labelFontWeight="bold", title=None)
    row = alt.Row("group:N", sort=list(groups), header=header)
    return _svg(chart.facet(row=row, spacing=6), None, f"{x_title} with 95% intervals")


def _scale(colours: Mapping[str, str]) -> alt.Scale:
    return alt.Scale(domain=list(colours), range=[STAND_IN[colour] for colour in colours.values()])


def _data(rows: Rows) -> alt.Data:
    return alt.Data(values=[dict(row) for row in rows])


def _svg(chart: alt.Chart | alt.FacetChart, height: int | None, label: str) -> Html:
    """The chart as inline SVG; `height` None: the chart has its own size."""
    if height is not None:
        chart = chart.properties(width=WIDTH, height=height, autosize=alt.AutoSizeParams(type="fit", contains="padding"))
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
    svg = vl_convert.vegalite_to_svg(chart.to_dict(validate=False))
    for name, colour in STAND_IN.items():
        svg = svg.replace(colour, f"var(--{name})")
    name = html.escape(label, quote=True)
    return Html(re.sub(r"^<svg[^>]*?(viewBox=\"[^\"]*\")>", rf'<svg class="plot" role="img" aria-label="{name}" \1>', svg))
