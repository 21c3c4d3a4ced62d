"""CompactGPT2: GPT-2 (Radford et al. 2019) over `nn.Linear`, with its own head count in each layer."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

# Relative, for an export ships these files as they are.
from .configuration import CompactGPT2Config
from .grouping import GroupedProjection, shared
from .rope import Rotary, rotate
from .window import rolling, whole, windowed

Rotation = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""One of transformers' attention functions: q, k, v `[batch, heads, length, head_dim]` and a mask -> `[batch, length,
heads, head_dim]` and, where it has them, the weights `[batch, heads, length, keys]`."""

_SERVED = {"num_items_in_batch", "is_causal", "output_attentions", "output_hidden_states"}
"""Arguments that `forward` does not name: the loss, the attention and transformers' own decorators read them."""


def eager_attention(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1), which so can tell its weights."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout, module.training)
    return (weights @ v).transpose(1, 2), weights


class Attention(nn.Module):
    """Causal self-attention of one layer, over the heads that the layer kept.

    `c_attn.weight` is `[3 * heads * head_dim, n_embd]`, its rows q, k, v, each the kept heads in
    ascending order; `c_proj.weight` is `[n_embd, heads * head_dim]`. Where query heads share keys and
    values, `c_attn` is a `GroupedProjection`.
    """

    def __init__(self, config: CompactGPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.n_head = len(config.kept_heads[layer])
        width = self.n_head * self.head_dim
        self.group_sizes = list(config.groups(layer).values())
        self.fill_groups = False
        """Whether keys and values are cached for each query head: the export to OpenVINO sets it."""
        self.c_attn: nn.Module = (
            GroupedProjection(config.n_embd, width, len(self.group_sizes) * self.head_dim)
            if config.grouped
            else nn.Linear(config.n_embd, 3 * width)
        )
        self.c_proj = nn.Linear(width, config.n_embd)
        self.window = config.windows[layer]
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        rotation: Rotation | None,
        attend: Attend,
        is_causal: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, length, n_embd]` -> the same shape, and the weights where `attend` tells them; appends to `cache` if
        there is one."""
        batch, length, _ = x.shape
        projected = self.c_attn(x)
        parts = projected if isinstance(projected, tuple) else projected.chunk(3, dim=-1)
        q, k, v = (part.view(batch, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        sizes = self.group_sizes
        if self.fill_groups:
            k, v, sizes = shared(k, sizes), shared(v, sizes), [1] * self.n_head
        if self.window is not None:
            mask = windowed(mask, self.window, length, cache, self.layer, x.device)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = shared(k, sizes), shared(v, sizes)
        dropout = self.attn_pdrop if self.training else 0.0
        y, weights = attend(self, q, k, v, mask, dropout=dropout, is_causal=is_causal)
        return self.resid_dropout(self.c_proj(y.reshape(batch, length, -1))), weights

    def qkv_weights(self) -> torch.Tensor:
        """The rows of `c_attn` that make each head's q, k and v, `[3, heads, head_dim, n_embd]`; heads of one group
        have the same k and v."""
        # One matrix, or those of q, k and v.
        matrices = [p for name, p in self.c_attn.named_parameters() if name.endswith("weight")]
        if len(matrices) == 1:
            return matrices[0].unflatten(0, (3, self.n_head, -1))
        q, k, v = (matrix.unflatten(0, (-1, self.head_dim))[None] for matrix in matrices)
        return torch.cat([q, shared(k, self.group_sizes), shared(v, self.group_sizes)])


class MLP(nn.Module):
    """The feed-forward half of a block: `n_embd -> n_inner -> n_embd`."""

    def __init__(self, config: CompactGPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: CompactGPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        rotation: Rotation | None,
        attend: Attend,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, rotation, attend, is_causal)[0]
        return x + self.mlp(self.ln_2(x))


class CompactGPT2PreTrainedModel(PreTrainedModel):
    """What the body and the language model share: initialisation and the abilities they declare."""

    config: CompactGPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @staticmethod
    def create_masks_for_generate(
        config: CompactGPT2Config,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | None:
        """The mask of which each layer takes its part; so named, for `generate` makes it ahead of a compiled step."""
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=whole(past_key_values, config),
            position_ids=position_ids,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):
            # Each block adds to the residual stream twice (GPT-2 paper, section 2.3).
            init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))


class CompactGPT2Model(CompactGPT2PreTrainedModel):
    """The transformer body: token ids to final hidden states."""

    def __init__(self, config: CompactGPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        else:
            self.rotary = Rotary(config)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids` int64 or `inputs_embeds`, `[batch, length(, n_embd)]` -> `[batch, length, n_embd]`.

        `attention_mask` is `[batch, past + length]`, 1 where there is text and 0 where there is padding, or what
        attention takes itself, `[batch, 1, length, past + length]`. `token_type_ids` `[batch, length]` are embedded as
        tokens and added, as in GPT-2. With `output_attentions` the call computes attention step by step, whatever the
        model's `attn_implementation`.

        Raises `TypeError` for an argument that nothing here reads, `ValueError` where learned positions run out.
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("is_causal") is False and any(self.config.windows):
            raise ValueError("is_causal=False: sliding windows look back alone")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        rolling(past_key_values, self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        config = self.config
        if kwargs.get("output_attentions", config.output_attentions) and config._attn_implementation != "eager":
            config = copy.copy(config)
            config._attn_implementation = "eager"
        if attention_mask is not None and attention_mask.ndim not in (2, 4):
            attention_mask = attention_mask.view(inputs_embeds.shape[0], -1)
        mask = self.create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids)
        rotation = None
        if self.config.position == "learned":
            self._check_positions(position_ids, past_key_values)
            inputs_embeds = inputs_embeds + self.wpe(position_ids)
        else:
            rotation = self.rotary(position_ids)
        if token_type_ids is not None:
            inputs_embeds = inputs_embeds + self.wte(token_type_ids)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
        x = self.drop(inputs_embeds)
        # Recomputed layers would append to the cache twice.
        cache = None if self.gradient_checkpointing and self.training else past_key_values
        for block in self.h:
            x = block(x, mask, cache, rotation, attend, kwargs.get("is_causal"))
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )

    def _check_positions(self, position_ids: torch.Tensor, cache: Cache | None) -> None:
        """Raise `ValueError` where there are more positions than were learned: a GPU would only say that it failed.

        A GPU's values, for which the host must wait, are looked at only where the shapes leave room for doubt: padding
        may make a text longer than its positions.
        """
        if is_tracing(position_ids) or not position_ids.numel():
            return
        reach, end = position_ids.shape[-1], self.config.n_positions
        if cache is not None:
            past = cache.get_seq_length()
            # A static cache counts on the device, too.
            reach = cache.max_cache_len if isinstance(past, torch.Tensor) else past + reach
        if (reach > end or position_ids.device.type == "cpu") and (last := int(position_ids.max())) >= end:
            raise ValueError(f"the text has {last + 1} tokens, the model {end} positions; give a shorter one")


class CompactGPT2LMHeadModel(CompactGPT2PreTrainedModel, GenerationMixin):
    """The language model: the body and an output projection, tied to the token embedding or of its own."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: CompactGPT2Config):
        super().__init__(config)
        self.transformer = CompactGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the body; logits are `[batch, length or logits_to_keep, vocab_size]`.

        `labels` `[batch, length]` are shifted inside; positions labelled -100 do not count.
        """
        body = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            return_dict=True,  # whatever the configuration says of what this method returns
            **kwargs,
        )
        hidden = body.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise `TypeError` for an argument that asks for something and that nothing reads."""
    for name, value in arguments.items():
        if value is not None and name not in _SERVED:
            raise TypeError(f"CompactGPT2 got an unexpected keyword argument {name!r}")
