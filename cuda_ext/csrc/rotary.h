// Rotary positions on the device: see Rotary in ops.h.
#pragma once

#include "ops.h"

namespace headroom {

// The cosine and sine by which number `d` of a head, and its pair, turn at `position`.
HR_DEVICE float2 rotary_angle(const Rotary& rotary, int position, int d) {
    return rotary.angles[static_cast<int64_t>(min(position, rotary.positions - 1)) * (rotary.dims / 2) + d / 2];
}

// Number `d` of a head, turned; `partner` is the other number of its pair. d < rotary.dims.
HR_DEVICE float turned(float2 angle, int d, float value, float partner) {
    return value * angle.x + (d % 2 == 0 ? -partner : partner) * angle.y;
}

}  // namespace headroom
