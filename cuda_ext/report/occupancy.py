"""How many blocks of a kernel a multiprocessor holds at once.

The rules are the CUDA C++ programming guide's ("Compute capabilities", the table "Technical specifications per compute
capability") and those of the toolkit's cuda_occupancy.h, against which the tests hold this: registers are given to
warps in units of 256, from a quarter of the file each; shared memory to blocks in units of 128 bytes (256 on
Turing), of which the system keeps 1 KiB a block from Ampere on.
"""

from dataclasses import dataclass

WARP = 32
_REGISTERS, _REGISTER_UNIT, _QUARTERS = 65536, 256, 4


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor, and how many a GPU has."""

    multiprocessors: int
    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_of_block: int
    shared_unit: int
    reserved_bytes: int  # of shared memory, in each block


TURING = Limits(40, 32, 16, 65536, 65536, 256, 0)  # T4, 7.5
AMPERE = Limits(108, 64, 32, 167936, 166912, 128, 1024)  # A100, 8.0
ADA = Limits(128, 48, 24, 102400, 101376, 128, 1024)  # RTX 4090, 8.9
HOPPER = Limits(132, 64, 32, 233472, 232448, 128, 1024)  # H100 SXM, 9.0


@dataclass(frozen=True)
class Occupancy:
    """`limit`: what there is not enough of for one more block."""

    blocks: int
    warps: int
    limit: str


def occupancy(limits: Limits, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """For blocks of `threads` with `registers` each and `shared_bytes`, static and dynamic together; 0 if none fits."""
    warps = -(-threads // WARP)
    of_warp = -(-max(registers, 1) * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    fits_file = of_warp * -(-warps // _QUARTERS) * _QUARTERS <= _REGISTERS
    by_registers = _REGISTERS // _QUARTERS // of_warp * _QUARTERS // warps if fits_file else 0
    taken = -(-(shared_bytes + limits.reserved_bytes) // limits.shared_unit) * limits.shared_unit
    fits_block = shared_bytes <= limits.shared_bytes_of_block
    by_shared = limits.shared_bytes // taken if taken else limits.blocks
    by = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": by_registers,
        "shared memory": by_shared if fits_block else 0,
    }
    limit = min(by, key=lambda name: by[name])
    return Occupancy(by[limit], by[limit] * warps, limit)
