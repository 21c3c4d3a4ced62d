"""How long a launch might take. Estimates: no GPU stands behind them.

The model: a launch takes the gap before it and then the longest of

- chain: the longest chain of waits through a block (csrc/ptx/profile.cpp), once for each wave of blocks. Under
  programmatic dependent launch the first wave's begins where it waits for the launch before;
- issue: the busiest multiprocessor's issue slots, of four warp schedulers;
- shared: its passes through L1 and shared memory, 128 bytes a cycle;
- tensor: its tensor-core operations;
- L2: all sectors that L1 does not have;
- DRAM: bytes that nobody has touched in this token or prefill.

They are taken to overlap without loss, so the estimate is a low one, but where ptxas makes a shorter chain. Left out:
contention between warps, instruction fetches, DRAM's pages, clocks that fall.
"""

from dataclasses import dataclass

from cuda_ext.report.compiled import Resources
from cuda_ext.report.counted import Launch
from cuda_ext.report.gpus import Gpu
from cuda_ext.report.occupancy import Occupancy, occupancy
from cuda_ext.report.useful import Operation

_SCHEDULERS, _LINE, _SECTOR = 4, 128, 32


@dataclass(frozen=True)
class Estimate:
    """Seconds of one launch; `parts` by name, of which the longest is the `bound`."""

    occupancy: Occupancy
    waves: float
    gap: float
    parts: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def seconds(self) -> float:
        return self.gap + max(self.parts.values())


def estimate(launch: Launch, resources: Resources, gpu: Gpu, *, dependent: bool = False) -> Estimate:
    """`dependent`: launched before the one before it has ended, where the GPU can."""
    processors = gpu.limits.multiprocessors
    shared = launch.shared_bytes + resources.shared_bytes
    held = occupancy(gpu.limits, launch.threads, resources.registers, shared)
    waves = launch.blocks / (max(held.blocks, 1) * processors)
    busiest = -(-launch.blocks // processors) / launch.blocks  # its share of all blocks
    gap, first = gpu.gap, launch.path
    if dependent and gpu.dependent_gap is not None:
        gap, first = gpu.dependent_gap, launch.path_after_wait
    whole_waves = max(1, -(-launch.blocks // (max(held.blocks, 1) * processors)))
    cycles = first.cycles + (whole_waves - 1) * launch.path.cycles
    lines = launch.wavefronts()[0] + launch.sectors()[0] * _SECTOR / _LINE
    parts = {
        "chain": cycles / gpu.clock,
        "issue": launch.slots * busiest / _SCHEDULERS / gpu.clock,
        "shared": lines * busiest / gpu.clock,
        "tensor": tensor_operations(launch, gpu) * busiest * processors / gpu.tensor,
        "L2": launch.l2_sectors * _SECTOR / gpu.l2,
        "DRAM": launch.bytes_cold / gpu.dram,
    }
    return Estimate(held, waves, gap, parts)


def tensor_operations(launch: Launch, gpu: Gpu) -> int:
    """Turing's mma has half of the others' depth."""
    return launch.kinds["tensor"][0] * 16 * 8 * 2 * (8 if gpu.ptx == "75" else 16)


def floor(operation: Operation, gpu: Gpu) -> float:
    """Seconds below which no implementation gets: weights, keys and values from DRAM, or operations."""
    return max(operation.fixed / gpu.dram, operation.operations / gpu.tensor)
