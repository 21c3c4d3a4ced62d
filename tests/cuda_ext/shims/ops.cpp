// ops.h's launchers with plain arguments, for ctypes. Streams are left out: the CPU has none.
#include "ops.h"

using namespace headroom;

extern "C" {

int hr_embed(const int* tokens, const int* start, const half* wte, const half* wpe, float* x, int batch, int length,
             int context, int ld) {
    return embed(tokens, start, wte, wpe, x, batch, length, context, ld, nullptr);
}

int hr_layer_norm(const float* x, const int* rows, const half* gain, const half* bias, half* out, int count, int width,
                  int ld_x, int ld_out, float epsilon) {
    return layer_norm(x, rows, gain, bias, out, count, width, ld_x, ld_out, epsilon, nullptr);
}

int hr_gemm_variants() { return gemm_variants(); }

int hr_gemm(const half* a, const half* weight, const half* bias, void* out, int m, int n, int k, int ld_a,
            int ld_weight, int ld_out, int epilogue, int variant) {
    const auto as = static_cast<Epilogue>(epilogue);
    return gemm({a, weight, bias, static_cast<half*>(out), static_cast<float*>(out), m, n, k, ld_a, ld_weight, ld_out, as},
                variant, nullptr);
}

int hr_add_bias(const half* bias, float* x, int m, int n, int ld) { return add_bias(bias, x, m, n, ld, nullptr); }

int hr_kv_append(half* qkv, int ld_qkv, int heads, half* k, half* v, int kv_heads, int capacity, int head_dim,
                 const float* angles, int dims, int positions, const int* start, const int* lengths, int batch,
                 int length) {
    return kv_append(qkv, ld_qkv, heads, {k, v, kv_heads, capacity, head_dim},
                     {reinterpret_cast<const float2*>(angles), dims, positions}, start, lengths, batch, length, nullptr);
}

int hr_attention_prefill(const half* qkv, int ld_qkv, int heads, const int* kv_head, int window, half* k, half* v,
                         int kv_heads, int capacity, int head_dim, const int* start, const int* lengths, half* out,
                         int ld_out, int batch, int length) {
    return attention_prefill(qkv, ld_qkv, {heads, kv_head, window}, {k, v, kv_heads, capacity, head_dim}, start, lengths,
                             out, ld_out, batch, length, nullptr);
}

int hr_attention_decode(const half* q, int ld_q, int heads, const int* kv_head, int window, half* k, half* v, int kv_heads,
                        int capacity, int head_dim, const int* lengths, half* out, int ld_out, int batch, int splits,
                        float* partial, unsigned* counters) {
    return attention_decode(q, ld_q, {heads, kv_head, window}, {k, v, kv_heads, capacity, head_dim}, lengths, out, ld_out,
                            batch, splits, partial, counters, false, nullptr);
}

int hr_matvec(const void* x, int ld_x, const half* gain, const half* shift, float epsilon, const half* weight,
              const half* bias, int rows, int n, int k, int ld_weight, int out_kind, void* out, int ld_out,
              int heads, half* cache_k, half* cache_v, int kv_heads, int capacity, int head_dim, const float* angles,
              int dims, int positions, const int* position) {
    Matvec p{};
    p.x = static_cast<const float*>(x);
    p.x_half = static_cast<const half*>(x);
    p.ld_x = ld_x;
    p.gain = gain, p.shift = shift, p.epsilon = epsilon;
    p.weight = weight, p.bias = bias;
    p.rows = rows, p.n = n, p.k = k, p.ld_weight = ld_weight;
    p.out = static_cast<MatvecOut>(out_kind);
    p.out_half = static_cast<half*>(out), p.out_float = static_cast<float*>(out), p.ld_out = ld_out;
    p.heads = heads, p.cache = {cache_k, cache_v, kv_heads, capacity, head_dim};
    p.rotary = {reinterpret_cast<const float2*>(angles), dims, positions};
    p.position = position;
    return matvec(p, false, nullptr);
}

int hr_sample(const float* logits, int ld_logits, int vocabulary, int batch, const Sampling* how, int* step,
              int* tokens) {
    return sample(logits, ld_logits, vocabulary, batch, how, step, tokens, nullptr);
}

int hr_advance(int* tokens, int* position, int* lengths, int* step, int* finished, int* history, const Sampling* how,
               int batch, int history_capacity, int capacity) {
    return advance({tokens, position, lengths, step, finished, history, how, batch, history_capacity, capacity},
                   nullptr);
}
}
