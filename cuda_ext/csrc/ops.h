// Every operation of the forward pass: one launcher each, in kernels/*.cu, on raw device pointers.
//
// Each returns 0, or the CUDA error of its launch. `half` is FP16; the residual stream is FP32, and so is
// every sum and statistic. All matrices are row-major. Weights are [out, in], 16-byte aligned, the input
// width padded with zeros to a multiple of 8 where it is odd ("ld" below: elements from row to row).
// Nothing here allocates, synchronises or reads the device: a launcher may be captured in a CUDA graph.
#pragma once

#include "device.h"

namespace headroom {

// x[b,t,:] = wte[tokens[b,t],:] + wpe[start[b]+t,:]; [batch, length] int32 to FP32. Rows of x, wte and wpe are `ld`
// apart. Positions past the table's `rows` take its last one: padding on the right, and, of rotary models, all positions
// the one row of zeros.
int embed(const int* tokens, const int* start, const half* wte, const half* wpe, float* x, int batch, int length,
          int rows, int ld, Stream stream);

// LayerNorm of FP32 rows to FP16: statistics in FP32. Columns width..ld_out-1 are written as zeros.
// rows == nullptr: row i of out is of row i of x; else of row rows[i].
int layer_norm(const float* x, const int* rows, const half* gain, const half* bias, half* out, int count, int width,
               int ld_x, int ld_out, float epsilon, Stream stream);

// ---- matrix products for many rows (prefill, large batches) ----
enum class Epilogue { kHalf, kGelu, kResidual, kFloat };
struct Gemm {
    const half* a;          // [m, k], rows ld_a apart
    const half* weight;     // [n, k], rows ld_weight apart
    const half* bias;       // [n] or nullptr
    half* out_half;         // kHalf, kGelu: a weight^T + bias, through GELU; rows ld_out apart
    float* out_float;       // kResidual: is added to; kFloat: is written (logits)
    int m, n, k, ld_a, ld_weight, ld_out;
    Epilogue epilogue;
};
// Our tensor-core kernel. `variant`: index of a tile shape, 0 <= variant < gemm_variants().
int gemm(const Gemm& problem, int variant, Stream stream);
int gemm_variants();
const char* gemm_variant_name(int variant);

// x[row, column] += bias[column]; FP32 [m, n], rows ld apart.
int add_bias(const half* bias, float* x, int m, int n, int ld, Stream stream);

// ---- KV cache ----
// One layer: K then V, each [batch, heads, capacity, head_dim] FP16; `heads` are key/value heads.
struct KvCache {
    half* k;
    half* v;
    int heads, capacity, head_dim;
};
// Rotary positions (RoPE, Su et al. 2021): numbers 2i and 2i + 1 of a head, for 2i < dims, are a pair that turns by the angle
// whose cosine and sine are angles[position][i]; [positions, dims / 2]. Packing has laid pairs side by side.
struct Rotary {
    const float2* angles;
    int dims;       // 0: positions are not rotary
    int positions;  // later ones, of padding, take the last
};
// Which keys a layer's queries see.
struct Queries {
    int heads;
    const int* kv_head;  // [heads]: the key/value head that each reads (GQA, Ainslie et al. 2023); nullptr: its own
    int window;          // the last so many keys, the query's own among them (Beltagy et al. 2020); 0: all
};
// A row of qkv is q of all query heads, then k and v of all key/value heads: (heads + 2 * cache.heads) * head_dim.
// Append k and v of qkv [batch, length, ..] (rows ld_qkv apart) at start[b] .. start[b]+length-1; turn q, in place, and k.
// Rows t >= lengths[b] (padding on the right) are left out; lengths == nullptr: all count.
int kv_append(half* qkv, int ld_qkv, int heads, const KvCache& cache, const Rotary& rotary, const int* start,
              const int* lengths, int batch, int length, Stream stream);

// Causal flash attention of `length` new queries a sequence, over the cache (which holds their keys already):
// query t of sequence b sees keys 0 .. start[b]+t, the last `window` of them. out: [batch, length, heads*head_dim], rows
// ld_out apart. Tensor cores; FP32 running softmax (Dao et al. 2022). Rows t >= lengths[b] are unspecified but finite.
int attention_prefill(const half* qkv, int ld_qkv, const Queries& queries, const KvCache& cache, const int* start,
                      const int* lengths, half* out, int ld_out, int batch, int length, Stream stream);

// Split-KV attention of one query a sequence: sequence b sees keys 0 .. lengths[b]-1, the last `window` of them.
// q: [batch, heads*head_dim], rows ld_q apart. partial: FP32 [batch, heads, splits, head_dim + 2], the
// parts' sums, then maximum (of base-2 exponents) and denominator. The last block of a head to finish merges (counters:
// [batch, heads] unsigned, zero before and after).
int attention_decode(const half* q, int ld_q, const Queries& queries, const KvCache& cache, const int* lengths, half* out,
                     int ld_out, int batch, int splits, float* partial, unsigned* counters, bool dependent, Stream stream);

// ---- matrix-vector products for 1 to 8 rows (decode) ----
constexpr int kMatvecRows = 8;
enum class MatvecIn { kNorm, kHalf };  // x is FP32 and goes through LayerNorm on its way in; or is FP16
enum class MatvecOut { kQkv, kGelu, kResidual, kFloat };  // in: kHalf for kResidual, kNorm for the others
struct Matvec {
    const float* x;                // kNorm: [rows, k], rows ld_x apart
    const half* x_half;            // kHalf: the same, k padded with zeros to a multiple of 8
    int ld_x;
    const half* gain; const half* shift;  // kNorm
    float epsilon;
    const half* weight;            // [n, k], rows ld_weight apart
    const half* bias;              // [n] or nullptr
    int rows, n, k, ld_weight;
    MatvecOut out;
    half* out_half;                // kQkv: q, [rows, heads * head_dim]; kGelu: [rows, n]
    float* out_float;              // kResidual: is added to; kFloat: is written
    int ld_out;
    int heads;                     // kQkv: query heads; n is (heads + 2 * cache.heads) * head_dim
    KvCache cache;                 // kQkv: k and v go straight to position[row]
    Rotary rotary;                 // kQkv: turns q and k
    const int* position;           // kQkv: [rows]
};
int matvec(const Matvec& problem, bool dependent, Stream stream);
// Shared memory that a block takes at most for `rows` rows of `width` columns through LayerNorm.
size_t matvec_shared_bytes(int rows, int width);

// ---- sampling, on the device ----
// How tokens are drawn, and where a sequence ends. It lies in device memory, so that one captured launch serves every
// request. cuda_ext/sampling.py writes it.
constexpr int kStopTokens = 64;
struct Sampling {
    uint64_t seed;
    float temperature;  // 0: greedy
    int top_k;          // 0: all
    float top_p;        // 1: all
    int pad;            // what a finished sequence repeats
    int stop_count;
    int stop[kStopTokens];
};
static_assert(sizeof(Sampling) == 288 && alignof(Sampling) == 8, "cuda_ext/sampling.py packs it so");

// tokens[b] = drawn from logits[b, :vocabulary] (rows ld_logits apart). The draw depends on seed, row and
// step[b] alone (Philox 4x32-10, Salmon et al. 2011), not on the batch around it or the launch geometry.
// Then step[b] += 1 where step != nullptr. Ties: the lower token. Fastest where rows begin at 16-byte addresses.
int sample(const float* logits, int ld_logits, int vocabulary, int batch, const Sampling* how, int* step, int* tokens,
           Stream stream);

// What follows a sampled token, without the host: finished[b] |= token is one of how->stop; finished rows repeat
// how->pad; history[b, step] = token; position[b] += 1, lengths[b] += 1 (not where finished or at capacity).
struct Advance {
    int* tokens; int* position; int* lengths; int* step; int* finished; int* history;
    const Sampling* how; int batch; int history_capacity; int capacity;
};
int advance(const Advance& state, Stream stream);

}  // namespace headroom
