// What becomes of the numbers of a QKV product: where positions are rotary they turn, and k and v go to the cache.
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

// Where number `place` of a row's k and v, [2, heads, head_dim], goes for `position` of `sequence`.
HR_DEVICE half* cache_place(const KvCache& cache, int head_dim, int sequence, int position, int place) {
    const int width = cache.heads * head_dim, column = place < width ? place : place - width;
    const int64_t head = static_cast<int64_t>(sequence) * cache.heads + column / head_dim;
    return (place < width ? cache.k : cache.v) + (head * cache.capacity + position) * head_dim + column % head_dim;
}

}  // namespace headroom
