#include "api.h"

#include <algorithm>
#include <cstring>

#include "decode_persistent.h"

using namespace headroom;

namespace {

// As cuda_ext/packing.py: LAYOUT. It goes up by one with every change of what the table holds.
constexpr int64_t kLayout = 2;

// Reads the table's numbers one after the other; cuda_ext/packing.py writes them in this order, their count first.
struct Reader {
    const int64_t* next;
    const int64_t* end;
    bool good;

    explicit Reader(const int64_t* table) : next(table + 2), end(table + table[1]), good(table[0] == kLayout) {}

    int64_t take() {
        if (!good || next == end) {
            good = false;
            return 0;
        }
        return *next++;
    }
    int number() { return static_cast<int>(take()); }
    half* address() {  // kernels load 16 bytes from there
        const int64_t address = take();
        good = good && address % 16 == 0;
        return reinterpret_cast<half*>(address);
    }
    bool whole() const { return good && next == end; }
};

// False where the table is not what this library reads.
bool read(const int64_t* table, Model& m) {
    Reader r{table};
    const int layers = r.number();
    m.width = r.number(), m.inner = r.number(), m.vocabulary = r.number(), m.position_rows = r.number();
    m.head_dim = r.number(), m.rotary.dims = r.number(), m.rotary.positions = r.number();
    m.ld_width = r.number(), m.ld_inner = r.number();
    const int32_t epsilon = r.number();
    std::memcpy(&m.epsilon, &epsilon, sizeof(float));
    const int capacity = r.number();
    m.rotary.angles = reinterpret_cast<const float2*>(r.address());
    m.wte = r.address(), m.wpe = r.address(), m.lnf_gain = r.address(), m.lnf_bias = r.address();
    for (int i = 0; i < layers && r.good; ++i) {
        Layer layer{};
        const int heads = r.number(), kv_heads = r.number(), window = r.number();
        const Queries queries{heads, reinterpret_cast<const int*>(r.address()), window};
        Linear* const linear = layer.linear;
        for (const half** part :
             {&layer.ln1_gain, &layer.ln1_bias, &linear[kQkv].weight, &linear[kQkv].bias, &linear[kOut].weight,
              &linear[kOut].bias, &layer.ln2_gain, &layer.ln2_bias, &linear[kFc].weight, &linear[kFc].bias,
              &linear[kProj].weight, &linear[kProj].bias})
            *part = r.address();
        half* k = r.address();
        const KvCache cache{k, r.address(), kv_heads, capacity, m.head_dim};
        layer.set_sizes(queries, cache, m.width, m.inner, m.ld_width, m.ld_inner);
        m.layers.push_back(layer);
    }
    for (int64_t left = r.take(); left > 0 && r.good; --left) {
        Choice choice{};
        choice.rows = r.number(), choice.n = r.number(), choice.k = r.number();
        choice.epilogue = static_cast<Epilogue>(r.number());
        choice.way.variant = r.number();
        for (uint64_t& word : choice.way.algorithm.words) word = static_cast<uint64_t>(r.take());
        m.choices.push_back(choice);
    }
    // What kernels expect of rows: they begin at 16-byte addresses, and no column is there that nobody writes.
    return r.whole() && m.ld_width == round_up(m.width, 8) && m.ld_inner == round_up(m.inner, 8);
}

// `use(model)`, or kBadTable.
template <typename Use>
auto with(const int64_t* table, Use use) -> decltype(use(Model{})) {
    Model model{};
    return read(table, model) ? use(model) : kBadTable;
}

// The same with calls going to `device`, or the CUDA error where it is not there.
template <typename Use>
int with(const int64_t* table, int device, Use use) {
    const DeviceGuard guard(device);
    return guard.error != 0 ? guard.error : with(table, use);
}

PersistentDecode persistent(const Model& m, int batch, int blocks, int threads) {
    PersistentDecode p{};
    p.layer_count = static_cast<int>(m.layers.size());
    for (const Layer& layer : m.layers) p.most_heads = std::max(p.most_heads, layer.queries.heads);
    p.width = m.width, p.inner = m.inner, p.vocabulary = m.vocabulary, p.position_rows = m.position_rows;
    p.head_dim = m.head_dim, p.rotary = m.rotary, p.ld_width = m.ld_width, p.ld_inner = m.ld_inner, p.epsilon = m.epsilon;
    p.wte = m.wte, p.wpe = m.wpe, p.lnf_gain = m.lnf_gain, p.lnf_bias = m.lnf_bias;
    p.state.batch = batch, p.state.capacity = m.layers.empty() ? 0 : m.layers[0].cache.capacity;
    p.blocks = blocks, p.threads = threads;
    return p;
}

Stream as_stream(void* stream) { return static_cast<Stream>(stream); }

}  // namespace

extern "C" {

int64_t hr_workspace_bytes(const int64_t* table, int batch, int length) {
    return with(table, [&](const Model& m) { return static_cast<int64_t>(workspace_bytes(m, batch, length)); });
}

int hr_prefill(const int64_t* table, void* workspace, const int* tokens, const int* start, const int* lengths,
               const int* rows, int row_count, int batch, int length, float* logits, int ld_logits, int device,
               void* stream) {
    return with(table, device, [&](const Model& m) {
        return prefill(m, workspace, tokens, start, lengths, rows, row_count, batch, length, logits, ld_logits,
                       as_stream(stream));
    });
}

int64_t hr_counters(const int64_t* table, int batch) {
    return with(table, [&](const Model& m) { return static_cast<int64_t>(counter_count(m, batch)); });
}

int hr_decode(const int64_t* table, void* workspace, void* counters, const int* tokens, const int* position,
              const int* lengths, int batch, int splits, float* logits, int ld_logits, int dependent, int device,
              void* stream) {
    return with(table, device, [&](const Model& m) {
        return decode(m, workspace, static_cast<unsigned*>(counters), tokens, position, lengths, batch, splits, logits,
                      ld_logits, dependent != 0, as_stream(stream));
    });
}

int hr_sample(const float* logits, int ld_logits, int vocabulary, int batch, const void* how, int* step, int* tokens,
              int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error != 0) return guard.error;
    return sample(logits, ld_logits, vocabulary, batch, static_cast<const Sampling*>(how), step, tokens,
                  as_stream(stream));
}

int hr_advance(int* tokens, int* position, int* lengths, int* step, int* finished, int* history, const void* how,
               int batch, int history_capacity, int capacity, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error != 0) return guard.error;
    return advance({tokens, position, lengths, step, finished, history, static_cast<const Sampling*>(how), batch,
                    history_capacity, capacity},
                   as_stream(stream));
}

int hr_product(const void* a, int ld_a, const void* weight, int ld_weight, const void* bias, void* out, int ld_out, int m,
               int n, int k, int epilogue, int variant, const uint64_t* algorithm, void* scratch, int device,
               void* stream) {
    const DeviceGuard guard(device);
    if (guard.error != 0) return guard.error;
    Way way{variant, {}};
    std::copy_n(algorithm, algorithm != nullptr ? kAlgorithmWords : 0, way.algorithm.words);
    const auto* b = static_cast<const half*>(bias);
    return product({static_cast<const half*>(a), static_cast<const half*>(weight), b, static_cast<half*>(out),
                    static_cast<float*>(out), m, n, k, ld_a, ld_weight, ld_out, static_cast<Epilogue>(epilogue)},
                   way, scratch, as_stream(stream));
}

int hr_product_variants() { return gemm_variants(); }
const char* hr_product_variant_name(int variant) { return gemm_variant_name(variant); }
int hr_product_variant_for(int m, int n) { return variant_for(m, n); }
int64_t hr_product_scratch_bytes() { return cublaslt_is_there() ? kCublasLtBytes : 0; }
int64_t hr_cublaslt_version() { return cublaslt_version(); }

int hr_cublaslt_algorithms(int m, int n, int k, int ld_a, int ld_weight, int ld_out, int epilogue, const void* bias,
                           int fewest_rows, uint64_t* found, int most, int device) {
    const DeviceGuard guard(device);
    if (guard.error != 0) return 0;
    Gemm problem{};
    problem.m = m, problem.n = n, problem.k = k;
    problem.ld_a = ld_a, problem.ld_weight = ld_weight, problem.ld_out = ld_out;
    problem.epilogue = static_cast<Epilogue>(epilogue), problem.bias = static_cast<const half*>(bias);
    return cublaslt_algorithms(problem, fewest_rows, reinterpret_cast<Algorithm*>(found), most);
}

int64_t hr_layers(const int64_t* table, void* layers) {
    return with(table, [&](const Model& m) {
        const size_t bytes = m.layers.size() * sizeof(Layer);
        if (layers != nullptr) std::memcpy(layers, m.layers.data(), bytes);
        return static_cast<int64_t>(bytes);
    });
}

int hr_persistent_blocks(const int64_t* table, int batch, int threads, int device) {
    return with(table, device,
                [&](const Model& m) { return persistent_max_blocks(persistent(m, batch, 1, threads)); });
}

int64_t hr_persistent_bytes(const int64_t* table, int blocks, int threads) {
    return with(table, [&](const Model& m) {
        return static_cast<int64_t>(persistent_workspace_bytes(persistent(m, 1, blocks, threads)));
    });
}

int hr_decode_persistent(const int64_t* table, const void* layers, void* workspace, int* tokens, int* position,
                         int* lengths, int* step, int* finished, int* history, int history_capacity, const void* how,
                         int batch, int greedy, int steps, float* logits, int ld_logits, int blocks, int threads,
                         int work, uint64_t* stamps, int stamps_each, int device, void* stream) {
    return with(table, device, [&](const Model& m) {
        PersistentDecode p = persistent(m, batch, blocks, threads);
        p.layers = static_cast<const Layer*>(layers), p.workspace = workspace;
        p.state = {tokens, position, lengths, step, finished, history, static_cast<const Sampling*>(how), batch,
                   history_capacity, p.state.capacity};
        p.greedy = greedy != 0, p.logits = logits, p.ld_logits = ld_logits;
        p.work = static_cast<PersistentWork>(work), p.stamps = stamps, p.stamps_each = stamps_each;
        return decode_persistent(p, steps, as_stream(stream));
    });
}

const char* hr_error_text(int code) {
    if (code == kCublasLtCannot) return "cuBLASLt refused the product";
    if (code == kNoVariant) return "our products have no such variant";
    if (code == kBadTable) return "the table of sizes and addresses is not of this library's layout";
    if (code == kCountersNotZero) return "counters of an earlier launch are not zero";
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return code == 0 ? "no error" : "see hr_host_error";
#endif
}
}
