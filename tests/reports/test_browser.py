"""The report in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import TINY, call
from large import large

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# A browser takes many seconds to start and to draw.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright comes with the `test` extra")
CHARTS = ("front", "ladder", "split_counts", "distribution", "labels", "information", "phases", "curves", "logits")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small trained sweep: two widths, two penalties, two coefficients, two seeds."""
    root = tmp_path_factory.mktemp("browser")
    words = [word for word in TINY if not word.startswith(("sae.width", "training.steps"))]
    grid = ["sae.width=5,10", "penalty=l1,sqrt", "penalty.coefficient=0.1,1", "seed=0,1", "training.steps=200"]
    assert call("run", *words, *grid, "name=tiny", f"output_dir={root}", "--json").code == 0
    assert call("report", "tiny", "--output-dir", str(root)).code == 0
    return root / "sweeps/tiny/report.html"


class Visit:
    """A page opened from disk, what it said on the console, and what it asked of the network."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready]", timeout=120_000)

    def chart(self, key: str, expression: str) -> Any:
        """What a JavaScript expression says of `chart`."""
        return self.page.evaluate(
            f"(() => {{ const chart = document.getElementById('chart-{key}'); return {expression}; }})()"
        )


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Iterator[Visit]:
    visit = Visit(browser, report, viewport={"width": 1440, "height": 1000})
    yield visit
    visit.context.close()


@pytest.fixture
def visit(opened: Visit, report: Path) -> Iterator[Visit]:
    """The one open page: a test leaves it as it was, and without a complaint or a request."""
    yield opened
    assert opened.complaints == []
    assert opened.requests == [report.as_uri()]


SHOWN_TRACES = "chart.data.filter((trace) => trace.meta && trace.visible !== false)"
SHOWN = f"{SHOWN_TRACES}.map((trace) => trace.meta)"


def test_by_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the claims"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "checkbox":
            break
    assert page.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle") == "solid"
    before = len(visit.chart("front", SHOWN))
    page.keyboard.press("Space")
    assert len(visit.chart("front", SHOWN)) < before
    page.keyboard.press("Space")
    page.locator("#chart-front").focus()
    first = _said_after(page, "ArrowRight", "FVU")
    assert _said_after(page, "ArrowRight", "FVU") != first
    assert _said_after(page, "ArrowLeft", "FVU") == first
    page.locator("#chart-phases").focus()
    _said_after(page, "End", "maxima")
    page.locator("#chart-logits").focus()
    _said_after(page, "Home", "token 0")
    page.locator("#pick-latent").focus()
    chosen = page.locator("#pick-latent").input_value()
    page.keyboard.press("ArrowDown")
    assert page.locator("#pick-latent").input_value() != chosen
    assert (
        page.locator("#latent-name").text_content().startswith(f"Latent {page.locator('#pick-latent').input_value()}:")
    )


def test_every_chart_is_drawn(visit: Visit) -> None:
    for key in CHARTS:
        marks = "chart.querySelectorAll('.point, .scatterlayer path, .heatmaplayer image, .bars path').length"
        assert visit.chart(key, marks) > 0, key
        assert visit.chart(key, "chart.getBoundingClientRect().height") > 100


def test_hovering_names_the_point(visit: Visit) -> None:
    point = visit.page.locator("#chart-front .scatterlayer .trace .points path").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = visit.page.locator("#chart-front .hoverlayer .hovertext").first
    hover.wait_for()
    words = hover.text_content()
    assert "mean of 2 seeds" in words and "width" in words and "FVU" in words


def test_switches_turn_lines_off_and_seeds_on(visit: Visit) -> None:
    def switch(group: str, value: str) -> Any:
        boxes = visit.page.locator(".switches[data-for=front] fieldset", has=visit.page.get_by_text(group, exact=True))
        return boxes.get_by_label(value, exact=True)

    assert {meta["penalty"] for meta in visit.chart("front", SHOWN)} == {"l1", "sqrt"}
    switch("penalty", "l1").uncheck()
    assert {meta["penalty"] for meta in visit.chart("front", SHOWN)} == {"sqrt"}
    switch("width", "5").uncheck()
    assert {meta["width"] for meta in visit.chart("front", SHOWN)} == {"10"}
    assert {meta["seed"] for meta in visit.chart("front", SHOWN)} == {"mean"}
    switch("seed", "1").check()
    switch("seed", "mean").uncheck()
    assert {meta["seed"] for meta in visit.chart("front", SHOWN)} == {"1"}
    for group, value, on in (
        ("penalty", "l1", True),
        ("width", "5", True),
        ("seed", "mean", True),
        ("seed", "1", False),
    ):
        switch(group, value).set_checked(on)
    assert len(visit.chart("front", SHOWN)) == 4


def test_splits_are_counted_one_way_or_the_other(visit: Visit) -> None:
    counts = visit.page.locator(".switches[data-for=split_counts]")
    shown = "chart.data.filter((trace) => trace.visible !== false).map((trace) => trace.meta.count)"
    for count in ("distinct ones", "all split latents"):
        counts.get_by_label(count, exact=True).check()
        assert visit.chart("split_counts", shown) == [count]


def test_measures_of_a_ladder_change_places_and_what_is_off_stays_off(visit: Visit) -> None:
    switches = visit.page.locator(".switches[data-for=ladder]")
    first = visit.chart("ladder", SHOWN)[0]["count"]
    title, legend = "chart._fullLayout.yaxis.title.text", "chart.querySelectorAll('.legend .traces').length"
    entries = visit.chart("ladder", legend)
    assert {meta["count"] for meta in visit.chart("ladder", SHOWN)} == {first} == {visit.chart("ladder", title)}
    switches.get_by_label("l1", exact=True).uncheck()
    assert {(meta["count"], meta["penalty"]) for meta in visit.chart("ladder", SHOWN)} == {(first, "sqrt")}
    switches.get_by_label("FVU", exact=True).check()
    assert {(meta["count"], meta["penalty"]) for meta in visit.chart("ladder", SHOWN)} == {("FVU", "sqrt")}
    assert visit.chart("ladder", f"[{title}, chart._fullLayout.yaxis.type]") == ["FVU", "log"]
    assert visit.chart("ladder", legend) == entries > 0
    switches.get_by_label("l1", exact=True).check()
    assert {meta["penalty"] for meta in visit.chart("ladder", SHOWN)} == {"l1", "sqrt"}
    switches.get_by_label(first, exact=True).check()
    assert visit.chart("ladder", f"[{title}, chart._fullLayout.yaxis.type]") == [first, "linear"]


def test_axes_become_linear_and_logarithmic_again(visit: Visit) -> None:
    box = visit.page.locator(".switches[data-for=front]").get_by_label("FVU", exact=True)
    box.uncheck()
    assert visit.chart("front", "[chart._fullLayout.xaxis.type, chart._fullLayout.yaxis.type]") == ["log", "linear"]
    low, high = visit.chart("front", "chart._fullLayout.yaxis.range")
    assert low < high and high > 0
    box.check()
    assert visit.chart("front", "chart._fullLayout.yaxis.type") == "log"


def test_the_page_opens_with_question_answer_and_what_was_run(visit: Visit) -> None:
    head = visit.page.locator("header").text_content()
    words = ("How does what latents stand for change", "The best trade-off", "What was run", "sae-sweep run toy=small")
    places = [head.index(each) for each in words]
    assert places == sorted(places)


def test_a_mark_opens_its_sae(visit: Visit) -> None:
    page = visit.page
    page.locator("#chart-front").focus()
    _said_after(page, "End", "FVU")
    wanted = visit.chart(
        "front", "chart.data.filter((trace) => trace.meta && trace.visible !== false).at(-1).customdata.at(-1).at(-1)"
    )
    page.keyboard.press("Enter")
    assert wanted[:8] in page.locator("#pick-sae option:checked").text_content()
    page.locator("#pick-sae").select_option(index=0)


def test_the_table_is_sorted_by_a_heading(visit: Visit) -> None:
    page = visit.page
    for direction in ("ascending", "descending"):
        page.locator(".results .sort", has_text="FVU").click()
        assert page.locator(".results th[aria-sort]").get_attribute("aria-sort") == direction
        found = [float(text) for text in page.locator(".results tbody td:nth-child(6)").all_text_contents()]
        assert found == sorted(found, reverse=direction == "descending") and len(found) == 4


def test_latents_answer(visit: Visit) -> None:
    page = visit.page
    saes = page.locator("#pick-sae option").count()
    assert saes >= 2
    page.locator("#pick-latent").select_option(index=1)
    name = page.locator("#latent-name").text_content()
    chosen = page.locator("#pick-latent").input_value()
    assert name.startswith(f"Latent {chosen}:")
    bars = visit.chart("logits", "Array.from(chart.data[0].y)")
    assert len(bars) == 5 and abs(sum(bars)) < 0.05 * max(map(abs, bars))
    shares = page.locator("#cells tbody tr").count()
    assert 1 <= shares <= 5
    page.locator("#nearest button").first.click()
    assert "width 5" in page.locator("#pick-sae option:checked").text_content()
    page.locator("#find").fill("nothing like it")
    assert page.locator("#pick-latent option").count() == 0 and page.locator("#card").is_hidden()
    assert page.locator("#none").is_visible()
    page.locator("#find").fill("")
    assert page.locator("#card").is_visible()
    for kind in page.locator("#pick-label option").evaluate_all("options => options.map((option) => option.value)"):
        page.locator("#pick-label").select_option(kind)


def _said_after(page: Any, key: str, word: str) -> str:
    """What a screen reader is told once a key has moved to another mark."""
    before = page.locator("#said").text_content()
    page.keyboard.press(key)
    page.wait_for_function(
        "([before, word]) => { const said = document.getElementById('said').textContent; "
        "return said !== before && said.includes(word); }",
        arg=[before, word],
    )
    return str(page.locator("#said").text_content())


def test_everything_has_a_name(visit: Visit) -> None:
    tree = visit.page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, a, [tabindex="0"], table')]
            .filter((element) => !(element.labels?.length || element.textContent.trim() || element.ariaLabel))
            .map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert tree == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_and_can_be_read(visit: Visit, scheme: str, width: int) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    visit.page.set_viewport_size({"width": width, "height": 1000})
    visit.page.wait_for_function(f"() => document.getElementById('chart-front')._fullLayout.width <= {width}")
    ink = "#1c2024" if scheme == "light" else "#e8eaed"
    visit.page.wait_for_function(
        "(ink) => [...document.querySelectorAll('.drawn')].every((chart) => chart._fullLayout.font.color === ink)",
        arg=ink,
    )
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = visit.page.evaluate(
        """() => {
            const light = (colour) => {
                const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
                const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            const texts = document.querySelectorAll("main h2, main p, main td, main th, .verdict, a");
            const inks = [...texts].map((text) => getComputedStyle(text).color);
            // Letters in the cells of a heatmap lie on the cells' colours, what hovers on a label of its own.
            const drawn = [...document.querySelectorAll(".chart text")];
            const plain = drawn.filter((text) => !text.closest(".heatmaplayer, .hoverlayer"));
            inks.push(...plain.map((text) => getComputedStyle(text).fill));
            const seen = inks.filter((colour) => colour.startsWith("rgb(")).map(light);
            return Math.min(...seen.map((ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)));
        }"""
    )
    assert contrast >= 4.5  # WCAG 2.2, AA


def test_on_a_phone_a_finger_scrolls_and_a_tap_names_the_point(browser: Any, report: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    visit = Visit(browser, report, **phone)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visit.chart("front", "chart._fullLayout.dragmode") is False
    point = visit.page.locator("#chart-front .scatterlayer .trace .points path").first
    point.scroll_into_view_if_needed()
    point.tap(force=True)
    visit.page.locator("#chart-front .hoverlayer .hovertext").first.wait_for()
    assert visit.complaints == []
    visit.context.close()


def test_on_paper_a_dark_page_is_light_and_holds_no_controls(visit: Visit) -> None:
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_function("() => document.getElementById('chart-front')._fullLayout.font.color === '#e8eaed'")
    visit.page.emulate_media(media="print", color_scheme="dark")
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert visit.chart("front", "chart._fullLayout.font.color") == "#1c2024"
    assert visit.chart("front", "chart._fullLayout.width") <= 700
    assert visit.page.locator(".switches").first.is_hidden()
    assert len(visit.page.pdf(format="A4")) > 10_000
    visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
    visit.page.emulate_media(media="screen", color_scheme="dark")
    assert visit.chart("front", "chart._fullLayout.font.color") == "#e8eaed"
    visit.page.emulate_media(color_scheme="light")


def test_pictures_are_drawn(report: Path) -> None:
    result = call("report", "tiny", "--output-dir", str(report.parents[2]), "--images")
    assert result.code == 0, result.err
    for name in CHARTS[:-1]:
        assert (report.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (report.parent / "figures" / f"{name}.svg").read_text()
        assert svg.startswith("<svg") and "http" not in svg.replace("http://www.w3.org/", "")


@pytest.mark.timeout(600)
def test_five_thousand_points_can_be_used(browser: Any, tmp_path: Path) -> None:
    large(tmp_path, coefficients=8, starts=5, seeds=5)
    assert call("report", "large", "--output-dir", str(tmp_path), "--json").code == 0
    opened = Visit(browser, tmp_path / "sweeps/large/report.html", viewport={"width": 1440, "height": 900})
    lines = len(opened.chart("front", SHOWN))
    assert {meta["width"] for meta in opened.chart("front", SHOWN)} == {"2048"}
    opened.page.locator(".switches[data-for=front]").get_by_label("1024", exact=True).check()
    assert len(opened.chart("front", SHOWN)) == 2 * lines
    opened.page.locator("#chart-front").focus()
    _said_after(opened.page, "ArrowRight", "FVU")
    assert opened.complaints == []
