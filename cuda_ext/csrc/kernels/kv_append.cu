// The keys and values of new tokens, from the rows of a QKV product to their places in the cache.
#include "../ops.h"

namespace headroom {
namespace {

constexpr int kThreads = 128;

// One block a token: its 2 * heads * head_dim values, 16 bytes a thread.
HR_KERNEL void kv_append_kernel(const half* qkv, int ld_qkv, KvCache cache, const int* start, const int* lengths,
                                int length) {
    const int64_t row = blockIdx.x;
    const int sequence = static_cast<int>(row / length), t = static_cast<int>(row % length);
    const int position = start[sequence] + t;
    if ((lengths != nullptr && t >= lengths[sequence]) || position >= cache.capacity) return;
    const int all = cache.heads * cache.head_dim;
    const half* keys = qkv + row * ld_qkv + all;
    for (int i = static_cast<int>(threadIdx.x) * 8; i < 2 * all; i += kThreads * 8) {
        const int column = i % all, head = column / cache.head_dim;
        half* to = i < all ? cache.k : cache.v;
        to += ((static_cast<int64_t>(sequence) * cache.heads + head) * cache.capacity + position) * cache.head_dim;
        store16(to + column % cache.head_dim, load16(keys + i));
    }
}

}  // namespace

int kv_append(const half* qkv, int ld_qkv, const KvCache& cache, const int* start, const int* lengths, int batch,
              int length, Stream stream) {
    const dim3 grid(static_cast<unsigned>(batch * length));
    return launch({grid, dim3(kThreads), 0, stream}, kv_append_kernel, qkv, ld_qkv, cache, start, lengths, length);
}

}  // namespace headroom
