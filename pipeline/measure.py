"""Measure the stages of a run: which rows there are, and quality, latency and memory of each."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from eval.agreement import Questions, compare, listen
from eval.engine import Engine
from eval.errors import UserError
from eval.latency import measure as measure_latency
from eval.memory import memory_in_fresh_process
from eval.perplexity import perplexity
from eval.results import (
    Agreement,
    Latency,
    Memory,
    Quality,
    QuantizedLayer,
    Row,
    Score,
    latency_from,
    save_json,
)
from eval.task_data import Documents, load_documents
from pipeline import hardware
from pipeline.artifacts import QUANTIZATION, Manifest, RunFolder, fingerprint, tree_bytes, versions
from pipeline.data import encode, sha256_text
from pipeline.engines import load_engine
from pipeline.engines.cuda import why_not as why_no_kernels
from pipeline.engines.cuda import why_not_model
from pipeline.engines.openvino import OpenVINOEngine
from pipeline.openvino_runtime import computes_bf16
from pipeline.reading import expanded
from pipeline.recipe import Measure, Recipe, Tasks
from pipeline.texts import load_text
from pipeline.tokenizer import load_tokenizer

VERSION = 2


@dataclass(frozen=True)
class Subject:
    """One row to be: a folder of a stage, run by one engine on one device at one precision."""

    stage: str
    folder: str
    """Below the stage folder: `model`, `model_fp16`, `ir_fp32`, `ir_fp16`."""
    engine: str
    device: str
    precision: str
    role: str = "chain"
    timed: bool = True
    """Whether latency and memory say something that no other row says."""
    skipped: str | None = None

    @property
    def key(self) -> str:
        """As in `eval.results.Row.key`."""
        return "/".join((self.stage, self.engine, self.device, self.precision))


def subjects(stages: Mapping[str, Mapping[str, Any]]) -> list[Subject]:
    """The rows that finished stages call for, in the table's order; `stages` holds the `details` of each manifest."""
    quantized = stages.get("quantize", {})
    no_gpu = hardware.why_no_gpu()
    no_kernels = why_no_kernels()
    no_bf16 = None if "quantize" not in stages or computes_bf16() else "this CPU has no bf16 units"

    def gpu(stage: str, folder: str, precision: str, role: str = "chain") -> Subject:
        return Subject(stage, folder, "torch", "cuda:0", precision, role, skipped=no_gpu)

    def kernels(stage: str, folder: str) -> Subject:
        return Subject(stage, folder, "cuda", "cuda:0", "fp16", skipped=no_kernels)

    def ir(folder: str, precision: str, role: str = "baseline", skipped: str | None = None) -> Subject:
        return Subject("quantize", folder, "openvino", "cpu", precision, role, skipped=skipped)

    def control(stage: str) -> list[Subject]:
        """A fine-tuned control arm, of which only the quality is news."""
        return [
            Subject(stage, "model", "torch", "cpu", "fp32", "control", timed=False),
            gpu(stage, "model_fp16", "fp16", "control"),
        ]

    rows = {
        "load": [Subject("load", "model", "torch", "cpu", "fp32"), gpu("load", "model", "fp32")],
        # On a CPU the FP16 weights are computed in FP32, so only their quality is news.
        "half": [Subject("half", "model", "torch", "cpu", "fp16", timed=False), gpu("half", "model", "fp16")],
        "prune": [
            Subject("prune", "model", "torch", "cpu", "fp16"),
            gpu("prune", "model", "fp16"),
            kernels("prune", "model"),
        ],
        "finetune": [
            Subject("finetune", "model", "torch", "cpu", "fp32"),
            gpu("finetune", "model_fp16", "fp16"),
            kernels("finetune", "model_fp16"),
        ],
        "quantize": [
            ir("ir_fp32", "fp32"),
            # INT8 computes by this CPU's defaults, in bf16 where there are units: so does what it is judged against.
            ir("ir_fp32", "bf16", skipped=no_bf16),
            *([ir("ir_fp32", "auto")] if no_bf16 else []),
            ir("ir_fp16", "fp16"),
            *([ir("ir_w8a8", "w8a8")] if quantized.get("w8a8") else []),
            ir("model", "int4-int8" if quantized.get("four_bit") else "int8", "chain"),
        ],
        "control-finetune": control("control-finetune"),
        "control-plain": control("control-plain"),
        "control-random": [
            Subject("control-random", "model", "torch", "cpu", "fp16", "control", timed=False),
            gpu("control-random", "model", "fp16", "control"),
        ],
    }
    return [row for stage, found in rows.items() if stage in stages for row in found]


def check_lengths(choices: Measure, context: int) -> None:
    """Raise `UserError` where the recipe's lengths do not fit a model of `context` positions.

    The measurements would find it out as well, but only after all the work.
    """
    window = choices.context or context
    written = choices.prompt_tokens + choices.new_tokens
    if not 2 <= window <= context:
        raise UserError(f"measure.context is {window}; give 2 to {context}, this model's limit")
    if choices.stride is not None and choices.stride > window:
        raise UserError(f"measure.stride is {choices.stride}; give 1 to {window}, the context")
    if (choices.latency or choices.memory) and written > context:
        raise UserError(f"measure.prompt_tokens + new_tokens are {written}; this model takes at most {context}")


def load_tasks(choices: Tasks) -> dict[str, Documents]:
    """The documents of the recipe's tasks; early, so that what is missing is told before all the work.

    Raises `UserError` where they cannot be had or the harness is not installed.
    """
    if choices.names:
        import eval.tasks  # noqa: F401
    return {name: load_documents(name, expanded(choices.data) if choices.data else None) for name in choices.names}


class Measurer:
    """Measures the rows of one run folder; what was measured before and has not changed is kept."""

    def __init__(self, run: RunFolder, recipe: Recipe, manifests: Mapping[str, Manifest]):
        """`manifests` are those of the finished stages to be measured, verified."""
        self.run, self.recipe, self.choices = run, recipe, recipe.measure
        self.manifests = manifests
        self.folder = run.path / "measurements"
        self._text: tuple[np.ndarray, str] | None = None
        machine = {"cpu": hardware.cpu(), "gpu": hardware.gpu()}
        choices = self.choices.model_dump(exclude={"agreement_tokens", "tasks"})
        self.circumstances = [VERSION, machine, versions(), recipe.data.evaluation, choices]

    def rows(self, *, latency: bool = True) -> list[Row]:
        """All rows of the finished stages. Without `latency`, only perplexity is measured."""
        found = self._subjects()
        live = [subject for subject in found if subject.skipped is None]
        timed = [subject for subject in live if subject.timed] if latency else []
        qualities = {subject.key: self._quality(subject) for subject in live}
        documents = load_tasks(self.choices.tasks) if latency else {}
        scores = {subject.key: self._tasks(subject, documents) for subject in live if documents}
        memories = {subject.key: self._memory(subject) for subject in timed if self.choices.memory}
        latencies = self._latencies(timed) if timed and self.choices.latency else {}
        rows = []
        for subject in found:
            row = Row(subject.stage, subject.engine, subject.device, subject.precision, subject.role)
            row.skipped = subject.skipped
            row.parameters = self.manifests[subject.stage].details["parameters"]
            row.bytes_on_disk = self._bytes(subject)
            if subject.skipped is None:
                row.compute, row.quality = qualities[subject.key]
                row.memory = memories.get(subject.key)
                row.latency = latencies.get(subject.key)
                row.tasks = scores.get(subject.key, {})
            rows.append(row)
        return rows

    def agreement(self) -> Agreement | None:
        """How alike the measured rows answer; `None` where there are not two, or the recipe asks for none."""
        live = [subject for subject in self._subjects() if subject.skipped is None]
        tokens = self.choices.agreement_tokens
        if len(live) < 2 or not tokens:
            return None

        def make() -> dict[str, Any]:
            print(f"measure: agreement of {len(live)} rows", file=sys.stderr)
            ids, digest = self.text()
            context = self.choices.context or self._engine(live[0]).context
            questions = Questions.fitting(ids[:tokens], context)
            answers = {subject.key: listen(self._engine(subject), questions) for subject in live}
            return asdict(compare(answers, questions, text_sha256=digest))

        return Agreement(**self._kept("agreement", live, make, tokens))

    def quantization(self) -> list[QuantizedLayer]:
        """What quantisation did to each matrix, and what multiplies it on this machine; empty before that stage."""
        quantized = [subject for subject in self._subjects() if (subject.stage, subject.role) == ("quantize", "chain")]
        if not quantized:
            return []

        def make() -> list[dict[str, Any]]:
            report = json.loads((self._path(quantized[0]) / QUANTIZATION).read_text(encoding="utf-8"))
            engine = self._engine(quantized[0])
            kernels = engine.kernels() if isinstance(engine, OpenVINOEngine) else {}
            return [{**layer, "kernel": kernels.get(layer["name"])} for layer in report["layers"]]

        return [QuantizedLayer(**layer) for layer in self._kept("quantization", quantized, make)]

    def _subjects(self) -> list[Subject]:
        details = {stage: manifest.details for stage, manifest in self.manifests.items()}
        return [self._possible(subject) for subject in subjects(details)]

    def _possible(self, subject: Subject) -> Subject:
        """The row, left out where the kernels do not know this model: what no other machine would mend comes first."""
        if subject.engine != "cuda":
            return subject
        return replace(subject, skipped=why_not_model(self._path(subject)) or subject.skipped)

    def _path(self, subject: Subject) -> Path:
        return self.run.stage(subject.stage) / subject.folder

    def _engine(self, subject: Subject) -> Engine:
        return load_engine(subject.engine, self._path(subject), device=subject.device, precision=subject.precision)

    def _bytes(self, subject: Subject) -> int:
        pattern = "openvino_model.*" if subject.engine == "openvino" else "*.safetensors"
        return tree_bytes(self._path(subject), pattern)

    def _kept(self, kind: str, subjects: Sequence[Subject], make: Callable[[], Any], choices: Any = None) -> Any:
        """The stored measurement of these subjects under these circumstances, or a new one.

        `choices` are those of the recipe that decide this kind of measurement alone.
        """
        made_from = [[subject.key, self.manifests[subject.stage].content] for subject in subjects]
        mark = fingerprint([kind, self.circumstances, self.text()[1], made_from, choices])
        name = subjects[0].key.replace("/", "-").replace(":", "") if len(subjects) == 1 else subjects[0].device[:4]
        path = self.folder / f"{kind}-{name}.json"
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if stored["fingerprint"] == mark:
                    return stored["value"]
            except (ValueError, KeyError, TypeError):
                print(f"measure: {path} is damaged; measuring again", file=sys.stderr)
        value = make()
        self.folder.mkdir(exist_ok=True)
        save_json({"fingerprint": mark, "value": value}, path)
        return value

    def text(self) -> tuple[np.ndarray, str]:
        """The evaluation text's token ids by the run's own tokenizer, and the text's sha256."""
        if self._text is None:
            text = load_text(self.recipe.data.evaluation)
            tokenizer = load_tokenizer(self.run.stage("load") / "model")
            self._text = encode(text, tokenizer), sha256_text(text)
        return self._text

    def _quality(self, subject: Subject) -> tuple[str, Quality]:
        def make() -> dict[str, Any]:
            print(f"measure: perplexity of {subject.key}", file=sys.stderr)
            engine = self._engine(subject)
            ids, digest = self.text()
            share = self.choices.text_share
            context = self.choices.context or engine.context
            quality = perplexity(
                engine,
                ids[: max(2, round(share * len(ids)))],
                context=context,
                stride=self.choices.stride or context,
                text_sha256=digest,
                text_share=share,
            )
            return {"compute": engine.compute, "quality": asdict(quality)}

        value = self._kept("quality", [subject], make)
        return value["compute"], Quality(**value["quality"])

    def _tasks(self, subject: Subject, documents: dict[str, Documents]) -> dict[str, Score]:
        """Scores by task. Answers are kept as they come until the subject has them all."""
        from eval.tasks import EngineLM, evaluate

        limit = self.choices.tasks.limit
        asked = [limit, version("lm-eval"), {name: found.sha256 for name, found in documents.items()}]
        mark = fingerprint([subject.key, self.manifests[subject.stage].content, self.circumstances])
        responses = self.folder / f".responses-{mark}.jsonl"

        def make() -> dict[str, Any]:
            print(f"measure: tasks of {subject.key}", file=sys.stderr)
            tokenizer = load_tokenizer(self.run.stage("load") / "model")
            lm = EngineLM(self._engine(subject), tokenizer, encode, responses=responses)
            return {name: asdict(score) for name, score in evaluate(lm, documents, limit=limit).items()}

        scores = self._kept("tasks", [subject], make, asked)
        responses.unlink(missing_ok=True)
        return {name: Score(**score) for name, score in scores.items()}

    def _memory(self, subject: Subject) -> Memory:
        def make() -> dict[str, Any]:
            print(f"measure: memory of {subject.key}", file=sys.stderr)
            command = [sys.executable, "-m", "pipeline", "probe", str(self._path(subject))]
            command += ["--engine", subject.engine, "--device", subject.device, "--precision", subject.precision]
            command += ["--prompt-tokens", str(self.choices.prompt_tokens), "--batch", str(self.choices.batch)]
            command += ["--new-tokens", str(self.choices.new_tokens)]
            return asdict(memory_in_fresh_process(command, timeout=600))

        return Memory(**self._kept("memory", [subject], make))

    def _latencies(self, timed: Sequence[Subject]) -> dict[str, Latency]:
        """Latencies side by side: all rows of one device in one interleaved run."""
        found: dict[str, Latency] = {}
        for device in dict.fromkeys(subject.device for subject in timed):
            group = [subject for subject in timed if subject.device == device]

            def make(group: list[Subject] = group) -> dict[str, Any]:
                print(f"measure: latency of {len(group)} rows side by side on {group[0].device}", file=sys.stderr)
                engines = {subject.key: self._engine(subject) for subject in group}
                measured = measure_latency(
                    engines,
                    prompt_pool=self.text()[0],
                    prompt_tokens=self.choices.prompt_tokens,
                    new_tokens=self.choices.new_tokens,
                    batch=self.choices.batch,
                    min_count=self.choices.min_count,
                    min_seconds=self.choices.min_seconds,
                    seed=self.recipe.seed,
                )
                return {key: asdict(latency) for key, latency in measured.items()}

            found |= {key: latency_from(raw) for key, raw in self._kept("latency", group, make).items()}
        return found
