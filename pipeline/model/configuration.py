"""The configuration of CompactGPT2: GPT-2's, plus which heads each layer kept."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 1


class CompactGPT2Config(PreTrainedConfig):
    """GPT-2's configuration with a head list for each layer.

    `kept_heads[i]` holds the ascending original indices (in `range(n_head)`) of layer i's heads;
    `None` keeps all. `head_dim` is a field of its own: once heads are gone, `n_embd / n_head`
    no longer gives it. `position` is `learned`, GPT-2's table, or `rope`, which turns the first
    `rope_share` of each head by angles of base `rope_base` (rope.py).

    `n_kv_head` key/value heads (None: as many as `n_head`) each serve `n_head / n_kv_head` query heads
    that follow one another (grouping.py); where some of these are gone it serves the rest, and it
    goes with the last. In a layer with a `window`, a token sees the last so many tokens, itself among
    them (window.py): one number for all layers, or a number or None for each.

    Raises `ValueError` where the head list does not fit the layer and head counts, or a variant's
    fields do not fit the model.
    """

    model_type = "compact_gpt2"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "num_key_value_heads": "n_kv_head",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    position: str = "learned"
    rope_base: float | int = 10000.0
    rope_share: float | int = 1.0
    window: int | list[int | None] | None = None
    if TYPE_CHECKING:  # None when left out, but always set once the configuration is made
        head_dim: int
        n_inner: int
        n_kv_head: int
        kept_heads: list[list[int]]
    else:
        head_dim: int | None = None
        n_inner: int | None = None
        n_kv_head: int | None = None
        kept_heads: list[list[int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "head_dim", "n_inner", "n_kv_head"):
            value = getattr(self, name)
            if not (_is_size(value) or (value is None and name in ("head_dim", "n_inner", "n_kv_head"))):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        for name in ("layer_norm_epsilon", "rope_base", "rope_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: give a number above 0")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}: give head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head is {self.n_kv_head}: give a divisor of n_head {self.n_head}")
        if self.kept_heads is None:
            self.kept_heads = [list(range(self.n_head)) for _ in range(self.n_layer)]
        if not isinstance(self.kept_heads, list) or not all(isinstance(heads, list) for heads in self.kept_heads):
            raise ValueError("kept_heads is no list of lists: give each layer's head numbers")
        if len(self.kept_heads) != self.n_layer:
            raise ValueError(f"kept_heads lists {len(self.kept_heads)} layers, n_layer is {self.n_layer}")
        for layer, heads in enumerate(self.kept_heads):
            numbers = all(type(head) is int for head in heads)
            if not heads or not numbers or heads != sorted(set(heads)) or heads[0] < 0 or heads[-1] >= self.n_head:
                raise ValueError(
                    f"kept_heads[{layer}] is {heads}: give at least one head, ascending, each in 0..{self.n_head - 1}"
                )
        if self.position not in ("learned", "rope"):
            raise ValueError(f"position is {self.position!r}: give learned or rope")
        if self.rope_base <= 1:
            raise ValueError(f"rope_base is {self.rope_base}: give more than 1")
        turns = self.position == "rope" or self.head_dim > 1  # GPT-2's heads may be of one number
        if self.rope_share > 1 or (turns and self.rotary_dim < 2):
            raise ValueError(
                f"rope_share is {self.rope_share}: give a share of head_dim {self.head_dim} that holds two numbers"
            )
        windows = self.windows
        if len(windows) != self.n_layer:
            raise ValueError(f"window lists {len(windows)} layers, n_layer is {self.n_layer}")
        if not all(window is None or (_is_size(window) and window > 1) for window in windows):
            raise ValueError(f"window is {self.window}: give at least 2 tokens")
        super().__post_init__(**kwargs)

    @property
    def pruned(self) -> bool:
        """Whether any layer has lost a head."""
        return any(len(heads) < self.n_head for heads in self.kept_heads)

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head rotary positions turn: the even number at or under `rope_share * head_dim`."""
        return int(self.rope_share * self.head_dim) // 2 * 2

    @property
    def variants(self) -> list[str]:
        """In words, what this model has that GPT-2 has not."""
        found = {
            "rotary positions": self.position == "rope",
            "grouped-query attention": self.grouped,
            "sliding windows": any(self.windows),
        }
        return [words for words, has in found.items() if has]

    @property
    def windows(self) -> list[int | None]:
        """Each layer's window in tokens; None: it sees all."""
        return self.window if isinstance(self.window, list) else [self.window] * self.n_layer

    @property
    def sliding_window(self) -> int:
        """The widest window, where there is one: by these two names transformers makes caches that roll (window.py)."""
        if not any(self.windows):
            raise AttributeError("the model has no window")
        return max(window for window in self.windows if window)

    @sliding_window.setter
    def sliding_window(self, tokens: int) -> None:
        self.window = [tokens if window else None for window in self.windows]

    @property
    def layer_types(self) -> list[str]:
        """Which layers roll, where one does."""
        if not any(self.windows):
            raise AttributeError("the model has no window")
        return ["sliding_attention" if window else "full_attention" for window in self.windows]

    @property
    def grouped(self) -> bool:
        """Whether query heads share key/value heads."""
        return self.n_kv_head < self.n_head

    def groups(self, layer: int) -> dict[int, int]:
        """The original index of each key/value head that a layer kept, ascending, and how many query heads read it."""
        return dict(sorted(Counter(head * self.n_kv_head // self.n_head for head in self.kept_heads[layer]).items()))
