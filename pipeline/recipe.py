"""Recipes: every choice of a run, typed and checked before any work starts."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from eval.errors import UserError, shown
from pipeline import plain
from pipeline.reading import expanded

if TYPE_CHECKING:
    from pipeline.model import CompactGPT2Config

RECIPES = Path(__file__).parent / "recipes"
_DEEPEST = 20

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Source = Annotated[str, Field(min_length=1)]
Tokens = Annotated[int, Field(ge=2)]
Window = Tokens | list[Tokens | None] | None


class Strict(BaseModel):
    """A part of a recipe: unknown keys and values out of range are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `true` for 1."""
        if isinstance(value, bool) and _types(cls.model_fields[str(info.field_name)].annotation) & {int, float}:
            raise ValueError("a number is needed")
        return value


def _types(annotation: Any) -> set[Any]:
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*map(_types, parts))


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return text


class Data(Strict):
    """Where the texts come from: `embedded:train|valid|test`, `hub:DATASET[@CONFIG]:SPLIT`, `wikitext:FILE` for one in
    WikiText's raw form, or a file, whose text is taken as it is: UTF-8, or .jsonl with a `text` in each line; .gz,
    .bz2 and .xz are unpacked."""

    train: Source = "embedded:train"
    calibration: Source = "embedded:valid"
    evaluation: Source = "embedded:test"


class Load(Strict):
    """The model: `embedded`, a folder in Hub format, or a Hub id such as `gpt2`."""

    source: Source = "embedded"
    revision: str | None = None
    n_kv_head: Positive | None = None
    """Pool key/value heads to so many (grouped-query attention), a divisor of the head count; `null`: leave them."""
    window: Window = None
    """Let each layer see so many tokens, the newest among them: one number, or one or `null` a layer; `null`: leave it.
    After either the model wants `finetune`."""


class Prune(Strict):
    """What goes: whole layers first; then, of what is left, attention heads and the MLPs' hidden neurons. With grouped
    queries heads are query heads; a key/value head goes with its last one."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share of the heads that goes."""
    mlp: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of each layer's hidden neurons that goes; what stays is a multiple of 32, the same in each layer."""
    layers: Annotated[int, Field(ge=0)] = 0
    """How many layers go: those that change the residual stream least. One must stay."""
    scope: Literal["layer", "global"] = "layer"
    rounding: Literal["floor", "nearest", "ceil"] = "nearest"
    scores: Literal["taylor", "magnitude", "activation", "random"] = "taylor"
    """How heads and neurons are scored; layers go by their influence, or with `random` at random."""
    compensate: bool = False
    """Whether what the removed heads and neurons gave is folded into the rest."""
    calibration_blocks: Positive = 32
    block_size: Annotated[int, Field(ge=2)] = 256


class Distill(Strict):
    """Learn from the dense teacher's distribution (Hinton et al. 2015) beside the text."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5


class Finetune(Strict):
    """Recover quality by training; `steps`, if given, takes the place of `epochs`."""

    epochs: Annotated[int, Field(ge=1, le=5)] = 1
    steps: Positive | None = None
    block_size: Annotated[int, Field(ge=2)] = 256
    pack: bool = True
    """`true`: the text is packed into blocks of `block_size` tokens without padding. `false`: each of its rows (of a
    plain file each of its paragraphs) is an example of its own, cut at `block_size` and padded; padding is masked."""
    batch_size: Positive = 8
    accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    save_steps: Positive = 100
    autocast: bool = True
    """Whether matrix products are in bf16 or fp16 where the device computes that natively; `false`: all in FP32, so
    that losses are the same on CPUs with and without bf16 units."""
    distill: Distill | None = None


class Quantize(Strict):
    """INT8 weights for the CPU. `ignore` holds regular expressions of module names that stay FP32."""

    method: Literal["rtn", "gptq"] = "rtn"
    bits: Literal[8, "mixed"] = 8
    """`mixed`: the layers that mind it least go to 4 bits, as many as the budget allows."""
    budget: Annotated[float, Field(ge=1)] = 1.01
    """With `mixed`: perplexity on the calibration text over that in FP32, at most."""
    w8a8: bool = False
    """Whether activations are quantised too, in an IR of its own to compare with."""
    ignore: list[Annotated[str, AfterValidator(_pattern)]] = []
    calibration_samples: Positive = 32
    block_size: Annotated[int, Field(ge=2)] = 256


class Controls(Strict):
    """The arms without which nobody can tell what pruning cost, or what a teacher gave."""

    dense_finetuned: bool = True
    random_heads: bool = True
    plain_finetuned: bool = True
    """Where `finetune.distill` is set: the same student without the teacher, with steps for the teacher's time."""


class Tasks(Strict):
    """What the rows are asked beyond perplexity; `data` is a folder with the tasks' files, `null` the Hub."""

    names: list[Literal["hellaswag", "lambada"]] = []
    data: str | None = None
    limit: Annotated[int, Field(ge=2)] | None = None
    """The first so many documents of each task; `null`: all."""


class Measure(Strict):
    """How each row is measured. `context: null` is the model's own limit."""

    text_share: Share = 1.0
    context: Positive | None = None
    stride: Positive | None = None
    prompt_tokens: Positive = 128
    new_tokens: Annotated[int, Field(ge=2)] = 32
    batch: Positive = 1
    min_count: Positive = 10
    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    latency: bool = True
    memory: bool = True
    agreement_tokens: Annotated[int, Field(ge=0)] = 1024
    """On how many tokens of the evaluation text the rows' answers are compared; 0: not at all."""
    tasks: Tasks = Tasks()


class Recipe(Strict):
    """A whole run, from model to INT8."""

    name: str = "custom"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Data = Data()
    load: Load = Load()
    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    quantize: Quantize = Quantize()
    controls: Controls = Controls()
    measure: Measure = Measure()


class PretrainModel(Strict):
    """The shape to train: GPT-2's architecture, `n_embd = n_head * head_dim`."""

    n_layer: Positive = 4
    n_head: Positive = 5
    head_dim: Positive = 64
    n_positions: Positive = 512
    vocab_size: Annotated[int, Field(ge=257, le=65536)] = 8192
    position: Literal["learned", "rope"] = "learned"
    """`rope`: rotary positions, of base `rope_base`, in the first `rope_share` of each head."""
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    rope_share: Share = 1.0
    n_kv_head: Positive | None = None
    """Key/value heads, a divisor of `n_head`, each read by as many query heads; `null`: one for each."""
    window: Window = None
    """How many tokens a layer sees, the newest among them: one number, or one or `null` for each layer."""

    @model_validator(mode="after")
    def _a_model_can_have_it(self) -> Self:
        """What the model's configuration would say, whose import costs seconds."""
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head is {self.n_kv_head}: give a divisor of n_head {self.n_head}")
        turns = self.position == "rope" or self.head_dim > 1
        if turns and int(self.rope_share * self.head_dim) < 2:
            raise ValueError(
                f"rope_share is {self.rope_share}: give a share of head_dim {self.head_dim} that holds two numbers"
            )
        if isinstance(self.window, list) and len(self.window) != self.n_layer:
            raise ValueError(f"window lists {len(self.window)} layers, n_layer is {self.n_layer}")
        return self

    def config(self, **fields: Any) -> "CompactGPT2Config":
        """The model's configuration, with `fields` beside these."""
        from pipeline.model import CompactGPT2Config

        return CompactGPT2Config(n_embd=self.n_head * self.head_dim, **self.model_dump(), **fields)


class HellaSwag(Strict):
    """HellaSwag while a model trains; `data` is a folder with its file, `null` the Hub."""

    every: Positive = 250
    """Steps from one score to the next."""
    data: str | None = None
    limit: Annotated[int, Field(ge=2)] | None = None
    """The first so many documents; `null`: all."""


class Pretrain(Strict):
    """Training from scratch."""

    name: str = "custom"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: PretrainModel = PretrainModel()
    shards: str | None = None
    """In place of text: a folder that `data prepare` made, or any of llm.c's shards with a `tokenizer/`."""
    style: Literal["wikitext", "plain"] = "plain"
    tokenizer_bytes: Positive = 20_000_000
    """How much of the text the tokenizer is trained on; shards bring their own."""
    max_bytes: Positive | None = None
    """How much of the text is used; shards are used whole."""
    validation: str | None = None
    """A text as in `Data`; `null`: the shards' held-out one, or `embedded:valid`."""
    steps: Positive = 1000
    schedule: Literal["stable", "cosine"] = "stable"
    """After the warm-up the rate stays, then falls linearly to zero over `decay_steps`; or falls from there as a
    cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay_steps: Annotated[int, Field(ge=0)] = 200
    batch_size: Positive = 16
    """Blocks that one process takes at a time."""
    accumulation: Positive = 1
    """Batches a step, over all processes together: their number changes nothing of what a step learns from."""
    parallel: Literal["none", "ddp", "zero1", "fsdp"] = "none"
    """What the processes of `torchrun` share beside the batches: nothing, the optimiser's state (ZeRO-1), or the
    weights and gradients as well (FSDP2)."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon` for the matrices with AdamW for the rest, or AdamW for all, fused, decaying the matrices."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    adam_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0
    """The longest that a step's gradient may be; 0: any."""
    checkpointing: bool = False
    """Whether blocks are computed again on the way back, which takes a third more time and little memory."""
    autocast: bool = True
    """As in `Finetune`."""
    compile: bool = False
    """Whether `torch.compile` compiles the blocks."""
    attention: Literal["any", "flash"] = "any"
    """`flash`: attention runs by SDPA's flash kernel, or the training does not begin."""
    save_steps: Positive = 100
    eval_steps: Positive = 100
    eval_blocks: Positive = 64
    log_steps: Positive = 10
    hellaswag: HellaSwag | None = None
    reference: Literal["fineweb", "fineweb-edu"] | None = None
    """Of what the validation text is a part, where the figure is to show OpenAI's GPT-2 124M on the same."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Of one device, for the share of it that is used; `null`: that of a GPU known here, or no share."""
    spike: Annotated[float, Field(gt=0)] | None = None
    """How many nats over the median of the last losses are a divergence; `null`: only what is no number is one."""
    rollbacks: Annotated[int, Field(ge=0)] = 0
    """How often a divergence goes back to the last checkpoint and on over other text, before it ends the training."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        decay_steps = self.decay_steps if self.schedule == "stable" else 0
        if self.warmup_steps + decay_steps > self.steps:
            raise ValueError(f"warmup_steps + decay_steps exceed steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _optimizer_splits(self) -> Self:
        if self.optimizer == "muon" and self.parallel not in ("none", "ddp"):
            raise ValueError(f"parallel {self.parallel} splits matrices that Muon needs whole; set optimizer=adamw")
        return self


class Size(Strict):
    """The shape of one member of a family."""

    n_layer: Positive
    n_head: Positive
    head_dim: Positive = 64


class Scaling(Strict):
    """A family of trainings from scratch, for a scaling law."""

    name: str = "custom"
    sizes: Annotated[list[Size], Field(min_length=3)]
    budgets: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """FLOPs, of 6 for each parameter and token: each size is trained on as many tokens as a budget has for it."""
    tokens_per_parameter: tuple[float, float] = (0.5, 250)
    """Combinations with fewer or more are left out."""
    passes: Annotated[float, Field(gt=0)] = 4
    """Ones that would read the text more often as well: from here on repeated text is worth noticeably less than new
    (Muennighoff et al. 2023, section 6)."""
    min_steps: Positive = 100
    """Ones of fewer steps as well."""
    warmup_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Of each training's steps, for the schedule `stable`: a loss counts only where the rate has come down."""
    resamples: Positive = 400
    """For the intervals."""
    pretrain: Pretrain = Pretrain()
    """All the rest. Shape, steps, warm-up, decay and evaluation are set for each training."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share + decay_share exceed 1")
        return self


R = TypeVar("R", bound=Strict)


def load_recipe(kind: type[R], name: str | Path, overrides: Iterable[str] = ()) -> R:
    """A recipe by preset name or YAML file, with `key.sub=value` overrides applied (see `read_value`).

    Raises `UserError` for a missing file, what is not plain YAML, an unknown key or a value out of range.
    """
    path = expanded(name) if str(name).endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    try:
        raw = plain.read(path)
    except FileNotFoundError as error:
        presets = ", ".join(sorted(preset.stem for preset in RECIPES.glob("*.yaml")))
        raise UserError(f"recipe {name}: not found; give a preset ({presets}) or a .yaml file") from error
    except OSError as error:
        raise UserError(f"recipe {shown(str(path))}: no readable YAML ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"recipe {path}: no readable YAML ({error})") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path}: holds {type(raw).__name__}; a mapping of keys is needed")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {shown(override)}: give key=value, as in prune.ratio=0.3")
        set_value(raw, key, read_value(kind, key, text))
    return parse_recipe(kind, raw, where=f"recipe {name}")


def parse_recipe(kind: type[R], raw: dict[str, Any], where: str = "recipe") -> R:
    """A checked recipe from plain data. Raises `UserError` naming the first key that is wrong."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first, place = _first(kind, error)
        key = shown(".".join(map(str, place)) or "recipe")
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown key '{key}'; known here: {_known(kind, place)}") from error
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {key} is {shown(repr(first.get('input')))}: {said}") from error


def read_value(kind: type[BaseModel], key: str, text: str) -> Any:
    """What a word of the shell means for a key: itself where the key holds text, else what it wholly reads as.

    `null`, `~`, `none` and nothing at all mean `None` where a key need hold no text. A word that reads as nothing
    else stays one, and is refused with the recipe.
    """
    kept = _annotation(kind, key)
    if kept is str:
        return text
    if kept == (str | None):
        return None if text.lower() in ("", "~", "null", "none") else text
    try:
        return plain.parse(text, comments=False)
    except ValueError:
        return text


def set_value(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one `key.sub` in place."""
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST:
        raise UserError(f"--set {shown(key)}: no key is as deep")
    for parent in parents:
        if not isinstance(raw.get(parent), dict):
            raw[parent] = {}
        raw = raw[parent]
    raw[last] = value


def holds_text(kind: type[BaseModel], key: str) -> bool:
    """Whether a key's value is text, so that any word of the shell will do."""
    return _annotation(kind, key) in (str, str | None)


def _annotation(kind: type[BaseModel] | None, key: str) -> Any:
    """The type of a key's value; `None` where no such key is known."""
    annotation: Any = kind
    for part in key.split("."):
        kind = _part(annotation)
        if kind is None or part not in kind.model_fields:
            return None
        annotation = kind.model_fields[part].annotation
    return annotation


def _part(annotation: Any) -> type[BaseModel] | None:
    """The recipe part that a key may hold, alone or in a list."""
    options = [annotation, *get_args(annotation)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _first(kind: type[BaseModel], error: ValidationError) -> tuple[Any, tuple[int | str, ...]]:
    """The first mistake and its key, without pydantic's names for the branches of a union, of which the one that got
    farthest says what is wrong."""
    found = [(each, _place(kind, each["loc"])) for each in error.errors()]
    key = _names(found[0][1])
    return max((each for each in found if _names(each[1]) == key), key=lambda each: len(each[0]["loc"]))


def _names(place: tuple[int | str, ...]) -> tuple[str, ...]:
    return tuple(part for part in place if isinstance(part, str))


def _place(kind: type[BaseModel] | None, location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    place: list[int | str] = []
    for part in location:
        if isinstance(part, int):
            place.append(part)
        elif kind is not None:
            place.append(part)
            kind = _part(kind.model_fields[part].annotation) if part in kind.model_fields else None
    return tuple(place)


def _known(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The keys that the recipe part holding `location` knows."""
    for name in location[:-1]:
        if isinstance(name, int):  # a place in a list
            continue
        kind = _part(kind.model_fields[name].annotation) or kind
    return ", ".join(kind.model_fields)
