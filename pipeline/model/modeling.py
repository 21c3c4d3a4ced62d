"""CompactGPT2: GPT-2 (Radford et al. 2019) over `nn.Linear`, with its own head count in each layer."""

import math

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

# Relative, for an export ships these files as they are.
from .configuration import CompactGPT2Config
from .grouping import GroupedProjection, shared
from .rope import Rotary, rotate
from .window import rolling, whole, windowed

Rotation = tuple[torch.Tensor, torch.Tensor]


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
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None, rotation: Rotation | None = None
    ) -> torch.Tensor:
        """`[batch, length, n_embd]` -> the same shape; appends to `cache` if there is one."""
        batch, length, _ = x.shape
        projected = self.c_attn(x)
        parts = projected if isinstance(projected, tuple) else projected.chunk(3, dim=-1)
        q, k, v = (part.view(batch, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        sizes = self.group_sizes
        if self.fill_groups:
            k, v, sizes = shared(k, sizes), shared(v, sizes), [1] * self.n_head
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.window is not None:
            mask = windowed(mask, self.window, length, k.shape[2], x.device)
        k, v = shared(k, sizes), shared(v, sizes)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            # No mask with several queries means plain causal; a single query sees all of the past.
            is_causal=mask is None and length > 1,
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, length, -1)))

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
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None, rotation: Rotation | None = None
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, rotation)
        return x + self.mlp(self.ln_2(x))


class CompactGPT2PreTrainedModel(PreTrainedModel):
    """What the body and the language model share: initialisation and the abilities they declare."""

    config: CompactGPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True

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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """`input_ids` int64 or `inputs_embeds`, `[batch, length(, n_embd)]` -> `[batch, length, n_embd]`.

        `attention_mask` is `[batch, past + length]`, 1 where there is text and 0 where there is padding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        rolling(past_key_values, self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=whole(past_key_values, self.config),
            position_ids=position_ids,
        )
        rotation = None
        if self.config.position == "learned":
            inputs_embeds = inputs_embeds + self.wpe(position_ids)
        else:
            rotation = self.rotary(position_ids)
        x = self.drop(inputs_embeds)
        for block in self.h:
            x = block(x, mask, past_key_values, rotation)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )


class CompactGPT2LMHeadModel(CompactGPT2PreTrainedModel, GenerationMixin):
    """The language model: the body and an output projection tied to the token embedding."""

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
        **kwargs: object,
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
        )
        hidden = body.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=body.past_key_values)
