// Decoding in one cooperative launch: embedding, all layers, LM head, argmax, next token.
//
// A layer is five phases with a grid barrier between them: LayerNorm and QKV with the KV append; attention; its
// projection; LayerNorm and fc with GELU; its projection. A block owns the same rows of a matrix in every token, and
// so the same columns of the residual stream, which stay in its shared memory; others read its copy in device memory.
// A row's tiles are multiplied by several warps and added in one order: no atomics, the same bits every time.
// Weights come through persistent/weight_ring.h, so the memory pipe runs on through barriers. LayerNorm's gains and
// shifts are loaded before the barrier that they stand behind; biases are not, they are asked for as a product begins.
#include "../persistent/attention.h"
#include "../persistent/block.h"
#include "../persistent/next_token.h"
#include "../persistent/norm.h"
#include "../persistent/weight_ring.h"
#include "../qkv.h"

namespace headroom {
namespace {

using namespace persistent;

constexpr int kInvalid = 1;  // cudaErrorInvalidValue

// This block's rows of the matrix times b.rows(); a thread gets at most one output a pass: write(r, row, value). Before,
// all lanes may look at their neighbours' values: place(r, row, value) is what is written.
template <int ROWS, typename Ring, typename Place, typename Write>
HR_DEVICE void product(const Block& b, Ring& ring, int index, const half* bias, Place place, Write write) {
    if (b.p.work == PersistentWork::kBarriers) return;
    [[maybe_unused]] constexpr int kUnroll = ROWS > 1 ? 1 : 4;  // more would spill
    const Matrix& m = b.matrix(index);
    const int rows_a_pass = min(b.threads / ROWS, b.plan.scratch_floats / (m.chunks * ROWS)) / kPair * kPair;
    const int r = b.thread % ROWS, mine = b.thread / ROWS;
    int tile = warp_id();
    for (int first = m.begin; first < m.end; first += rows_a_pass) {
        if (first > m.begin) sync_block();  // the last pass's sums have been read
        const int count = min(rows_a_pass, m.end - first);
        const int first_tile = (first - m.begin) * m.chunks;
        const bool writes = mine < count && r < b.batch();
        float value = writes && bias != nullptr ? to_float(bias[first + mine]) : 0.0f;
        for (; tile < first_tile + count * m.chunks; tile += b.warps) {
            const half* weights = ring.wait();
            const int column = tile % m.chunks * b.plan.stage, halves = min(b.plan.stage, m.ld - column);
            float sums[ROWS][2] = {};
            if (b.p.work == PersistentWork::kAll) {
#pragma unroll kUnroll
                for (int i = lane_id() * 8; i < halves; i += kWarp * 8) {
                    float w[8];
                    unpack8(load16(weights + i), w);
#pragma unroll
                    for (int row = 0; row < ROWS; ++row) {
                        float y[8];
                        unpack8(load16(b.rows() + row * b.plan.ld_rows + column + i), y);
#pragma unroll
                        for (int j = 0; j < 8; ++j) sums[row][j % 2] += w[j] * y[j];
                    }
                }
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const float sum = warp_sum(sums[row][0] + sums[row][1]);
                if (lane_id() == row) b.scratch()[(tile - first_tile) * ROWS + row] = sum;
            }
            ring.release();
        }
        sync_block();
        if (b.p.work != PersistentWork::kAll) continue;
        for (int i = 0; writes && i < m.chunks; ++i) value += b.scratch()[(mine * m.chunks + i) * ROWS + r];
        value = place(r, first + mine, value);
        if (writes) write(r, first + mine, value);
    }
}

template <int ROWS, typename Ring, typename Write>
HR_DEVICE void product(const Block& b, Ring& ring, int index, const half* bias, Write write) {
    product<ROWS>(b, ring, index, bias, [](int, int, float value) { return value; }, write);
}

// Queries and keys turn where positions are rotary: the other number of a pair is ROWS lanes away.
template <int ROWS>
HR_DEVICE float in_position(const Block& b, const Layer& layer, int r, int row, float value) {
    const Rotary& rotary = b.p.rotary;
    if (rotary.dims == 0) return value;
    const float partner = warp_xor(value, ROWS);
    const int d = row % b.p.head_dim, turning = layer.query_width() + layer.cache.heads * b.p.head_dim;
    if (r >= b.batch() || row >= turning || d >= rotary.dims) return value;
    return turned(rotary_angle(rotary, b.state().position[r], d), d, value, partner);
}

// Queries for all to see, keys and values into the cache.
HR_DEVICE void write_qkv(const Block& b, const Layer& layer, int r, int row, float value) {
    const int q_width = layer.query_width(), position = b.state().position[r];
    if (row < q_width) {
        b.q()[r * q_width + row] = to_half(value);
    } else if (position < layer.cache.capacity) {
        *cache_place(layer.cache, b.p.head_dim, r, position, row - q_width) = to_half(value);
    }
}

// GELU's results into b.rows(), zeros in the padding and in rows past the batch.
template <int ROWS>
HR_DEVICE void load_inner(const Block& b) {
    const int ld = b.p.ld_inner;
    for (int i = b.thread * 8; i < ROWS * ld; i += b.threads * 8) {
        const int r = i / ld, column = i % ld;
        const uint4 v = r < b.batch() ? load16_across_blocks(b.inner() + i) : make_uint4(0, 0, 0, 0);
        uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (column + 2 * j >= b.p.inner) words[j] = 0;
            if (column + 2 * j + 1 == b.p.inner) words[j] &= 0xffffu;
        }
        store16(b.rows() + r * b.plan.ld_rows + column, make_uint4(words[0], words[1], words[2], words[3]));
    }
    sync_block();
}

template <int ROWS>
HR_KERNEL void HR_LAUNCH_BOUNDS(kMaxThreads, 1) decode_kernel(Plan plan) {
    HR_SHARED(unsigned char, shared);
    const Block b(plan, shared);
    const PersistentDecode& p = plan.p;
    unsigned* counters = static_cast<unsigned*>(p.workspace);
    unsigned round = 0;
    const bool all_work = p.work == PersistentWork::kAll;
    const auto stamp = [&](unsigned place) {
        if (p.stamps == nullptr || b.thread != 0) return;
        p.stamps[static_cast<int64_t>(blockIdx.x) * p.stamps_each + place] = global_nanoseconds();
    };
    const auto meet = [&] {
        stamp(2 * round + 1);
        grid_barrier(counters, ++round);
        stamp(2 * round);
    };
    stamp(0);

    const auto* table = reinterpret_cast<const uint32_t*>(p.layers);
    const int words = p.layer_count * static_cast<int>(sizeof(Layer) / sizeof(uint32_t));
    for (int i = b.thread; i < words; i += b.threads) reinterpret_cast<uint32_t*>(shared + plan.table)[i] = table[i];
    if (b.thread < b.batch()) {
        b.state().token[b.thread] = p.state.tokens[b.thread];
        b.state().position[b.thread] = p.state.position[b.thread];
        b.state().step[b.thread] = p.greedy ? p.state.step[b.thread] : 0;
        b.state().finished[b.thread] = p.greedy ? p.state.finished[b.thread] : 0;
    }
    sync_block();
    b.make_matrices();
    half* stages = reinterpret_cast<half*>(shared + plan.ring) + warp_id() * plan.depth * plan.stage;
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + plan.full) + warp_id() * plan.depth;
    WeightRing<Block> ring(b, kLinears * p.layer_count + 1, p.work == PersistentWork::kBarriers ? 0 : plan.steps, stages, full,
                           plan.depth, plan.stage);

    const int own_begin = first_row(p.width, blockIdx.x);
    const auto add = [&](int r, int column, float value) {
        float& sum = b.own()[r * plan.own_columns + column - own_begin];
        sum += value;
        b.x()[static_cast<int64_t>(r) * p.ld_width + column] = sum;
    };
    Norm norm(b, b.layer(0).ln1_gain, b.layer(0).ln1_bias);
    for (int step = 0; step < plan.steps; ++step) {
        if (all_work) embed_own<ROWS>(b);
        for (int index = 0; index < p.layer_count; ++index) {
            const Layer& layer = b.layer(index);
            if (all_work) normalise<ROWS>(b, norm, index == 0);
            product<ROWS>(
                b, ring, kLinears * index + kQkv, layer.linear[kQkv].bias,
                [&](int r, int row, float value) { return in_position<ROWS>(b, layer, r, row, value); },
                [&](int r, int row, float value) { write_qkv(b, layer, r, row, value); });
            meet();
            if (all_work) {
                if (p.head_dim == 32) attend<32>(b, layer);
                if (p.head_dim == 64) attend<64>(b, layer);
                if (p.head_dim == 128) attend<128>(b, layer);
            }
            meet();
            if (all_work) merge_attention<ROWS>(b, layer);
            product<ROWS>(b, ring, kLinears * index + kOut, layer.linear[kOut].bias, add);
            norm = Norm(b, layer.ln2_gain, layer.ln2_bias);
            meet();
            if (all_work) normalise<ROWS>(b, norm, false);
            product<ROWS>(b, ring, kLinears * index + kFc, layer.linear[kFc].bias, [&](int r, int row, float value) {
                b.inner()[static_cast<int64_t>(r) * p.ld_inner + row] = to_half(gelu_tanh(value));
            });
            meet();
            if (all_work) load_inner<ROWS>(b);
            product<ROWS>(b, ring, kLinears * index + kProj, layer.linear[kProj].bias, add);
            const bool last = index + 1 == p.layer_count;
            const Layer& next = b.layer(last ? index : index + 1);
            norm = Norm(b, last ? p.lnf_gain : next.ln1_gain, last ? p.lnf_bias : next.ln1_bias);
            meet();
        }
        if (all_work) normalise<ROWS>(b, norm, false);
        Best best;
        product<ROWS>(b, ring, kLinears * p.layer_count, nullptr, [&](int r, int row, float value) {
            p.logits[static_cast<int64_t>(r) * p.ld_logits + row] = value;
            best.offer(value, row);
        });
        if (!p.greedy) break;  // then there is one step
        if (all_work) nominate<ROWS>(b, best);
        norm = Norm(b, b.layer(0).ln1_gain, b.layer(0).ln1_bias);
        meet();
        if (!all_work) continue;
        pick(b);
        bool over = true;
        for (int r = 0; r < b.batch(); ++r) over = over && b.state().finished[r] != 0;
        if (over) break;
    }
    ring.drain();
    stamp(2 * round + 1);
    // Nobody is in a barrier any more once all are here: the last one readies the counters for the next launch.
    if (b.thread == 0 && atomic_add(counters + 1, 1u) + 1 == gridDim.x) counters[0] = counters[1] = 0;
}

auto* kernel_for(int batch) {
    return batch == 1 ? decode_kernel<1> : batch == 2 ? decode_kernel<2> : decode_kernel<kPersistentBatch>;
}

}  // namespace

int persistent_stamps(const PersistentDecode& what, int steps) {
    const int barriers = 5 * what.layer_count + (what.greedy ? 1 : 0);
    return 2 * steps * barriers + 2;
}

size_t persistent_workspace_bytes(const PersistentDecode& what) {
    return Plan(what, 1).workspace_bytes;
}

int persistent_max_blocks(const PersistentDecode& what) {
    const Plan plan(what, 1);
    return plan.valid() ? cooperative_blocks(kernel_for(what.state.batch), what.threads, plan.shared_bytes) : 0;
}

int decode_persistent(const PersistentDecode& what, int steps, Stream stream) {
    const Plan plan(what, steps);
    if (!plan.valid() || what.blocks < 1 || steps < 1 || (steps > 1 && !what.greedy)) return kInvalid;
    if (what.stamps != nullptr && what.stamps_each < persistent_stamps(what, steps)) return kInvalid;
    Launch how{dim3(static_cast<unsigned>(what.blocks)), dim3(static_cast<unsigned>(what.threads)), plan.shared_bytes,
               stream};
    how.cooperative = true;
    return launch(how, kernel_for(what.state.batch), plan);
}

}  // namespace headroom
