"""A GPT-2 folder: its safetensors held against its config.json by their headers, before anything is built or read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open

from cuda_ext.configuration import named, read_config, read_json, shown
from cuda_ext.errors import CheckpointError

# torch takes seconds to be imported: what is wrong with a folder is told without it.
if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "pytorch_model.bin.index.json")
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_HEAD, _TABLE = "lm_head.weight", "wte.weight"


class Wanted(NamedTuple):
    """A tensor as `config.json` implies it: rows, columns (0: a vector), and whether stock GPT-2 stores it turned."""

    rows: int
    columns: int
    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns) if self.columns else (self.rows,)


class Stored(NamedTuple):
    """A tensor as a file's header tells it, with the name that it has there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers fit its config: `fields` are read_config's, `stored` the tensors by GPT-2's names, without
    `transformer.`, the head left out: it is the token table."""

    folder: Path
    fields: dict[str, Any]
    stored: dict[str, Stored]

    @property
    def dtype(self) -> torch.dtype:
        """What the tensors are stored as; FP32 where they are of several types or of FP64."""
        import torch

        kinds = {_DTYPES[stored.dtype] for stored in self.stored.values()}
        dtype: torch.dtype = getattr(torch, kinds.pop() if len(kinds) == 1 else "float32")
        return torch.float32 if dtype is torch.float64 else dtype

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor's name, without `transformer.`, and its values in memory of its own, linear weights [out, in].

        Raises CheckpointError for NaN, infinity and a value beyond `dtype`.
        """
        import torch

        with contextlib.ExitStack() as stack:
            files = {file: stack.enter_context(_opened(file)) for file in {each.file for each in self.stored.values()}}
            for name, wanted in expected(self.fields):
                stored = self.stored[name]
                values = _values(self.folder, files[stored.file], stored)
                turned = values.T if wanted.turned and self.fields["model_type"] == "gpt2" else values
                result = torch.empty(wanted.shape, dtype=dtype).copy_(turned)
                if not torch.isfinite(result).all():
                    raise CheckpointError(
                        f"{self.folder}: {named(stored.name)} reaches {values.abs().max():.3g}, beyond the "
                        f"{torch.finfo(dtype).max:.3g} of {str(dtype).removeprefix('torch.')}; give a wider precision"
                    )
                yield name, result


def read_checkpoint(folder: Path) -> Checkpoint:
    """Headers and config.json alone, in a moment; of the values only a head's, where there is one beside the token
    table. Raises CheckpointError where a file is missing or damaged or is no safetensors, a tensor is missing, surplus,
    or not as config.json implies, or the head is not the token table; it names the first such.
    """
    if os.path.exists(folder / "adapter_config.json"):  # noqa: PTH110 - where it may not look, config.json will tell
        raise CheckpointError(
            f"{folder}: holds adapter_config.json; merge the adapter into its model (peft's merge_and_unload) and give "
            "that folder"
        )
    fields = read_config(folder)
    try:
        stored = _headers(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror}; give a folder to be read") from error
    head = stored.pop(_HEAD, None)
    if head is None and not fields["tie_word_embeddings"]:
        raise CheckpointError(
            f"{folder}: config.json has tie_word_embeddings false, and the file no {_HEAD}; give a model whose head is "
            "its token embedding"
        )
    if head is not None and _TABLE not in stored and fields["tie_word_embeddings"]:
        stored[_TABLE] = head  # the shared table under its other name
        head = None
    surplus = {name: each for name, each in stored.items() if not _is_mask(fields, name, each)}
    needed = {name: _fitting(folder, fields, name, wanted, surplus) for name, wanted in expected(fields)}
    if surplus:
        odd = next(iter(surplus.values()))
        raise CheckpointError(
            f"{folder}: {named(odd.name)} {list(odd.shape)} has no place in this model; it does not fit config.json"
        )
    if head is not None:
        _refuse_shape(folder, head, Wanted(fields["vocab_size"], fields["n_embd"], False).shape)
        _refuse_dtype(folder, head)
        _refuse_untied(folder, needed[_TABLE], head)
    return Checkpoint(folder, fields, needed)


def expected(fields: dict[str, Any]) -> Iterator[tuple[str, Wanted]]:
    """The tensors that a model of these fields has, in order, one by one: however large a number config.json holds, the
    first that the file lacks ends it."""
    width, heads = fields["n_embd"], fields["n_head"]
    inner, head_dim = fields["n_inner"] or 4 * width, fields.get("head_dim") or width // heads
    groups = fields.get("n_kv_head") or heads
    yield _TABLE, Wanted(fields["vocab_size"], width, False)
    if fields.get("position", "learned") == "learned":
        yield "wpe.weight", Wanted(fields["n_positions"], width, False)
    for layer in range(fields["n_layer"]):
        kept = fields["kept_heads"][layer] if fields.get("kept_heads") else None
        all_heads = (heads if kept is None else len(kept)) * head_dim
        shared = (groups if kept is None else len({head * groups // heads for head in kept})) * head_dim
        if groups < heads:
            inputs = {"attn.c_attn.q": all_heads, "attn.c_attn.k": shared, "attn.c_attn.v": shared}
        else:
            inputs = {"attn.c_attn": 3 * all_heads}
        linear = {module: (rows, width) for module, rows in inputs.items()} | {"attn.c_proj": (width, all_heads)}
        mlp = {"mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner)}
        for norm, modules in (("ln_1", linear), ("ln_2", mlp)):
            for part in ("weight", "bias"):
                yield f"h.{layer}.{norm}.{part}", Wanted(width, 0, False)
            for module, (rows, columns) in modules.items():
                yield f"h.{layer}.{module}.weight", Wanted(rows, columns, True)
                yield f"h.{layer}.{module}.bias", Wanted(rows, 0, False)
    for part in ("weight", "bias"):
        yield f"ln_f.{part}", Wanted(width, 0, False)


def _fitting(folder: Path, fields: dict[str, Any], name: str, wanted: Wanted, stored: dict[str, Stored]) -> Stored:
    """The stored tensor of that name, taken out of `stored`. Raises CheckpointError if there is none that fits."""
    found = stored.pop(name, None)
    if found is None:
        odd = next((each.name for each in stored.values() if each.name.endswith(name)), "")
        surplus = odd.removesuffix(name).removesuffix("transformer.")
        raise CheckpointError(
            f"{folder}: transformer.{name} is missing, which config.json asks for (n_layer is {fields['n_layer']})"
            + (f"; there is {named(odd)}: take {named(surplus)} off the names" if surplus else "")
        )
    stock = fields["model_type"] == "gpt2"
    shape = wanted.shape[::-1] if wanted.turned and stock else wanted.shape
    _refuse_shape(folder, found, shape, _advice(name, found.shape, shape) if stock else "")
    _refuse_dtype(folder, found)
    return found


def _advice(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What other programs do to a GPT-2 that gives its matrices such a shape."""
    if found == wanted[::-1]:
        return "; GPT-2 keeps linear weights as [in, out]: turn them (nanoGPT's are [out, in])"
    if ".attn.c_" in name and len(found) == len(wanted) and found < wanted:
        return "; were its heads pruned, give the unpruned checkpoint"
    return ""


def _refuse_shape(folder: Path, stored: Stored, shape: tuple[int, ...], advice: str = "") -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"{folder}: {named(stored.name)} is {list(stored.shape)} in the file, {list(shape)} by config.json{advice}"
        )


def _refuse_dtype(folder: Path, stored: Stored) -> None:
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            f"{folder}: {named(stored.name)} is stored as {stored.dtype}; give a checkpoint in {', '.join(_DTYPES)}"
        )


def _values(folder: Path, file: Any, stored: Stored) -> torch.Tensor:
    values: torch.Tensor = file.get_tensor(stored.name)
    if not values.isfinite().all():
        raise CheckpointError(f"{folder}: {named(stored.name)} holds NaN or infinity; give an undamaged checkpoint")
    return values


def _refuse_untied(folder: Path, *stored: Stored) -> None:
    import torch

    table, head = (_values(folder, _opened(each.file), each) for each in stored)
    common = torch.promote_types(table.dtype, head.dtype)
    if not torch.equal(table.to(common), head.to(common)):
        raise CheckpointError(
            f"{folder}: {_HEAD} differs from {named(stored[0].name)}: an untied head, which is not supported; "
            "give a model whose head is its token embedding"
        )


def _is_mask(fields: dict[str, Any], name: str, stored: Stored) -> bool:
    """Whether it is a constant of the causal mask, which old files hold as well, `n_ctx` wide."""
    layer, _, part = name.removeprefix("h.").partition(".")
    if fields["model_type"] != "gpt2" or not layer.isdecimal() or int(layer) >= fields["n_layer"]:
        return False
    square = len(stored.shape) == 4 and stored.shape == (1, 1, stored.shape[3], stored.shape[3])
    return (part == "attn.bias" and square) or (part == "attn.masked_bias" and stored.shape in ((), (1,)))


def _headers(folder: Path) -> dict[str, Stored]:
    """All tensors of the files that hold the weights, without the `transformer.` that some names begin with."""
    listed = None if (folder / _SINGLE).exists() else _index(folder)
    found: dict[str, Stored] = {}
    for file in [_SINGLE] if listed is None else sorted(set(listed.values())):
        with _opened(folder / file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                stored = Stored(folder / file, name, tuple(part.get_shape()), str(part.get_dtype()))
                first = found.setdefault(_bare(name), stored)
                if first is not stored:
                    raise CheckpointError(
                        f"{folder}: {named(name)} is there twice, in {first.file.name} and {file}; "
                        "give a checkpoint that holds each tensor once"
                    )
    for name, file in (listed or {}).items():
        held = found.get(_bare(name))
        if held is None or (held.name, held.file.name) != (name, file):
            raise CheckpointError(f"{folder / file}: holds no {named(name)}, though {_INDEX} says so; copy it again")
    return found


def _bare(name: str) -> str:
    """A tensor's name without `transformer.`; the head is no part of the body, whatever its name says."""
    bare = name.removeprefix("transformer.")
    return name if bare == _HEAD else bare


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor: a safetensors file of the folder. It may be a link, of which the Hub's cache is made."""
    path = folder / _INDEX
    if not path.exists():
        pickled = next((name for name in _PICKLES if (folder / name).exists()), None)
        if pickled:
            raise CheckpointError(
                f"{folder / pickled}: a pickle can run code when it is loaded, so none is; "
                "convert it to model.safetensors (save_pretrained does) and try again"
            )
        raise CheckpointError(f"{folder}: holds no {_SINGLE}; give a folder in Hub format")
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: weight_map is {shown(files)}; the file of each tensor is needed")
    for name, file in files.items():
        plain = isinstance(file, str) and file.isprintable() and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {named(name)} is in {shown(file)}; a .safetensors file of the same folder is needed"
            )
    return files


def _opened(path: Path, framework: str = "pt") -> Any:
    """A safetensors file whose header is whole; by `numpy` it is not to be read on. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is not there, or is no file; copy the checkpoint again")
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise CheckpointError(f"{path}: is a Git LFS pointer to the weights; run git lfs pull there")
    try:
        return safe_open(path, framework=framework)
    except Exception as error:  # whatever a damaged header leads it to
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged or incomplete ({said}); copy it again") from error
