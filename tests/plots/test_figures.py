"""Figures from results: all written, readable, labelled, the same each time, and honest about what is missing."""

import dataclasses
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import sample_results as sample
from PIL import Image
from scipy.stats import binomtest, t

from eval.statistics import ratio
from plots import FIGURES, agreement, draw_all, latency, memory, quality, quantization, style, tasks, tradeoff
from plots.rows import label, labels, measured, unmeasured_note

SVG = "{http://www.w3.org/2000/svg}"


def svg_texts(path) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.parse(path).iter(f"{SVG}text")]


def texts(figure) -> list:
    """All texts that a figure really shows; matplotlib also keeps labels of ticks beyond the limits."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    shown = (text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip())
    return [text for text in shown if text not in beyond]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    return folder, draw_all(sample.full(gpu=True), folder)


def test_each_figure_is_a_png_that_shows_something_and_an_svg(drawn):
    folder, paths = drawn
    assert {path.name for path in paths} == {f"{name}{end}" for name in FIGURES for end in (".png", ".svg")}
    assert sorted(folder.iterdir()) == sorted(paths)
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as image:
            colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
        assert len(colours) > 50
        assert max(share for share, _ in colours) < 0.97 * sum(share for share, _ in colours)
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("latency", ["time to first token (ms)", "time per output token (ms)", "CPU: prefill of 128 tokens, batch 1"]),
        ("perplexity", ["perplexity per token", "61.27", "half · torch · cuda:0 · fp16"]),
        ("memory", ["MB (10⁶ bytes)", "GPU: device memory", "CPU: resident memory of a fresh process", "180 of 450"]),
        ("size", ["MB (10⁶ bytes)", "8.61", "quantize · openvino · int8"]),
        (
            "tradeoff",
            ["decode: time per output token (ms)", "perplexity per token", "quantize · int8", "34.4 MB on disk"],
        ),
        ("agreement", ["load · torch · fp32   1", "KL divergence (nats a token)", "8", "–"]),
        ("tasks", ["HellaSwag: 10,042 documents", "LAMBADA: 200 documents, a part", "accuracy", "0.277", "0.139"]),
        ("quantization", ["layer", "weight error (%)", "mlp.c_fc", "lm_head"]),
        ("heads", ["layer", "head", "taylor score", "random score"]),
        ("learning_curves", ["loss (nats per token)", "optimizer step", "finetune", "control-finetune"]),
    ],
)
def test_svg_holds_units_and_names_as_text(drawn, name, wanted):
    found = svg_texts(drawn[0] / f"{name}.svg")
    assert [text for text in wanted if text not in found] == []


def test_rows_of_both_kinds_of_device_are_named_in_panels_of_their_own():
    results = sample.full(gpu=True)
    figure = latency.draw(results)
    panels = {axes.get_title(loc="left").split(":")[0]: [] for axes in figure.axes}
    for axes in figure.axes:
        panels[axes.get_title(loc="left").split(":")[0]].append(axes)
    assert list(panels) == ["CPU", "GPU"]
    for (prefill, decode), device in zip(panels.values(), ("cpu", "cuda:0"), strict=True):
        rows = [row for row in results.rows if row.device == device and row.latency]
        assert [text.get_text() for text in prefill.get_yticklabels()] == labels(rows)
        for axes, part in ((prefill, "prefill"), (decode, "decode")):
            widths = [bar.get_width() for bar in axes.patches]
            assert widths == pytest.approx([1e3 * getattr(row.latency, part).p50 for row in rows])


def test_whiskers_are_the_interval():
    results = sample.single()
    (axes, _) = latency.draw(results).axes
    ((low, high),) = [segment[:, 0] for segment in axes.collections[0].get_segments()]
    assert (low, high) == pytest.approx([1e3 * seconds for seconds in results.rows[0].latency.prefill.ci95])


def test_control_rows_are_hatched_and_no_others():
    results = sample.full()
    bars = quality.draw(results).axes[0].patches
    rows = measured(results, lambda row: row.quality)
    assert [bool(bar.get_hatch()) for bar in bars] == [row.role == "control" for row in rows]


def test_memory_stacks_the_model_on_the_libraries():
    results = sample.single()
    base, model = memory.draw(results).axes[0].patches
    seen = results.rows[0].memory
    assert base.get_width() == pytest.approx(seen.baseline_rss / 1e6)
    assert (model.get_x(), model.get_x() + model.get_width()) == pytest.approx((base.get_width(), seen.peak_rss / 1e6))


def test_same_files_stand_once_in_the_size_figure():
    results = sample.full(gpu=True)
    names = [text.get_text() for text in memory.draw_size(results).axes[0].get_yticklabels()]
    assert len(names) == len(set(names)) == 12
    assert sum(name.startswith("half") for name in names) == 1


def test_crosses_stand_on_pruned_heads():
    figure = quality.draw_heads(sample.full())
    crosses = {tuple(point) for point in figure.axes[0].collections[0].get_offsets().astype(int).tolist()}
    assert crosses == {(1, 0), (0, 2), (2, 2), (3, 2), (4, 2)}
    assert figure.axes[0].get_title(loc="left") == "prune: taylor, global scope\n5 of 20 heads pruned"


def test_a_training_without_the_teacher_has_a_panel_of_its_own():
    results = sample.full()
    assert len(quality.draw_learning_curves(results).axes) == 1
    results.curves["control-plain"] = sample.curve(40, 38, points=31)
    figure = quality.draw_learning_curves(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "learning from text and teacher",
        "learning from the text alone",
    ]
    # Each training is a thin line and its mean.
    assert [len(axes.lines) for axes in figure.axes] == [4, 1]
    assert [text.get_text() for text in figure.legends[0].texts] == ["finetune", "control-finetune", "control-plain"]


def test_layers_go_by_their_original_number():
    results = sample.full()
    heads = results.heads["prune"]
    heads.layers, heads.influence = [0, 2, 3, 5], [0.4, 0.1, 0.3, 0.3, 0.2, 0.9]
    labels = [text.get_text() for text in quality.draw_heads(results).axes[0].get_yticklabels()]
    assert labels == ["0", "2", "3", "5"]
    lines = quality.heads_by_layer(results)
    assert [line[1] for line in lines[1:]] == [
        "4 of 5, without 1",
        "gone",
        "all 5",
        "1 of 5, without 0, 2, 3, 4",
        "gone",
        "all 5",
    ]
    assert [line[2] for line in lines[5:]] == ["–", "–"]  # the other pruning took no layers


def test_cells_of_the_agreement_matrix_say_what_was_measured():
    results = sample.full()
    found = results.agreement
    found.kl[0][1], found.top1[0][1] = 2.71e-4, 0.98765
    (axes, _) = agreement.draw(results).axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(cells) == len(found.rows) ** 2
    assert cells[1, 0] == "2.7e-4\n98.8%"  # KL(first || second), in the first row
    assert all(cells[i, i] == "–" for i in range(len(found.rows)))
    assert axes.images[0].get_array().mask.diagonal().all()


def test_task_scores_stand_beside_the_published_ones():
    results = sample.full()
    results.rows[0].tasks.pop("lambada")
    scored = [row for row in results.rows if row.tasks]
    hellaswag, lambada = tasks.draw(results).axes
    assert [bar.get_width() for bar in hellaswag.patches] == [row.tasks["hellaswag"].accuracy for row in scored]
    assert len(lambada.patches) == len(scored) - 1
    for axes, lines in ((hellaswag, {("--", 0.2955), (":", 0.25)}), (lambada, set())):
        drawn = {(line.get_linestyle(), line.get_xdata()[0]) for line in axes.lines}
        assert {line for line in drawn if line[0] in ("--", ":")} == lines
    ((low, high),) = [s[:, 0] for s in hellaswag.collections[0].get_segments()]
    score = scored[0].tasks["hellaswag"]
    wilson = binomtest(round(score.accuracy * score.documents), score.documents).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    assert tasks.columns(results) == ["row", "HellaSwag", "LAMBADA"]
    assert tasks.lines(results)[0] == (label(scored[0]), "0.2775 ± 0.0045 (10,042 of 10,042)", "–")
    assert "0.3256" not in tasks.note(results) and "Only a part of LAMBADA was asked" in tasks.note(results)
    for row in scored:
        for name, size in (("hellaswag", 10_041), ("lambada", 5_153)):
            if name in row.tasks:
                row.tasks[name] = dataclasses.replace(row.tasks[name], documents=size, of=size)
    assert "0.3256 for LAMBADA in OpenAI's variant, EleutherAI/lm-evaluation-harness" in tasks.note(results)
    assert "Only a part of HellaSwag was asked" in tasks.note(results)  # all of a file that is not all of the split
    for row in results.rows:
        row.tasks.pop("lambada", None)
    assert len(tasks.draw(results).axes) == 1 and tasks.columns(results) == ["row", "HellaSwag"]


def test_agreement_in_words():
    results = sample.full()
    found = results.agreement
    keys = found.rows
    ir, int8 = keys.index("quantize/openvino/cpu/fp32"), keys.index("quantize/openvino/cpu/int8")
    found.top1[ir][int8], found.kl[ir][int8], found.diverged[ir][int8] = 0.9912, 3e-4, [None, 5, None, None]
    found.diverged[0][1] = [None, 0, 3, 63]
    words = agreement.against_first(results)
    found.top1_stderr[ir][int8], found.kl_stderr[ir][int8] = 0.0031, 2e-5
    words = agreement.against_first(results)
    assert "groups of 32 instead of 0) at 99.1 ± 0.31 % of 1,023 positions and loses 3.0e-4 ± 2.0e-5 nats" in (
        words.summary
    )
    assert "3 of 4 greedy continuations of 64 tokens are the same throughout" in words.summary
    assert [line[0] for line in words.lines] == [key.replace("/", " · ") for key in keys[1:]]
    assert all(len(line) == len(agreement.COLUMNS) for line in words.lines)
    assert words.lines[0][-1] == "all, 0, 3, 63" and " ± " in words.lines[0][3] and " ± " in words.lines[0][4]
    found.kl_stderr = found.top1_stderr = None
    assert "±" not in "".join(itertools.chain(*agreement.against_first(results).lines))
    results.rows = results.rows[:1]  # the matrix may know rows that the table does not
    assert agreement.against_first(results).summary == "Against load · torch · cpu · fp32:"
    assert agreement.against_first(sample.single()) is None


def test_layers_with_different_head_counts_are_drawn():
    results = sample.full()
    results.heads["prune"].scores[1] = [0.5, 0.25]
    results.heads["prune"].kept[1] = [1]
    image = quality.draw_heads(results).axes[0].images[0].get_array()
    assert image.shape == (4, 5)
    assert image.mask[1].tolist() == [False, False, True, True, True]


def test_heads_by_layer():
    results = sample.full()
    lines = quality.heads_by_layer(results)
    assert lines[0] == ("layer", "prune", "control-random") and len(lines) == 5
    assert lines[1:3] == [("0", "4 of 5, without 1", "4 of 5, without 4"), ("1", "all 5", "4 of 5, without 2")]
    results.heads["control-random"].kept.pop()
    assert quality.heads_by_layer(results)[-1] == ("3", "all 5", "–")
    assert quality.heads_by_layer(sample.single()) == []


def test_int8_errors_stand_over_their_layers():
    results = sample.full()
    (matrix, head) = results.quantization
    far = dataclasses.replace(matrix, name="transformer.h.17.mlp.c_fc", error=0.02)
    results.quantization = [far, head, matrix]
    lines = quantization.draw(results).axes[0].lines
    assert [[*map(list, line.get_data())] for line in lines] == [
        [[0, 17], pytest.approx([0.7, 2.0])],
        [[-0.5, 17.5], pytest.approx([0.93, 0.93])],
    ]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]


def test_the_front_in_words():
    (cpu, gpu) = tradeoff.front(sample.full(gpu=True))
    assert cpu == (
        "On the CPU, no row measurably beats quantize · openvino · fp32, quantize · openvino · fp16, "
        "quantize · openvino · int8 or control-finetune · torch · fp32 without losing in the other way."
    )
    assert gpu.startswith("On the GPU") and tradeoff.front(sample.empty()) == []
    results = sample.full()
    results.rows[-1].quality = dataclasses.replace(results.rows[-1].quality, stderr=None, parts=[])
    assert tradeoff.front(results) == [
        "On the CPU, which rows no other beats cannot be told: not all were scored and timed alike, with intervals."
    ]
    assert tradeoff.front(sample.single()) == [
        "On the CPU, no row measurably beats load · torch · fp32 without losing in the other way."
    ]


def test_the_front_by_brute_force():
    """Differences of logs against t times the standard error of 40 paired parts; speeds by their own ratios."""
    rows = measured(sample.many(), lambda row: row.latency)

    def gain(row, base) -> tuple[int, int]:
        differences = np.subtract(row.quality.parts, base.quality.parts)
        reach = t.ppf(0.975, 39) * differences.std(ddof=1) / 40**0.5
        speed = ratio(base.latency.decode, row.latency.decode)
        better = np.sign(-differences.mean()) * (abs(differences.mean()) > reach)
        return int(better), (speed.low > 1) - (speed.high < 1)

    best = [
        row for row in rows if not any(sum(got := gain(o, row)) > 0 and min(got) >= 0 for o in rows if o is not row)
    ]
    assert tradeoff.unbeaten(rows) == best and 0 < len(best) < len(rows)


def test_a_hair_of_perplexity_decides_no_front():
    results = sample.full()
    fp32, fp16 = (
        next(row for row in results.rows if row.engine == "openvino" and row.precision == p) for p in ("fp32", "fp16")
    )
    fp16.latency = fp32.latency
    fp16.quality = sample.quality(fp32.quality.perplexity - 0.0003)
    best = tradeoff.unbeaten([fp32, fp16])
    assert best == [fp32, fp16]
    rings = [dots for dots in tradeoff.draw(results).axes[0].collections if dots.get_facecolor().size == 0]
    assert len(rings) == len(tradeoff.unbeaten(measured(results, lambda row: row.latency and row.quality)))


@pytest.mark.parametrize("name", ["a $b$ c", "$\\frac{", "x_1^2 $", "<b>&", "ünïcödé", "%s{}"])
def test_names_are_names_and_no_formulas(name, tmp_path):
    results = sample.full()
    for row in results.rows:
        row.stage = name if row.stage == "prune" else row.stage
        if row.quality and row.stage == "load":
            row.quality = sample.quality(9_000.0)  # log scales, whose ticks matplotlib writes as formulas
    results.heads[name], results.curves[name] = results.heads.pop("prune"), results.curves.pop("finetune")
    results.quantization[0].name = name
    draw_all(results, tmp_path)
    for figure in ("perplexity", "tradeoff", "latency", "learning_curves", "quantization", "heads"):
        found = svg_texts(tmp_path / f"{figure}.svg")
        assert any(name in text for text in found), figure
        assert not any("mathdefault" in text for text in found)


@pytest.mark.parametrize("results", [sample.full(), sample.full(gpu=True), sample.single(), sample.many(20)])
def test_no_text_overlaps_another_or_leaves_the_figure(results):
    for draw in (
        latency.draw,
        quality.draw,
        memory.draw,
        memory.draw_size,
        tradeoff.draw,
        agreement.draw,
        tasks.draw,
        quality.draw_heads,
        quality.draw_learning_curves,
        quantization.draw,
    ):
        figure = draw(results)
        if figure is None:
            optional = (agreement.draw, tasks.draw, quality.draw_heads, quality.draw_learning_curves, quantization.draw)
            assert draw in optional
            continue
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for (text, box), (other, against) in itertools.combinations(boxes, 2):
            assert not box.padded(-1).overlaps(against.padded(-1)), f"{draw.__module__}: {text!r} over {other!r}"


def test_one_row_is_drawn(tmp_path):
    names = {path.stem for path in draw_all(sample.single(), tmp_path)}
    assert names == {"latency", "perplexity", "memory", "size", "tradeoff", "tasks"}


def test_nothing_measured_draws_nothing_and_removes_what_was_there(tmp_path):
    assert draw_all(sample.full(), tmp_path)
    assert draw_all(sample.empty(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_same_results_same_bytes_whatever_the_user_set(drawn, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "savefig.dpi": 33, "lines.linewidth": 9}):
        again = draw_all(sample.full(gpu=True), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn[1]]
    assert b"<dc:date>" not in (tmp_path / "latency.svg").read_bytes()


def test_the_note_counts_what_is_left_out(tmp_path):
    results = sample.full()
    rows = measured(results, lambda row: row.latency)
    note = unmeasured_note(results, rows)
    assert note == "Left out: 4 rows not measured here (the table says why), 1 row without this figure's measurement."
    draw_all(results, tmp_path)
    found = " ".join(svg_texts(tmp_path / "latency.svg"))
    assert "4 rows not measured here" in found
    assert unmeasured_note(sample.single(), sample.single().rows) != ""
    one = sample.single()
    assert unmeasured_note(one, one.rows) == ""


def test_far_apart_perplexities_go_on_a_log_scale():
    results = sample.full()
    results.rows[0].quality = sample.quality(50_000.0)
    assert quality.draw(results).axes[0].get_xscale() == "log"
    assert "log scale" in quality.draw(results).axes[0].get_xlabel()
    assert tradeoff.draw(results).axes[0].get_yscale() == "log"
    assert quality.draw(sample.full()).axes[0].get_xscale() == "linear"


def test_gpu_rows_without_device_memory_leave_the_memory_figure():
    results = sample.full(gpu=True)
    for row in results.rows:
        if row.device == "cuda:0":
            row.memory = dataclasses.replace(row.memory, gpu_allocator_peak=None, gpu_process=None)
    assert [axes.get_title(loc="left")[:3] for axes in memory.draw(results).axes] == ["CPU"]


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_ink_and_edges_can_be_seen_by_day_and_by_night(drawn):
    """Text 4.5 to 1, marks 3 to 1 by colour or by edge; and each rule for the night meets colours that occur."""
    svg = (drawn[0] / "memory.svg").read_text()
    night = dict(re.findall(r'\[fill="(#\w{6})"\]\{fill:(#\w{6})!important\}', svg))
    assert "@media screen and (prefers-color-scheme: dark)" in svg
    dark = night["#ffffff"]
    assert contrast(dark, "#ffffff") > 15
    for ink in (style.INK, style.QUIET):
        assert contrast(ink, "#ffffff") >= 4.5 and contrast(night[ink], dark) >= 4.5
    for stage in (*style.COLOURS, "another"):
        for role in style.ROLES:
            look = style.fill(sample.row(stage, "torch", "cpu", "fp32", role=role))
            if role == "chain":
                assert contrast(look["edgecolor"], "#ffffff") >= 3
                assert contrast(night.get(look["facecolor"], look["facecolor"]), dark) >= 3
            elif role == "baseline":
                assert look["facecolor"] in night


def test_colours_differ_by_stage_and_unknown_stages_have_one():
    assert len(set(style.COLOURS.values())) == len(style.COLOURS)
    assert style.colour("something else") == style.OTHER
