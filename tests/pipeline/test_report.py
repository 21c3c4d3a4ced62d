"""The report: whole, self-contained, safe, and the same each time."""

import base64
import dataclasses
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "plots"))
import sample_results as sample

from eval.errors import UserError
from eval.results import save_results
from pipeline import report
from plots import FIGURES, agreement, quantization, tasks
from plots.rows import label
from plots.table import markdown


def written(folder: Path, results) -> tuple[str, str]:
    """HTML and Markdown of a run."""
    save_results(results, folder / "results.json")
    assert report.write_report(folder) == folder / "report.html"
    return ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def parse(html: str) -> ElementTree.Element:
    """Strict: every tag closed, every attribute quoted, every entity known."""
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def prose(root: ElementTree.Element) -> str:
    return " ".join(" ".join(root.itertext()).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *written(folder, sample.full())


def test_html_is_well_formed_and_loads_nothing_from_outside(full):
    root = parse(full[1])
    assert root.tag == "html" and root.get("lang") == "en"
    for node in root.iter():
        assert node.tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data"):
            assert node.get(name, "data:").startswith(("data:", "#"))
    style = root.find("head/style").text
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_every_row_stands_in_the_table(full):
    root = parse(full[1])
    body = root.find(".//tbody").findall("tr")
    results = sample.full()
    assert [tr.find("th").text for tr in body] == [label(row) for row in results.rows]
    assert [tr.get("class") for tr in body] == [row.role for row in results.rows]
    for tr, row in zip(body, results.rows, strict=True):
        assert sum(int(cell.get("colspan", 1)) for cell in tr) == 8
        assert (f"not measured: {sample.NO_GPU}" in prose(tr)) == (row.skipped is not None)
    assert "5.08 to 5.23" in prose(body[0])


@pytest.mark.parametrize(
    ("part", "words", "heading"),
    [
        (agreement, agreement.against_first(sample.full()), "Do they say the same?"),
        (quantization, quantization.by_layer(sample.full()), "What quantisation did"),
    ],
    ids=["agreement", "quantization"],
)
def test_agreement_and_quantisation_stand_in_tables_of_their_own(full, part, words, heading):
    _, html, text = full
    root = parse(html)
    name = part.__name__.removeprefix("plots.")
    lines = root.findall(f".//table[@class='{name}']/tbody/tr")
    assert [tuple(cell.text for cell in line) for line in lines] == words.lines
    assert words.summary in prose(root) and words.note in prose(root)
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert {len(line) for line in cells} == {len(part.COLUMNS)}
    assert cells[2] == list(map(markdown, words.lines[0]))
    assert heading not in "".join(written(full[0].parent, sample.single()))


def test_the_words_on_quantisation():
    words = quantization.by_layer(sample.full())
    assert words.lines[0] == ("h.0.mlp.c_fc", "8", "gptq", "1.0e-4 to 0.010", "0.700 %", "Dense avx_f32")
    assert "lm_head the most. On this machine" in words.summary


def test_task_scores_stand_in_a_table_of_their_own(full):
    _, html, text = full
    root = parse(html)
    lines = root.findall(".//table[@class='tasks']/tbody/tr")
    assert [tuple(cell.text for cell in line) for line in lines] == tasks.lines(sample.full())
    assert tasks.note(sample.full()) in prose(root)
    assert f"| {' | '.join(tasks.lines(sample.full())[0])} |" in text
    assert "What can they do?" not in "".join(written(full[0].parent, sample.many(2)))


def test_figures_are_embedded_with_words_for_those_who_cannot_see(full):
    images = parse(full[1]).findall(".//figure//img")
    assert len(images) == len(FIGURES)
    for name, image in zip(FIGURES, images, strict=True):
        assert len(image.get("alt")) > 40
        kind, data = image.get("src").split(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data) == (full[0] / "plots" / f"{name}.svg").read_bytes()
    assert "9 CPU rows" in images[0].get("alt")
    assert (
        images[FIGURES.index("heads")]
        .get("alt")
        .endswith("prune: taylor, global scope; control-random: random, global scope.")
    )


def test_report_says_all_that_is_known_of_the_run(full):
    _, html, text = full
    words = prose(parse(html))
    run = sample.full().run
    for part in ("Some CPU", "avx2, amx_int8", "2026.4.1", "0123abc", run["date"], run["command"], "181.0 s", "3.81 %"):
        assert part in words
        assert part.replace("_", "\\_") in text
    assert "INFERENCE_PRECISION_HINT=f32" in words


def test_hostile_text_stays_text(full):
    _, html, text = full
    root = parse(html)
    assert yaml.safe_load(root.findall(".//pre/code")[1].text) == sample.full().run["recipe"]
    assert "<script>" not in html
    outside_code = re.sub(r"(`{3,}).*?\n\1", "", text, flags=re.S)
    assert "<script>" not in outside_code


@pytest.mark.parametrize("field", ["skipped", "compute", "name", "command"])
def test_hostile_text_anywhere(tmp_path, field):
    results = sample.full()
    if field in ("name", "command"):
        results.run = {**results.run, field: sample.HOSTILE}
    else:
        results.rows[1] = dataclasses.replace(results.rows[1], **{field: sample.HOSTILE})
    html, _ = written(tmp_path, results)
    assert "<script>" not in html
    assert "alert('x')" in prose(parse(html))


def test_markdown_links_figures_that_exist(full):
    folder, _, text = full
    links = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    assert [Path(link).stem for _, link in links] == list(FIGURES)
    assert all((folder / link).is_file() and alt for alt, link in links)
    assert report.markdown_table(sample.full()) in text


def test_twice_the_same_bytes(full):
    folder, html, text = full
    assert (folder / "report.html").stat().st_mode & 0o777 == 0o644
    report.write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == html
    assert (folder / "report.md").read_text(encoding="utf-8") == text
    assert {path.name for path in folder.iterdir()} == {"results.json", "report.html", "report.md", "plots"}


@pytest.mark.parametrize("results", [sample.empty(), sample.single(), sample.full(gpu=True)])
def test_other_runs_have_reports_too(tmp_path, results):
    html, text = written(tmp_path, results)
    rows = parse(html).find(".//tbody").findall("tr")
    assert len(rows) == len(results.rows)
    assert ("Nothing was measured that a figure could show." in text) == (not parse(html).findall(".//img"))


def test_a_run_that_says_little_of_itself_has_a_report(tmp_path):
    html, _ = written(tmp_path, dataclasses.replace(sample.single(), run={}))
    assert parse(html).find(".//h1").text == "Headroom: run"


def test_no_results_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="run the pipeline first"):
        report.write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fences_outlast_what_they_hold():
    assert report.fence("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"
    assert report.fence("x\n") == "```\nx\n```"


def test_flat_names_nested_values():
    assert report.flat({"a": {"b": 1, "c": []}, "d": None}) == [("a.b", "1"), ("a.c", "none"), ("d", "none")]


def test_table_is_what_the_command_line_prints():
    assert report.table(sample.full()).splitlines()[0].split()[:3] == ["row", "params", "size"]
