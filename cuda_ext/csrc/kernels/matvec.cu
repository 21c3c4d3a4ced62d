// Matrix products for 1 to 8 rows of x: what a decoded token pays for is reading the weights, once.
//
// Tensor cores multiply x, rows 8 to 15 of the tile left zero, by 8 outputs' weights: eight rows cost what one does, and
// nothing is unpacked. The mma's order of columns is free, as long as both sides agree: a lane's 16 bytes of a weight row,
// as they lie in memory, are its part of two mma steps. A block's warps share its outputs' columns, so that a whole matrix
// of GPT-2's small sizes is on its way at once; their sums meet in shared memory, in a fixed order.
//
// Weights do not depend on what ran before: under programmatic dependent launch they are asked for before the launch
// before has ended. Each block repeats the LayerNorm of x: cheaper than a launch of its own.
#include "../qkv.h"
#include "../row_norm.h"

namespace headroom {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTile = 8;    // outputs of an mma
constexpr int kMostTiles = 4;
constexpr int kStep = 32;   // columns of a step: 16 bytes in each of a row's four lanes

// From row to row of the normalised x: half of the shared memory's banks further, so that two rows do not meet in one.
HR_ANY int shared_row(int k) { return round_up(k, 64) + 32; }

size_t shared_bytes(int tiles, int normal_rows, int k) {
    return static_cast<size_t>(kWarps) * kMatvecRows * tiles * kTile * sizeof(float) +
           static_cast<size_t>(normal_rows) * shared_row(k) * sizeof(half);
}

HR_DEVICE uint4 zeros() { return make_uint4(0, 0, 0, 0); }

template <MatvecOut OUT>
HR_DEVICE void write(const Matvec& p, int row, int column, float value) {
    const int64_t at = static_cast<int64_t>(row) * p.ld_out + column;
    if (OUT == MatvecOut::kGelu) p.out_half[at] = to_half(gelu_tanh(value));
    if (OUT == MatvecOut::kResidual || OUT == MatvecOut::kFloat) p.out_float[at] = value;
    if (OUT == MatvecOut::kQkv) {
        const KvCache& cache = p.cache;
        const int q_width = p.heads * cache.head_dim;
        if (column < q_width) {
            p.out_half[at] = to_half(value);
        } else if (p.position[row] < cache.capacity) {
            *cache_place(cache, cache.head_dim, row, p.position[row], column - q_width) = to_half(value);
        }
    }
}

// Queries and keys turn where positions are rotary: the number beside this lane's is the other one of its pair.
HR_DEVICE float in_position(const Matvec& p, int row, int column, float value) {
    const float partner = warp_xor(value, 1);
    const int d = column % p.cache.head_dim;
    if (row >= p.rows || column >= (p.heads + p.cache.heads) * p.cache.head_dim || d >= p.rotary.dims) return value;
    return turned(rotary_angle(p.rotary, p.position[row], d), d, value, partner);
}

// A block computes TILES * 8 outputs.
template <int TILES, MatvecIn IN, MatvecOut OUT>
HR_KERNEL void HR_LAUNCH_BOUNDS(kThreads, 2) matvec_kernel(Matvec p) {
    constexpr int kLoads = TILES < kMostTiles ? 12 : 8;  // that a thread has on their way; more would spill
    constexpr int kOutputs = TILES * kTile, kAhead = kLoads / TILES, kRound = kAhead * kWarps;
    static_assert(kOutputs * kMatvecRows <= kThreads, "a thread finishes at most one output");
    static_assert(kOutputs * kMatvecRows % kWarp == 0 && kOutputs % 2 == 0, "a pair's two numbers are in one warp");
    HR_SHARED(float, sums);  // [kWarps][kMatvecRows][kOutputs]; then, for kNorm, x: [rows][shared_row(k)]
    half* normal = reinterpret_cast<half*>(sums + kWarps * kMatvecRows * kOutputs);
    // A lane's place in a fragment: a row of x and an output, and which of the step's four pieces.
    const int group = lane_id() / 4, part = lane_id() % 4;
    const int chunks = ceil_div(p.k, 8), steps = ceil_div(chunks, 4), first = static_cast<int>(blockIdx.x) * kOutputs;

    const half* weight[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        weight[t] = p.weight + static_cast<int64_t>(min(first + t * kTile + group, p.n - 1)) * p.ld_weight + part * 8;
    uint4 w[kAhead][TILES], x[kAhead];
    const auto fetch_weights = [&](int step, uint4(&to)[TILES]) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
            to[t] = step * 4 + part < chunks ? load16_stream(weight[t] + step * kStep) : zeros();
    };
    const auto fetch_x = [&](int step) {
        const half* from = p.x_half + static_cast<int64_t>(group) * p.ld_x + step * kStep + part * 8;
        return group < p.rows && step * 4 + part < chunks ? load16(from) : zeros();
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch_weights(warp_id() + i * kWarps, w[i]);

    // The output that this thread finishes.
    const int row = static_cast<int>(threadIdx.x) / kOutputs, column = first + static_cast<int>(threadIdx.x) % kOutputs;
    const bool finishes = row < p.rows && column < p.n;
    float value = finishes && p.bias != nullptr ? to_float(p.bias[column]) : 0.0f;

    let_next_launch_begin();
    wait_for_previous_launch();
    if (OUT == MatvecOut::kResidual && finishes) value += p.out_float[static_cast<int64_t>(row) * p.ld_out + column];
    if (IN == MatvecIn::kNorm) {
        const int ld = shared_row(p.k);
        if (warp_id() < p.rows)
            row_norm(p.x + static_cast<int64_t>(warp_id()) * p.ld_x, p.gain, p.shift, normal + warp_id() * ld, p.k, ld,
                     p.epsilon);
        sync_block();
        normal += group * ld + part * 8;
    } else {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) x[i] = fetch_x(warp_id() + i * kWarps);
    }

    float d[TILES][4] = {};
    for (int begin = warp_id(); begin < steps; begin += kRound) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int step = begin + i * kWarps;
            if (step >= steps) break;  // a whole warp
            if (IN == MatvecIn::kNorm) x[i] = group < p.rows ? load16(normal + step * kStep) : zeros();
            const uint32_t low[4] = {x[i].x, 0, x[i].y, 0}, high[4] = {x[i].z, 0, x[i].w, 0};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma_16816(d[t], low, {w[i][t].x, w[i][t].y});
                mma_16816(d[t], high, {w[i][t].z, w[i][t].w});
            }
            fetch_weights(step + kRound, w[i]);
            if (IN == MatvecIn::kHalf) x[i] = fetch_x(step + kRound);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        *reinterpret_cast<float2*>(sums + (warp_id() * kMatvecRows + group) * kOutputs + t * kTile + part * 2) =
            make_float2(d[t][0], d[t][1]);
    sync_block();
    if (threadIdx.x >= kMatvecRows * kOutputs) return;  // whole warps
#pragma unroll
    for (int other = 0; other < kWarps; ++other) value += sums[other * kMatvecRows * kOutputs + threadIdx.x];
    if (OUT == MatvecOut::kQkv && p.rotary.dims > 0) value = in_position(p, row, column, value);
    if (finishes) write<OUT>(p, row, column, value);
}

template <int TILES, MatvecIn IN, MatvecOut OUT>
int run(const Matvec& p, bool dependent, Stream stream) {
    Launch how{dim3(static_cast<unsigned>(ceil_div(p.n, TILES * kTile))), dim3(kThreads),
               shared_bytes(TILES, IN == MatvecIn::kNorm ? p.rows : 0, p.k), stream};
    how.dependent = dependent;
    return launch(how, matvec_kernel<TILES, IN, OUT>, p);
}

}  // namespace

int matvec(const Matvec& problem, bool dependent, Stream stream) {
    // As few outputs a block as keep its loads on their way: a large GPU's multiprocessors should all have one.
    switch (problem.out) {
        case MatvecOut::kQkv: return run<2, MatvecIn::kNorm, MatvecOut::kQkv>(problem, dependent, stream);
        case MatvecOut::kGelu: return run<2, MatvecIn::kNorm, MatvecOut::kGelu>(problem, dependent, stream);
        case MatvecOut::kResidual: return run<1, MatvecIn::kHalf, MatvecOut::kResidual>(problem, dependent, stream);
        default: return run<kMostTiles, MatvecIn::kNorm, MatvecOut::kFloat>(problem, dependent, stream);
    }
}

size_t matvec_shared_bytes(int rows, int width) { return shared_bytes(kMostTiles, rows, width); }

}  // namespace headroom
