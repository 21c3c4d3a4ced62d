"""Sentences computed from rows: right numbers, no claim beyond the intervals, nothing said that is not in the data."""

import dataclasses

import pytest
import sample_results as sample

from eval.statistics import Ratio
from plots import agreement, findings, pairs, quantization
from plots.numbers import span


def row_of(results, key):
    return next(row for row in results.rows if row.key == key)


def test_gains_on_the_cpu():
    assert findings.gains(sample.full(bf16=True)) == (
        "On the CPU, quantize · openvino · int8 against load · torch · fp32: 0.25 × the bytes on disk, "
        "decode 2.49 × as fast, prefill 1.69 × as fast "
        "(step by step: pruning: decode 1.01 × as fast, prefill 1.03 × as fast; "
        "openvino instead of torch: decode 1.54 × as fast, prefill 1.36 × as fast; "
        "BF16 arithmetic instead of FP32 and keys and values in f16 instead of f32: decode 1.11 × as fast, "
        "prefill 1.67 × as fast; INT8 weights instead of FP32: decode 1.44 × as fast, prefill 0.72 × as fast)."
    )


def test_gains_on_the_gpu_stand_apart():
    text = findings.gains(sample.full(gpu=True))
    assert (
        "; on the GPU, finetune · torch · fp16 against load · torch · fp32: 0.48 × the bytes on disk, decode 1.07 ×"
        in text
    )


def test_no_claim_where_the_interval_holds_one():
    assert findings.speed(Ratio(1.01, 0.99, 1.03)) == findings.speed(Ratio(1.0, 1.0, 1.0)) == "not measurably different"
    assert findings.speed(Ratio(2.0, 1.9, 2.1)) == "2.00 × as fast"
    assert findings.speed(Ratio(0.5, 0.4, 0.6)) == "0.50 × as fast"


def test_costs_against_the_controls():
    assert findings.costs(sample.full()) == (
        "Pruning with fine-tuning changed perplexity by +1.17 % (95 % interval +1.09 to +1.24 %; 59.90 against 59.21) "
        "against the dense model fine-tuned alike; INT8 changed it by +0.20 % (95 % interval +0.12 to +0.29 %; 60.02 "
        "against 59.90) against its FP32 IR (besides: keys and values in f16 instead of f32, dynamic quantisation in "
        "groups of 32 instead of 0)."
    )


def test_int8_is_judged_against_the_ir_of_its_own_arithmetic():
    """Where the CPU computes INT8 in bf16, bf16's own gain and cost are no merit of INT8."""
    results = sample.full(bf16=True)
    assert "INT8 changed it by +0.08 % (95 % interval −0.01 to +0.18 %; 60.02 against 59.97) against its BF16 IR." in (
        findings.costs(results)
    )
    assert "besides" not in findings.costs(results)
    found = pairs.int8_pair(results, lambda row: row.latency)
    assert (found.base.precision, found.differs) == ("bf16", ["INT8 weights instead of FP32"])
    assert "as its BF16 IR at" in agreement.against_first(results).summary
    row_of(results, "quantize/openvino/cpu/bf16").quality = None
    assert "what quantisation cost is not known, for no IR was measured in BF16" in findings.costs(results)
    row_of(results, "quantize/openvino/cpu/bf16").latency = None
    assert "Not judged: decoding of quantize · openvino · cpu · int8, for no row" in findings.shortfalls(results)
    assert agreement.against_first(results).summary == "Against load · torch · cpu · fp32:"


def test_a_row_of_all_the_same_settings_goes_before_others():
    results = sample.full()
    exact, int8 = (row_of(results, f"quantize/openvino/cpu/{name}") for name in ("fp32", "int8"))
    results.rows.append(dataclasses.replace(exact, precision="auto", compute=int8.compute))
    found = pairs.int8_pair(results)
    assert (found.base.precision, found.differs) == ("auto", ["INT8 weights instead of FP32"])


@pytest.mark.parametrize("gpu", [False, True])
def test_every_pair_names_what_differs(gpu):
    """On a CPU as it is: the pruned model is kept in FP16, the fine-tuned in FP32, both computed in FP32."""
    results = sample.full(gpu, bf16=True)
    prune = row_of(results, "prune/torch/cpu/fp32")
    for row in (prune, row_of(results, "control-random/torch/cpu/fp32")):
        row.precision, row.compute = "fp16", sample.FP32.replace("32", "16", 1)
    judged = {
        (each.pair.row.stage, each.pair.base.stage): each.pair.differs
        for each in findings.judgements(results)
        if each.pair and each.pair.row.device == "cpu"
    }
    assert judged == {
        ("prune", "load"): ["pruning", "FP16 weights instead of FP32"],
        ("finetune", "prune"): ["fine-tuning", "FP32 weights instead of FP16"],
        ("prune", "control-random"): ["which heads were pruned"],
        ("quantize", "quantize"): ["INT8 weights instead of FP32"],
    }
    assert "fine-tuning (perplexity 0.8950 ×, 0.8941 to 0.8958; besides: FP32 weights instead of FP16)" in (
        findings.shortfalls(results)
    )
    assert pairs.finetuned_pair(results).differs == ["pruning"]


def test_fine_tuning_that_cannot_be_told_is_not_called_a_help():
    results = sample.full()
    row_of(results, "finetune/torch/cpu/fp32").quality = sample.quality(66.92)
    text = findings.shortfalls(results)
    cannot = text.partition("Cannot be told whether it helped: ")[2].partition(". Not")[0]
    assert "fine-tuning (perplexity 0.9999 ×, 0.9987 to 1.0010)" in cannot
    assert "fine-tuning" not in text.partition("Cannot")[0]


@pytest.mark.parametrize(
    ("low", "high", "digits", "bound", "said"),
    [
        (0.9941, 0.99982, 4, 1.0, "0.9941 to 0.9998"),
        (0.9941, 0.99998, 4, 1.0, "0.99410 to 0.99998"),
        (1.0000002, 1.0021, 3, 1.0, "1.0000002 to 1.0021000"),
        (1.0, 1.0, 3, 1.0, "1.000 to 1.000"),
        (0.997, 1.0, 3, 1.0, "0.997 to 1.000"),
        (1.0411, 1.05004, 3, 1.05, "1.04110 to 1.05004"),
        (1 - 1e-15, 1.2, 3, 1.0, "1.000000000 to 1.200000000"),
    ],
)
def test_an_interval_does_not_read_as_touching_what_it_does_not(low, high, digits, bound, said):
    assert span(low, high, digits, bound) == said


def test_without_intervals_nothing_is_claimed():
    """As in results from before them."""
    results = sample.full()
    for row in results.rows:
        if row.quality:
            row.quality = dataclasses.replace(row.quality, stderr=None, parts=[])
    text = findings.shortfalls(results)
    assert "Cannot be told whether it helped: " in text and "fine-tuning (perplexity 0.8950 ×, no interval)" in text
    assert "fine-tuning" not in text.partition("Cannot")[0]
    said = findings.caveats(results)
    assert any(
        "Perplexities of 10 rows have no interval, for the results are from a version without" in x for x in said
    )
    assert any("Whether an aim was met cannot be told" in caveat for caveat in said)
    for row in results.rows:
        if row.quality:
            row.quality.tokens = 319
    assert any("no interval, for the text is too short" in caveat for caveat in findings.caveats(results))


def test_what_was_not_judged_is_named():
    results = sample.full()
    results.run = results.run | {"recipe": {"finetune": {"distill": {"temperature": 2.0}}}}
    results.rows = [row for row in results.rows if row.stage != "control-random"]
    text = findings.shortfalls(results)
    assert "Not judged: pruning by score instead of at random, for prune and control-random were not both" in text
    assert "the dense teacher instead of plain fine-tuning at equal FLOPs, for finetune and control-plain" in text


def test_perplexities_of_different_texts_are_not_compared():
    results = sample.full()
    control = row_of(results, "control-finetune/torch/cpu/fp32")
    control.quality = dataclasses.replace(control.quality, stride=512)
    assert "what pruning cost is not known" in findings.costs(results).lower()
    assert any("different texts or windows" in caveat for caveat in findings.caveats(results))
    assert any("no control arm" in caveat for caveat in findings.caveats(results))


def test_shortfalls_name_what_helped_what_cannot_be_told_and_what_is_missing():
    assert findings.shortfalls(sample.full(bf16=True)) == (
        "Helped: INT8 weights instead of FP32 for decoding (quantize · openvino · cpu · int8 against quantize · "
        "openvino · cpu · bf16: 1.44 × as fast, 1.424 to 1.461); fine-tuning (perplexity 0.8950 ×, 0.8941 to 0.8958); "
        "pruning by score instead of at random (perplexity 0.7570 ×, 0.7563 to 0.7578). Cannot be told whether it "
        "helped: pruning for decoding (prune · torch · cpu · fp32 against load · torch · cpu · fp32: 1.01 × as fast, "
        "0.997 to 1.023). Not measured: 4 of 14 rows (this torch build has no CUDA support)."
    )


def test_pruning_on_the_gpu_is_judged_at_its_own_precision():
    text = findings.shortfalls(sample.full(gpu=True))
    assert "pruning for decoding (prune · torch · cuda:0 · fp16 against half · torch · cuda:0 · fp16: 1.02 ×" in text
    assert (
        "FP16 instead of FP32 for decoding (half · torch · cuda:0 · fp16 against load · torch · cuda:0 · fp32" in text
    )
    assert text.endswith("No row of 14 rows was left unmeasured.")


@pytest.mark.parametrize(
    ("key", "perplexity", "said"),
    [
        ("prune/torch/cpu/fp32", 89.5, "pruning by score instead of at random (perplexity 1.0123 ×"),
        ("finetune/torch/cpu/fp32", 67.93, "fine-tuning (perplexity 1.0149 ×"),
    ],
)
def test_quality_steps_that_did_not_help(key, perplexity, said):
    results = sample.full()
    assert said not in findings.shortfalls(results)
    row_of(results, key).quality = sample.quality(perplexity)
    assert said in findings.shortfalls(results).partition("Did not help: ")[2].partition(". ")[2] or (
        said in findings.shortfalls(results).partition("Did not help: ")[2]
    )


def test_int8_that_is_slower_is_said():
    results = sample.full()
    row_of(results, "quantize/openvino/cpu/int8").latency = sample.latency(12.7, 3.52)
    text = findings.shortfalls(results)
    assert "Did not help: INT8 weights instead of FP32 for decoding (quantize · openvino · cpu · int8 against" in text


@pytest.mark.parametrize(("factor", "said"), [(1.018, None), (1.0201, "Whether an aim was met"), (1.022, "An aim was")])
@pytest.mark.parametrize(
    ("key", "base", "aim"),
    [
        ("finetune/torch/cpu/fp32", 59.21, "the control arm's ({}), {} 1.02"),
        ("quantize/openvino/cpu/int8", 59.90 * 1.005 / 1.02, "its FP32 IR's ({}), {} 1.005"),
    ],
)
def test_aims_are_judged_by_the_interval(factor, said, key, base, aim):
    results = sample.full()
    row_of(results, key).quality = sample.quality(base * factor)
    whose, _, last = aim.partition(" ({}), {}")
    found = [caveat for caveat in findings.caveats(results) if "aim" in caveat and f"× {whose} (" in caveat]
    assert [caveat[: len(said or "")] for caveat in found] == ([said] if said else [])
    assert not found or found[0].endswith(
        ("where at most" if "Whether" in said else "above") + f"{last}{' is wanted' * ('Whether' in said)}."
    )


@pytest.mark.parametrize(("size", "missed"), [(8_900_000, False), (9_100_000, True)])
def test_missed_aim_of_size(size, missed):
    results = sample.full()
    row_of(results, "quantize/openvino/cpu/int8").bytes_on_disk = size
    assert any("above 0.27" in caveat for caveat in findings.caveats(results)) == missed


def test_caveats_come_from_the_data():
    said = findings.caveats(sample.full())
    assert any("Only 12.5 % of the evaluation text was scored (35,937 tokens)" in caveat for caveat in said)
    assert any(
        caveat.startswith("4 rows not measured: this torch build has no CUDA support (load ·") for caveat in said
    )
    assert (
        "Without latency and memory: half · torch · cpu · fp16 (FP16 weights, FP32 arithmetic, eager, SDPA, threads 2)."
        in said
    )
    assert any("INT8 rows run on the CPU" in caveat for caveat in said)
    whole = sample.full(gpu=True)
    for row in whole.rows:
        row.quality = dataclasses.replace(row.quality, text_share=1.0)
    assert not any("evaluation text" in caveat or "not measured" in caveat for caveat in findings.caveats(whole))


def test_a_disturbed_machine_is_said():
    results = sample.full()
    assert not any("not quiet" in caveat for caveat in findings.caveats(results))
    prefill = row_of(results, "prune/torch/cpu/fp32").latency.prefill
    prefill.p90 = 1.51 * prefill.p50
    (said,) = [caveat for caveat in findings.caveats(results) if "not quiet" in caveat]
    assert "(prune · torch · cpu · fp32)" in said


def test_different_loads_are_said():
    results = sample.full()
    assert not any("different prompts" in caveat for caveat in findings.caveats(results))
    row_of(results, "prune/torch/cpu/fp32").latency = sample.latency(20, 5, prompt=64)
    assert any("different prompts" in caveat for caveat in findings.caveats(results))


def test_pruning_arithmetic():
    text = findings.pruning_arithmetic(sample.full())
    removed = sample.DENSE - sample.PRUNED
    assert f"5 of 20 attention heads, that is {removed:,} of 8.60 M parameters (3.81 %)" in text
    assert "about 1.04 × as fast at best; measured: not measurably different on cpu." in text
    assert findings.pruning_arithmetic(sample.single()) is None


def test_pruning_arithmetic_of_layers_and_neurons():
    results = sample.full()
    heads = results.heads["prune"]
    heads.layers, heads.influence, heads.n_inner = [0, 1, 3, 4], [0.3, 0.2, 0.1, 0.2, 0.4], [1120, 1280]
    said = "1 of 5 layers, 5 of 20 attention heads in the others, 160 of 1,280 hidden neurons in each layer, that is "
    assert f"Pruning removed {said}" in findings.pruning_arithmetic(results)


@pytest.mark.parametrize(
    ("plain", "verdict"),
    [
        (60.4, "the teacher was the better use of it (0.9917 ×, 95 % interval 0.9908 to 0.9926)."),
        (59.5, "plain fine-tuning was the better use of it (1.0067 ×, 95 % interval 1.0059 to 1.0075)."),
        (59.901, "which was the better use of it cannot be told (1.0000 ×, 95 % interval 0.9991 to 1.0008)."),
    ],
)
def test_what_the_teacher_gave(plain, verdict):
    results = sample.full()
    assert findings.distillation(results) is None
    results.rows.append(sample.row("control-plain", "torch", "cpu", "fp32", plain, "control", compute=sample.FP32))
    results.curves["control-plain"] = sample.curve(67, plain, points=62)
    results.run["training_seconds"] = {"finetune": 181.43, "control-plain": 190.0}
    text = findings.distillation(results)
    assert text.startswith(
        "With the dense teacher, fine-tuning came to perplexity 59.90 (235 steps, 181 s); plain fine-tuning at equal "
        f"FLOPs to {plain:.2f} (310 steps, 190 s): {verdict.partition(' (')[0]} ("
    )
    helped = findings.shortfalls(results).partition("Cannot be told")[0].partition("Did not help")
    assert ["the dense teacher" in part for part in (helped[0], helped[2])] == [plain == 60.4, plain == 59.5]
    del results.curves["control-plain"], results.run["training_seconds"]
    assert f"(235 steps); plain fine-tuning at equal FLOPs to {plain:.2f}: " in findings.distillation(results)
    assert pairs.quality_pair(results, "finetune", "control-plain").differs == ["the teacher"]


def test_protocol_names_window_share_counts():
    text = " ".join(findings.protocol(sample.full()))
    for part in ("windows of 512 tokens with stride 256", "12.5 % of the text, 35,937 scored tokens", "ab" * 32):
        assert part in text
    for part in ("prompt of 128 tokens, then 32 new tokens, batch 1", "median of 23 samples"):
        assert part in text
    assert findings.protocol(sample.empty()) == []


def test_three_sentences_whatever_was_measured():
    for results in (sample.full(), sample.full(gpu=True), sample.single(), sample.empty(), sample.many()):
        sentences = findings.summary(results)
        assert len(sentences) == 3
        assert all(text.endswith(".") and text[0].isupper() for text in sentences)
    assert findings.gains(sample.empty()).startswith("What the chain gained cannot be told")
    assert "Not judged: pruning by score" in findings.shortfalls(sample.empty())


def test_four_bits_are_not_called_int8() -> None:
    results = sample.full()
    row = next(row for row in results.rows if row.precision == "int8")
    results.agreement.rows[results.agreement.rows.index(row.key)] = row.key.replace("int8", "int4-int8")
    row.precision = "int4-int8"
    layer = dataclasses.replace(results.quantization[0], name="transformer.h.1.mlp.c_fc", bits=4, scheme="groups")
    results.quantization.append(layer)
    assert "INT4-INT8 changed it by" in findings.costs(results)
    assert agreement.against_first(results).summary.startswith("INT4-INT8 holds the same token")
    words = quantization.by_layer(results)
    assert words is not None and ", 1 in INT4 (groups)." in words.summary
