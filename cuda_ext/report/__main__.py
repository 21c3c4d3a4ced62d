"""`python -m cuda_ext.report`: an analysis of the kernels without a profiler. See docs/cuda.md, "Without a GPU"."""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from cuda_ext import build, ptx_build
from cuda_ext.errors import CudaExtError
from cuda_ext.host_build import HostBuildError
from cuda_ext.packing import Shape, read_shape, unsupported
from cuda_ext.report import counted, page
from cuda_ext.report.counted import gpt2_shape
from cuda_ext.report.gpus import GPUS, Gpu
from cuda_ext.report.subjects import Subject, subjects

_TEACHES = """\
No GPU is needed, but nvcc and g++ are. nvcc's PTX runs on the CPU at the launches' true geometry, over random weights,
and is counted: instructions by kind, sectors asked for against needed, bank conflicts, bytes from DRAM, the longest
chain of waits. ptxas tells registers and spills, from which occupancy follows. A stated model makes times of it: all
are ESTIMATES, good for where to look first, not for what a GPU will do.

The page begins with times, says what to look at first and why, and ends with the model and its constants. How to read
it: a kernel far over its floor that is bound by its "chain" waits: look at the lines under "Where warps wait". One that
is bound by "issue" computes: look at its mix of instructions. "Sectors asked/needed" over 1 is bad coalescing.

examples:
  python -m cuda_ext.report --out runs/report                      GPT-2 124M with ten of twelve heads: 4 to 10 minutes
  python -m cuda_ext.report --shape 2,256,4 --context 64           a small one: 1 minute once nvcc has compiled
  python -m cuda_ext.report --model runs/mine/finetune/model_fp16 --gpu T4 --batch 8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    choices = _parser().parse_args(arguments)
    try:
        shape = _shape(choices)
        _refuse_unwritable(choices.out)
        reason = ptx_build.why_not()
        if reason is not None:
            raise CudaExtError(f"the report cannot be made: {reason}")
        gpus = [_gpu(name) for name in choices.gpu] if choices.gpu else list(GPUS)
        reports = [subjects(shape, choices.batch, choices.context, gpu, _tell) for gpu in gpus]
    except (CudaExtError, HostBuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if choices.out is not None:
        _write(choices, shape, reports)
    print(page.summary(reports))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cuda_ext.report", description="What each CUDA kernel does and might cost, without a GPU.",
        epilog=_TEACHES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint, for its sizes alone")
    subject.add_argument(
        "--shape", default="12,768,10", metavar="LAYERS,WIDTH,HEADS[,HEAD_DIM[,INNER[,VOCABULARY]]]",
        help="sizes of a model; GPT-2 124M without two of twelve heads unless given",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens behind a decoded one, and of the prefill (512)"
    )
    names = ", ".join(gpu.name for gpu in GPUS)
    parser.add_argument("--gpu", action="append", metavar="NAME", help=f"one of {names}; may be repeated (all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where kernel-report.md and kernel-report.json go")
    return parser


def _shape(choices: argparse.Namespace) -> Shape:
    if choices.batch < 1:
        raise CudaExtError(f"--batch is {choices.batch}; give 1 or more")
    shape = read_shape(choices.model) if choices.model is not None else _named_shape(choices.shape)
    if unsupported(shape):
        raise CudaExtError(f"{choices.model or choices.shape}: {unsupported(shape)}")
    most = shape.context - counted.DECODED
    if not 1 <= choices.context <= most:
        raise CudaExtError(
            f"--context is {choices.context}; give 1 to {most}, of the model's {shape.context} positions"
        )
    return shape


def _named_shape(text: str) -> Shape:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not 3 <= len(numbers) <= 6 or min(numbers) < 1:
        raise CudaExtError(f"--shape is {text!r}; give 3 to 6 numbers, as in 12,768,10 or 12,768,10,64,3072,50257")
    layers, width, heads = numbers[:3]
    head_dim, inner, vocabulary = (numbers[3:] + [64, 4 * width, 50257][len(numbers) - 3 :])[:3]
    return gpt2_shape(width, inner, vocabulary, head_dim, (heads,) * layers)


def _gpu(name: str) -> Gpu:
    found = [gpu for gpu in GPUS if name.lower() in gpu.name.lower()]
    if len(found) != 1:
        raise CudaExtError(f"--gpu is {name!r}; give one of {', '.join(gpu.name for gpu in GPUS)}")
    return found[0]


def _tell(words: str) -> None:
    print(f"{words} ...", file=sys.stderr, flush=True)


def _refuse_unwritable(folder: Path | None) -> None:
    """Before minutes of work, not after. Raises CudaExtError."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CudaExtError(f"--out {folder}: {error.strerror}; give a folder that can be written") from error


def _write(choices: argparse.Namespace, shape: Shape, reports: Sequence[Sequence[Subject]]) -> None:
    heads = ", ".join(sorted({str(count) for count in shape.heads}))
    compiler = build._version(build.find_nvcc())
    what = (
        f"{len(shape.heads)} layers, width {shape.width}, {heads} heads of {shape.head_dim}, inner width {shape.inner}"
    )
    facts = {
        "subject": f"{what}, vocabulary {shape.vocabulary}; batch {choices.batch}, context {choices.context}",
        "command": f"python -m cuda_ext.report {' '.join(sys.argv[1:])}",
        "machine": f"{platform.machine()}, {platform.system()}; no GPU",
        "versions": f"{compiler}; torch {torch.__version__}; Python {platform.python_version()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    text = page.markdown(reports, "Kernels without a GPU", [f"{key}: {value}" for key, value in facts.items()])
    (choices.out / "kernel-report.md").write_text(text, encoding="utf-8")
    data = page.as_json(reports, facts)
    (choices.out / "kernel-report.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
