"""Command lines in processes of their own, forked from one that has all imports behind it.

A fresh `python -m pipeline` spends seconds on imports alone; the tests that kill a run over and over
need a real process each time, but not that.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_WARM = (
    "pipeline.cli",
    "pipeline.runner",
    "pipeline.pretrain",
    "pipeline.inc",
    "pipeline.engines.torch",
    "pipeline.engines.openvino",
    "transformers.models.gpt2.modeling_gpt2",
    "neural_compressor.torch.quantization",
    "optimum.exporters.openvino.convert",
    "optimum.exporters.openvino.model_configs",
    "plots",
)


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a run folder; it has a forked child, whose pid is the line it prints."""
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from pipeline.artifacts import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


class Forks:
    """Starts `python -m pipeline ...` as forked processes."""

    def __init__(self, folder: Path, modules: Sequence[str] = _WARM):
        self.folder = folder
        self.count = 0
        with (folder / "server").open("wb") as log:
            self.server = subprocess.Popen(
                [sys.executable, __file__, *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._ask("ready?") == "ready", (folder / "server").read_text()

    def _ask(self, request: Any) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        assert line, (self.folder / "server").read_text()
        return json.loads(line)

    def start(self, *arguments: object, env: Mapping[str, str] | None = None) -> "Forked":
        """A process at work, with `env` on top of the environment."""
        self.count += 1
        log = self.folder / str(self.count)
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()
        words = [str(argument) for argument in arguments]
        return Forked(self, self._ask({"argv": words, "log": str(log), "env": dict(env or {})}), log)

    def wait(self, pid: int) -> int:
        """Its exit code; the negative signal if it was killed."""
        return os.waitstatus_to_exitcode(self._ask({"wait": pid}))

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        process = self.start(*arguments)
        return self.wait(process.pid), process.out(), process.err()

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


class Forked:
    """One such process."""

    def __init__(self, forks: Forks, pid: int, log: Path):
        self.forks, self.pid, self.log = forks, pid, log

    def out(self) -> str:
        """Its stdout so far."""
        return self.log.with_suffix(".out").read_text()

    def err(self) -> str:
        """Its stderr so far."""
        return self.log.with_suffix(".err").read_text()

    def signal_when(self, moment: Callable[["Forked"], Any], number: int = signal.SIGKILL) -> int:
        """Send a signal as soon as `moment` is true; returns the exit code."""
        while not moment(self):
            with contextlib.suppress(ChildProcessError):
                state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
                assert state != "Z", f"it ended before its moment:\n{self.err()}"
            time.sleep(0.001)
        os.kill(self.pid, number)
        return self.forks.wait(self.pid)


def _serve() -> None:
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if request == "ready?":
            answer: Any = "ready"
        elif "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _child(request, torch)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _child(request: dict[str, Any], torch: Any) -> None:
    code: Any = 70
    try:
        log = Path(request["log"])
        for number, suffix in ((0, None), (1, ".out"), (2, ".err")):
            path = log.with_suffix(suffix) if suffix else Path(os.devnull)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = ["pipeline", *request["argv"]]
        os.environ.update(request["env"])
        torch.set_num_threads(1)
        from pipeline.cli import main

        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    # Started as a script, the folder of this file takes the place of the repository's root.
    sys.path[0] = str(Path(__file__).parents[2])
    _serve()
