// The likeliest token over all blocks, and what follows from it.
#pragma once

#include "block.h"

namespace headroom::persistent {

struct Best {
    uint32_t key = 0;  // floats in order as unsigned integers; a NaN is the least
    uint32_t token = 0xffffffffu;

    HR_DEVICE void offer(uint32_t other_key, uint32_t other_token) {
        if (other_key > key || (other_key == key && other_token < token)) key = other_key, token = other_token;
    }
    HR_DEVICE void offer(float logit, int other_token) {
        const uint32_t bits = __float_as_uint(logit);
        const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        offer(logit == logit ? ordered : 0u, static_cast<uint32_t>(other_token));
    }
    // With those of lanes that differ in the bits from `lowest` on.
    HR_DEVICE void reduce(int lowest) {
        for (int mask = kWarp / 2; mask >= lowest; mask /= 2) {
            const uint32_t other_key = warp_xor(key, mask), other_token = warp_xor(token, mask);
            offer(other_key, other_token);
        }
    }
};

// The best of this block's logits, for all to see after the next grid barrier.
template <int ROWS>
HR_DEVICE void nominate(const Block& b, Best best) {
    best.reduce(ROWS);
    sync_block();  // the sums in scratch have been read
    uint32_t* of_warps = reinterpret_cast<uint32_t*>(b.scratch());
    if (lane_id() < ROWS) {
        of_warps[(warp_id() * ROWS + lane_id()) * 2] = best.key;
        of_warps[(warp_id() * ROWS + lane_id()) * 2 + 1] = best.token;
    }
    sync_block();
    if (b.thread >= b.batch()) return;
    for (int w = 0; w < b.warps; ++w) {
        const uint32_t* other = of_warps + (w * ROWS + b.thread) * 2;
        best.offer(other[0], other[1]);
    }
    store16(b.candidates() + b.thread * gridDim.x + blockIdx.x, make_uint4(best.key, best.token, 0, 0));
}

// The best of all blocks' nominees, and what follows from it: advance.cu, in every block alike; block 0 tells.
HR_DEVICE void pick(const Block& b) {
    const Advance& out = b.p.state;
    for (int r = warp_id(); r < b.batch(); r += b.warps) {
        Best best;
        for (int i = lane_id(); i < static_cast<int>(gridDim.x); i += kWarp) {
            const uint4 other = load16_across_blocks(b.candidates() + r * gridDim.x + i);
            best.offer(other.x, other.y);
        }
        best.reduce(1);
        if (lane_id() != 0) continue;
        State& s = b.state();
        const bool over = s.finished[r] != 0;
        const int token = over ? out.how->pad : static_cast<int>(best.token), place = s.step[r];
        bool ends = over;
        for (int i = 0; i < out.how->stop_count; ++i) ends = ends || token == out.how->stop[i];
        const bool room = s.position[r] + 1 < out.capacity;
        s.token[r] = token;
        s.step[r] = place + 1;
        s.finished[r] = ends || !room;
        if (!over && room) s.position[r] += 1;
        if (blockIdx.x != 0) continue;
        if (place < out.history_capacity) out.history[static_cast<int64_t>(r) * out.history_capacity + place] = token;
        out.tokens[r] = token;
        out.step[r] = s.step[r];
        out.finished[r] = s.finished[r];
        if (!over && room) {
            out.position[r] = s.position[r];
            out.lengths[r] += 1;
        }
    }
    sync_block();
}

}  // namespace headroom::persistent
