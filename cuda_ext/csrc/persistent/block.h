// What the phases of kernels/decode_persistent.cu share: where everything lies, and a block's view of it.
#pragma once

#include "../decode_persistent.h"
#include "weight_ring.h"

namespace headroom::persistent {

constexpr int kMaxThreads = 384, kMaxSplits = 16;
constexpr int kMaxStage = 1024;  // halves
constexpr int kPairBits = 1, kPair = 1 << kPairBits;  // rows of q and k that rotary positions turn together

// Of each sequence, the same in all blocks.
struct State {
    int token[kPersistentBatch], position[kPersistentBatch], step[kPersistentBatch], finished[kPersistentBatch];
};

// Where the parts of the workspace and of shared memory lie, in bytes.
struct Plan {
    PersistentDecode p;
    int steps, ld_rows, own_columns, scratch_floats, stage, depth;
    size_t x, q, inner, partial, candidates, workspace_bytes;  // two counters come first
    int table, matrices, rows, own, scratch, full, ring;
    size_t shared_bytes;

    Plan(const PersistentDecode& what, int steps_) : p(what), steps(steps_) {
        const size_t batch = kPersistentBatch, heads = p.most_heads, blocks = max(p.blocks, 1);
        const int rows_of_batch = p.state.batch <= 2 ? p.state.batch : kPersistentBatch;
        size_t at = 2 * sizeof(unsigned);
        const auto carve = [&](size_t bytes) {
            const size_t begin = round_up<size_t>(at, 128);
            at = begin + bytes;
            return begin;
        };
        x = carve(batch * p.ld_width * sizeof(float));
        q = carve(batch * heads * p.head_dim * sizeof(half));
        inner = carve(batch * p.ld_inner * sizeof(half));
        partial = carve(batch * heads * kMaxSplits * (p.head_dim + 2) * sizeof(float));
        candidates = carve(batch * blocks * sizeof(uint4));
        workspace_bytes = at;

        const int warps = p.threads / kWarp;
        ld_rows = max(max(p.ld_width, p.ld_inner), p.most_heads * p.head_dim);
        own_columns = ceil_div(p.width, static_cast<int>(blocks));
        scratch_floats = max(p.threads * kPersistentBatch, warps * (p.head_dim + 2));
        // Stages are a warp's loads long, and no longer than the shortest that holds a row of `width` in equal parts.
        stage = round_up(ceil_div(p.ld_width, ceil_div(p.ld_width, kMaxStage)), kWarp * 8);
        at = sizeof(State);  // it comes first
        table = carve(p.layer_count * sizeof(Layer));
        matrices = carve((kLinears * p.layer_count + 1) * sizeof(Matrix));
        rows = carve(static_cast<size_t>(rows_of_batch) * ld_rows * sizeof(half));
        own = carve(static_cast<size_t>(rows_of_batch) * own_columns * sizeof(float));
        scratch = carve(scratch_floats * sizeof(float));
        full = round_up<size_t>(at, 128);
        const size_t limit = p.shared_bytes != 0 ? p.shared_bytes : most_shared_bytes();
        const size_t each = warps * (stage * sizeof(half) + sizeof(uint64_t));
        depth = limit > full + 128 && each > 0 ? static_cast<int>((limit - full - 128) / each) : 0;
        carve(static_cast<size_t>(depth) * warps * sizeof(uint64_t));
        ring = carve(static_cast<size_t>(depth) * warps * stage * sizeof(half));
        shared_bytes = at;
    }

    bool valid() const {
        return p.state.batch >= 1 && p.state.batch <= kPersistentBatch && p.threads % kWarp == 0 &&
               p.threads >= kWarp && p.threads <= kMaxThreads && p.width <= 8 * p.threads && depth >= 2 &&
               scratch_floats >= ceil_div(ld_rows, stage) * kPersistentBatch * kPair &&
               (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128);
    }
};

// A block's view: parameters, the parts of its shared memory, and of the workspace. Addresses are worked out where
// they are used, as registers are short.
struct Block {
    const Plan& plan;
    const PersistentDecode& p;
    unsigned char* shared;
    int threads = static_cast<int>(blockDim.x), warps = threads / kWarp, thread = static_cast<int>(threadIdx.x);

    HR_DEVICE Block(const Plan& plan_, unsigned char* shared_) : plan(plan_), p(plan_.p), shared(shared_) {}

    template <typename T>
    HR_DEVICE T* in_shared(int at) const {
        return reinterpret_cast<T*>(shared + at);
    }
    template <typename T>
    HR_DEVICE T* in_workspace(size_t at) const {
        return reinterpret_cast<T*>(static_cast<unsigned char*>(p.workspace) + at);
    }
    HR_DEVICE int batch() const { return p.state.batch; }
    HR_DEVICE State& state() const { return *in_shared<State>(0); }
    HR_DEVICE const Layer& layer(int index) const { return in_shared<Layer>(plan.table)[index]; }
    HR_DEVICE half* rows() const { return in_shared<half>(plan.rows); }  // what is multiplied: [ROWS, plan.ld_rows]
    // This block's columns of the residual stream: [ROWS, plan.own_columns].
    HR_DEVICE float* own() const { return in_shared<float>(plan.own); }
    HR_DEVICE float* scratch() const { return in_shared<float>(plan.scratch); }
    HR_DEVICE float* x() const { return in_workspace<float>(plan.x); }
    HR_DEVICE half* q() const { return in_workspace<half>(plan.q); }
    HR_DEVICE half* inner() const { return in_workspace<half>(plan.inner); }
    HR_DEVICE float* partial() const { return in_workspace<float>(plan.partial); }
    HR_DEVICE uint4* candidates() const { return in_workspace<uint4>(plan.candidates); }

    // The matrices in the order of their use: WeightRing's sequence. They are made once, as that takes divisions.
    HR_DEVICE const Matrix& matrix(int index) const { return in_shared<Matrix>(plan.matrices)[index]; }
    HR_DEVICE void make_matrices() const {
        const int last = kLinears * p.layer_count;
        for (int index = thread; index <= last; index += threads) {
            const Linear head{p.wte, nullptr, p.vocabulary, p.ld_width};
            const Linear& of = index == last ? head : layer(index / kLinears).linear[index % kLinears];
            const int together = index != last && index % kLinears == kQkv ? kPairBits : 0;
            in_shared<Matrix>(plan.matrices)[index] = {of.weight, of.ld, first_row(of.rows, blockIdx.x, together),
                                                       first_row(of.rows, blockIdx.x + 1, together),
                                                       ceil_div(of.ld, plan.stage)};
        }
        sync_block();
    }
};

}  // namespace headroom::persistent
