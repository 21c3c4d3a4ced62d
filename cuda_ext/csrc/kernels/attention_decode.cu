// Attention of one query a sequence: the keys are split over blocks (Flash-Decoding, Dao et al. 2023).
//
// head_dim / 8 lanes hold a key, 16 bytes each, so a warp reads several keys at once, and each lane group keeps its
// own running softmax. Groups merge in shared memory, blocks in device memory, where the last one to come adds up.
#include "../ops.h"
#include "../softmax.h"

namespace headroom {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kAhead = 4;  // keys that a lane asks for together

template <int D>
HR_KERNEL void HR_LAUNCH_BOUNDS(kThreads, 1)
    attention_kernel(const half* q, int ld_q, Queries queries, KvCache cache, const int* lengths, half* out, int ld_out,
                     float* partial, unsigned* counters) {
    constexpr int kLanes = D / 8;                  // of one key
    constexpr int kGroups = kThreads / kLanes;     // keys in a block's hands at once
    HR_SHARED(float, merged);                      // [kGroups][D + 2], then one word
    const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
    const int thread = static_cast<int>(threadIdx.x), group = thread / kLanes, part = thread % kLanes * 8;
    const int64_t of_head = static_cast<int64_t>(sequence) * queries.heads + head;
    const int kv_head = queries.kv_head != nullptr ? queries.kv_head[head] : head;
    const int64_t cached = (static_cast<int64_t>(sequence) * cache.heads + kv_head) * cache.capacity * D + part;

    wait_for_previous_launch();
    const int length = min(lengths[sequence], cache.capacity), seen = first_in_window(length, queries.window);
    const int each = ceil_div(length - seen, splits), begin = seen + split * each, end = min(begin + each, length);
    float query[8];
    unpack8(load16(q + static_cast<int64_t>(sequence) * ld_q + head * D + part), query);
    const float scale = kLog2E * rsqrtf(static_cast<float>(D));
#pragma unroll
    for (float& x : query) x *= scale;
    PartialSoftmax own;
    attend_keys<D, kAhead>(own, query, cache.k + cached, cache.v + cached, begin, end, group, kGroups,
                           [](const half* from) { return load16(from); });
    let_next_launch_begin();

    float* mine = merged + group * (D + 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) mine[part + j] = own.sums[j];
    if (part == 0) {
        mine[D] = own.highest;
        mine[D + 1] = own.weight;
    }
    sync_block();
    float total = 0.0f, most = -INFINITY, denominator = 0.0f;
    if (thread < D) {
        for (int g = 0; g < kGroups; ++g) most = fmaxf(most, merged[g * (D + 2) + D]);
        for (int g = 0; g < kGroups; ++g) {
            const float p = masked_exp2(merged[g * (D + 2) + D], most);
            total += p * merged[g * (D + 2) + thread];
            denominator += p * merged[g * (D + 2) + D + 1];
        }
    }
    half* to = out + static_cast<int64_t>(sequence) * ld_out + head * D;
    if (splits == 1) {
        if (thread < D) to[thread] = to_half(total / denominator);
        return;
    }

    float* parts = partial + of_head * splits * (D + 2);
    if (thread < D) parts[split * (D + 2) + thread] = total;
    if (thread == 0) {
        parts[split * (D + 2) + D] = most;
        parts[split * (D + 2) + D + 1] = denominator;
    }
    fence_device();
    sync_block();
    unsigned* arrived = reinterpret_cast<unsigned*>(merged + kGroups * (D + 2));
    if (thread == 0) *arrived = atomic_add(counters + of_head, 1u);
    sync_block();
    if (*arrived + 1 != static_cast<unsigned>(splits)) return;
    fence_device();
    if (thread == 0) counters[of_head] = 0;
    if (thread >= D) return;
    total = denominator = 0.0f, most = -INFINITY;
    for (int s = 0; s < splits; ++s) most = fmaxf(most, load_shared_across_blocks(parts + s * (D + 2) + D));
    for (int s = 0; s < splits; ++s) {
        const float p = masked_exp2(load_shared_across_blocks(parts + s * (D + 2) + D), most);
        total += p * load_shared_across_blocks(parts + s * (D + 2) + thread);
        denominator += p * load_shared_across_blocks(parts + s * (D + 2) + D + 1);
    }
    to[thread] = to_half(total / denominator);
}

template <int D>
int run(const half* q, int ld_q, const Queries& queries, const KvCache& cache, const int* lengths, half* out, int ld_out,
        int batch, int splits, float* partial, unsigned* counters, bool dependent, Stream stream) {
    constexpr int kGroups = kThreads / (D / 8);
    const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(queries.heads), static_cast<unsigned>(batch));
    Launch how{grid, dim3(kThreads), (kGroups * (D + 2) + 1) * sizeof(float), stream};
    how.dependent = dependent;
    return launch(how, attention_kernel<D>, q, ld_q, queries, cache, lengths, out, ld_out, partial, counters);
}

}  // namespace

int attention_decode(const half* q, int ld_q, const Queries& queries, const KvCache& cache, const int* lengths, half* out,
                     int ld_out, int batch, int splits, float* partial, unsigned* counters, bool dependent,
                     Stream stream) {
    const auto chosen = cache.head_dim == 32 ? run<32> : cache.head_dim == 64 ? run<64> : run<128>;
    return chosen(q, ld_q, queries, cache, lengths, out, ld_out, batch, splits, partial, counters, dependent, stream);
}

}  // namespace headroom
