// Global memory is the process's own. What may be touched is named; what blocks see of each other may be delayed.
#pragma once

#include "machine.h"

namespace headroom::ptx {

// Memory that kernels may touch while settings.named_memory; what it overlaps has been freed since.
void name_memory(uint64_t begin, uint64_t bytes);
void forget_named_memory();

void check_global(Warp& warp, const Instruction& i, int lane, uint64_t address, uint64_t bytes, uint32_t alignment);
void read_global(Warp& warp, const Instruction& i, int lane, uint64_t address, void* to, uint32_t bytes, bool past_l1);
void write_global(Warp& warp, const Instruction& i, int lane, uint64_t address, const void* from, uint32_t bytes);

// Before an atomic operation there: what its own block has stored is older, and its line in L1 is no longer true.
void settle(Block& block, uint64_t address, uint32_t bytes);

// Release: this thread's stores, and those that a barrier has shown it, reach all blocks. Acquire: stale lines go.
void release(Warp& warp, int lane);
void acquire(Warp& warp);
// A block's end: all its stores reach the others.
void release_all(Block& block);
// What ld.global.nc has read, and what was written, count within one call.
void forget_read_only();

}  // namespace headroom::ptx
