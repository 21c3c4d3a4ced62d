"""One subject of the CPU benchmark in a process of its own: `python -m benchmarks.cpu_worker MODULE VARIANT PACKAGE`.

Each line of stdin is a JSON object that says what to `do`; each is answered by one on stdout, `{"error": ...}` where
it failed. What a subject needs is imported when it is asked for, and nothing else: its memory is measured.
"""

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_peers.runner import Runner
from eval.errors import reason


class Worker:
    """Its methods are what can be asked for."""

    runner: Runner

    def __init__(self, module: str, variant: str, package: str):
        self.version = version(package)
        self.module = importlib.import_module(f"benchmarks.cpu_peers.{module}")
        self.variant = variant

    def convert(self, source: str, out: str) -> dict[str, Any]:
        """A model folder into what the subject loads."""
        self.module.convert(Path(source), Path(out), self.variant)
        return {"version": self.version}

    def load(self, folder: str, **limits: int) -> dict[str, Any]:
        """Ready to `generate`."""
        self.runner = self.module.load(Path(folder), self.variant, **limits)
        return {key: getattr(self.runner, key) for key in ("compute", "weight_bytes", "kv_bytes")}

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Seconds to the first token and of one later token; the tokens."""
        found = self.runner.generate(np.array(prompts), count)
        return {"prefill": found.first, "decode": found.later / (count - 1), "tokens": found.tokens.tolist()}

    def perplexity(self, text: str, vocab_size: int, context: int) -> dict[str, Any]:
        """Of the token ids in the .npy file `text`."""
        from dataclasses import asdict

        import torch

        from eval.perplexity import perplexity

        class Judged:
            name = device = precision = "cpu"
            compute = ""

            def __init__(self, runner: Runner):
                self.runner, self.context, self.vocab_size = runner, context, vocab_size

            def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(self.runner.logits(input_ids.numpy()))

        ids: Any = np.load(text)
        judged: Any = Judged(self.runner)
        found = perplexity(
            judged, ids, context=context, stride=context, batch=1, text_sha256="", text_share=1.0, progress=False
        )
        return asdict(found)


def main() -> None:
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(*sys.argv[1:])
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": reason(error)[:300], "missing": isinstance(error, ImportError)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
