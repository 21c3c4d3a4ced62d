"""Several processes in one pretraining: what each reads, and which part of weights and optimiser each keeps.

A checkpoint holds whole weights and a whole optimiser state in one form, however they were spread: a training
may go on with another number of processes, or another way to share the work.
"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from eval.errors import UserError, WorkError
from pipeline.model import CompactGPT2LMHeadModel
from pipeline.optim import SplitOptimizer
from pipeline.recipe import Pretrain
from pipeline.shards import ShuffledBlocks
from pipeline.training import ResumingTrainer, reading, world_size
from pipeline.watching import Meter


def check_processes(recipe: Pretrain) -> None:
    """Raise `UserError` where the recipe does not go with the number of processes."""
    count = world_size()
    if count > 1 and recipe.parallel == "none":
        raise UserError(f"parallel is none, but {count} processes were started; set parallel=ddp, zero1 or fsdp")
    if recipe.accumulation % count:
        raise UserError(
            f"accumulation {recipe.accumulation} is over all processes, of which there are {count}; "
            "set it to a multiple of that (and batch_size down, for the same tokens a step)"
        )


@contextlib.contextmanager
def lost_others(name: str) -> Iterator[None]:
    """One clear line where another process of this training has ended."""
    line = f"{name}: another process ended, so this one does; the same command goes on from the last checkpoint"
    if world_size() == 1:
        yield
        return

    def told_to_end(*_: Any) -> None:
        raise WorkError(line)  # torchrun sends this when one process has failed

    earlier = signal.signal(signal.SIGTERM, told_to_end)
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in _CONNECTION):
            raise WorkError(line) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)


_CONNECTION = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "NCCL")


def shard(model: CompactGPT2LMHeadModel, dtype: torch.dtype | None) -> None:
    """Spread a model over the processes, in place (FSDP2: torch's `fully_shard`), a block at a time.

    Done here because accelerate does it on a GPU alone, where the tests could not follow. It computes in bf16
    where that is the `dtype` of autocast, adds gradients in FP32, and keeps FP32 weights.
    """
    half = torch.bfloat16 if dtype is torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)  # the rest at once: the embedding and the head are one matrix


def _whole(value: Any) -> Any:
    """Plain data with each spread tensor gathered on the CPU; all processes must call it."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _part(value: torch.Tensor, like: DTensor) -> DTensor:
    """This process's part of a whole tensor, spread as `like` is."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class PretrainTrainer(ResumingTrainer):
    """A `Trainer` whose shards are read by `ShuffledBlocks`' own shares, and whose optimiser or model may be spread."""

    def __init__(self, meter: Meter, **choices: Any):
        super().__init__(**choices, callbacks=[meter])
        self.meter = meter
        self.spread = isinstance(self.model, FSDPModule)
        if self.spread:
            # accelerate would wrap it in DDP as well.
            self.accelerator.prepare_model = lambda model, **_: model

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the speed with a loss."""
        super().log(logs | (self.meter.read(self.state.global_step) if "loss" in logs else {}), start_time)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process alone; accelerate would split once more what is a share already."""
        if not isinstance(self.train_dataset, ShuffledBlocks):
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def whole_model(self) -> CompactGPT2LMHeadModel:
        """See `ResumingTrainer`."""
        if not self.spread:
            return super().whole_model()
        whole = CompactGPT2LMHeadModel(self.model.config)
        whole.load_state_dict(_whole(self.model.state_dict()))
        return whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write whole weights, by the first process."""
        if not self.spread:
            return super().save_model(output_dir, _internal_call)
        whole = self.whole_model()
        if self.args.should_save:
            whole.save_pretrained(output_dir)

    def load_weights(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint, or this process's part of them."""
        if not self.spread:
            return super().load_weights(checkpoint)
        with reading(checkpoint / SAFE_WEIGHTS_NAME), torch.no_grad():
            state = load_file(checkpoint / SAFE_WEIGHTS_NAME)
            for name, parameter in self.model.named_parameters():
                parameter.copy_(_part(state[name], parameter))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return _whole(super()._get_grad_norm(model, grad_norm))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        inner = self.optimizer.optimizer
        if isinstance(inner, SplitOptimizer):
            inner.consolidate_state_dict()
        if not self.spread:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = _whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.spread:
            for parameter, state in self.optimizer.state.items():
                state |= {
                    name: _part(value, parameter) for name, value in state.items() if value.shape == parameter.shape
                }
