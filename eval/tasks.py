"""Tasks of EleutherAI's lm-evaluation-harness on any engine."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from eval.engine import Engine
from eval.errors import UserError, WorkError
from eval.perplexity import LOGITS_BYTES
from eval.results import Score
from eval.task_data import Documents

_Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request's texts, the tokens of its context, the tokens to be scored."""


class EngineLM(TemplateLM):
    """Any `eval.engine.Engine` as a model of the harness.

    Requests run longest first, so that memory shows its worst at once and neighbours are of like length; rows of
    a batch are filled up on the right, which causal attention never looks at. `encode` is how a text becomes tokens.
    With `responses`, a file, each answer is kept as it comes, and one that is there is not asked for again.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        encode: Callable[[str, Any], np.ndarray],
        *,
        batch: int = 32,
        responses: Path | None = None,
    ):
        super().__init__()
        self.engine, self.tokenizer, self.encode, self.batch = engine, tokenizer, encode, batch
        self._responses = responses
        self._known = dict(_read_responses(responses)) if responses else {}

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which stands before a text without context."""
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids without special tokens."""
        return self.encode(string, self.tokenizer).tolist()

    def count(self, context: str, continuation: str) -> int:
        """How many tokens of the pair are scored."""
        return len(self._encode_pair(context, continuation)[1])

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding would write it.

        What is longer than the engine's context loses its beginning. Raises `WorkError` where a score is not finite.
        """
        keys = [_key(context, continuation) for _, context, continuation in requests]
        todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        order = sorted(todo, key=lambda key: -len(todo[key][1]) - len(todo[key][2]))
        label = f"tasks {self.engine.name} {self.engine.device} {self.engine.precision}"
        with tqdm(total=len(set(keys)), initial=len(set(keys) - set(todo)), desc=label, disable=disable_tqdm) as bar:
            for group in self._groups(order, todo):
                self._keep(dict(zip(group, self._score([todo[key] for key in group]), strict=True)))
                bar.update(len(group))
        return [self._known[key] for key in keys]

    def _groups(self, order: Sequence[str], todo: Mapping[str, _Pair]) -> Iterator[Sequence[str]]:
        """Batches whose logits stay below `LOGITS_BYTES`."""
        begin = 0
        while begin < len(order):
            _, context, continuation = todo[order[begin]]
            length = min(self.engine.context, len(context) + len(continuation) - 1)
            rows = max(1, min(self.batch, LOGITS_BYTES // (4 * self.engine.vocab_size * max(1, length))))
            yield order[begin : begin + rows]
            begin += rows

    def _score(self, requests: Sequence[_Pair]) -> Iterator[tuple[float, bool]]:
        rows = [(context + continuation)[-self.engine.context - 1 :] for _, context, continuation in requests]
        inputs = torch.zeros(len(rows), max(len(row) for row in rows) - 1, dtype=torch.int64)
        for line, row in zip(inputs, rows, strict=True):
            line[: len(row) - 1] = torch.tensor(row[:-1])
        for logits, row, (texts, _, continuation) in zip(self.engine.logits(inputs), rows, requests, strict=True):
            scored = min(len(continuation), len(row) - 1)
            target = torch.tensor(row[len(row) - scored :], device=logits.device)
            found = logits[len(row) - 1 - scored : len(row) - 1].float().log_softmax(-1)
            score = float(found.gather(1, target[:, None]).double().sum())
            if not -float("inf") < score < float("inf"):
                raise WorkError(f"the log-likelihood of {texts} is {score}: nothing can be scored")
            yield score, bool((found.argmax(-1) == target).all())

    def _keep(self, answers: Mapping[str, tuple[float, bool]]) -> None:
        self._known.update(answers)
        if self._responses:
            with self._responses.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps([key, *answer])}\n" for key, answer in answers.items())

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, the first token after the end-of-text token."""
        pairs: list[_Pair] = []
        ends = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.engine.context, 1
            )
            pairs += [(None, *make_disjoint_window(window)) for window in windows]
            ends.append(len(pairs))
        scores = [score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)]
        return [sum(scores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stop texts, `max_gen_toks` (256) or a full context.

        Raises `UserError` where sampling is asked for.
        """
        return [self._continue(*request.args) for request in tqdm(requests, desc="generate", disable=disable_tqdm)]

    def _continue(self, context: str, options: Mapping[str, Any]) -> str:
        if options.get("do_sample"):
            raise UserError("a task asks for sampling; greedy decoding alone is supported")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        room = min(options.get("max_gen_toks", 256), self.engine.context - 1)
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.engine.context - room) :]
        logits = self.engine.prefill(torch.tensor([prompt]))
        written: list[int] = []
        text = ""
        while len(written) < room:
            token = int(logits[0].argmax())
            if token == self.eot_token_id:
                break
            written.append(token)
            text = self.tokenizer.decode(written)
            if any(stop in text for stop in stops):
                return min((text.partition(stop)[0] for stop in stops), key=len)
            if len(written) < room:
                logits = self.engine.decode(torch.tensor([token]))
        return text


def _key(context: Sequence[int], continuation: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([context, continuation]).encode()).hexdigest()[:24]


def _read_responses(path: Path) -> Iterator[tuple[str, tuple[float, bool]]]:
    """The answers in a file; lines that a kill cut off are passed over, and nothing will be written onto them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    for line in text.split("\n"):
        try:
            key, score, greedy = json.loads(line)
            yield str(key), (float(score), bool(greedy))
        except (ValueError, TypeError):
            continue


def evaluate(lm: EngineLM, tasks: Mapping[str, Documents], *, limit: int | None = None) -> dict[str, Score]:
    """Accuracy and its standard error by task, on the first `limit` documents of each.

    HellaSwag (Zellers et al. 2019) in completion style: the ending with the highest mean log-likelihood a token
    is the choice. LAMBADA (Paperno et al. 2016): the last word counts where greedy decoding would write all of it.
    Raises `UserError` where a task has a single document.
    """
    for name, documents in tasks.items():
        if min(len(documents.rows), limit or len(documents.rows)) < 2:
            raise UserError(f"task {name}: 1 document gives no accuracy with an error; give at least 2")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its own defaults
    loaded = {name: _task(name, documents, lm) for name, documents in tasks.items()}
    found = evaluator.evaluate(lm, {"tasks": loaded, "groups": {}}, limit=limit, bootstrap_iters=1, log_samples=False)
    return {
        name: Score(
            accuracy=found["results"][name]["acc,none"],
            stderr=found["results"][name]["acc_stderr,none"],
            documents=found["n-samples"][name]["effective"],
            of=len(documents.rows),
            data_sha256=documents.sha256,
        )
        for name, documents in tasks.items()
    }


def _task(name: str, documents: Documents, lm: EngineLM) -> ConfigurableTask:
    """The harness's task over documents in memory."""

    def chosen(document: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        texts = [f" {choice}" for choice in document["choices"]]
        if len(texts) == 1:
            return {"acc": float(results[0][1])}
        means = [score / lm.count(document["query"], text) for text, (score, _) in zip(texts, results, strict=True)]
        return {"acc": float(means.index(max(means)) == document["gold"])}

    several = len(documents.rows[0]["choices"]) > 1
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents.rows)},
            "test_split": "test",
            "output_type": "multiple_choice" if several else "loglikelihood",
            "doc_to_text": lambda document: document["query"],
            "doc_to_choice": lambda document: document["choices"],
            "doc_to_target": lambda document: document["gold"] if several else f" {document['choices'][0]}",
            "process_results": chosen,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
        }
    )
