"""What a pretraining is watched by: kernel of attention, speed, utilisation, HellaSwag, and the curve of it all."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from eval.results import Score
from eval.task_data import load_documents
from pipeline.model import CompactGPT2Config, CompactGPT2LMHeadModel
from pipeline.recipe import HellaSwag
from pipeline.training import ResumingTrainer, is_main_process


class _Kernels(TorchDispatchMode):
    """Collects the names of the attention operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name:
            self.seen.add(name.removeprefix("_scaled_dot_product_").removeprefix("_"))
        return func(*args, **(kwargs or {}))


def attention_kernel(model: CompactGPT2LMHeadModel, dtype: torch.dtype | None) -> str:
    """Which of SDPA's kernels computes a full block of `model` under autocast to `dtype`; `math` for none."""
    ids = torch.zeros(1, model.config.n_positions, dtype=torch.int64, device=model.device)
    cast = torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext()
    with _Kernels() as kernels, cast:
        model(ids, use_cache=False)
    return ", ".join(sorted(kernels.seen)) or "math"


def training_flops(config: CompactGPT2Config, length: int | None = None) -> int:
    """FLOPs of one token, forward and backward: 6 for each weight that multiplies, and attention's products over a
    block of `length` tokens, by default a full one (Chowdhery et al. 2022, appendix B; the causal half is not taken
    off). Only heads that were kept count. A third of it is the forward pass.
    """
    width = config.head_dim * sum(map(len, config.kept_heads))
    shared = config.head_dim * sum(len(config.groups(layer)) for layer in range(config.n_layer))
    blocks = 2 * config.n_embd * (width + shared + config.n_layer * config.n_inner)
    weights = blocks + config.n_embd * config.vocab_size
    return 6 * weights + 12 * width * (length or config.n_positions)


class Meter(TrainerCallback):
    """Tokens a second of all processes together, and what share that is of `peak` FLOPs a second; `None`: unknown."""

    def __init__(self, tokens_a_step: int, flops_a_token: int, peak: float | None):
        self.tokens, self.flops, self.peak = tokens_a_step, flops_a_token, peak
        self.step, self.begun = 0, 0.0

    def _begin(self, step: int) -> None:
        self.step, self.begun = step, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is no training."""
        stopped = time.perf_counter()
        yield
        self.begun += time.perf_counter() - stopped

    def read(self, step: int) -> dict[str, float]:
        """`tokens_per_second` and, with a peak, `mfu` since the last reading."""
        speed = (step - self.step) * self.tokens / (time.perf_counter() - self.begun)
        self._begin(step)
        return {"tokens_per_second": speed} | ({"mfu": speed * self.flops / self.peak} if self.peak else {})

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        # A point of the curve has a training loss, whatever else it has.
        control.should_log = control.should_log or control.should_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        self._begin(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._begin(state.global_step)


class Quiz(TrainerCallback):
    """HellaSwag's accuracy every so many steps; the first process is asked, the others wait."""

    def __init__(self, trainer: ResumingTrainer, meter: Meter, tokenizer: Any, choices: HellaSwag):
        self.trainer, self.meter, self.tokenizer, self.choices = trainer, meter, tokenizer, choices
        if is_main_process():
            self.documents = load_documents("hellaswag", Path(choices.data) if choices.data else None)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.choices.every:
            return
        with self.meter.paused():
            model = self.trainer.whole_model()
            if is_main_process():
                score = self._score(model)
                self.trainer.log({"hellaswag": score.accuracy, "hellaswag_documents": score.documents})
        control.should_log = True  # which a log takes back

    def _score(self, model: CompactGPT2LMHeadModel) -> Score:
        from eval.tasks import EngineLM, evaluate
        from pipeline.engines.torch import TorchEngine

        lm = EngineLM(TorchEngine(model, device=str(model.device)), self.tokenizer)
        return evaluate(lm, {"hellaswag": self.documents}, limit=self.choices.limit)["hellaswag"]


_KEYS = {
    "epoch": "epoch",
    "loss": "loss",
    "eval_loss": "validation_loss",
    "hellaswag": "hellaswag",
    "hellaswag_documents": "hellaswag_documents",
    "learning_rate": "rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
}


def learning_curve(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """A trainer's logs, one point a step that has a training loss: `step`, and what of `_KEYS`' values there is."""
    points: dict[float, dict[str, float]] = {}
    for log in history:
        point = points.setdefault(log["step"], {"step": log["step"]})
        point |= {name: log[key] for key, name in _KEYS.items() if key in log}
    return [point for point in points.values() if "loss" in point]
