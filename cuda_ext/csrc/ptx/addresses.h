// Where each lane of a memory instruction points to.
#pragma once

#include "machine.h"

namespace headroom::ptx {

// Computed for all lanes before any of them goes on, and told to the observer.
class Addresses {
  public:
    Addresses(Warp& warp, const Instruction& i, Lanes lanes, uint32_t bytes, bool is_write);
    uint64_t operator[](int lane) const { return at_[lane]; }

  private:
    uint64_t at_[kWarp];
};

}  // namespace headroom::ptx
