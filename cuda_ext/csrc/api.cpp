#include "api.h"

#include <algorithm>
#include <cstring>

#include "decode_persistent.h"

using namespace headroom;

namespace {

// Reads the table's numbers one after the other; cuda_ext/packing.py writes them in this order.
struct Reader {
    const int64_t* next;
    int number() { return static_cast<int>(*next++); }
    half* address() { return reinterpret_cast<half*>(*next++); }
};

Model read(const int64_t* table) {
    Reader r{table};
    Model m{};
    const int layers = r.number();
    m.width = r.number(), m.inner = r.number(), m.vocabulary = r.number(), m.context = r.number();
    m.head_dim = r.number(), m.ld_width = r.number(), m.ld_inner = r.number();
    const int32_t epsilon = r.number();
    std::memcpy(&m.epsilon, &epsilon, sizeof(float));
    const int capacity = r.number();
    m.wte = r.address(), m.wpe = r.address(), m.lnf_gain = r.address(), m.lnf_bias = r.address();
    for (int i = 0; i < layers; ++i) {
        Layer layer{};
        layer.heads = r.number();
        for (const half** part : {&layer.ln1_gain, &layer.ln1_bias, &layer.qkv_weight, &layer.qkv_bias, &layer.out_weight,
                                  &layer.out_bias, &layer.ln2_gain, &layer.ln2_bias, &layer.fc_weight, &layer.fc_bias,
                                  &layer.proj_weight, &layer.proj_bias})
            *part = r.address();
        half* k = r.address();
        layer.cache = {k, r.address(), layer.heads, capacity, m.head_dim};
        m.layers.push_back(layer);
    }
    for (int64_t left = *r.next++; left > 0; --left) {
        Choice choice{};
        choice.rows = r.number(), choice.n = r.number(), choice.k = r.number();
        choice.epilogue = static_cast<Epilogue>(r.number());
        choice.way = r.number();
        m.choices.push_back(choice);
    }
    return m;
}

PersistentDecode persistent(const Model& m, int batch, int blocks, int threads) {
    PersistentDecode p{};
    p.layer_count = static_cast<int>(m.layers.size());
    for (const Layer& layer : m.layers) p.most_heads = std::max(p.most_heads, layer.heads);
    p.width = m.width, p.inner = m.inner, p.vocabulary = m.vocabulary, p.context = m.context;
    p.head_dim = m.head_dim, p.ld_width = m.ld_width, p.ld_inner = m.ld_inner, p.epsilon = m.epsilon;
    p.wte = m.wte, p.wpe = m.wpe, p.lnf_gain = m.lnf_gain, p.lnf_bias = m.lnf_bias;
    p.state.batch = batch, p.state.capacity = m.layers.empty() ? 0 : m.layers[0].cache.capacity;
    p.blocks = blocks, p.threads = threads;
    return p;
}

Stream as_stream(void* stream) { return static_cast<Stream>(stream); }

}  // namespace

extern "C" {

int64_t hr_workspace_bytes(const int64_t* table, int batch, int length) {
    return static_cast<int64_t>(workspace_bytes(read(table), batch, length));
}

int hr_prefill(const int64_t* table, void* workspace, const int* tokens, const int* start, const int* lengths,
               const int* rows, int row_count, int batch, int length, float* logits, int ld_logits, void* stream) {
    return prefill(read(table), workspace, tokens, start, lengths, rows, row_count, batch, length, logits, ld_logits,
                   as_stream(stream));
}

int64_t hr_counters(const int64_t* table, int batch) {
    return static_cast<int64_t>(counter_count(read(table), batch));
}

int hr_decode(const int64_t* table, void* workspace, void* counters, const int* tokens, const int* position,
              const int* lengths, int batch, int splits, float* logits, int ld_logits, int dependent, void* stream) {
    return decode(read(table), workspace, static_cast<unsigned*>(counters), tokens, position, lengths, batch, splits,
                  logits, ld_logits, dependent != 0, as_stream(stream));
}

int hr_sample(const float* logits, int ld_logits, int vocabulary, int batch, float temperature, int top_k, float top_p,
              uint64_t seed, int* step, int* tokens, void* stream) {
    return sample(logits, ld_logits, vocabulary, batch, {temperature, top_k, top_p, seed}, step, tokens,
                  as_stream(stream));
}

int hr_advance(int* tokens, int* position, int* lengths, int* step, int* finished, int* history, const int* stop,
               int stop_count, int pad, int batch, int history_capacity, int capacity, void* stream) {
    return advance({tokens, position, lengths, step, finished, history, stop, stop_count, pad, batch, history_capacity,
                    capacity},
                   as_stream(stream));
}

int hr_product(const void* a, int ld_a, const void* weight, int ld_weight, const void* bias, void* out, int ld_out, int m,
               int n, int k, int epilogue, int way, void* scratch, void* stream) {
    const auto* b = static_cast<const half*>(bias);
    return product({static_cast<const half*>(a), static_cast<const half*>(weight), b, static_cast<half*>(out),
                    static_cast<float*>(out), m, n, k, ld_a, ld_weight, ld_out, static_cast<Epilogue>(epilogue)},
                   way, scratch, as_stream(stream));
}

int hr_product_ways() { return product_ways(); }
const char* hr_product_way_name(int way) { return product_way_name(way); }
int64_t hr_product_scratch_bytes() { return cublaslt_is_there() ? kCublasLtBytes : 0; }

int64_t hr_layers(const int64_t* table, void* layers) {
    const Model model = read(table);
    const size_t bytes = model.layers.size() * sizeof(Layer);
    if (layers != nullptr) std::memcpy(layers, model.layers.data(), bytes);
    return static_cast<int64_t>(bytes);
}

int hr_persistent_blocks(const int64_t* table, int batch, int threads) {
    return persistent_max_blocks(persistent(read(table), batch, 1, threads));
}

int64_t hr_persistent_bytes(const int64_t* table, int blocks, int threads) {
    return static_cast<int64_t>(persistent_workspace_bytes(persistent(read(table), 1, blocks, threads)));
}

int hr_decode_persistent(const int64_t* table, const void* layers, void* workspace, int* tokens, int* position,
                         int* lengths, int* step, int* finished, int* history, int history_capacity, const int* stop,
                         int stop_count, int pad, int batch, int greedy, int steps, float* logits, int ld_logits,
                         int blocks, int threads, int work, uint64_t* stamps, int stamps_each, void* stream) {
    PersistentDecode p = persistent(read(table), batch, blocks, threads);
    p.layers = static_cast<const Layer*>(layers), p.workspace = workspace;
    p.state = {tokens, position, lengths, step, finished, history, stop, stop_count, pad, batch, history_capacity,
               p.state.capacity};
    p.greedy = greedy != 0, p.logits = logits, p.ld_logits = ld_logits;
    p.work = static_cast<PersistentWork>(work), p.stamps = stamps, p.stamps_each = stamps_each;
    return decode_persistent(p, steps, as_stream(stream));
}

const char* hr_error_text(int code) {
    if (code == kCublasLtCannot) return "cuBLASLt refused the product";
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return code == 0 ? "no error" : "see hr_host_error";
#endif
}
}
