"""What a pretraining would take: memory of each device and time, without training."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eval.errors import UserError
from pipeline import hardware
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.pretrain import new_model
from pipeline.recipe import Pretrain
from pipeline.watching import training_flops


def estimate(recipe: Pretrain, device: str | None = None, devices: int = 1, utilisation: float = 0.4) -> dict[str, Any]:
    """Bytes of each of `devices` GPUs of the kind `device` (by default this machine's), and seconds in all.

    Weights, gradients and optimiser state are counted; what the way forward keeps for the way back is measured on
    tensors without data, in autocast to bf16 where the recipe has it. Time is FLOPs over `utilisation` of the peak,
    which is that of 16-bit products.
    `device_memory` is what one has, `None` if that is not known.
    Raises `UserError` for a GPU whose peak is not known, devices that the recipe cannot use, or a utilisation that is
    no share.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: give a share of the peak, such as 0.4")
    here = hardware.gpu()
    name = device or (here["name"] if here else None)
    peak = 1e12 * recipe.peak_tflops if recipe.peak_tflops else hardware.peak_flops(name or "")
    if peak is None:
        known = ", ".join(hardware.PEAKS)
        raise UserError(f"--on {name or 'nothing'}: unknown; give one of {known}, or --set peak_tflops=N as well")
    if recipe.accumulation % devices:
        raise UserError(
            f"--devices {devices}: accumulation {recipe.accumulation} is no multiple of it; "
            f"--set accumulation={-(-recipe.accumulation // devices) * devices}"
        )
    if devices > 1 and recipe.parallel == "none":
        raise UserError(f"--devices {devices}: parallel is none; --set parallel=ddp, zero1 or fsdp")
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
        model = new_model(recipe)
        parameters, matrices, kept = _measured(model, recipe.checkpointing)
    adam = 8 * parameters
    state = adam if recipe.optimizer == "adamw" else adam - 4 * matrices
    split = devices if recipe.parallel == "fsdp" else 1
    memory = {
        "weights": 4 * parameters // split,
        "gradients": 4 * parameters // split,
        "optimizer": state // (devices if recipe.parallel in ("zero1", "fsdp") else 1),
        # DDP adds gradients up in a copy of its own; autocast keeps the weights in bf16.
        "copies": (4 * parameters if devices > 1 and split == 1 else 0)
        + (2 * parameters // split if recipe.autocast else 0),
        "activations": recipe.batch_size * kept,
    }
    flops = training_flops(model.config)
    tokens = recipe.steps * recipe.batch_size * recipe.accumulation * recipe.model.n_positions
    return {
        "device": name or f"{recipe.peak_tflops:g} TFLOPS",
        "devices": devices,
        "parameters": parameters,
        "tokens": tokens,
        "flops": tokens * flops,
        "memory": memory | {"total": sum(memory.values())},
        "device_memory": here["memory"] if here and not device else hardware.memory(name or ""),
        "batch_size": recipe.batch_size,
        "accumulation": recipe.accumulation,
        "autocast": recipe.autocast,
        "utilisation": utilisation,
        "seconds": tokens * flops / (peak * utilisation * devices),
    }


def _measured(model: CompactGPT2LMHeadModel, checkpointing: bool) -> tuple[int, int, int]:
    """Parameters, those of them that Muon takes, and the bytes that one block keeps until the way back."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2 and ".h." in name)
    # What does not grow with the blocks, as weights in bf16, falls out of the difference.
    kept = _kept(model, 2) - _kept(model, 1)
    # On the way back the logits have a gradient of their own, in FP32.
    return model.num_parameters(), matrices, kept + 4 * model.config.n_positions * model.config.vocab_size


def _kept(model: CompactGPT2LMHeadModel, blocks: int) -> int:
    """Bytes that autograd keeps of a forward pass over so many blocks."""
    kept: dict[int, int] = {}
    length = model.config.n_positions

    def keep(value: torch.Tensor) -> torch.Tensor:
        # Without data a causal mask is written out, which a real step has no need of.
        if value.shape[1:] != (1, length, length):
            storage = value.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return value

    ids = torch.zeros(blocks, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        held = model(ids, labels=ids, use_cache=False)  # as long as it is held, no place in memory is given away
    del held
    return sum(kept.values())


def format_estimate(found: dict[str, Any]) -> str:
    """What a person reads."""
    memory = "\n".join(f"  {name:<12} {value / 2**30:8.2f} GiB" for name, value in found["memory"].items())
    hours = found["seconds"] / 3600
    peak = "the peak" if found["autocast"] else "the peak of 16-bit products, which FP32 does not reach"
    return (
        f"{found['parameters']:,} parameters, {found['tokens']:,} tokens, {found['flops']:.3g} FLOPs\n"
        f"memory of each device, of {found['devices']} {found['device']}:\n{memory}\n{verdict(found)}\n"
        f"time: {hours:,.1f} hours at {found['utilisation']:.0%} of {peak} (an assumption: --utilisation)"
    )


def verdict(found: dict[str, Any]) -> str:
    """Whether it fits, and what to lower if not: a step may learn from as many tokens, in smaller batches."""
    total, there = found["memory"]["total"], found["device_memory"]
    if there is None:
        return f"whether that fits is not known: nor is the memory of {found['device']}"
    has = f"{found['device']} has {there / 2**30:.0f} GiB"
    if total <= there:
        return f"it fits: {has}"
    room = there - total + found["memory"]["activations"]
    size = found["batch_size"]
    fitting = [n for n in range(1, size) if size % n == 0 and n * found["memory"]["activations"] <= room * size]
    advice = (
        f"--set batch_size={fitting[-1]} --set accumulation={found['accumulation'] * size // fitting[-1]}"
        if fitting
        else "--set checkpointing=true, or more devices with parallel=fsdp, or a smaller model"
    )
    return f"IT DOES NOT FIT: {has}; {advice}"
