// Softmax over keys in one pass: what the kernels of attention share.
//
// A running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): sums are kept relative to the highest score so far, and
// shrink when a higher one comes. Scores are exponents of 2: the query is scaled by log2(e) / sqrt(D).
#pragma once

#include "device.h"

namespace headroom {

constexpr float kLog2E = 1.4426950408889634f;

// exp2(x - highest), and 0 where x is masked or there was nothing yet.
HR_DEVICE float masked_exp2(float x, float highest) { return x == -INFINITY ? 0.0f : exp2f(x - highest); }

// The first of `length` keys that the query at their end sees.
HR_DEVICE int first_in_window(int length, int window) { return window > 0 ? max(0, length - window) : 0; }

// Of one query and some keys: sums of eight of the values' columns, their scores' maximum and denominator.
struct PartialSoftmax {
    float sums[8] = {}, highest = -INFINITY, weight = 0.0f;
};

// Adds this lane group's share of keys begin..end-1 (split-KV: another block has others): every groups-th, from the group-th.
// D / 8 lanes hold a key, 16 bytes each; `keys`, `values` and `query` are at this lane's columns. AHEAD keys and values are
// asked for together.
template <int D, int AHEAD, typename Load16>
HR_DEVICE void attend_keys(PartialSoftmax& part, const float (&query)[8], const half* keys, const half* values, int begin,
                           int end, int group, int groups, Load16 load) {
    for (int key0 = begin; key0 < end; key0 += groups * AHEAD) {
        uint4 k[AHEAD], v[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int key = key0 + i * groups + group;
            const int64_t at = static_cast<int64_t>(key) * D;
            k[i] = key < end ? load(keys + at) : make_uint4(0, 0, 0, 0);
            v[i] = key < end ? load(values + at) : make_uint4(0, 0, 0, 0);
        }
        float scores[AHEAD], new_highest = part.highest;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            float x[8], score = 0.0f;
            unpack8(k[i], x);
#pragma unroll
            for (int j = 0; j < 8; ++j) score += x[j] * query[j];
#pragma unroll
            for (int mask = 1; mask < D / 8; mask *= 2) score += warp_xor(score, mask);
            scores[i] = key0 + i * groups + group < end ? score : -INFINITY;
            new_highest = fmaxf(new_highest, scores[i]);
        }
        const float shrink = masked_exp2(part.highest, new_highest);
        part.highest = new_highest;
        part.weight *= shrink;
#pragma unroll
        for (float& sum : part.sums) sum *= shrink;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            float x[8];
            unpack8(v[i], x);
            const float p = masked_exp2(scores[i], part.highest);
            part.weight += p;
#pragma unroll
            for (int j = 0; j < 8; ++j) part.sums[j] += p * x[j];
        }
    }
}

}  // namespace headroom
