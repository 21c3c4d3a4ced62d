// One small kernel for each primitive of device.h, and kernels with faults that the runtime must report.
#include "device.h"

namespace headroom {
namespace {

HR_KERNEL void halves(const float* x, half* out, int n) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) out[i] = to_half(x[i]);
}

HR_KERNEL void packed(const float* x, uint32_t* bits, float* back) {
    const int i = static_cast<int>(threadIdx.x);
    bits[i] = pack_half2(x[2 * i], x[2 * i + 1]);
    const float2 both = unpack_half2(bits[i]);
    back[2 * i] = both.x;
    back[2 * i + 1] = both.y;
}

// 0 xor, 1 down, 2 up, 3 from, 4 ballot, 5 sum, 6 maximum
HR_KERNEL void shuffle(const float* x, float* out, int what, int argument) {
    const int i = static_cast<int>(threadIdx.x);
    float v = x[i];
    if (what == 0) v = warp_xor(v, argument);
    if (what == 1) v = warp_down(v, argument);
    if (what == 2) v = warp_up(v, argument);
    if (what == 3) v = warp_from(v, argument);
    if (what == 4) v = __uint_as_float(warp_ballot(v > 0));
    if (what == 5) v = warp_sum(v);
    if (what == 6) v = warp_max(v);
    out[i] = v;
}

HR_KERNEL void sums(const float* x, float* out, int n) {
    HR_SHARED(float, scratch);
    float sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) sum += x[blockIdx.x * n + i];
    const float total = block_sum(sum, scratch);
    const float twice = block_sum(2 * sum, scratch);  // the scratch is free again
    if (threadIdx.x == 0) out[blockIdx.x] = twice - total;
}

// Who is who: out[linear block, linear thread] = all twelve numbers, packed in base 8.
HR_KERNEL void indices(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int code = 0;
    for (unsigned v : {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z}) {
        code = code * 8 + static_cast<int>(v);
    }
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = code;
}

// c[16, 8] = a[16, 16] b[8, 16]^T through ldmatrix and mma; `trans`: b is given as [16, 8].
HR_KERNEL void tile(const half* a, const half* b, const float* c, float* out, int trans) {
    HR_SHARED(half, shared);
    const int lane = lane_id();
    for (int i = lane; i < 32; i += kWarp) store16(shared + 8 * i, load16(a + 8 * i));
    half* const shared_b = shared + 256;
    for (int i = lane; i < 16; i += kWarp) store16(shared_b + 8 * i, load16(b + 8 * i));
    sync_block();
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, shared + (lane % 16) * 16 + lane / 16 * 8);
    if (trans != 0) {
        ldmatrix_x4_trans(fb, shared_b + lane % 16 * 8);
    } else {
        ldmatrix_x4(fb, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
    }
    const int row = lane / 4, column = lane % 4 * 2;
    float d[4] = {c[row * 8 + column], c[row * 8 + column + 1], c[(row + 8) * 8 + column],
                  c[(row + 8) * 8 + column + 1]};
    const uint32_t first_two[2] = {fb[0], fb[1]};
    mma_16816(d, fa, first_two);
    out[row * 8 + column] = d[0];
    out[row * 8 + column + 1] = d[1];
    out[(row + 8) * 8 + column] = d[2];
    out[(row + 8) * 8 + column + 1] = d[3];
}

HR_KERNEL void matrices(const uint16_t* m, uint32_t* out, int trans) {
    HR_SHARED(uint16_t, shared);
    store16(shared + 8 * lane_id(), load16(m + 8 * lane_id()));
    sync_block();
    uint32_t r[4];
    if (trans != 0) {
        ldmatrix_x4_trans(r, shared + 8 * lane_id());
    } else {
        ldmatrix_x4(r, shared + 8 * lane_id());
    }
    for (int i = 0; i < 4; ++i) out[4 * lane_id() + i] = r[i];
}

HR_KERNEL void count(float* sum, unsigned* tickets, unsigned* seen) {
    atomic_add(sum, 1.0f);
    seen[blockIdx.x * blockDim.x + threadIdx.x] = atomic_add(tickets, 1u);
}

// A read and a write of its own instead of an atomic: some additions get lost under some seed.
HR_KERNEL void lost_count(float* sum) {
    const float before = *sum;
    fence_device();
    *sum = before + 1.0f;
}

// Two stages of copies in flight. `fault`: 1 waits for too few, 2 forgets the barrier, 3 forgets to commit,
// 4 the next copy goes to a stage that others still read.
HR_KERNEL void pipeline(const float* x, float* out, int stages, int n, int fault) {
    HR_SHARED(float, shared);
    const int i = static_cast<int>(threadIdx.x), row = 4 * static_cast<int>(blockDim.x);
    const auto fetch = [&](int stage) {
        cp_async16(shared + stage % 2 * row + 4 * i, x + stage * row + 4 * i, stage * row + 4 * i < n);
        if (fault != 3) cp_async_commit();
    };
    fetch(0);
    for (int stage = 0; stage < stages; ++stage) {
        if (stage + 1 < stages) {
            fetch(stage + 1);
            if (fault == 1)
                cp_async_wait<2>();
            else
                cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        if (fault != 2) sync_block();
        for (int j = 0; j < 4; ++j) {  // what another thread has fetched
            const int other = (4 * i + j + row / 2) % row;
            out[stage * row + other] = shared[stage % 2 * row + other];
        }
        if (fault != 4) sync_block();
    }
}

// The same with one thread's bulk copies. `fault`: 1 does not wait, 2 waits for the phase before.
HR_KERNEL void bulk(const float* x, float* out, int stages, int fault) {
    HR_SHARED(float, shared);
    const int row = static_cast<int>(blockDim.x);
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + 2 * row);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) mbarrier_init(full + i, 1);
    }
    sync_block();
    const auto fetch = [&](int stage) {
        if (threadIdx.x != 0) return;
        const unsigned half_row = static_cast<unsigned>(row) * 2;
        mbarrier_expect_and_arrive(full + stage % 2, 2 * half_row);
        bulk_copy(shared + stage % 2 * row, x + stage * row, half_row, full + stage % 2);
        bulk_copy(shared + stage % 2 * row + row / 2, x + stage * row + row / 2, half_row, full + stage % 2);
    };
    fetch(0);
    for (int stage = 0; stage < stages; ++stage) {
        if (stage + 1 < stages) fetch(stage + 1);
        const unsigned parity = static_cast<unsigned>(stage) / 2 % 2;
        if (fault != 1) mbarrier_wait(full + stage % 2, fault == 2 ? parity ^ 1 : parity);
        const int i = row - 1 - static_cast<int>(threadIdx.x);
        out[stage * row + i] = shared[stage % 2 * row + i];
        sync_block();
    }
}

// Each round, every block adds up what all blocks wrote in the round before. `fault`: 1 without barriers, 2 wrong
// round.
HR_KERNEL void rounds(float* values, unsigned* counter, int count, int fault) {
    const int blocks = static_cast<int>(gridDim.x), me = static_cast<int>(blockIdx.x);
    for (int round = 1; round <= count; ++round) {
        const float* from = values + (round - 1) * blocks;
        float sum = 0;
        for (int i = 0; i < blocks; ++i) sum += load_shared_across_blocks(from + i);
        if (threadIdx.x == 0) values[round * blocks + me] = sum + static_cast<float>(me);
        if (fault != 1) grid_barrier(counter, static_cast<unsigned>(fault == 2 ? round + 1 : round));
    }
}

// Faults by number; see test_host_runtime.py for what each must be called.
HR_KERNEL void broken(int fault, const float* x, float* out) {
    HR_SHARED(float, shared);
    const int i = static_cast<int>(threadIdx.x);
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared);
    uint32_t r[4];
    if (fault == 0 && i >= 3) sync_block();
    if (fault == 1) {
        if (i % 2 == 0)
            sync_block();
        else
            sync_warp();
    }
    if (fault == 2 && i != 7) out[i] = warp_xor(x[i], 1);
    if (fault == 3) out[i] = i % 2 == 0 ? warp_xor(x[i], 2) : warp_down(x[i], 2);
    if (fault == 4) load16(x + 1);
    if (fault == 5) store16(shared + 2, make_uint4(0, 0, 0, 0));
    if (fault == 6) cp_async16(shared + 1, x);
    if (fault == 7) cp_async16(shared + 1024, x);
    if (fault == 8) ldmatrix_x4(r, shared + 4 * i + 1020);
    if (fault == 9) shared[1024 + i] = 0;
    if (fault == 10) grid_barrier(reinterpret_cast<unsigned*>(out), 1);
    if (fault == 11) mbarrier_wait(barrier, 0);
    if (fault == 12 || fault == 13 || fault == 14) {
        if (i == 0) mbarrier_init(barrier, 1);
        sync_block();
        if (fault == 12) mbarrier_wait(barrier, 0);
        if (fault == 13) mbarrier_expect_and_arrive(barrier, 16);
        if (fault == 14 && i == 0) bulk_copy(shared + 16, x, 20, barrier);
    }
    if (fault == 15) {
        if (i == 0) return;
        warp_ballot(true);
    }
    if (fault == 18) {
        while (load_shared_across_blocks(x + i % 2) == 0) {
        }
    }
    if (fault == 16) shared[-1] = 0;
    if (fault == 17 && i == 0) {
        mbarrier_init(barrier, 1);
        bulk_copy(shared + 16, x, 64, barrier);
    }
}

HR_KERNEL void shared_is_poisoned(uint32_t* out) {
    HR_SHARED(uint32_t, shared);
    out[threadIdx.x] = shared[threadIdx.x];
    shared[threadIdx.x] = 1;
}

// Is a value read without a barrier after another warp's write?
HR_KERNEL void racy(float* out, int barrier) {
    HR_SHARED(float, shared);
    const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    shared[i] = static_cast<float>(i);
    if (barrier == 1) sync_warp();
    if (barrier == 2) sync_block();
    const int from = barrier == 1 ? i ^ 1 : n - 1 - i;
    out[i] = shared[from] == static_cast<float>(from) ? 1.0f : 0.0f;
}

// A flag that one block raises and all others spin for.
HR_KERNEL void flagged(float* flag, float* out) {
    if (blockIdx.x == 1 && threadIdx.x == 3) {
        fence_device();
        *flag = 7;
    }
    float seen = 0;
    while (seen == 0) seen = load_shared_across_blocks(flag);
    out[blockIdx.x * blockDim.x + threadIdx.x] = seen;
}

// A barrier in each of 21 frames: needs a stack that keeps them.
HR_DEVICE float deep(int level, const float* x) {
    float here[64];
    for (int i = 0; i < 64; ++i) here[i] = x[i % 32] + static_cast<float>(level);
    sync_block();
    return level == 0 ? here[0] : here[level % 64] + deep(level - 1, x);
}
HR_KERNEL void recurse(const float* x, float* out) {
    out[threadIdx.x] = deep(20, x);
}

}  // namespace
}  // namespace headroom

using namespace headroom;

extern "C" {
int hr_test_halves(const float* x, half* out, int n) {
    return launch({dim3(1), dim3(32)}, halves, x, out, n);
}
int hr_test_packed(const float* x, uint32_t* bits, float* back) {
    return launch({dim3(1), dim3(32)}, packed, x, bits, back);
}
int hr_test_shuffle(const float* x, float* out, int what, int argument) {
    return launch({dim3(1), dim3(64)}, shuffle, x, out, what, argument);
}
int hr_test_sums(const float* x, float* out, int blocks, int threads, int n) {
    return launch({dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 32 * sizeof(float)}, sums,
                  x, out, n);
}
int hr_test_indices(int* out) {
    return launch({dim3(2, 3, 4), dim3(5, 2, 3)}, indices, out);
}
int hr_test_tile(const half* a, const half* b, const float* c, float* out, int trans) {
    return launch({dim3(1), dim3(32), 1024}, tile, a, b, c, out, trans);
}
int hr_test_matrices(const uint16_t* m, uint32_t* out, int trans) {
    return launch({dim3(1), dim3(32), 512}, matrices, m, out, trans);
}
int hr_test_count(float* sum, unsigned* tickets, unsigned* seen, int cooperative) {
    return launch({dim3(4), dim3(32), 0, nullptr, cooperative != 0}, count, sum, tickets, seen);
}
int hr_test_lost_count(float* sum) {
    return launch({dim3(2), dim3(64), 0, nullptr, true}, lost_count, sum);
}
int hr_test_pipeline(const float* x, float* out, int stages, int n, int fault) {
    return launch({dim3(1), dim3(64), 2 * 4 * 64 * sizeof(float)}, pipeline, x, out, stages, n, fault);
}
int hr_test_bulk(const float* x, float* out, int stages, int fault) {
    return launch({dim3(1), dim3(64), 2 * 64 * sizeof(float) + 16}, bulk, x, out, stages, fault);
}
int hr_test_rounds(float* values, unsigned* counter, int count, int fault) {
    return launch({dim3(4), dim3(64), 0, nullptr, true}, rounds, values, counter, count, fault);
}
int hr_test_broken(int fault, const float* x, float* out) {
    return launch({dim3(1), dim3(64), 4096}, broken, fault, x, out);
}
int hr_test_poison(uint32_t* out) {
    return launch({dim3(3), dim3(32), 128}, shared_is_poisoned, out);
}
int hr_test_racy(float* out, int barrier) {
    return launch({dim3(1), dim3(64), 64 * sizeof(float)}, racy, out, barrier);
}
int hr_test_flagged(float* flag, float* out) {
    return launch({dim3(4), dim3(64), 0, nullptr, true}, flagged, flag, out);
}
int hr_test_recurse(const float* x, float* out) {
    return launch({dim3(1), dim3(1024)}, recurse, x, out);
}
int hr_test_geometry(int blocks, int threads, int shared) {
    return launch(
        {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared)},
        shared_is_poisoned, nullptr);
}
}
