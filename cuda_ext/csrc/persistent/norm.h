// Embedding and LayerNorm of the residual stream: every block does it all, a thread 8 columns.
#pragma once

#include "block.h"

namespace headroom::persistent {

// 8 numbers of a vector of `width`, zeros behind its end.
HR_DEVICE uint4 load_columns(const half* from, int column, int width) {
    if (column + 8 <= width && reinterpret_cast<uintptr_t>(from) % 16 == 0) return load16(from + column);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = column + 2 * i;
        words[i] = pack_half2(at < width ? to_float(from[at]) : 0.0f, at + 1 < width ? to_float(from[at + 1]) : 0.0f);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

struct Norm {
    uint4 gain, shift;
    HR_DEVICE Norm(const Block& b, const half* gain_, const half* shift_)
        : gain(load_columns(gain_, b.thread * 8, b.p.width)), shift(load_columns(shift_, b.thread * 8, b.p.width)) {}
};

HR_DEVICE const half* token_row(const Block& b, int r) {
    return b.p.wte + static_cast<int64_t>(b.state().token[r]) * b.p.ld_width;
}
HR_DEVICE const half* place_row(const Block& b, int r) {
    return b.p.wpe + static_cast<int64_t>(min(b.state().position[r], b.p.position_rows - 1)) * b.p.ld_width;
}

// This block's columns of the residual stream, as they begin.
template <int ROWS>
HR_DEVICE void embed_own(const Block& b) {
    const int begin = first_row(b.p.width, blockIdx.x), count = first_row(b.p.width, blockIdx.x + 1) - begin;
    for (int i = b.thread; i < count * ROWS; i += b.threads) {
        const int r = i / count, column = i % count;
        if (r >= b.batch()) continue;
        const int at = begin + column;
        b.own()[r * b.plan.own_columns + column] = to_float(token_row(b, r)[at]) + to_float(place_row(b, r)[at]);
    }
}

HR_DEVICE void load_residual(const Block& b, int r, int column, bool embedded, float (&x)[8]) {
    if (embedded) {
        float place[8];
        unpack8(load16(token_row(b, r) + column), x);
        unpack8(load16(place_row(b, r) + column), place);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] += place[i];
        return;
    }
    const float* from = b.x() + static_cast<int64_t>(r) * b.p.ld_width + column;
#pragma unroll
    for (int half_of = 0; half_of < 2; ++half_of) {
        const uint4 v = load16_across_blocks(from + 4 * half_of);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * half_of + i] = __uint_as_float(words[i]);
    }
}

// The sums over the block of ROWS values at once, in every thread. `scratch` stays in use until the next barrier.
template <int ROWS>
HR_DEVICE void block_sums(const Block& b, float (&values)[ROWS], float* scratch) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        values[r] = warp_sum(values[r]);
        if (lane_id() == 0) scratch[r * b.warps + warp_id()] = values[r];
    }
    sync_block();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float of_warp = lane_id() < b.warps ? scratch[r * b.warps + lane_id()] : 0.0f;
        values[r] = warp_sum(of_warp);
    }
}

// LayerNorm of the residual stream (`embedded`: of the embedding) into b.rows(), two rows at a time: more would spill.
template <int ROWS>
HR_DEVICE void normalise(const Block& b, const Norm& norm, bool embedded) {
    constexpr int kTogether = ROWS < 2 ? ROWS : 2;
    const int width = b.p.width, column = b.thread * 8;
#pragma unroll 1
    for (int r0 = 0; r0 < ROWS; r0 += kTogether) {
        float x[kTogether][8], mean[kTogether] = {}, scale[kTogether] = {};
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            const bool there = r0 + r < b.batch();
            if (there && column < width) load_residual(b, r0 + r, column, embedded, x[r]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (!there || column + i >= width) x[r][i] = 0.0f;
                mean[r] += x[r][i];
            }
        }
        block_sums<kTogether>(b, mean, b.scratch());
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            mean[r] /= static_cast<float>(width);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float difference = column + i < width ? x[r][i] - mean[r] : 0.0f;
                scale[r] += difference * difference;
            }
        }
        block_sums<kTogether>(b, scale, b.scratch() + kTogether * b.warps);
        if (column >= width) continue;
        float gain[8], shift[8];
        unpack8(norm.gain, gain);
        unpack8(norm.shift, shift);
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            const float s = rsqrtf(scale[r] / static_cast<float>(width) + b.p.epsilon);
            float y[8];  // zeros behind the width, as gain and shift are
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] = (x[r][i] - mean[r]) * s * gain[i] + shift[i];
            store16(b.rows() + (r0 + r) * b.plan.ld_rows + column,
                    make_uint4(pack_half2(y[0], y[1]), pack_half2(y[2], y[3]), pack_half2(y[4], y[5]),
                               pack_half2(y[6], y[7])));
        }
    }
    sync_block();
}

}  // namespace headroom::persistent
