"""Runs a CompactGPT2, dense or pruned, by our own kernels: FP16 weights and activations, FP32 sums."""

import functools
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.errors import CudaExtError
from cuda_ext.graphs import capture
from cuda_ext.memory import chunk
from cuda_ext.packing import Packed, cache_elements, pack, table
from cuda_ext.persistent import Persistent, State
from cuda_ext.products import Choice, bucket, choose, logits_width
from cuda_ext.ranges import ranged
from cuda_ext.sampling import WORDS, Sampling
from cuda_ext.tuning import Tuner

_LOOK_EVERY = 8  # steps between looks at whether every sequence has ended
_KEYS_PER_SPLIT = 64
_TRIED, _TRIALS = 8, 3  # tokens in which ways to decode are compared, and how often in one measurement
DECODE = ("graph", "persistent", "eager")
DEPENDENT = "HEADROOM_CUDA_DEPENDENT"
"""The environment's switch: "0" launches no kernel before the one before it has ended."""

_Of = ParamSpec("_Of")
_Result = TypeVar("_Result")


def why_not(device: str = "cuda") -> str | None:
    """What keeps the engine from running here, in one sentence; None where it can run. `device` as for `Engine`."""
    if torch.version.cuda is None:
        return "this torch build has no CUDA support"
    if not torch.cuda.is_available():
        return "torch sees no GPU (is the driver there, and new enough for this torch?)"
    index = torch.device(device).index
    if index is not None and index >= torch.cuda.device_count():
        return f"there is no {device}; torch sees {torch.cuda.device_count()} GPUs, the first of which is cuda:0"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        return f"the GPU has compute capability {major}.{minor}; 7.5 (Turing) is the first supported"
    return None


def is_available() -> bool:
    """Whether a GPU is here that the kernels can run on."""
    return why_not() is None


def _guard(device: torch.device) -> AbstractContextManager[object]:
    """Streams, events and captures of its scope are `device`'s, whichever was current before."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on_its_device(
    method: Callable[Concatenate["Engine", _Of], _Result],
) -> Callable[Concatenate["Engine", _Of], _Result]:
    @functools.wraps(method)
    def call(self: "Engine", *arguments: _Of.args, **named: _Of.kwargs) -> _Result:
        with _guard(self.device):
            return method(self, *arguments, **named)

    return call


class Engine:
    """A checkpoint with its KV cache on one device; every buffer is planned here, none is made while decoding.

    `decode`: "graph" replays one CUDA graph a token; "persistent" runs one launch for many tokens, for batches of
    1 to 4 where the model fits, and graphs for others; "eager" launches the kernels one by one; "auto" takes the
    faster of the first two, measured once for each batch (tuning.py).

    `dependent`: whether a kernel may begin before the one before it has ended (programmatic dependent launch, from
    Hopper on). None: where the GPU can, unless $HEADROOM_CUDA_DEPENDENT is "0".
    """

    def __init__(
        self,
        packed: Packed,
        *,
        device: str,
        max_batch: int = 1,
        max_context: int | None = None,
        decode: str = "auto",
        dependent: bool | None = None,
    ) -> None:
        shape = packed.shape
        if decode not in ("auto", *DECODE):
            raise CudaExtError(f"decode is {decode!r}; give one of {', '.join(('auto', *DECODE))}")
        if max_batch < 1:
            raise CudaExtError(f"max_batch is {max_batch}; give 1 or more")
        capacity = shape.context if max_context is None else max_context
        if not 1 <= capacity <= shape.context:
            raise CudaExtError(f"max_context is {max_context}; the model's positions end at {shape.context}")
        self.shape, self.device, self.max_batch, self.context = shape, torch.device(device), max_batch, capacity
        if self.device.type == "cuda" and self.device.index is None:  # it stays there, whatever becomes current
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._packed, self._decode, self._dependent = packed, decode, _dependent(self.device, dependent)
        with _guard(self.device):
            self._allocate()

    def _allocate(self) -> None:
        packed, shape, max_batch, capacity = self._packed, self.shape, self.max_batch, self.context
        self.weights = packed.weights.to(self.device)
        self.cache = torch.zeros(cache_elements(shape, max_batch, capacity), dtype=torch.float16, device=self.device)
        self._tuner = Tuner(self.device)
        self._choices: list[Choice] = []
        self._chosen: set[tuple[int, int]] = set()
        self.table = self._make_table()
        self._chunk = chunk(max_batch, capacity)
        size = ops.workspace_bytes(self.table, max_batch, self._chunk, self.device.type)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._counters = self._ints(ops.counters(self.table, max_batch, self.device.type))
        self._logits = self._rows_of_logits(max_batch)
        # Of each sequence: the token last read, its position, how many are cached.
        self._tokens, self._position, self._lengths = (self._ints(max_batch) for _ in range(3))
        # Of sampling: tokens drawn so far, whether a stop token came, and all that were drawn.
        self._drawn, self._finished = self._ints(max_batch), self._ints(max_batch)
        self._history = self._ints(max_batch, capacity)
        self._sampling = self._ints(WORDS)  # how; read by captured kernels, so it stays where it is
        self._batch, self._longest = 0, 0  # as the host knows them
        wanted = self._decode in ("auto", "persistent")
        self._persistent = Persistent(self.table, max_batch, self.device) if wanted else None
        self._ways: dict[int, str] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}  # at most two a batch: see _run

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str,
        device: str | None = None,
        max_batch: int = 1,
        max_context: int | None = None,
        decode: str = "auto",
        dependent: bool | None = None,
    ) -> Self:
        """Load a folder of `config.json` and safetensors, ours or stock GPT-2.

        `device`: "cuda" or "cuda:N"; "cpu" runs the kernels' source on the CPU, slowly, as the tests do.
        Raises CudaExtError where there is no usable GPU, CheckpointError for a folder that cannot be used.
        """
        device = device or "cuda"
        reason = None if device == "cpu" else why_not(device)
        if reason is not None:
            raise CudaExtError(f"the CUDA engine cannot run: {reason}")
        return cls(
            pack(Path(folder)),
            device=device,
            max_batch=max_batch,
            max_context=max_context,
            decode=decode,
            dependent=dependent,
        )

    def reset(self) -> None:
        """Forget the past."""
        self._batch, self._longest = 0, 0

    @_on_its_device
    @ranged("prefill")
    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of all positions, from an empty past: int [batch, length] -> FP32 [batch, length, vocabulary]."""
        batch, length = self._accept(input_ids)
        logits = torch.empty(batch, length, self.shape.vocabulary, dtype=torch.float32, device=self.device)
        tokens = self._on_device(input_ids)
        for begin in range(0, length, self._chunk):
            part = tokens[:, begin : begin + self._chunk].contiguous()
            count = part.shape[1]
            self._tune(batch * count, batch * count)
            some = self._rows_of_logits(batch * count)
            start, lengths = self._full(batch, begin), self._full(batch, count)
            ops.prefill(self.table, self.workspace, self.cache, part, start, lengths, None, some)
            logits[:, begin : begin + count] = some.unflatten(0, (batch, count))
        self._hold(batch, self._full(batch, length), length)
        return logits

    @_on_its_device
    @ranged("prefill")
    def prefill(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Forget the past, read prompts, return the next tokens' logits: FP32 [batch, vocabulary].

        `input_ids` int [batch, length]; `lengths`: how many of each row count, the rest being padding on the right.
        """
        return self._prefill(input_ids, lengths).clone()

    def _prefill(self, input_ids: Tensor, lengths: Sequence[int] | None, room: int = 0) -> Tensor:
        """The logits are overwritten by the next token's. `room`: for how many more tokens there must be."""
        batch, length = self._accept(input_ids)
        try:
            counts = [length] * batch if lengths is None else [operator.index(count) for count in lengths]
        except TypeError:
            raise CudaExtError(f"lengths are {list(lengths or ())}; give integers") from None
        if len(counts) != batch or not all(1 <= count <= length for count in counts):
            raise CudaExtError(f"lengths {counts} do not fit a batch of {batch} by {length} tokens")
        self._make_room(max(counts) + room)
        tokens = self._on_device(input_ids)
        logits = self._logits[:batch]
        for begin in range(0, length, self._chunk):
            part = tokens[:, begin : begin + self._chunk].contiguous()
            width = part.shape[1]
            self._tune(batch * width, batch)
            ends = [b for b, count in enumerate(counts) if begin < count <= begin + width]
            rows = self._of([b * width + counts[b] - 1 - begin for b in ends])
            here = self._of([min(max(count - begin, 0), width) for count in counts])
            some = logits if len(ends) == batch else self._rows_of_logits(len(ends))
            ops.prefill(self.table, self.workspace, self.cache, part, self._full(batch, begin), here, rows, some)
            if some is not logits:
                logits[self._of(ends).long()] = some
        self._hold(batch, self._of(counts), max(counts))
        return logits

    @_on_its_device
    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a sequence: int [batch] -> FP32 [batch, vocabulary], overwritten by the next call."""
        if token_ids.shape != (self._batch,):
            raise CudaExtError(f"decode got {list(token_ids.shape)} tokens for {self._batch} sequences; prefill first")
        self._make_room(1)
        self._check_tokens(token_ids)
        self._tokens[: self._batch] = token_ids.to(self.device, torch.int32)
        self._position[: self._batch] += 1
        self._lengths[: self._batch] += 1
        self._forward(self._batch)
        self._longest += 1
        return self._logits[: self._batch]

    @_on_its_device
    def extend(
        self, count: int, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Draw and append `count` tokens a sequence behind what is held: int32 [batch, count], on the device.

        Nothing waits for the device. Each call draws anew from `seed`.
        """
        batch, how = self._batch, Sampling(temperature, top_k, top_p, seed)
        if count < 1:
            raise CudaExtError(f"count is {count}; give 1 or more")
        if batch == 0:
            raise CudaExtError("extend has nothing to go on from; prefill first")
        self._make_room(count)
        self._draw_first(batch, how)
        self._steps(batch, how, count - 1)
        self._forward(batch)
        self._longest += count
        return self._history[:batch, :count].clone()

    @_on_its_device
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        lengths: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continue prompts by up to `max_new_tokens`; temperature 0 takes the likeliest token.

        A sequence ends at a token of `stop` (at most 64), which it keeps. Sampling, stopping and the next step stay on
        the device. `on_tokens` gets each step's tokens (a finished sequence repeats token 0) one
        step late, so that the GPU never waits for it.
        """
        if max_new_tokens < 1:
            raise CudaExtError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        how = Sampling(temperature, top_k, top_p, seed, tuple(dict.fromkeys(stop)))
        self._prefill(input_ids, lengths, room=max_new_tokens - 1)
        batch = self._batch
        watch = _Watch(self.device)
        self._draw_first(batch, how)
        done = 1
        while True:
            state = torch.stack([self._tokens[:batch], self._finished[:batch]])
            if on_tokens is not None or how.stop:
                watch.send(state, on_tokens)
            if done == max_new_tokens or watch.all_finished():
                break
            count = min(1 if on_tokens is not None else _LOOK_EVERY, max_new_tokens - done)
            self._steps(batch, how, count)
            done += count
        watch.drain()
        rows = self._history[:batch, :done].tolist()
        self.reset()
        return [_until(row, stop) for row in rows]

    # ---- one token ----

    def _draw_first(self, batch: int, how: Sampling) -> None:
        self._drawn.zero_()
        self._finished.zero_()
        self._ask_for(how)
        self._draw(batch)

    def _ask_for(self, how: Sampling) -> None:
        """What is drawn from now on; in the stream's order, so that launches before it draw as they were asked to."""
        packed = how.packed()
        if self.device.type == "cuda":  # from pinned memory the host need not wait for the copy
            packed = packed.pin_memory()
        self._sampling.copy_(packed, non_blocking=True)

    def _steps(self, batch: int, how: Sampling, count: int) -> None:
        """`count` times: the tokens drawn last through the model, and the next ones drawn."""
        if count and how.greedy and self._way(batch) == "persistent":
            self._launch_persistent(batch, steps=count, greedy=True)
            return
        for _ in range(count):
            self._run("step", batch, self._step)

    def _step(self, batch: int) -> None:
        self._launch(batch)
        self._draw(batch)

    def _forward(self, batch: int) -> None:
        self._run("forward", batch, self._launch)

    @ranged("sampling")
    def _draw(self, batch: int) -> None:
        tokens, position, lengths, drawn, finished, history = self._state(batch)
        ops.sample(self._logits[:batch], self._sampling, drawn, tokens)
        ops.advance(tokens, position, lengths, drawn, finished, history, self._sampling, self.context)

    def _launch(self, batch: int) -> None:
        """From tokens, positions and lengths to logits."""
        if self._way(batch) == "persistent":
            self._launch_persistent(batch, steps=1, greedy=False)
            return
        # Fixed in a graph, so for the longest context: a split without keys costs little.
        splits = max(1, min(32, self.context // _KEYS_PER_SPLIT))
        ops.decode(
            self.table, self.workspace, self._counters, self.cache, self._tokens[:batch], self._position[:batch],
            self._lengths[:batch], self._logits[:batch], splits, self._dependent,
        )  # fmt: skip

    @ranged("persistent launch")
    def _launch_persistent(self, batch: int, *, steps: int, greedy: bool) -> None:
        assert self._persistent is not None
        state, logits = self._state(batch), self._logits[:batch]
        self._persistent.decode(self.cache, state, self._sampling, logits, steps=steps, greedy=greedy)

    def _state(self, batch: int) -> State:
        tokens, position, lengths = self._tokens[:batch], self._position[:batch], self._lengths[:batch]
        return tokens, position, lengths, self._drawn[:batch], self._finished[:batch], self._history[:batch]

    def _way(self, batch: int) -> str:
        """How this batch is decoded."""
        if batch not in self._ways:
            if batch > ops.MATVEC_ROWS:
                self._tune(batch, batch)
            graph = "graph" if self._decode != "eager" and self.device.type == "cuda" else "eager"
            ways = [graph]
            if self._persistent is not None and self._persistent.fits(batch):
                ways = ["persistent"] if self._decode == "persistent" else [graph, "persistent"]
            self._ways[batch] = ways[0] if len(ways) == 1 else self._measured(batch, ways)
        return self._ways[batch]

    def _measured(self, batch: int, ways: list[str]) -> str:
        """The fastest way to go on from what is held, which stays as it is."""
        if self._longest + 1 + _TRIED > self.context:  # no room to try
            return ways[0]
        asked_for = self._sampling.clone()
        self._ask_for(Sampling())
        state = (*self._state(self.max_batch), self._logits)
        kept = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)

        def trial(way: str) -> Callable[[], None]:
            def run() -> None:
                restore()
                self._position += 1  # the cache is written behind its end only
                self._lengths += 1
                self._finished.zero_()
                self._ways[batch] = way
                if way == "persistent":
                    self._launch_persistent(batch, steps=_TRIED, greedy=True)
                else:  # what a graph of a step holds
                    for _ in range(_TRIED):
                        self._step(batch)

            return run

        shape = self.shape
        name = f"decode {batch} at {self.context}: {shape.width} {shape.inner} {shape.vocabulary} {shape.heads}"
        fastest = self._tuner.fastest(name, {way: trial(way) for way in ways}, _TRIALS)
        restore()
        self._sampling.copy_(asked_for)
        return fastest

    @ranged("decode")
    def _run(self, name: str, batch: int, step: Callable[[int], None]) -> None:
        """`step`; where this batch goes by graphs, by the graph of this name, captured when it is first met."""
        if self._way(batch) != "graph":
            step(batch)
            return
        if (name, batch) not in self._graphs:
            self._graphs[name, batch] = self._capture(lambda: step(batch))
        self._graphs[name, batch].replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        state = (self._tokens, self._position, self._lengths, self._logits, self._drawn, self._finished)
        kept = [tensor.clone() for tensor in state]
        graph = capture(step)
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)
        return graph

    # ---- measured choices ----

    def _tune(self, rows: int, head_rows: int) -> None:
        """Make sure that the ways of products of so many rows have been measured."""
        buckets = bucket(rows), bucket(head_rows)
        if self._tuner.active and any(buckets) and buckets not in self._chosen:
            self._chosen.add(buckets)
            chosen = choose(self._packed, self.weights, *buckets, self._tuner, self.workspace)
            self._choices = list(dict.fromkeys([*self._choices, *chosen]))
            self.table = self._make_table()

    def _make_table(self) -> Tensor:
        return table(self._packed, self.weights, self.cache, self.max_batch, self.context, self._choices)

    # ---- small things ----

    def _accept(self, input_ids: Tensor) -> tuple[int, int]:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise CudaExtError(f"input_ids has shape {list(input_ids.shape)}; give [batch, length]")
        batch, length = input_ids.shape
        if batch > self.max_batch:
            raise CudaExtError(f"a batch of {batch} is over the planned {self.max_batch}; raise max_batch")
        self._check_tokens(input_ids)
        self.reset()
        self._make_room(length)
        return batch, length

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.is_floating_point():
            raise CudaExtError(f"tokens are {tokens.dtype}; give integers")
        # On the GPU this would wait for the device: those come from a sampler.
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.shape.vocabulary:
            raise CudaExtError(f"a token is outside 0..{self.shape.vocabulary - 1}")

    def _make_room(self, tokens: int) -> None:
        if self._longest + tokens > self.context:
            raise CudaExtError(f"{self._longest + tokens} tokens are over the context of {self.context}")

    def _hold(self, batch: int, lengths: Tensor, longest: int) -> None:
        self._lengths[:batch] = lengths
        self._position[:batch] = lengths - 1
        self._batch, self._longest = batch, longest
        self._counters.zero_()  # a decode that was broken off may have left some
        if self._persistent is not None:
            self._persistent.reset()

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, torch.int32)

    def _of(self, values: Sequence[int]) -> Tensor:
        held = torch.tensor(values, dtype=torch.int32)
        if self.device.type == "cuda":  # from pinned memory the host need not wait for the copy
            held = held.pin_memory().to(self.device, non_blocking=True)
        return held

    def _rows_of_logits(self, count: int) -> Tensor:
        """FP32 [count, vocabulary], the same apart everywhere: cuBLASLt's algorithms were measured for that."""
        padded = torch.zeros(count, logits_width(self.shape.vocabulary), device=self.device)  # a capture reads all
        return padded[:, : self.shape.vocabulary]

    def _full(self, batch: int, value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=self.device)

    def _ints(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)


def _dependent(device: torch.device, wanted: bool | None) -> bool:
    """Whether kernels launch before the one before has ended.

    Dependent launches came with Hopper. On the CPU they change nothing, or are tested (docs/cuda.md).
    """
    can = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)
    if wanted and not can:
        raise CudaExtError(f"dependent is True, but {device} has no dependent launches; compute capability 9.0 has")
    return can and os.environ.get(DEPENDENT, "1") != "0" if wanted is None else wanted


class _Watch:
    """Brings tokens and end marks to the host without the device waiting: read once their event has passed."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: list[tuple[Tensor, torch.cuda.Event | None, Callable[[list[int]], None] | None]] = []
        self._finished = False

    def send(self, pair: Tensor, to: Callable[[list[int]], None] | None = None) -> None:
        """`pair`: int32 [2, batch], tokens and end marks."""
        while to is not None and len(self._pending) > 1:  # at most one step late
            self._take()
        if self._on_gpu:
            copy = torch.empty(pair.shape, dtype=pair.dtype, pin_memory=True).copy_(pair, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((copy, event, to))
        else:
            self._pending.append((pair, None, to))

    def all_finished(self) -> bool:
        while self._pending and not self._finished:
            event = self._pending[0][1]
            if event is not None and not event.query():
                break
            self._take()
        return self._finished

    def drain(self) -> None:
        while self._pending:
            self._take()

    def _take(self) -> None:
        pair, event, to = self._pending.pop(0)
        if event is not None:
            event.synchronize()
        if to is not None and not self._finished:
            to(pair[0].tolist())
        self._finished = self._finished or bool(pair[1].all())


def _until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Up to the first stop token, which stays."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
