"""Runs a CompactGPT2, dense or pruned, by our own kernels: FP16 weights and activations, FP32 sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.errors import CudaExtError
from cuda_ext.packing import Packed, cache_elements, pack, table

_CHUNK_ROWS = 2048  # tokens that one prefill launch works on: bounds the workspace
_LOOK_EVERY = 8  # steps between looks at whether every sequence has ended
_KEYS_PER_SPLIT = 64
DECODE = ("graph", "eager")


def why_not() -> str | None:
    """What keeps the engine from running here, in one sentence; None where it can run."""
    if torch.version.cuda is None:
        return "this torch build has no CUDA support"
    if not torch.cuda.is_available():
        return "torch sees no GPU (is the driver there, and new enough for this torch?)"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 5):
        return f"the GPU has compute capability {major}.{minor}; 7.5 (Turing) is the first supported"
    return None


def is_available() -> bool:
    """Whether a GPU is here that the kernels can run on."""
    return why_not() is None


@dataclass(frozen=True)
class _Draw:
    """How tokens are drawn; temperature 0 takes the likeliest."""

    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise CudaExtError(f"{self}: give temperature >= 0, top_k >= 0 and 0 < top_p <= 1")


class Engine:
    """A checkpoint with its KV cache on one device; every buffer is planned here, none is made while decoding.

    `decode`: "graph" replays one CUDA graph a token, "eager" launches the kernels one by one.
    """

    def __init__(
        self, packed: Packed, *, device: str, max_batch: int = 1, max_context: int | None = None, decode: str = "graph"
    ) -> None:
        shape = packed.shape
        if decode not in DECODE:
            raise CudaExtError(f"decode is {decode!r}; give one of {', '.join(DECODE)}")
        if max_batch < 1:
            raise CudaExtError(f"max_batch is {max_batch}; give 1 or more")
        capacity = max_context or shape.context
        if not 1 <= capacity <= shape.context:
            raise CudaExtError(f"max_context is {max_context}; the model's positions end at {shape.context}")
        self.shape, self.device, self.max_batch, self.context = shape, torch.device(device), max_batch, capacity
        self._by_graph = decode == "graph" and self.device.type == "cuda"
        # Dependent launches came with Hopper.
        self._dependent = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.weights = packed.weights.to(self.device)
        self.cache = torch.zeros(cache_elements(shape, max_batch, capacity), dtype=torch.float16, device=self.device)
        self.table = table(packed, self.weights, self.cache, max_batch, capacity)
        self._chunk = max(1, min(capacity, _CHUNK_ROWS // max_batch))
        size = ops.workspace_bytes(self.table, max_batch, self._chunk, self.device.type)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._logits = torch.empty(max_batch, shape.vocabulary, dtype=torch.float32, device=self.device)
        # Of each sequence: the token last read, its position, how many are cached.
        self._tokens, self._position, self._lengths = (self._ints(max_batch) for _ in range(3))
        # Of sampling: tokens drawn so far, whether a stop token came, and all that were drawn.
        self._drawn, self._finished = self._ints(max_batch), self._ints(max_batch)
        self._history = self._ints(max_batch, capacity)
        self._batch, self._longest = 0, 0  # as the host knows them
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}
        self._stop_tokens: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str,
        device: str | None = None,
        max_batch: int = 1,
        max_context: int | None = None,
        decode: str = "graph",
    ) -> Self:
        """Load a folder of `config.json` and safetensors, ours or stock GPT-2.

        `device`: "cuda" or "cuda:N"; "cpu" runs the kernels' source on the CPU, slowly, as the tests do.
        Raises CudaExtError where there is no usable GPU, CheckpointError for a folder that cannot be used.
        """
        reason = None if device == "cpu" else why_not()
        if reason is not None:
            raise CudaExtError(f"the CUDA engine cannot run: {reason}")
        return cls(
            pack(Path(folder)), device=device or "cuda", max_batch=max_batch, max_context=max_context, decode=decode
        )

    def reset(self) -> None:
        """Forget the past."""
        self._batch, self._longest = 0, 0

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of all positions, from an empty past: int [batch, length] -> FP32 [batch, length, vocabulary]."""
        batch, length = self._accept(input_ids)
        logits = torch.empty(batch, length, self.shape.vocabulary, dtype=torch.float32, device=self.device)
        tokens = self._on_device(input_ids)
        for begin in range(0, length, self._chunk):
            part = tokens[:, begin : begin + self._chunk].contiguous()
            count = part.shape[1]
            some = torch.empty(batch * count, self.shape.vocabulary, dtype=torch.float32, device=self.device)
            start, lengths = self._full(batch, begin), self._full(batch, count)
            ops.prefill(self.table, self.workspace, self.cache, part, start, lengths, None, some)
            logits[:, begin : begin + count] = some.view(batch, count, -1)
        self._hold(batch, self._full(batch, length), length)
        return logits

    def prefill(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Forget the past, read prompts, return the next tokens' logits: FP32 [batch, vocabulary].

        `input_ids` int [batch, length]; `lengths`: how many of each row count, the rest being padding on the right.
        """
        batch, length = self._accept(input_ids)
        counts = list(lengths) if lengths is not None else [length] * batch
        if len(counts) != batch or not all(1 <= count <= length for count in counts):
            raise CudaExtError(f"lengths {counts} do not fit a batch of {batch} by {length} tokens")
        tokens = self._on_device(input_ids)
        logits = self._logits[:batch]
        for begin in range(0, length, self._chunk):
            part = tokens[:, begin : begin + self._chunk].contiguous()
            width = part.shape[1]
            ends = [b for b, count in enumerate(counts) if begin < count <= begin + width]
            rows = self._of([b * width + counts[b] - 1 - begin for b in ends])
            here = self._of([min(max(count - begin, 0), width) for count in counts])
            some = logits if len(ends) == batch else torch.empty(len(ends), logits.shape[1], device=self.device)
            ops.prefill(self.table, self.workspace, self.cache, part, self._full(batch, begin), here, rows, some)
            if some is not logits:
                logits[self._of(ends).long()] = some
        self._hold(batch, self._of(counts), max(counts))
        return logits.clone()

    def decode(self, token_ids: Tensor) -> Tensor:
        """Append one token a sequence: int [batch] -> FP32 [batch, vocabulary], overwritten by the next call."""
        if token_ids.shape != (self._batch,):
            raise CudaExtError(f"decode got {list(token_ids.shape)} tokens for {self._batch} sequences; prefill first")
        self._make_room(1)
        self._check_tokens(token_ids)
        self._tokens[: self._batch] = token_ids.to(self.device, torch.int32)
        self._position[: self._batch] += 1
        self._lengths[: self._batch] += 1
        self._replay((self._batch,), lambda: self._launch(self._batch))
        self._longest += 1
        return self._logits[: self._batch]

    def extend(
        self, count: int, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Draw and append `count` tokens a sequence behind what is held: int32 [batch, count], on the device.

        Nothing waits for the device. Each call draws anew from `seed`.
        """
        batch = self._batch
        if batch == 0:
            raise CudaExtError("extend has nothing to go on from; prefill first")
        self._make_room(count)
        step = self._sampler(_Draw(temperature, top_k, top_p, seed), ())
        for _ in range(count):
            step()
        self._longest += count
        return self._history[:batch, :count].clone()

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

        A sequence ends at a token of `stop`, which it keeps. Sampling, stopping and the next step stay on the
        device. `on_tokens` gets each step's tokens (a finished sequence repeats token 0) one
        step late, so that the GPU never waits for it.
        """
        if max_new_tokens < 1:
            raise CudaExtError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        how = _Draw(temperature, top_k, top_p, seed)
        self.prefill(input_ids, lengths)
        batch = self._batch
        self._make_room(max_new_tokens - 1)
        step = self._sampler(how, tuple(stop))
        watch = _Watch(self.device)
        done = 0
        for done in range(1, max_new_tokens + 1):
            if done < max_new_tokens:
                step()
            else:  # the last one needs no logits behind it, nor room for them
                self._draw(batch, how, self._stops(tuple(stop)))
            if on_tokens is not None:
                watch.send(torch.stack([self._tokens[:batch], self._finished[:batch]]), on_tokens)
            elif len(stop) and done % _LOOK_EVERY == 0:
                watch.send(torch.stack([self._tokens[:batch], self._finished[:batch]]))
            if watch.all_finished():
                break
        watch.drain()
        rows = self._history[:batch, :done].tolist()
        self.reset()
        return [_until(row, stop) for row in rows]

    # ---- one token ----

    def _sampler(self, how: _Draw, stop: tuple[int, ...]) -> Callable[[], None]:
        """What draws a token from the logits, and computes the next ones: one graph replay where there are graphs."""
        batch, stops = self._batch, self._stops(stop)
        self._drawn.zero_()
        self._finished.zero_()

        def step() -> None:
            self._draw(batch, how, stops)
            self._launch(batch)

        return lambda: self._replay((batch, how, stop), step)

    def _draw(self, batch: int, how: _Draw, stops: Tensor) -> None:
        tokens, drawn = self._tokens[:batch], self._drawn[:batch]
        ops.sample(self._logits[:batch], drawn, tokens, how.temperature, how.top_k, how.top_p, how.seed)
        ops.advance(
            tokens, self._position[:batch], self._lengths[:batch], drawn, self._finished[:batch],
            self._history[:batch], stops, 0, self.context,
        )  # fmt: skip

    def _launch(self, batch: int) -> None:
        """From tokens, positions and lengths to logits."""
        # Fixed in a graph, so for the longest context: a split without keys costs little.
        splits = max(1, min(32, self.context // _KEYS_PER_SPLIT))
        ops.decode(
            self.table, self.workspace, self.cache, self._tokens[:batch], self._position[:batch],
            self._lengths[:batch], self._logits[:batch], splits, self._dependent,
        )  # fmt: skip

    def _replay(self, name: tuple[object, ...], step: Callable[[], None]) -> None:
        """Run `step` by the graph of this name, captured when it is first met."""
        if not self._by_graph:
            step()
            return
        if name not in self._graphs:
            self._graphs[name] = self._capture(step)
        self._graphs[name].replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        state = (self._tokens, self._position, self._lengths, self._logits, self._drawn, self._finished)
        kept = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            step()  # loads the kernels, which a capture must not
        torch.cuda.current_stream(self.device).wait_stream(side)
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph

    def _stops(self, stop: tuple[int, ...]) -> Tensor:
        # A graph keeps the address, so the tensor must live as long.
        if stop not in self._stop_tokens:
            self._stop_tokens[stop] = self._of(stop)
        return self._stop_tokens[stop]

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

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, torch.int32)

    def _of(self, values: Sequence[int]) -> Tensor:
        held = torch.tensor(values, dtype=torch.int32)
        if self.device.type == "cuda":  # from pinned memory the host need not wait for the copy
            held = held.pin_memory().to(self.device, non_blocking=True)
        return held

    def _full(self, batch: int, value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=self.device)

    def _ints(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)


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
