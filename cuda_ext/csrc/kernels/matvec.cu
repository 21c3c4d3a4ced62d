// Matrix products for 1 to 8 rows: what a decoded token pays for is reading the weights once.
//
// A warp computes a few outputs and reads their weight rows 16 bytes a lane, the next ones on their way while it
// multiplies. The rows of x wait in shared memory as FP16, through LayerNorm where one is due, which every block
// repeats: cheaper than a launch of its own. Weights do not depend on what ran before, so under programmatic
// dependent launch the first ones are fetched before the launch before has ended.
#include "../ops.h"

namespace headroom {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

// The sums over the block of ROWS values at once, in every thread.
template <int ROWS>
HR_DEVICE void block_sums(float (&values)[ROWS], float* scratch) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        values[r] = warp_sum(values[r]);
        if (lane_id() == 0) scratch[r * kWarps + warp_id()] = values[r];
    }
    sync_block();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        values[r] = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) values[r] += scratch[r * kWarps + w];
    }
    sync_block();
}

// LayerNorm of the rows of p.x into shared memory; columns k..width-1, and rows past p.rows, become zeros.
template <int ROWS>
HR_DEVICE void normalise(const Matvec& p, half* rows, int width, float* scratch) {
    const int thread = static_cast<int>(threadIdx.x);
    float mean[ROWS] = {}, scale[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        for (int i = thread; i < p.k && r < p.rows; i += kThreads) mean[r] += p.x[static_cast<int64_t>(r) * p.ld_x + i];
    block_sums<ROWS>(mean, scratch);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        mean[r] /= static_cast<float>(p.k);
        for (int i = thread; i < p.k && r < p.rows; i += kThreads) {
            const float difference = p.x[static_cast<int64_t>(r) * p.ld_x + i] - mean[r];
            scale[r] += difference * difference;
        }
    }
    block_sums<ROWS>(scale, scratch);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        scale[r] = rsqrtf(scale[r] / static_cast<float>(p.k) + p.epsilon);
        for (int i = thread; i < width; i += kThreads) {
            float x = 0.0f;
            if (i < p.k && r < p.rows)
                x = (p.x[static_cast<int64_t>(r) * p.ld_x + i] - mean[r]) * scale[r] * to_float(p.gain[i]) + to_float(p.shift[i]);
            rows[r * width + i] = to_half(x);
        }
    }
}

template <int ROWS>
HR_DEVICE void copy_rows(const Matvec& p, half* rows, int width) {
    for (int i = static_cast<int>(threadIdx.x) * 8; i < ROWS * width; i += kThreads * 8) {
        const int row = i / width;
        const half* from = p.x_half + static_cast<int64_t>(row) * p.ld_x + i % width;
        store16(rows + i, row < p.rows ? load16(from) : make_uint4(0, 0, 0, 0));
    }
}

template <MatvecOut OUT>
HR_DEVICE void write(const Matvec& p, int row, int column, float value) {
    if (p.bias != nullptr) value += to_float(p.bias[column]);
    const int64_t at = static_cast<int64_t>(row) * p.ld_out + column;
    if (OUT == MatvecOut::kGelu) p.out_half[at] = to_half(gelu_tanh(value));
    if (OUT == MatvecOut::kResidual) p.out_float[at] += value;
    if (OUT == MatvecOut::kFloat) p.out_float[at] = value;
    if (OUT == MatvecOut::kQkv) {
        const KvCache& cache = p.cache;
        const int all = cache.heads * cache.head_dim, which = column / all, place = column % all;
        if (which == 0) {
            p.out_half[at] = to_half(value);
        } else if (p.position[row] < cache.capacity) {
            half* to = which == 1 ? cache.k : cache.v;
            const int64_t head = static_cast<int64_t>(row) * cache.heads + place / cache.head_dim;
            to[(head * cache.capacity + p.position[row]) * cache.head_dim + place % cache.head_dim] = to_half(value);
        }
    }
}

// EACH outputs a warp; ROWS rows of x.
template <int ROWS, int EACH, MatvecIn IN, MatvecOut OUT>
HR_KERNEL void HR_LAUNCH_BOUNDS(kThreads, 1) matvec_kernel(Matvec p) {
    HR_SHARED(half, rows);
    const int width = round_up(p.k, 8), chunks = width / 8;
    const int column0 = (static_cast<int>(blockIdx.x) * kWarps + warp_id()) * EACH;
    const half* weight[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) weight[e] = p.weight + static_cast<int64_t>(min(column0 + e, p.n - 1)) * p.ld_weight;

    uint4 ahead[EACH];
    auto fetch = [&](int chunk) {
#pragma unroll
        for (int e = 0; e < EACH; ++e)
            ahead[e] = chunk < chunks ? load16_stream(weight[e] + chunk * 8) : make_uint4(0, 0, 0, 0);
    };
    fetch(lane_id());
    wait_for_previous_launch();
    if (IN == MatvecIn::kNorm) {
        normalise<ROWS>(p, rows, width, reinterpret_cast<float*>(rows + ROWS * width));
    } else {
        copy_rows<ROWS>(p, rows, width);
    }
    sync_block();

    float sums[EACH][ROWS] = {};
#pragma unroll 4
    for (int chunk = lane_id(); chunk < chunks; chunk += kWarp) {
        uint4 now[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) now[e] = ahead[e];
        fetch(chunk + kWarp);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float x[8];
            unpack8(load16(rows + r * width + chunk * 8), x);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                float w[8];
                unpack8(now[e], w);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[e][r] += w[i] * x[i];
            }
        }
    }
    let_next_launch_begin();
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = warp_sum(sums[e][r]);
            if (lane_id() == 0 && column0 + e < p.n && r < p.rows) write<OUT>(p, r, column0 + e, sum);
        }
}

template <int ROWS, MatvecIn IN, MatvecOut OUT>
int run(const Matvec& p, bool dependent, Stream stream) {
    constexpr int kEach = OUT == MatvecOut::kFloat || ROWS > 2 ? 4 : 2;
    const int width = round_up(p.k, 8);
    Launch how{dim3(static_cast<unsigned>(ceil_div(p.n, kWarps * kEach))), dim3(kThreads),
               static_cast<size_t>(ROWS) * (width * sizeof(half) + kWarps * sizeof(float)), stream};
    how.dependent = dependent;
    return launch(how, matvec_kernel<ROWS, kEach, IN, OUT>, p);
}

template <int ROWS>
int run(const Matvec& p, bool dependent, Stream stream) {
    switch (p.out) {
        case MatvecOut::kQkv: return run<ROWS, MatvecIn::kNorm, MatvecOut::kQkv>(p, dependent, stream);
        case MatvecOut::kGelu: return run<ROWS, MatvecIn::kNorm, MatvecOut::kGelu>(p, dependent, stream);
        case MatvecOut::kResidual: return run<ROWS, MatvecIn::kHalf, MatvecOut::kResidual>(p, dependent, stream);
        default: return run<ROWS, MatvecIn::kNorm, MatvecOut::kFloat>(p, dependent, stream);
    }
}

}  // namespace

int matvec(const Matvec& problem, bool dependent, Stream stream) {
    if (problem.rows == 1) return run<1>(problem, dependent, stream);
    if (problem.rows == 2) return run<2>(problem, dependent, stream);
    if (problem.rows <= 4) return run<4>(problem, dependent, stream);
    return run<8>(problem, dependent, stream);
}

}  // namespace headroom
