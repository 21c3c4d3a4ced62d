// The keys and values of new tokens, from the rows of a QKV product to their places in the cache. Where positions are
// rotary, keys turn on their way, and queries where they lie.
#include "../qkv.h"

namespace headroom {
namespace {

constexpr int kThreads = 128;

// Eight numbers of a head, from number `d` on, turned in FP32.
HR_DEVICE uint4 rotated(uint4 packed, const Rotary& rotary, int position, int d) {
    uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (d + 2 * i >= rotary.dims) break;
        const float2 pair = unpack_half2(words[i]), angle = rotary_angle(rotary, position, d + 2 * i);
        words[i] = pack_half2(turned(angle, 0, pair.x, pair.y), turned(angle, 1, pair.y, pair.x));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// One block a token: its row's numbers, 16 bytes a thread.
HR_KERNEL void kv_append_kernel(half* qkv, int ld_qkv, int heads, KvCache cache, Rotary rotary, const int* start,
                                const int* lengths, int length) {
    const int64_t row = blockIdx.x;
    const int sequence = static_cast<int>(row / length), t = static_cast<int>(row % length);
    const int position = start[sequence] + t;
    if ((lengths != nullptr && t >= lengths[sequence]) || position >= cache.capacity) return;
    const int q_width = heads * cache.head_dim, kv_width = cache.heads * cache.head_dim;
    half* from = qkv + row * ld_qkv;
    const int first = rotary.dims > 0 ? 0 : q_width;  // queries stay as they are where nothing turns them
    for (int i = first + static_cast<int>(threadIdx.x) * 8; i < q_width + 2 * kv_width; i += kThreads * 8) {
        const bool is_value = i >= q_width + kv_width;
        const uint4 x = is_value ? load16(from + i) : rotated(load16(from + i), rotary, position, i % cache.head_dim);
        store16(i < q_width ? from + i : cache_place(cache, cache.head_dim, sequence, position, i - q_width), x);
    }
}

}  // namespace

int kv_append(half* qkv, int ld_qkv, int heads, const KvCache& cache, const Rotary& rotary, const int* start,
              const int* lengths, int batch, int length, Stream stream) {
    const dim3 grid(static_cast<unsigned>(batch * length));
    return launch({grid, dim3(kThreads), 0, stream}, kv_append_kernel, qkv, ld_qkv, heads, cache, rotary, start, lengths,
                  length);
}

}  // namespace headroom
