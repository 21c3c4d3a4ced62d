// Attention of one token, spread over the blocks: as kernels/attention_decode.cu, but whoever reads the result merges
// the parts, which spares a wait.
#pragma once

#include "../softmax.h"
#include "block.h"

namespace headroom::persistent {

constexpr int kAhead = 2;  // keys that a lane asks for together
constexpr int kKeysPerSplit = 32;

HR_DEVICE int most_splits(const Block& b, const Layer& layer) {
    const int wanted = b.p.splits > 0 ? b.p.splits : static_cast<int>(gridDim.x) / (layer.queries.heads * b.batch());
    return max(1, min(wanted, kMaxSplits));
}
HR_DEVICE int keys_of(const Block& b, const Layer& layer, int r) {
    return min(b.state().position[r] + 1, layer.cache.capacity);
}
HR_DEVICE int first_key_of(const Block& b, const Layer& layer, int r) {
    return first_in_window(keys_of(b, layer, r), layer.queries.window);
}
HR_DEVICE int splits_of(int keys, int most) {
    return min(most, ceil_div(keys, kKeysPerSplit));
}

// Parts of the keys of every head, one a block: sums, maximum and denominator into b.partial(), as attention_decode.cu.
template <int D>
HR_DEVICE void attend(const Block& b, const Layer& layer) {
    constexpr int kLanes = D / 8;  // of one key
    const int heads = layer.queries.heads, most = most_splits(b, layer), groups = b.threads / kLanes;
    const int group = b.thread / kLanes, part = b.thread % kLanes * 8;
    for (int unit = static_cast<int>(blockIdx.x); unit < heads * b.batch() * most;
         unit += static_cast<int>(gridDim.x)) {
        const int split = unit % most, of_head = unit / most, r = of_head / heads, head = of_head % heads;
        const int keys = keys_of(b, layer, r), first = first_key_of(b, layer, r);
        const int splits = splits_of(keys - first, most);
        if (split >= splits) continue;
        const int each = ceil_div(keys - first, splits), begin = first + split * each, end = min(begin + each, keys);
        const int kv_head = layer.queries.kv_head != nullptr ? layer.queries.kv_head[head] : head;
        const int64_t of_cache = static_cast<int64_t>(r) * layer.cache.heads + kv_head;
        const int64_t cached = of_cache * layer.cache.capacity * D + part;
        float query[8];
        unpack8(load16_across_blocks(b.q() + (r * heads + head) * D + part), query);
        const float scale = kLog2E * rsqrtf(static_cast<float>(D));
#pragma unroll
        for (float& x : query) x *= scale;
        PartialSoftmax own;
        attend_keys<D, kAhead>(own, query, layer.cache.k + cached, layer.cache.v + cached, begin, end, group, groups,
                               [](const half* from) { return load16_across_blocks(from); });
        // The groups of a warp merge by shuffles, warps in shared memory.
        float top = own.highest;
#pragma unroll
        for (int mask = kLanes; mask < kWarp; mask *= 2) top = fmaxf(top, warp_xor(top, mask));
        const float shrink = masked_exp2(own.highest, top);
        own.weight *= shrink;
#pragma unroll
        for (float& sum : own.sums) sum *= shrink;
#pragma unroll
        for (int mask = kLanes; mask < kWarp; mask *= 2) {
            own.weight += warp_xor(own.weight, mask);
#pragma unroll
            for (float& sum : own.sums) sum += warp_xor(sum, mask);
        }
        float* merged = b.scratch() + warp_id() * (D + 2);
        if (lane_id() < kLanes) {
#pragma unroll
            for (int j = 0; j < 8; ++j) merged[part + j] = own.sums[j];
            if (part == 0) merged[D] = top, merged[D + 1] = own.weight;
        }
        sync_block();
        float* to = b.partial() + static_cast<int64_t>(unit) * (D + 2);
        for (int d = b.thread; d < D; d += b.threads) {
            float total = 0.0f, denominator = 0.0f, most_of_all = -INFINITY;
            for (int w = 0; w < b.warps; ++w) most_of_all = fmaxf(most_of_all, b.scratch()[w * (D + 2) + D]);
            for (int w = 0; w < b.warps; ++w) {
                const float p = masked_exp2(b.scratch()[w * (D + 2) + D], most_of_all);
                total += p * b.scratch()[w * (D + 2) + d];
                denominator += p * b.scratch()[w * (D + 2) + D + 1];
            }
            to[d] = total;
            if (d == 0) to[D] = most_of_all, to[D + 1] = denominator;
        }
        sync_block();
    }
}

// The parts of all heads, merged into b.rows().
template <int ROWS>
HR_DEVICE void merge_attention(const Block& b, const Layer& layer) {
    const int dim = b.p.head_dim, all = layer.query_width(), most = most_splits(b, layer);
    for (int i = b.thread; i < ROWS * all; i += b.threads) {
        const int r = i / all, column = i % all;
        float total = 0.0f, denominator = 0.0f, highest = -INFINITY;
        if (r < b.batch()) {
            const int splits = splits_of(keys_of(b, layer, r) - first_key_of(b, layer, r), most);
            const int head = r * layer.queries.heads + column / dim;
            const float* parts = b.partial() + static_cast<int64_t>(head) * most * (dim + 2);
#pragma unroll 4
            for (int s = 0; s < splits; ++s) {
                const float of_split = load_shared_across_blocks(parts + s * (dim + 2) + column % dim);
                const float highest_of_split = load_shared_across_blocks(parts + s * (dim + 2) + dim);
                const float weight = load_shared_across_blocks(parts + s * (dim + 2) + dim + 1);
                const float higher = fmaxf(highest, highest_of_split);
                const float old = masked_exp2(highest, higher), now = masked_exp2(highest_of_split, higher);
                total = total * old + of_split * now;
                denominator = denominator * old + weight * now;
                highest = higher;
            }
        }
        b.rows()[r * b.plan.ld_rows + column] = to_half(r < b.batch() ? total / denominator : 0.0f);
    }
    sync_block();
}

}  // namespace headroom::persistent
