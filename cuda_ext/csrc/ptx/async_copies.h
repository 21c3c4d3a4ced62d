// cp.async by groups, bulk copies by mbarriers. What is in flight reads as NaN.
#pragma once

#include "machine.h"

namespace headroom::ptx {

// One of the block's bulk copies arrives.
void complete_bulk_copy(Block& block, size_t which);
// Whether the lane has copies on their way; they are dropped.
bool drop_copies(Warp& warp, int lane);

}  // namespace headroom::ptx
