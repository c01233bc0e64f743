"""The report as a reader sees it: in headless Chromium, wide and on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from reported import GUARDS, make_run

from retune.config import ReportConfig
from retune.stages.report import report

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
PHONE = 390  # pixels

# Elements that make the page wider than the window; what scrolls within itself does not count.
WIDER = """[...document.querySelectorAll("body *")].filter(e =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !e.closest(".scroll, pre, nav ul, svg")
).map(e => e.outerHTML.slice(0, 90))"""
# Of each plot its size and how many marks of data in it have one.
DRAWN = """[...document.querySelectorAll("svg.plot")].map(svg => {
  const box = svg.getBoundingClientRect(), marks = [...svg.querySelectorAll(".role-mark path, .role-mark line")];
  const seen = marks.filter(mark => { const b = mark.getBoundingClientRect(); return b.width + b.height > 0 });
  return [svg.getAttribute("aria-label"), box.width, box.height, seen.length] })"""
# The contrast of the text of elements to what lies behind them, as WCAG defines it.
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = text => { const [r, g, b] = rgb(text).map(v => v / 255).map(
    v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) {
    const found = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(found)) return found }
    return "rgb(255,255,255)" };
  const found = {}, texts = "h2, p, .soft, .note, .good, .bad, .badge, td, td small, th, a, .card span, summary";
  for (const e of document.querySelectorAll(texts)) {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    const key = e.tagName + "." + e.className, ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    found[key] = Math.min(found[key] ?? 99, ratio) }
  return found })()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: Page) -> Page:
    """The tab, with what earlier pages did forgotten."""
    tab.value("1")
    tab.events.clear()
    return tab


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    report(run="demo", inputs=make_run(folder), out=folder / "x.html", settings=ReportConfig(examples=4), guards=GUARDS)
    return (folder / "x.html").as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "phone"), [(1280, False), (PHONE, True)])
def test_it_opens_without_complaint_or_request(page: Page, url: str, width: int, phone: bool, dark: bool) -> None:
    page.open(url, width, dark=dark, phone=phone)
    page.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert page.value("document.scrollingElement.scrollWidth") <= width, page.value(WIDER)
    drawn = page.value(DRAWN)
    assert len(drawn) >= 12 and page.value("document.images.length + document.scripts.length") == 0
    assert all(across > 200 and high > 100 and marks for _, across, high, marks in drawn), drawn
    faint = {element: ratio for element, ratio in page.value(CONTRAST).items() if ratio < 4.5}
    assert not faint
    assert page.complaints() == []
    assert page.requests() == [url]


def test_plots_change_with_the_scheme(page: Page, url: str) -> None:
    fill = "getComputedStyle(document.querySelector('svg.plot [aria-roledescription=circle]')).fill"
    seen = []
    for dark in (False, True):
        page.open(url, 1280, dark=dark)
        seen.append((page.value(fill), page.value("getComputedStyle(document.body).backgroundColor")))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


def test_a_query_is_under_the_pointer(page: Page, url: str) -> None:
    page.open(url, 1280)
    under = """(() => { const svg = [...document.querySelectorAll("#queries svg.plot")][0];
      svg.scrollIntoView({behavior: "instant"});
      const all = [...svg.querySelectorAll("[aria-roledescription=circle]")], last = all[all.length - 1];
      const box = last.getBoundingClientRect();
      const there = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      return there.querySelector("title").textContent })()"""
    assert "Which passage is on topic" in page.value(under)


def test_a_poor_page_would_be_noticed(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "poor.html"
    path.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<p style="width: 50rem; color: #ccc">wide</p><img src="http://127.0.0.1:9/x.png"><script>nothing()</script>'
    )
    page.open(path.as_uri(), PHONE, phone=True)
    assert page.value("document.scrollingElement.scrollWidth") > PHONE
    assert page.value(WIDER)[0].startswith("<p style=") and page.value(CONTRAST)["P."] < 2
    assert any("nothing is not defined" in complaint for complaint in page.complaints())
    assert "http://127.0.0.1:9/x.png" in page.requests()
