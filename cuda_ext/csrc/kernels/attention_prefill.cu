// Causal attention of many queries, in one pass over the keys with a running softmax (FlashAttention-2, Dao 2023).
//
// A block takes 64 queries of one head, a warp 16 of them. Their scores, weights and sums stay in registers: the
// accumulator fragments of Q K^T, rounded to FP16, are the left fragments of P V. Tiles of keys and values come through
// two stages of shared memory, the next on its way while one is used. Masks cost only where they bite: in tiles that
// hold a key which some query of the block must not see. With a window, tiles before that of the first query are skipped.
#include "../ops.h"
#include "../softmax.h"

namespace headroom {
namespace {

constexpr int kQueries = 64, kWarps = 4, kThreads = kWarps * kWarp;

template <int D>
constexpr int kKeysOfTile = D == 128 ? 32 : 64;  // as many as the registers hold

// Where 16-byte chunk `chunk` of row `row` of a tile lies, in halves: swizzled against bank conflicts.
template <int D>
HR_DEVICE int place(int row, int chunk) {
    const int turn = D == 32 ? row / 2 % 4 : row % 8;
    return row * D + (chunk ^ turn) * 8;
}

// ROWS rows; those before `begin` and from `rows` on become zeros and are not read.
template <int D, int ROWS>
HR_DEVICE void load_tile(half* tile, const half* from, int64_t ld, int begin, int rows) {
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * D / 8; i += kThreads) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const bool valid = row >= begin && row < rows;
        cp_async16(tile + place<D>(row, chunk), valid ? from + row * ld + chunk * 8 : from, valid);
    }
}

template <int D>
HR_KERNEL void HR_LAUNCH_BOUNDS(kThreads, 1)
    attention_kernel(const half* qkv, int ld_qkv, Queries queries, KvCache cache, const int* start, const int* lengths,
                     half* out, int ld_out, int length) {
    HR_SHARED(half, stages);  // K, V of stage 0, then of stage 1
    constexpr int kKeys = kKeysOfTile<D>, kTile = kKeys * D;
    const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);  // the longest first
    const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
    const int lane = lane_id(), query0 = tile * kQueries;
    const int count = min(lengths != nullptr ? lengths[sequence] : length, length);  // queries of this sequence
    const int first = start[sequence];
    half* to = out + (static_cast<int64_t>(sequence) * length + query0) * ld_out + head * D;
    if (query0 >= count) {  // padding only
        for (int i = static_cast<int>(threadIdx.x); i < min(kQueries, length - query0) * D; i += kThreads)
            to[static_cast<int64_t>(i / D) * ld_out + i % D] = to_half(0.0f);
        return;
    }
    const int keys = min(first + min(query0 + kQueries, count), cache.capacity);
    const int first_key = first_in_window(first + query0 + 1, queries.window);  // of the first query
    const int first_tile = first_key / kKeys, tiles = ceil_div(keys, kKeys);
    const int kv_head = queries.kv_head != nullptr ? queries.kv_head[head] : head;
    const int64_t base = (static_cast<int64_t>(sequence) * cache.heads + kv_head) * cache.capacity * D;

    auto load_keys = [&](int t) {
        half* stage = stages + (t - first_tile) % 2 * 2 * kTile;
        const int64_t from = base + static_cast<int64_t>(t) * kTile;
        load_tile<D, kKeys>(stage, cache.k + from, D, first_key - t * kKeys, keys - t * kKeys);
        load_tile<D, kKeys>(stage + kTile, cache.v + from, D, first_key - t * kKeys, keys - t * kKeys);
    };

    const half* query = qkv + (static_cast<int64_t>(sequence) * length + query0) * ld_qkv + head * D;
    load_tile<D, kQueries>(stages + 2 * kTile, query, ld_qkv, 0, min(kQueries, length - query0));  // stage 1 will be there
    load_keys(first_tile);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
        ldmatrix_x4(q[d], stages + 2 * kTile + place<D>(warp_id() * 16 + lane % 16, d * 2 + lane / 16));
    sync_block();  // stage 1 may be filled

    const float scale = kLog2E * rsqrtf(static_cast<float>(D));  // exp2 takes the place of exp
    const int row_position = first + query0 + warp_id() * 16 + lane / 4;  // of rows lane / 4 and that + 8
    const int row_first[2] = {first_in_window(row_position + 1, queries.window),
                              first_in_window(row_position + 9, queries.window)};
    float sums[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, weight[2] = {};
    for (int t = first_tile; t < tiles; ++t) {
        if (t + 1 < tiles) load_keys(t + 1);
        cp_async_commit();
        cp_async_wait<1>();
        sync_block();
        const half* k = stages + (t - first_tile) % 2 * 2 * kTile;
        const half* v = k + kTile;

        float scores[kKeys / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
#pragma unroll
            for (int j = 0; j < kKeys / 8; j += 2) {
                uint32_t both[4];
                ldmatrix_x4(both, k + place<D>(j * 8 + lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
                const uint32_t left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
                mma_16816(scores[j], q[d], left);
                mma_16816(scores[j + 1], q[d], right);
            }

        // A key after the block's first query, or one before the window of its last.
        const bool border = t * kKeys + kKeys - 1 > first + query0 ||
                            t * kKeys < first_in_window(first + query0 + kQueries, queries.window);
        float new_highest[2] = {highest[0], highest[1]}, base[2];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = t * kKeys + j * 8 + lane % 4 * 2 + i % 2;
                const bool hidden = border && (key > row_position + i / 2 * 8 || key < row_first[i / 2]);
                scores[j][i] = hidden ? -INFINITY : scores[j][i] * scale;
                new_highest[i / 2] = fmaxf(new_highest[i / 2], scores[j][i]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            new_highest[r] = fmaxf(new_highest[r], warp_xor(new_highest[r], 1));
            new_highest[r] = fmaxf(new_highest[r], warp_xor(new_highest[r], 2));
            const float old_highest = highest[r];
            highest[r] = new_highest[r];
            // A window may hide all keys of the first tiles from a row: then exponents are taken from 0, not from -infinity.
            base[r] = new_highest[r] == -INFINITY ? 0.0f : new_highest[r];
            const float shrink = exp2f(old_highest - base[r]);  // 0 at the first tile
            weight[r] *= shrink;
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                sums[d][2 * r] *= shrink;
                sums[d][2 * r + 1] *= shrink;
            }
        }
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[j][i] = exp2f(scores[j][i] - base[i / 2]);
                weight[i / 2] += scores[j][i];
            }
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
            const uint32_t p[4] = {
                pack_half2(scores[2 * j][0], scores[2 * j][1]), pack_half2(scores[2 * j][2], scores[2 * j][3]),
                pack_half2(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                pack_half2(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
            for (int d = 0; d < D / 8; d += 2) {
                uint32_t both[4];
                ldmatrix_x4_trans(both, v + place<D>(j * 16 + lane % 16, d + lane / 16));
                const uint32_t left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
                mma_16816(sums[d], p, left);
                mma_16816(sums[d + 1], p, right);
            }
        }
        sync_block();  // before the next tile lands here
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float total = weight[r] + warp_xor(weight[r], 1);
        total += warp_xor(total, 2);
        const float inverse = total > 0.0f ? 1.0f / total : 0.0f;  // a row of padding may see no key by its window
        const int row = warp_id() * 16 + lane / 4 + r * 8;
        if (query0 + row >= length) continue;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            half* pair = to + static_cast<int64_t>(row) * ld_out + d * 8 + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(pair) = pack_half2(sums[d][2 * r] * inverse, sums[d][2 * r + 1] * inverse);
        }
    }
}

template <int D>
int run(const half* qkv, int ld_qkv, const Queries& queries, const KvCache& cache, const int* start, const int* lengths,
        half* out, int ld_out, int batch, int length, Stream stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(length, kQueries)), static_cast<unsigned>(queries.heads),
                    static_cast<unsigned>(batch));
    return launch({grid, dim3(kThreads), 4 * kKeysOfTile<D> * D * sizeof(half), stream}, attention_kernel<D>, qkv, ld_qkv,
                  queries, cache, start, lengths, out, ld_out, length);
}

}  // namespace

int attention_prefill(const half* qkv, int ld_qkv, const Queries& queries, const KvCache& cache, const int* start,
                      const int* lengths, half* out, int ld_out, int batch, int length, Stream stream) {
    const auto chosen = cache.head_dim == 32 ? run<32> : cache.head_dim == 64 ? run<64> : run<128>;
    return chosen(qkv, ld_qkv, queries, cache, start, lengths, out, ld_out, batch, length, stream);
}

}  // namespace headroom
