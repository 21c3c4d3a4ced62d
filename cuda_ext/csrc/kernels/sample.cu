// The next token, drawn on the device: temperature, then top-k, then top-p, then a draw; or the argmax.
//
// One block a row. Neither filter sorts: the smallest logit that is kept is found four bits at a time, by how many
// tokens (top-k) or how much probability (top-p) lie at or above it. All sums run in a fixed order, so the same seed,
// row and step draw the same token whatever else is in the batch. Tokens that tie with the last one kept are kept.
// A NaN counts as minus infinity.
#include "../ops.h"

namespace headroom {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kDigits = 16;

// Floats in order as unsigned integers.
HR_DEVICE uint32_t order(float x) {
    if (!(x == x)) return 0;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), its first word.
HR_DEVICE uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0;
}

struct Row {
    const float* logits;
    int count;
    float* scratch;  // [kDigits][kWarps]
    bool aligned;    // rows begin at 16-byte addresses

    HR_DEVICE float logit(int i) const { return logits[i]; }

    // use(i, logit) for this thread's share, ascending; several loads are on their way at once.
    template <typename Use>
    HR_DEVICE void each(Use use) const {
        constexpr int kTogether = 4;
        const int thread = static_cast<int>(threadIdx.x), fours = aligned ? count / 4 : 0;
        for (int base = thread; base < fours; base += kTogether * kThreads) {
            float4 x[kTogether];
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
                x[j] = reinterpret_cast<const float4*>(logits)[min(base + j * kThreads, fours - 1)];
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int i = (base + j * kThreads) * 4;
                if (i >= fours * 4) break;
                use(i, x[j].x), use(i + 1, x[j].y), use(i + 2, x[j].z), use(i + 3, x[j].w);
            }
        }
        for (int i = fours * 4 + thread; i < count; i += kThreads) use(i, logits[i]);
    }
};

// The largest key such that the tokens at or above it weigh at least `target` together. A token weighs 1, or, given
// the highest logit and 1 / temperature, its share before normalisation; below `floor` it weighs nothing.
template <bool BY_SHARE>
HR_DEVICE uint32_t threshold(const Row& row, float target, uint32_t floor, float highest, float scale) {
    uint32_t found = 0;
    for (int shift = 28; shift >= 0; shift -= 4) {
        float above[kDigits] = {};  // [d]: weight of keys whose digits so far are `found`'s and whose next is >= d
        float beyond = 0.0f;        // of keys above every key with these digits
        row.each([&](int, float x) {
            const uint32_t key = order(x);
            if (key < floor || key < found) return;
            const float weight = BY_SHARE ? expf((x - highest) * scale) : 1.0f;
            const uint32_t digit = (key - found) >> shift;
            if (digit >= kDigits) {
                beyond += weight;
                return;
            }
#pragma unroll
            for (uint32_t d = 0; d < kDigits; ++d) above[d] += digit >= d ? weight : 0.0f;
        });
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
            const float sum = warp_sum(above[d] + beyond);
            if (lane_id() == 0) row.scratch[d * kWarps + warp_id()] = sum;
        }
        sync_block();
        uint32_t digit = 0;
        for (uint32_t d = 1; d < kDigits; ++d) {
            float sum = 0.0f;
            for (int w = 0; w < kWarps; ++w) sum += row.scratch[d * kWarps + w];
            if (sum >= target) digit = d;
        }
        found |= digit << shift;
        sync_block();
    }
    return found;
}

// The weight of all tokens at or above `floor`, in every thread; `mine` is this thread's run of consecutive tokens.
HR_DEVICE float total_share(const Row& row, uint32_t floor, float highest, float scale, int begin, int end,
                            float& mine) {
    mine = 0.0f;
    for (int i = begin; i < end; ++i)
        if (order(row.logit(i)) >= floor) mine += expf((row.logit(i) - highest) * scale);
    return block_sum(mine, row.scratch);
}

HR_KERNEL void HR_LAUNCH_BOUNDS(kThreads, 1)
    sample_kernel(const float* logits, int ld_logits, int vocabulary, const Sampling* how, int* step, int* tokens) {
    HR_SHARED(float, scratch);
    const int thread = static_cast<int>(threadIdx.x), batch_row = static_cast<int>(blockIdx.x);
    const Row row{logits + static_cast<int64_t>(batch_row) * ld_logits, vocabulary, scratch,
                  ld_logits % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0};
    wait_for_previous_launch();
    // Asked for before the logits, so that they are there when the argmax is.
    const float temperature = how->temperature, top_p = how->top_p;
    const int top_k = how->top_k, at = step != nullptr ? step[batch_row] : 0;
    const uint64_t seed = how->seed;

    // The highest logit, the lower token where two tie.
    uint32_t best = 0;
    int best_token = vocabulary;
    row.each([&](int i, float x) {
        const uint32_t key = order(x);
        if (key > best || best_token == vocabulary) best = key, best_token = i;
    });
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const uint32_t key = warp_xor(best, offset);
        const int token = warp_xor(best_token, offset);
        if (key > best || (key == best && token < best_token)) best = key, best_token = token;
    }
    uint32_t* keys = reinterpret_cast<uint32_t*>(scratch);
    if (lane_id() == 0) {
        keys[warp_id()] = best;
        keys[kWarps + warp_id()] = static_cast<uint32_t>(best_token);
    }
    sync_block();
    for (int w = 0; w < kWarps; ++w) {
        const int token = static_cast<int>(keys[kWarps + w]);
        if (keys[w] > best || (keys[w] == best && token < best_token)) best = keys[w], best_token = token;
    }
    sync_block();
    int chosen = best_token;

    if (temperature > 0.0f) {
        const float highest = row.logit(best_token), scale = 1.0f / temperature;
        uint32_t floor = order(-INFINITY) + 1;  // what has no probability is never drawn
        if (top_k > 0 && top_k < vocabulary)
            floor = max(floor, threshold<false>(row, static_cast<float>(top_k), floor, 0.0f, 0.0f));
        const int run = ceil_div(vocabulary, kThreads);
        const int begin = min(thread * run, vocabulary), end = min(begin + run, vocabulary);
        float mine;
        float total = total_share(row, floor, highest, scale, begin, end, mine);
        if (top_p < 1.0f) {
            floor = max(floor, threshold<true>(row, top_p * total, floor, highest, scale));
            total = total_share(row, floor, highest, scale, begin, end, mine);
        }
        // Runs before this thread's: within the warp by shuffles, then whole warps.
        float before = mine;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const float left = warp_up(before, offset);
            if (lane_id() >= offset) before += left;
        }
        if (lane_id() == kWarp - 1) scratch[warp_id()] = before;
        int* drawn = reinterpret_cast<int*>(scratch + kWarps);
        if (thread == 0) *drawn = vocabulary;
        sync_block();
        float after = before;
        for (int w = 0; w < warp_id(); ++w) after += scratch[w];
        float past = after - before;  // the sum of the warps before, then of this warp's lanes before
        const float of_lane_before = warp_up(before, 1);
        past += lane_id() > 0 ? of_lane_before : 0.0f;

        const uint32_t bits = philox(static_cast<uint32_t>(at), static_cast<uint32_t>(batch_row), 0, 0,
                                     static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        const float point = static_cast<float>(bits >> 8) * 0x1p-24f * total;
        // The first token, in this thread's run, whose sum passes the point. Runs abut but for rounding: the lowest
        // token that any thread finds is taken, and the best one where rounding lets the point past all.
        if (after > point || thread == kThreads - 1) {
            float sum = past;
            int found = vocabulary;
            for (int i = begin; i < end && found == vocabulary; ++i) {
                if (order(row.logit(i)) < floor) continue;
                sum += expf((row.logit(i) - highest) * scale);
                if (sum > point) found = i;
            }
            atomic_min(drawn, found);
        }
        sync_block();
        chosen = *drawn < vocabulary ? *drawn : best_token;
    }
    if (thread == 0) {
        tokens[batch_row] = chosen;
        if (step != nullptr) step[batch_row] = at + 1;
    }
}

}  // namespace

int sample(const float* logits, int ld_logits, int vocabulary, int batch, const Sampling* how, int* step, int* tokens,
           Stream stream) {
    const dim3 grid(static_cast<unsigned>(batch));
    const size_t shared = kDigits * kWarps * sizeof(float);
    return launch({grid, dim3(kThreads), shared, stream}, sample_kernel, logits, ld_logits, vocabulary, how, step,
                  tokens);
}

}  // namespace headroom
