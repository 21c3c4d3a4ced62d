// A checkpoint on the device, and the forward pass over it: ops.h's operations in order.
#pragma once

#include <vector>

#include "product.h"

namespace headroom {

// A matrix [rows, ..], its rows ld apart, and its bias.
struct Linear {
    const half *weight, *bias;
    int rows, ld;
};
enum : int { kQkv, kOut, kFc, kProj, kLinears };  // a layer's, in the order of their use

struct Layer {
    const half *ln1_gain, *ln1_bias, *ln2_gain, *ln2_bias;
    Linear linear[kLinears];
    Queries queries;
    KvCache cache;

    // Numbers of a row of q, and of q, k and v together.
    HR_ANY int query_width() const { return linear[kOut].ld; }
    HR_ANY int qkv_width() const { return linear[kQkv].rows; }

    void set_sizes(const Queries& queries_, const KvCache& cache_, int width, int inner, int ld_width, int ld_inner) {
        queries = queries_, cache = cache_;
        const int q_width = queries.heads * cache.head_dim, kv_width = cache.heads * cache.head_dim;
        const int rows[kLinears] = {q_width + 2 * kv_width, width, inner, width};
        const int ld[kLinears] = {ld_width, q_width, ld_width, ld_inner};
        for (int i = 0; i < kLinears; ++i) linear[i].rows = rows[i], linear[i].ld = ld[i];
    }
};

// The way that was measured to be the fastest for products of rows / 2 + 1 to `rows` rows.
struct Choice {
    int rows, n, k;
    Epilogue epilogue;
    Way way;
};

constexpr int kBadTable = -2;         // of api.cpp: the table describes no model
constexpr int kCountersNotZero = -3;  // of `decode`, on the CPU, where it can look

struct Model {
    int width, inner, vocabulary, head_dim;
    int position_rows;  // of wpe: as many as positions, or one of zeros where they are rotary
    int ld_width, ld_inner;  // width and inner, rounded up to a multiple of 8: weights have zeros there
    float epsilon;
    Rotary rotary;
    const half *wte, *wpe, *lnf_gain, *lnf_bias;
    std::vector<Layer> layers;
    std::vector<Choice> choices;
};

// What a forward pass writes on its way, carved from one buffer. It may hold anything before a call, and does after.
size_t workspace_bytes(const Model& model, int batch, int length);

// New tokens [batch, length] behind start[b] cached ones; lengths[b] of them count, the rest is padding on the right.
// logits: FP32 [row_count], rows ld_logits apart, of the rows [batch * length] that `rows` lists, or of the first ones where
// it is null. row_count may be 0: a chunk of a prompt in which no sequence ends.
int prefill(const Model& model, void* workspace, const int* tokens, const int* start, const int* lengths,
            const int* rows, int row_count, int batch, int length, float* logits, int ld_logits, Stream stream);

// How many arrival counters split attention has: a buffer of its own, zero before each call of `decode` and after,
// which is checked on the CPU.
size_t counter_count(const Model& model, int batch);

// One token a sequence at position[b]; lengths[b] = position[b] + 1. logits: FP32 [batch, vocabulary].
// `splits`: over how many blocks a head's keys are spread. `dependent`: programmatic dependent launch (sm_90).
int decode(const Model& model, void* workspace, unsigned* counters, const int* tokens, const int* position,
           const int* lengths, int batch, int splits, float* logits, int ld_logits, bool dependent, Stream stream);

}  // namespace headroom
