// Tensor-core matrix product with its epilogue: out = epilogue(a weight^T + bias).
//
// A block computes a tile of BM x BN. Slices of BK columns of both operands travel through a ring of shared-memory
// stages by asynchronous copies, so that STAGES - 1 slices are on their way while one is multiplied. 16-byte chunks
// are XOR-swizzled within a row, which leaves ldmatrix without bank conflicts. For the few rows of a batched decode
// step the warps share one small tile and divide each slice's columns (WK > 1): many blocks, deep rings, and a sum
// over warps in fixed order at the end.
#include "../ops.h"

namespace headroom {
namespace {

template <int BM_, int BN_, int BK_, int WM_, int WN_, int WK_, int STAGES_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, WM = WM_, WN = WN_, WK = WK_, STAGES = STAGES_;
    static constexpr int kThreads = WM * WN * WK * kWarp;
    static constexpr int kChunks = BK / 8;                       // 16-byte chunks of a row
    static constexpr int kStageHalves = (BM + BN) * BK;
    static constexpr int MT = BM / WM / 16, NT = BN / WN / 8;    // mma tiles of a warp
    static constexpr size_t kRingBytes = static_cast<size_t>(STAGES) * kStageHalves * sizeof(half);
    static constexpr size_t kSumBytes = static_cast<size_t>(WK - 1) * WM * WN * MT * NT * 4 * kWarp * sizeof(float);
    static constexpr size_t kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
    static_assert(BK == 32 || BK == 64, "the swizzle knows rows of 64 and 128 bytes");
    static_assert(BM % (WM * 16) == 0 && BN % (WN * 16) == 0 && BK % (WK * 16) == 0);

    // Where chunk `chunk` of row `row` of a stage lies, in halves.
    HR_DEVICE static int place(int row, int chunk) {
        const int turn = BK == 64 ? row % 8 : row / 2 % 4;
        return row * BK + (chunk ^ turn) * 8;
    }
};

template <typename T>
HR_DEVICE void load_slice(half* stage, const Gemm& p, int row0, int column0, int k0) {
    for (int i = static_cast<int>(threadIdx.x); i < (T::BM + T::BN) * T::kChunks; i += T::kThreads) {
        const int row = i / T::kChunks, chunk = i % T::kChunks;
        const bool of_a = row < T::BM;
        const int from = of_a ? row0 + row : column0 + row - T::BM;
        const bool valid = from < (of_a ? p.m : p.n) && k0 + chunk * 8 < p.k;
        const half* source = of_a ? p.a : p.weight;
        if (valid) source += static_cast<int64_t>(from) * (of_a ? p.ld_a : p.ld_weight) + k0 + chunk * 8;
        cp_async16(stage + T::place(row, chunk), source, valid);
    }
}

template <Epilogue E>
HR_DEVICE void write_pair(const Gemm& p, int row, int column, float left, float right) {
    if (row >= p.m || column >= p.n) return;
    const bool both = column + 1 < p.n;
    if (p.bias != nullptr) {
        left += to_float(p.bias[column]);
        if (both) right += to_float(p.bias[column + 1]);
    }
    const int64_t at = static_cast<int64_t>(row) * p.ld_out + column;
    if (E == Epilogue::kGelu) {
        left = gelu_tanh(left);
        right = gelu_tanh(right);
    }
    if (E == Epilogue::kHalf || E == Epilogue::kGelu) {
        if (both && at % 2 == 0) {
            *reinterpret_cast<uint32_t*>(p.out_half + at) = pack_half2(left, right);
        } else {
            p.out_half[at] = to_half(left);
            if (both) p.out_half[at + 1] = to_half(right);
        }
    } else {
        float* out = p.out_float + at;
        const bool add = E == Epilogue::kResidual;
        if (both && at % 2 == 0) {
            float2* pair = reinterpret_cast<float2*>(out);
            const float2 before = add ? *pair : make_float2(0.0f, 0.0f);
            *pair = make_float2(before.x + left, before.y + right);
        } else {
            out[0] = (add ? out[0] : 0.0f) + left;
            if (both) out[1] = (add ? out[1] : 0.0f) + right;
        }
    }
}

template <typename T, Epilogue E>
HR_KERNEL void HR_LAUNCH_BOUNDS(T::kThreads, 1) gemm_kernel(Gemm p) {
    HR_SHARED(half, ring);
    const int row0 = static_cast<int>(blockIdx.y) * T::BM, column0 = static_cast<int>(blockIdx.x) * T::BN;
    const int lane = lane_id(), warp = warp_id();
    const int warp_k = warp % T::WK, warp_n = warp / T::WK % T::WN, warp_m = warp / T::WK / T::WN;
    const int slices = ceil_div(p.k, T::BK);

    float sums[T::MT][T::NT][4] = {};
#pragma unroll
    for (int s = 0; s < T::STAGES - 1; ++s) {
        if (s < slices) load_slice<T>(ring + s * T::kStageHalves, p, row0, column0, s * T::BK);
        cp_async_commit();
    }
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<T::STAGES - 2>();
        sync_block();  // this slice is there for all, and the stage that is filled next has been read by all
        const int next = slice + T::STAGES - 1;
        if (next < slices) load_slice<T>(ring + next % T::STAGES * T::kStageHalves, p, row0, column0, next * T::BK);
        cp_async_commit();

        const half* a = ring + slice % T::STAGES * T::kStageHalves;
        const half* b = a + T::BM * T::BK;
#pragma unroll
        for (int step = warp_k; step < T::BK / 16; step += T::WK) {
            uint32_t left[T::MT][4], right[T::NT][2];
#pragma unroll
            for (int i = 0; i < T::MT; ++i) {
                const int row = (warp_m * T::MT + i) * 16 + lane % 16;
                ldmatrix_x4(left[i], a + T::place(row, step * 2 + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < T::NT; j += 2) {  // two tiles of 8 output columns at once
                const int row = (warp_n * T::NT + j) * 8 + lane / 16 * 8 + lane % 8;
                uint32_t both[4];
                ldmatrix_x4(both, b + T::place(row, step * 2 + lane / 8 % 2));
                right[j][0] = both[0], right[j][1] = both[1];
                right[j + 1][0] = both[2], right[j + 1][1] = both[3];
            }
#pragma unroll
            for (int i = 0; i < T::MT; ++i)
#pragma unroll
                for (int j = 0; j < T::NT; ++j) mma_16816(sums[i][j], left[i], right[j]);
        }
    }
    cp_async_wait<0>();

    if constexpr (T::WK > 1) {
        HR_SHARED(float, parts);
        constexpr int kEach = T::MT * T::NT * 4 * kWarp;
        float* mine = parts + (warp / T::WK * (T::WK - 1)) * kEach;
        sync_block();  // the ring is free
#pragma unroll
        for (int i = 0; i < T::MT * T::NT * 4; ++i)
            if (warp_k > 0) mine[(warp_k - 1) * kEach + i * kWarp + lane] = sums[i / 4 / T::NT][i / 4 % T::NT][i % 4];
        sync_block();
        if (warp_k > 0) return;
        for (int k = 0; k < T::WK - 1; ++k)
#pragma unroll
            for (int i = 0; i < T::MT * T::NT * 4; ++i)
                sums[i / 4 / T::NT][i / 4 % T::NT][i % 4] += mine[k * kEach + i * kWarp + lane];
    }
#pragma unroll
    for (int i = 0; i < T::MT; ++i)
#pragma unroll
        for (int j = 0; j < T::NT; ++j) {
            const int row = row0 + (warp_m * T::MT + i) * 16 + lane / 4;
            const int column = column0 + (warp_n * T::NT + j) * 8 + lane % 4 * 2;
            write_pair<E>(p, row, column, sums[i][j][0], sums[i][j][1]);
            write_pair<E>(p, row + 8, column, sums[i][j][2], sums[i][j][3]);
        }
}

template <typename T>
int run(const Gemm& p, Stream stream) {
    const Launch how{dim3(static_cast<unsigned>(ceil_div(p.n, T::BN)), static_cast<unsigned>(ceil_div(p.m, T::BM))),
                     dim3(T::kThreads), T::kSharedBytes, stream};
    switch (p.epilogue) {
        case Epilogue::kHalf: return launch(how, gemm_kernel<T, Epilogue::kHalf>, p);
        case Epilogue::kGelu: return launch(how, gemm_kernel<T, Epilogue::kGelu>, p);
        case Epilogue::kResidual: return launch(how, gemm_kernel<T, Epilogue::kResidual>, p);
        default: return launch(how, gemm_kernel<T, Epilogue::kFloat>, p);
    }
}

struct Variant {
    const char* name;
    int (*run)(const Gemm&, Stream);
};
// Rings of at most 64 KiB, which every architecture from sm_75 on has.
const Variant kVariants[] = {
    {"128x128", run<Tile<128, 128, 32, 2, 4, 1, 4>>}, {"128x64", run<Tile<128, 64, 32, 2, 2, 1, 4>>},
    {"64x64", run<Tile<64, 64, 64, 2, 2, 1, 4>>},     {"32x64", run<Tile<32, 64, 64, 1, 2, 2, 5>>},
    {"16x32", run<Tile<16, 32, 64, 1, 1, 4, 8>>},     {"32x16", run<Tile<32, 16, 64, 1, 1, 4, 8>>},
};

}  // namespace

int gemm(const Gemm& problem, int variant, Stream stream) { return kVariants[variant].run(problem, stream); }
int gemm_variants() { return static_cast<int>(sizeof(kVariants) / sizeof(kVariants[0])); }
const char* gemm_variant_name(int variant) { return kVariants[variant].name; }

}  // namespace headroom
