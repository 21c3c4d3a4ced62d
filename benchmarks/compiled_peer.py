"""The strongest that torch alone gives: a static KV cache, `torch.compile` at its highest tuning, CUDA graphs.

A decode step is one function over fixed addresses: it reads its token and position from buffers, appends to
the cache, and writes the next token and position back into the same buffers. It is compiled with the tuning of
`mode="max-autotune"` and its graph is captured here by hand, once, so that a token costs one replay: the mode's
own graphs check guards and inputs at each call. Tokens come to the host only when somebody asks.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.model import CompactGPT2LMHeadModel

MODE = "max-autotune-no-cudagraphs"
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`q` `[batch, heads, 1, head_dim]` over the keys that `seen` `[capacity]` marks: torch's own kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None, None])


def attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The same, written out, for the compiler to fuse."""
    scores = (q.float() * k.float()).sum(-1) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights[..., None] * v.float()).sum(-2, keepdim=True).to(v.dtype)


class StaticGPT2(nn.Module):
    """A CompactGPT2's own modules over a cache of fixed size; `batch` sequences of equal length."""

    token: torch.Tensor
    position: torch.Tensor
    places: torch.Tensor
    history: torch.Tensor

    def __init__(self, model: CompactGPT2LMHeadModel, *, batch: int, capacity: int, attend: Attend = attend_sdpa):
        super().__init__()
        self.model = cast(Any, model)
        self.attend, self.batch = attend, batch
        like = self.model.transformer.wte.weight
        self.register_buffer("token", torch.zeros(batch, 1, dtype=torch.int64, device=like.device))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64, device=like.device))
        self.register_buffer("places", torch.arange(capacity, device=like.device))
        self.register_buffer("history", torch.zeros(batch, capacity + 1, dtype=torch.int64, device=like.device))
        self.cache = nn.ParameterList()
        for block in self.model.transformer.h:
            shape = (2, batch, block.attn.n_head, capacity, block.attn.head_dim)
            self.cache.append(nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device), False))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[batch, length]` at `positions` `[length]` -> FP32 logits of the last, `[batch, vocab]`.

        More than one token: they are the first ones, and see each other alone.
        """
        body, length = self.model.transformer, tokens.shape[1]
        seen = self.places <= positions[-1]
        x = body.wte(tokens) + body.wpe(positions)
        for block, cache in zip(body.h, self.cache, strict=True):
            a = block.attn
            qkv = a.c_attn(block.ln_1(x)).view(self.batch, length, 3, a.n_head, a.head_dim).permute(2, 0, 3, 1, 4)
            cache.index_copy_(3, positions, qkv[1:])
            if length > 1:
                y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
            else:
                y = self.attend(qkv[0], cache[0], cache[1], seen)
            x = x + a.c_proj(y.transpose(1, 2).reshape(self.batch, length, -1))
            x = x + block.mlp(block.ln_2(x))
        return self.model.lm_head(body.ln_f(x[:, -1])).float()

    def step(self) -> torch.Tensor:
        """Decode `token` at `position`; both then hold the next, and `history` too. Returns `[batch, vocab]`."""
        logits = self(self.token, self.position)
        token = logits.argmax(-1, keepdim=True)
        self.token.copy_(token)
        self.position.add_(1)
        self.history.index_copy_(1, self.position, token)
        return logits


class CompiledPeer:
    """A subject of the benchmark: see `benchmarks.subjects.Subject`. Compiles in `__init__`: minutes.

    `part` says which half is compiled and captured, "decode" or "prefill"; the other half runs as it is.
    """

    def __init__(
        self,
        model: CompactGPT2LMHeadModel,
        *,
        batch: int,
        length: int,
        capacity: int,
        part: str,
        attend: Attend = attend_sdpa,
    ):
        self.model = static = StaticGPT2(model, batch=batch, capacity=capacity, attend=attend)
        device = static.token.device
        self.prompt = prompt = torch.zeros(batch, length, dtype=torch.int64, device=device)
        places = torch.arange(length, device=device)

        def read() -> torch.Tensor:
            return static(prompt, places)

        self.logits = torch.empty(0)
        self.read: Callable[[], torch.Tensor] = read
        self.step: Callable[[], torch.Tensor] = static.step
        with torch.inference_mode():
            if part == "decode":
                self.step = captured(torch.compile(static.step, mode=MODE, fullgraph=True, dynamic=False))
            else:
                self.read = captured(torch.compile(read, mode=MODE, fullgraph=True, dynamic=False))

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `benchmarks.subjects.Subject`."""
        self.prompt.copy_(ids)
        self.logits = self.read()
        return self.logits

    @torch.inference_mode()
    def burst(self, count: int) -> torch.Tensor:
        """See `benchmarks.subjects.Subject`. To be called once after a prefill."""
        static, length = self.model, self.prompt.shape[1]
        token = self.logits.argmax(-1, keepdim=True)
        static.token.copy_(token)
        static.history[:, length : length + 1] = token
        static.position.fill_(length)
        for _ in range(count):
            self.step()
        return static.history[:, length : length + count]


def captured(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`work` as a CUDA graph: calling the result replays it and returns the same tensor each time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled, tuned or set up at first use happens here
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
