"""What no engine computes, refused in the same words by all, before a library answers in its own or not at all."""

import torch

from eval.errors import UserError


def check_tokens(input_ids: torch.Tensor, *, past: int, context: int, vocab_size: int) -> None:
    """Raise `UserError` where `[batch, length]` token ids that follow `past` tokens are none, no integers, outside the
    vocabulary, or more than the model has positions for."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise UserError(f"the tokens have shape {list(input_ids.shape)}; give [batch, length], one or more each")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise UserError(f"the tokens are {input_ids.dtype}; give integers")
    total = past + input_ids.shape[1]
    if total > context:
        raise UserError(f"the text has {total} tokens, the model {context} positions; give a shorter one")
    if input_ids.device.type == "cpu":  # a GPU's would have to be waited for
        low, high = (int(end) for end in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"token {wrong} is none of the model's {vocab_size}; give the model's own tokenizer")


def check_step(token_ids: torch.Tensor, *, batch: int) -> None:
    """Raise `UserError` where `[batch]` tokens are not one for each of the sequences that are held."""
    if token_ids.shape != (batch,) or not batch:
        raise UserError(f"decode got tokens of shape {list(token_ids.shape)} for {batch} sequences; prefill first")
