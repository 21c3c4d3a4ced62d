"""Sentences computed from rows: right numbers, no claim beyond the intervals, nothing said that is not in the data."""

import dataclasses

import pytest
import sample_results as sample

from plots import agreement, findings, quantization


def row_of(results, key):
    return next(row for row in results.rows if row.key == key)


def test_gains_on_the_cpu():
    assert findings.gains(sample.full()) == (
        "On the CPU, quantize · openvino · int8 against load · torch · fp32: 0.25 × the bytes on disk, "
        "decode 2.49 × as fast, prefill 1.69 × as fast "
        "(against its own FP32 IR: decode 1.61 × as fast, prefill 1.20 × as fast)."
    )


def test_gains_on_the_gpu_stand_apart():
    text = findings.gains(sample.full(gpu=True))
    assert (
        "; on the GPU, finetune · torch · fp16 against load · torch · fp32: 0.48 × the bytes on disk, decode 1.07 ×"
        in text
    )


def test_no_claim_where_the_intervals_touch():
    slow, same = sample.timing(0.0100, 0.02), sample.timing(0.0101, 0.02)
    assert findings.speed(same, slow) == "not measurably different"
    assert findings.speed(sample.timing(0.0050, 0.02), slow) == "2.00 × as fast"
    assert findings.speed(sample.timing(0.0200, 0.02), slow) == "0.50 × as fast"


def test_costs_against_the_controls():
    assert findings.costs(sample.full()) == (
        "Pruning with fine-tuning changed perplexity by +1.17 % against the dense model fine-tuned alike "
        "(59.90 against 59.21); INT8 changed it by +0.20 % against its FP32 IR (60.02 against 59.90)."
    )


def test_perplexities_of_different_texts_are_not_compared():
    results = sample.full()
    control = row_of(results, "control-finetune/torch/cpu/fp32")
    control.quality = dataclasses.replace(control.quality, stride=512)
    assert "what pruning cost is not known" in findings.costs(results).lower()
    assert any("different texts or windows" in caveat for caveat in findings.caveats(results))
    assert any("no control arm" in caveat for caveat in findings.caveats(results))


def test_shortfalls_name_what_did_not_help_and_what_is_missing():
    assert findings.shortfalls(sample.full()) == (
        "Did not help: prune · torch · cpu · fp32 decodes no faster than load · torch · cpu · fp32; "
        "not measured: 4 of 14 rows (this torch build has no CUDA support)."
    )


def test_pruning_on_the_gpu_is_judged_at_its_own_precision():
    text = findings.shortfalls(sample.full(gpu=True))
    assert "prune · torch · cuda:0 · fp16 decodes no faster than half · torch · cuda:0 · fp16" in text
    assert text.endswith("no row of 14 was left unmeasured.")


@pytest.mark.parametrize(
    ("key", "perplexity", "said"),
    [
        ("prune/torch/cpu/fp32", 88.5, "no lower than pruning at random"),
        ("finetune/torch/cpu/fp32", 66.93, "no lower than pruning had"),
    ],
)
def test_quality_steps_that_did_not_help(key, perplexity, said):
    results = sample.full()
    assert said not in findings.shortfalls(results)
    row_of(results, key).quality = sample.quality(perplexity)
    assert said in findings.shortfalls(results)


def test_int8_that_is_no_faster_is_said():
    results = sample.full()
    row_of(results, "quantize/openvino/cpu/int8").latency = sample.latency(12.7, 3.32)
    assert (
        "quantize · openvino · cpu · int8 decodes no faster than quantize · openvino · cpu · fp32"
        in findings.shortfalls(results)
    )


def test_everything_helped():
    results = sample.full()
    row_of(results, "prune/torch/cpu/fp32").latency = sample.latency(15, 4)
    results.rows = [row for row in results.rows if row.skipped is None]
    assert findings.shortfalls(results) == "Every step that could be compared helped; no row of 10 was left unmeasured."


@pytest.mark.parametrize(("factor", "missed"), [(1.0199, False), (1.0201, True)])
def test_missed_aim_of_fine_tuning(factor, missed):
    results = sample.full()
    row_of(results, "finetune/torch/cpu/fp32").quality = sample.quality(59.21 * factor)
    said = [caveat for caveat in findings.caveats(results) if "the control arm's, above 1.02" in caveat]
    assert bool(said) == missed
    assert not missed or "1.0201 ×" in said[0]


@pytest.mark.parametrize(("factor", "missed"), [(1.0049, False), (1.0052, True)])
def test_missed_aim_of_int8(factor, missed):
    results = sample.full()
    row_of(results, "quantize/openvino/cpu/int8").quality = sample.quality(59.90 * factor)
    assert any("its FP32 IR's, above 1.005" in caveat for caveat in findings.caveats(results)) == missed


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
    assert "Without latency and memory: half · torch · cpu · fp16 (FP16 weights, FP32 compute)." in said
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
        (60.4, "the teacher was the better use of it"),
        (59.5, "plain fine-tuning was the better use of it"),
        (59.9, "neither was better"),
    ],
)
def test_what_the_teacher_gave(plain, verdict):
    results = sample.full()
    assert findings.distillation(results) is None
    results.rows.append(sample.row("control-plain", "torch", "cpu", "fp32", plain, "control"))
    results.curves["control-plain"] = sample.curve(67, plain, points=62)
    results.run["training_seconds"] = {"finetune": 181.43, "control-plain": 190.0}
    assert findings.distillation(results) == (
        "With the dense teacher, fine-tuning came to perplexity 59.90 (235 steps, 181 s); plain fine-tuning at equal "
        f"time, counted in FLOPs, to {plain:.2f} (310 steps, 190 s): {verdict}."
    )
    assert ("the dense teacher gave no more" in findings.shortfalls(results)) == (plain <= 59.9)
    del results.curves["control-plain"], results.run["training_seconds"]
    assert f"(235 steps); plain fine-tuning at equal time, counted in FLOPs, to {plain:.2f}: " in findings.distillation(
        results
    )


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
    assert findings.shortfalls(sample.empty()).startswith("No step can be compared")


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
