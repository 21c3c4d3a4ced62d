"""The report and the comparison in a real Chromium: at three widths, light and dark, on paper, by keyboard."""

import copy
import dataclasses
import io
import itertools
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "plots"))
import sample_results as sample
from browser import Browser

from eval.results import save_results
from pipeline.report import write_comparison, write_report

# The contrast of every visible text with what is painted behind it, where that is below WCAG's AA.
# Stripes count as their darker and their lighter colour.
PALE = """
(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const style = getComputedStyle(node);
      if (style.backgroundImage !== "none") return style.backgroundImage.match(/rgba?\\([^)]*\\)/g).map(rgb);
      const colour = rgb(style.backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return [colour];
    }
    return [[255, 255, 255]];
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement, style = getComputedStyle(node);
    if (!walk.currentNode.data.trim() || node.closest("style")) continue;
    seen += 1;
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    for (const colour of behind(node))
      if (contrast(rgb(style.color), colour) < (large ? 3 : 4.5))
        found.push([walk.currentNode.data, style.color, colour]);
  }
  return {seen, found};
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A report with everything in it, and a comparison in which much cannot be compared."""
    folders = []
    for name in ("one", "other-run-with-a-rather-long-name-that-has-no-space"):
        results = sample.full(gpu=bool(folders))
        if folders:
            results.run = copy.deepcopy(results.run)
            results.run["recipe"]["prune"]["ratio"] = 0.4
            results.rows[4].quality = dataclasses.replace(results.rows[4].quality, stride=512)
            results.rows[6].latency = sample.latency(20.7, 3.2, prompt=64)
        folders.append(tmp_path_factory.mktemp("runs") / name)
        folders[-1].mkdir()
        save_results(results, folders[-1] / "results.json")
    return {"report": write_report(folders[0]), "comparison": write_comparison(*folders)[0]}


@pytest.mark.parametrize("page", ["report", "comparison"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_legible_at_every_width(browser: Browser, pages: dict[str, Path], page: str, dark: bool) -> None:
    for width in (360, 800, 1400):
        browser.open(pages[page], width=width, dark=dark)
        assert browser.ask("document.documentElement.scrollWidth") <= width
        outside = """[...document.querySelectorAll("main *")].filter(n => !n.closest(".scroll, .hidden") &&
            n.getBoundingClientRect().right > innerWidth + 1).map(n => n.outerHTML.slice(0, 80))"""
        assert browser.ask(outside) == []
        contrast = browser.ask(PALE)
        assert contrast["seen"] > 100 and contrast["found"] == []
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(23, 23, 26)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("page", ["report", "comparison"])
def test_what_a_screen_reader_needs(browser: Browser, pages: dict[str, Path], page: str) -> None:
    browser.open(pages[page])
    assert browser.ask("document.documentElement.lang") == "en"
    images = browser.ask("[...document.images].map(i => [i.alt.length, i.naturalWidth])")
    assert images and all(words > 40 and width > 300 for words, width in images)
    levels = browser.ask("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    tables = browser.ask("[...document.querySelectorAll('table')].map(t => t.querySelectorAll('th[scope]').length)")
    assert tables and min(tables) >= 2
    targets = browser.ask("[...document.querySelectorAll('a')].map(a => !!document.querySelector(a.hash))")
    assert len(targets) > 3 and all(targets)
    ids = browser.ask("[...document.querySelectorAll('[id]')].map(n => n.id)")
    assert len(ids) == len(set(ids))


def test_everything_that_scrolls_can_be_reached_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page, width=360)
        scrolling = browser.ask(
            """[...document.querySelectorAll("body *")].filter(n => n.scrollWidth > n.clientWidth + 1 &&
            !["visible", "hidden", "clip"].includes(getComputedStyle(n).overflowX))
            .map(n => [n.tabIndex, n.getAttribute("role"), n.getAttribute("aria-label")])"""
        )
        assert len(scrolling) > 3
        assert all(index == 0 and role == "region" and label for index, role, label in scrolling)
        assert len({label for *_, label in scrolling}) == len(scrolling)
        browser.press("Tab", 9)
        focus = "[document.activeElement.textContent, document.activeElement.getBoundingClientRect().top >= 0]"
        assert browser.ask(focus) == ["Skip to the results", True]
        browser.press("Enter", 13)
        assert browser.ask("document.activeElement.id") == "main"
        browser.press("Tab", 9)
        assert browser.ask("document.activeElement.className") == "scroll"
        browser.press("ArrowRight", 39)
        assert browser.ask("new Promise(r => setTimeout(() => r(document.activeElement.scrollLeft), 300))") > 0


def test_nothing_is_asked_of_anyone(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page)
        assert page.resolve().as_uri() in browser.requests
        assert [url for url in browser.requests if not url.startswith(("data:", page.resolve().as_uri()))] == []
        assert browser.ask("performance.getEntriesByType('resource').every(e => e.name.startsWith('data:'))")


def test_figures_follow_the_screen_and_are_light_on_paper(browser: Browser, pages: dict[str, Path]) -> None:
    for dark, media, paper in ((False, "screen", 255), (True, "screen", 23), (True, "print", 255)):
        browser.open(pages["report"], dark=dark, media=media)
        with Image.open(io.BytesIO(browser.screenshot("img"))) as image:
            shown = image.convert("L")
        assert abs(shown.getpixel((4, 4)) - paper) < 4
        dark_end, light_end = shown.getextrema()
        assert light_end - dark_end > 180  # the ink on it can be seen


def test_paper(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page, width=717, dark=True, media="print")  # A4 within Chromium's margins
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.ask("document.documentElement.scrollWidth") <= 717
        wide = "[...document.querySelectorAll('table, img, pre')].map(n => n.getBoundingClientRect().right)"
        assert max(browser.ask(wide)) <= 718
        assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert browser.ask(PALE)["found"] == []
        assert browser.pdf().startswith(b"%PDF-")
