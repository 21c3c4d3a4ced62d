"""config.json of a GPT-2: a closed set of fields, each of the type and in the range that a model can have."""

import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cuda_ext.errors import CheckpointError

KINDS = ("gpt2", "compact_gpt2")
_LARGEST = 16 << 20  # bytes of a JSON file: more is none of a GPT-2's


class _Field(NamedTuple):
    """What a field may be, in code and in words; its value where config.json leaves it out."""

    fits: Callable[[Any], bool]
    wanted: str
    default: Any = None


def _or_null(field: _Field) -> _Field:
    return _Field(lambda value: value is None or field.fits(value), f"{field.wanted}, or null", field.default)


def _size(default: Any = None) -> _Field:
    return _Field(lambda value: type(value) is int and 1 <= value < 2**31, "a whole number of at least 1", default)


def _number(fits: Callable[[float], bool], wanted: str, default: float) -> _Field:
    def is_such(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and fits(value)

    return _Field(is_such, wanted, default)


def _list_of(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(item, value))


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_window(value: Any) -> bool:
    return _is_int(value) and 2 <= value < 2**31


def _is_id(value: Any) -> bool:
    return _is_int(value) and -(2**31) <= value < 2**31


_FLAG = _Field(lambda value: type(value) is bool, "true or false")
_DROPOUT = _number(lambda value: 0 <= value <= 1, "a number from 0 to 1", 0.1)
_TOKEN = _or_null(_Field(_is_id, "a token id", 50256))
_TYPES = ("auto", "float", "float16", "float32", "float64", "half", "double", "bfloat16")
_DTYPE = _or_null(
    _Field(
        lambda value: isinstance(value, str) and value.removeprefix("torch.") in _TYPES,
        "a floating-point type of torch's, as float32",
    )
)
_KIND = _Field(lambda value: value in KINDS, "gpt2 or compact_gpt2")

# The defaults are transformers'.
_FIELDS = {
    "vocab_size": _size(50257),
    "n_positions": _size(1024),
    "n_embd": _size(768),
    "n_layer": _size(12),
    "n_head": _size(12),
    "n_inner": _or_null(_size()),
    "activation_function": _Field(lambda value: isinstance(value, str), "a function's name", "gelu_new"),
    "resid_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "attn_pdrop": _DROPOUT,
    "layer_norm_epsilon": _number(lambda value: 0 < value <= 1, "a number above 0 and at most 1", 1e-5),
    "initializer_range": _number(lambda value: value >= 0, "a number of at least 0", 0.02),
    "use_cache": _FLAG._replace(default=True),
    "bos_token_id": _TOKEN,
    "eos_token_id": _or_null(
        _Field(lambda value: _is_id(value) or _list_of(_is_id)(value), "a token id or a list of them", 50256)
    ),
    "pad_token_id": _TOKEN._replace(default=None),
    "tie_word_embeddings": _FLAG._replace(default=True),
}
_COMPACT_FIELDS = _FIELDS | {
    "head_dim": _or_null(_size()),
    "kept_heads": _or_null(_Field(_list_of(_list_of(_is_int)), "a list of head numbers for each layer")),
    "n_kv_head": _or_null(_size()),
    "position": _Field(lambda value: value in ("learned", "rope"), "learned or rope", "learned"),
    "rope_base": _number(lambda value: value > 1, "a number above 1", 10000.0),
    "rope_share": _number(lambda value: 0 < value <= 1, "a number above 0 and at most 1", 1.0),
    "window": _or_null(
        _Field(
            lambda value: _is_window(value) or _list_of(lambda item: item is None or _is_window(item))(value),
            "a number of at least 2 tokens, or a list of one or null for each layer",
        )
    ),
}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "num_key_value_heads": "n_kv_head",
}
# A GPT-2 with another value computes something else.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_causal": True,
}


def read_config(folder: Path) -> dict[str, Any]:
    """`model_type` and the fields of a `gpt2` or `compact_gpt2` that decide what it computes, complete and checked each
    for itself; other keys of config.json are not looked at. Raises CheckpointError.
    """
    path = folder / "config.json"
    config = read_json(path)
    kind = _checked(path, config, "model_type", _KIND)
    _refuse_other_functions(path, config)
    known = _FIELDS if kind == "gpt2" else _COMPACT_FIELDS
    for alias, name in _ALIASES.items():
        if name in known and alias in config and config.setdefault(name, config[alias]) != config[alias]:
            raise CheckpointError(
                f"{path}: {name} is {shown(config[name])} and {alias} {shown(config[alias])}, which are one; keep one"
            )
    for name in ("dtype", "torch_dtype"):
        _checked(path, config, name, _DTYPE)
    fields = {name: _checked(path, config, name, field) for name, field in known.items()}
    _refuse_misfits(path, fields)
    return {"model_type": kind, **fields}


def read_sizes(folder: Path, *names: str) -> dict[str, int]:
    """Only these fields, each a size that must be there. Raises CheckpointError."""
    path = folder / "config.json"
    config = read_json(path)
    return {name: _checked(path, config, name, _size()) for name in names}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds. Raises CheckpointError."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no file; give a folder in Hub format")
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path}: holds {path.stat().st_size} bytes; a GPT-2's are a few thousand")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found; give a folder in Hub format") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a folder that you may read") from error
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path}: no JSON ({said}); copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no mapping but {shown(value)}; copy the checkpoint again")
    return value


def named(name: str) -> str:
    """A name out of a file, as it is where it is harmless."""
    return name if name.isprintable() and 0 < len(name) <= 100 else shown(name)


def shown(value: Any) -> str:
    """A value out of a file, on one line and short."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxlong = brief.maxother = 100
    text = brief.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is there twice")
    return found


def _checked(path: Path, config: dict[str, Any], name: str, field: _Field) -> Any:
    value = config.get(name, field.default)
    if not field.fits(value):
        state = f"is {shown(value)}" if name in config else "is missing"
        raise CheckpointError(f"{path}: {name} {state}; {field.wanted} is needed")
    return value


def _refuse_other_functions(path: Path, config: dict[str, Any]) -> None:
    """What makes the same weights another function than GPT-2's, or weights that are none."""
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{path}: quantization_config: the folder is quantized already (by {shown(method)}); "
            "give the checkpoint that it was made from"
        )
    if config.get("pruned_heads"):
        raise CheckpointError(
            f"{path}: pruned_heads is {shown(config['pruned_heads'])}: pruned by transformers 4, in a form that "
            "transformers 5 does not load; give the unpruned checkpoint and prune it here"
        )
    for name, value in _FIXED.items():
        if config.get(name, value) is not value:
            raise CheckpointError(
                f"{path}: {name} is {shown(config[name])}; a GPT-2 is supported with {json.dumps(value)} alone"
            )
    classes = config.get("architectures")
    if classes is not None and not _list_of(lambda name: isinstance(name, str) and "GPT2" in name)(classes):
        raise CheckpointError(f"{path}: architectures is {shown(classes)}; GPT2LMHeadModel is needed, or leave it out")


def _refuse_misfits(path: Path, fields: dict[str, Any]) -> None:
    """Fields that are right alone, but not together."""
    heads, width = fields["n_head"], fields["n_embd"]
    if fields.get("head_dim") is None and width % heads:
        raise CheckpointError(f"{path}: n_embd {width} is no multiple of n_head {heads}")
    groups = fields.get("n_kv_head")
    if groups is not None and heads % groups:
        raise CheckpointError(f"{path}: n_kv_head is {groups}; a divisor of n_head {heads} is needed")
    windows = fields.get("window")
    if isinstance(windows, list) and len(windows) != fields["n_layer"]:
        raise CheckpointError(f"{path}: window lists {len(windows)} layers, n_layer is {fields['n_layer']}")
    head_dim = fields.get("head_dim") or width // heads
    if fields.get("position") == "rope" and fields["rope_share"] * head_dim < 2:
        raise CheckpointError(
            f"{path}: rope_share is {fields['rope_share']}; a share of head_dim {head_dim} that holds two numbers is "
            "needed"
        )
    kept = fields.get("kept_heads")
    if kept is None:
        return
    if len(kept) != fields["n_layer"]:
        raise CheckpointError(f"{path}: kept_heads lists {len(kept)} layers, n_layer is {fields['n_layer']}")
    for layer, some in enumerate(kept):
        if not some or some != sorted(set(some)) or some[0] < 0 or some[-1] >= heads:
            raise CheckpointError(
                f"{path}: kept_heads[{layer}] is {shown(some)}; at least one head, ascending, each in "
                f"0..{heads - 1}, is needed"
            )
