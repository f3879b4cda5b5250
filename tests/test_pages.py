"""The pages in a browser: on a phone and on a desk, light and dark, nothing sticks out, nothing is
asked of the network and nothing complains.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_report import change_json
from test_sweep_report import fail, make_grid, make_worse

from mlx_distill.reporting.runs_page import report
from mlx_distill.reporting.sweep_findings import Places
from mlx_distill.reporting.sweep_page import write_report

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = 390, 1280  # pixels
PAGES = ("run", "unscored", "several", "sweep", "nothing beats the base")
CUT = """() => [...document.querySelectorAll('.wide, .text, pre')]
    .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent.slice(0, 60))"""

DRAWN = """() => [...document.querySelectorAll('.plot')]
    .map(plot => [...plot.querySelectorAll('svg')].filter(one => one.clientWidth).length)"""


class Opened(NamedTuple):
    """A page in a window: the page itself, and what it did that it should not."""

    page: Any
    complaints: list[str]
    requests: list[str]

    def faults(self) -> list[str]:
        """What a reader would mind."""
        wide = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        outside = [f"{wide} pixels stick out"] if wide > 0 else []
        return [*outside, *self.complaints, *self.requests]


@pytest.fixture(scope="module")
def browser():
    """Chromium: the system's, else the one that `playwright install chromium` brings."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def look(browser) -> Callable[..., Opened]:
    """Open a page with all its folds open."""
    windows = []

    def opened(path: Path, width: int = DESK, scheme: str = "light") -> Opened:
        window = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        windows.append(window)
        page, complaints, requests = window.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: requests.append(asked.url))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        requests.remove(path.as_uri())  # the page itself
        return Opened(page, complaints, requests)

    yield opened
    for window in windows:
        window.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, write_run) -> dict[str, Path]:
    """A page of each kind, with long names and everything that a page can hold."""
    root = tmp_path_factory.mktemp("pages")
    plain = write_run(root / "runs" / "without-the-teacher", kd_weight=0.0, student=311)
    run = write_run(root / "runs" / f"{'a-very-long-name-' * 5}", compare=(str(plain),))
    other = write_run(root / "runs" / "other", steps=100)
    unscored = write_run(root / "runs" / "unscored", steps=100)
    change_json(other / "eval.json", lambda content: content.update(task="gsm8k:" + "folder/" * 9))
    (unscored / "eval.json").unlink()
    grid = fail(make_grid(), "run 0-1", "run 9-0", line=f"{'x' * 90}: {'a long line ' * 9}")
    where = Places("../run/report.html", "recipes/x.toml", "logs/x.log")
    places = {row.run: where for row in grid.rows}
    swept = replace(grid, places=places, results="results.csv")
    return {
        "run": report([run], root / "run").html,
        "unscored": report([unscored], root / "unscored").html,
        "several": report([run, plain, other, unscored], root / "several").html,
        "sweep": write_report(swept, root / "sweep"),
        "nothing beats the base": write_report(make_worse(-2.6), root / "nothing"),
    }


@pytest.mark.parametrize("name", PAGES)
def test_nothing_sticks_out_complains_or_asks_the_network(pages, look, name):
    for width, scheme in product((PHONE, DESK), ("light", "dark")):
        opened = look(pages[name], width, scheme)
        assert opened.faults() == []
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, background[4:-1].split(","))) > 128) == (scheme == "light")
        drawn = opened.page.evaluate(DRAWN)  # of a chart's widths the one that fits
        assert drawn and set(drawn) == {1}
        if width == PHONE:
            assert opened.page.evaluate(CUT) == []  # no table goes on where it is not seen


def test_a_recipe_is_copied_by_its_button(pages, look):
    page = look(pages["run"]).page
    page.click(".copied button")
    assert page.inner_text(".copied button") == "copied"
    assert "[truncation]\nfraction = 0.5" in page.evaluate("getSelection().toString()")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<p style='width: 2000px'>x</p>", "pixels stick out"),
        ("<img src='http://localhost:9/x.png'>", "http://localhost:9/x.png"),
        ("<p onclick='1 +'>x</p><script>console.error('no')</script>", "no"),
        ("<script>nowhere()</script>", "nowhere is not defined"),
    ],
)
def test_a_page_with_a_fault_is_found_out(tmp_path, look, body, fault):
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{body}</body>")
    assert fault in " ".join(look(tmp_path / "page.html").faults())


def test_a_table_that_is_cut_is_found_out(tmp_path, look):
    cell = "<td style='white-space: nowrap'>a cell that does not break at all</td>"
    table = f"<div class='wide' style='overflow: auto'><table><tr>{cell * 4}</tr></table></div>"
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{table}</body>")
    opened = look(tmp_path / "page.html", PHONE)
    assert opened.faults() == [] and len(opened.page.evaluate(CUT)) == 1
