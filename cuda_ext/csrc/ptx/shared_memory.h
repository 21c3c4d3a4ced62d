// A block's shared memory: bounds, alignment, and who may touch what without a barrier between.
#pragma once

#include "machine.h"

namespace headroom::ptx {

uint8_t* shared_at(Warp& warp, uint32_t address);

void check_shared(Warp& warp, const Instruction& i, int lane, uint32_t address, uint32_t bytes, uint32_t alignment);
enum class Touch { kRead, kWrite, kAtomic };  // atomic operations do not race with each other
// Notes the access, and faults where nothing orders it behind another thread's. Of `check_shared` addresses only.
void touch_shared(Warp& warp, const Instruction& i, int lane, uint32_t address, uint32_t bytes, Touch how);
// The lane's own asynchronous copy has arrived there: as if it had written now.
void touch_by_copy(Warp& warp, int lane, uint32_t address, uint32_t bytes);
// A bulk copy is on its way there: to be read after the mbarrier's phase alone.
void touch_by_bulk_copy(Block& block, uint32_t address, uint32_t bytes, uint32_t mbarrier, uint32_t phase);

}  // namespace headroom::ptx
