"""Several processes in one pretraining: what each reads, and which part of the optimiser each keeps.

A checkpoint holds whole weights and a whole optimiser state in one form, however they were spread: a training
may go on with another number of processes, or another way to share the work.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from eval.errors import UserError, WorkError
from pipeline.optim import SplitOptimizer
from pipeline.recipe import Pretrain
from pipeline.shards import ShuffledBlocks
from pipeline.training import ResumingTrainer, world_size


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


class PretrainTrainer(ResumingTrainer):
    """A `Trainer` whose shards are read by `ShuffledBlocks`' own shares, and whose optimiser may be split."""

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        split = getattr(self.optimizer, "optimizer", None)
        if isinstance(split, SplitOptimizer):
            split.consolidate_state_dict()
        super()._save_optimizer_and_scheduler(output_dir)
