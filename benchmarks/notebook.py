"""Run a notebook from top to bottom and keep its outputs: `python -m benchmarks.notebook project.ipynb`."""

import argparse
import ast
import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from eval.errors import UserError, WorkError, reason
from eval.results import save_text

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "parameters"
"""The tag of the cell whose assignments may be replaced, as papermill calls it."""


class _Client(NotebookClient):
    """Sends progress to our stderr and keeps it out of the notebook."""

    def output(self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None, cell_index: int) -> Any:
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stderr":
            print(msg["content"]["text"], end="", file=sys.stderr, flush=True)
            return None
        if display_id or msg["content"].get("data", {}).get("text/plain") == "":
            return None  # a progress bar: made to be updated in place, or gone when it has ended
        return super().output(outs, msg, display_id, cell_index)


def run_notebook(path: Path, out: Path | None = None, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Execute a notebook from the repository root and write it with its outputs to `out` (default: in place).

    `parameters` replaces the values that the cell tagged `parameters` assigns. What stderr and progress
    bars showed is not kept, nor any time stamp. Written whole, and only if every cell ran.

    Raises `UserError` for a file that is no notebook, a parameter that the cell does not assign, or an
    `out` that cannot be written; `WorkError` naming the cell that failed.
    """
    notebook = _read(path)
    if parameters:
        set_parameters(notebook, parameters, path)
    out = out or path
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: give a file, in a folder that is there")
    _execute(notebook, path)
    _normalise(notebook)
    try:
        save_text(nbformat.writes(notebook) + "\n", out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; give an --out that can be written") from error
    return notebook


def set_parameters(notebook: NotebookNode, parameters: Mapping[str, Any], path: Path) -> None:
    """Replace the values of top-level assignments in the parameters cell; comments stay."""
    cell = next((cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ())), None)
    if cell is None or cell.cell_type != "code":
        raise UserError(f"{path}: has no code cell tagged '{PARAMETERS}', so nothing can be set")
    for name, value in parameters.items():
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                cell.source = _replaced(cell.source, node.value, repr(value))
                break
        else:
            raise UserError(f"{path}: the cell tagged '{PARAMETERS}' does not assign {name}")


def _replaced(source: str, node: ast.expr, text: str) -> str:
    """The source with `text` in the place of `node`; `ast` counts columns in UTF-8 bytes."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    raw = source.encode().splitlines(keepends=True)
    before = b"".join(raw[: node.lineno - 1]) + raw[node.lineno - 1][: node.col_offset]
    after = raw[node.end_lineno - 1][node.end_col_offset :] + b"".join(raw[node.end_lineno :])
    return (before + text.encode() + after).decode()


def _read(path: Path) -> NotebookNode:
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a notebook (.ipynb)") from error
    except Exception as error:  # nbformat raises its own kinds, jsonschema's and KeyError for files that are none
        raise UserError(f"{path}: no notebook ({reason(error)}); give an .ipynb file of format 4") from error
    return notebook


def _execute(notebook: NotebookNode, path: Path) -> None:
    at_work = "before the first cell"

    def begin(cell: NotebookNode, cell_index: int) -> None:
        nonlocal at_work
        # nbclient's own handler ends in an assertion; without it Ctrl-C is a KeyboardInterrupt as anywhere.
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        if cell.cell_type == "code":
            at_work = f"cell {cell_index + 1} of {len(notebook.cells)} ({_first_line(cell)})"
            print(f"{path.name}: {at_work}", file=sys.stderr, flush=True)

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = _Client(
        notebook,
        timeout=None,
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,
        shutdown_kernel="immediate",  # a graceful end, interrupted, prints tracebacks of its closed sockets
        on_cell_start=begin,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        said = (error.evalue.splitlines() or [""])[0]
        raise WorkError(f"{path}: {at_work} failed: {error.ename}: {said}") from error
    except DeadKernelError as error:
        raise WorkError(f"{path}: {at_work} failed: the kernel died; too little memory is the usual cause") from error
    except NoSuchKernel as error:
        raise UserError(f"{path}: asks for kernel {error.name!r}, which is not here; pip install ipykernel") from error


def _first_line(cell: NotebookNode) -> str:
    return next((line.strip() for line in cell.source.splitlines() if line.strip()), "empty")


def _normalise(notebook: NotebookNode) -> None:
    """Leave out what differs from one run to the next without saying anything."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Text that was flushed piece by piece, as one piece."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit 2 with one line on stderr for the user's mistakes, 1 for a cell that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.notebook", description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; by default in place")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a recipe key, as in finetune.steps=2; all that are given take the place of the notebook's overrides",
    )
    parser.add_argument("--run-folder", metavar="FOLDER", help="take the place of the notebook's run folder")
    choices = parser.parse_args(arguments)
    parameters: dict[str, Any] = {}
    if choices.set:
        parameters["overrides"] = choices.set
    if choices.run_folder:
        parameters["run_folder"] = choices.run_folder
    try:
        run_notebook(choices.notebook, choices.out, parameters)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the notebook was left as it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
