#include "api.h"

#include <cstring>

#include "model.h"

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
    return m;
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

int hr_decode(const int64_t* table, void* workspace, const int* tokens, const int* position, const int* lengths,
              int batch, int splits, float* logits, int ld_logits, int dependent, void* stream) {
    return decode(read(table), workspace, tokens, position, lengths, batch, splits, logits, ld_logits, dependent != 0,
                  as_stream(stream));
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

const char* hr_error_text(int code) {
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return code == 0 ? "no error" : "see hr_host_error";
#endif
}
}
