#include "model.h"

#include <algorithm>

namespace headroom {
namespace {

constexpr int kMaxSplits = 64;
constexpr size_t kSharedAlways = 48 * 1024;  // what a block gets without asking

int most_heads(const Model& model) {
    int most = 0;
    for (const Layer& layer : model.layers) most = std::max(most, layer.queries.heads);
    return most;
}

// The parts of the workspace, each 256-byte aligned. Where a part lies depends on `batch` and `length`: what one call
// left there is another part to the next, so nothing may be expected to be there still.
struct Workspace {
    float* x;          // the residual stream [rows, ld_width]
    half* normal;      // after LayerNorm [rows, ld_width]
    half* qkv;         // [rows, (heads + 2 * key/value heads) * head_dim]; in decode, q alone
    half* attention;   // [rows, heads * head_dim]
    half* inner;       // [rows, ld_inner]
    float* partial;    // of split attention
    unsigned char* scratch;  // of cuBLASLt
    size_t bytes;

    Workspace(const Model& model, void* base, int batch, int length) {
        const size_t rows = static_cast<size_t>(batch) * length, heads = most_heads(model);
        auto* next = static_cast<unsigned char*>(base);
        auto carve = [&](auto*& part, size_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
            next += round_up<size_t>(count * sizeof(*part), 256);
        };
        carve(x, rows * model.ld_width);
        carve(normal, rows * model.ld_width);
        carve(qkv, rows * 3 * heads * model.head_dim);  // as many key/value heads at most
        carve(attention, rows * heads * model.head_dim);
        carve(inner, rows * model.ld_inner);
        carve(partial, static_cast<size_t>(batch) * heads * kMaxSplits * (model.head_dim + 2));
        carve(scratch, cublaslt_is_there() ? kCublasLtBytes : 0);
        bytes = static_cast<size_t>(next - static_cast<unsigned char*>(base));
    }
};

// Runs launches one after the other and keeps the first error.
struct Sequence {
    int error = 0;
    void operator()(int result) { error = error != 0 ? error : result; }
};

Way way_for(const Model& model, const Gemm& p) {
    for (const Choice& c : model.choices) {
        const bool same = c.n == p.n && c.k == p.k && c.epilogue == p.epilogue;
        if (same && p.m <= c.rows && c.rows < 2 * p.m) return c.way;
    }
    return {variant_for(p.m, p.n), {}};
}

int multiply(const Model& model, const Workspace& w, const half* a, int ld_a, const half* weight, int ld_weight,
             const half* bias, void* out, int ld_out, int m, int n, int k, Epilogue epilogue, Stream stream) {
    const Gemm problem{a, weight, bias, static_cast<half*>(out), static_cast<float*>(out), m, n, k, ld_a, ld_weight, ld_out,
                       epilogue};
    const int error = product(problem, way_for(model, problem), w.scratch, stream);
    // A refusal leaves `out` as it was, so that our own tile can take over.
    return error == kCublasLtCannot ? gemm(problem, variant_for(m, n), stream) : error;
}

// A layer's feed-forward half, for many rows.
int feed_forward(const Model& model, const Layer& layer, const Workspace& w, int rows, Stream stream) {
    Sequence run;
    run(layer_norm(w.x, nullptr, layer.ln2_gain, layer.ln2_bias, w.normal, rows, model.width, model.ld_width,
                   model.ld_width, model.epsilon, stream));
    run(multiply(model, w, w.normal, model.ld_width, layer.linear[kFc].weight, model.ld_width, layer.linear[kFc].bias, w.inner,
                 model.ld_inner, rows, model.inner, model.width, Epilogue::kGelu, stream));
    run(multiply(model, w, w.inner, model.ld_inner, layer.linear[kProj].weight, model.ld_inner, layer.linear[kProj].bias, w.x,
                 model.ld_width, rows, model.width, model.inner, Epilogue::kResidual, stream));
    return run.error;
}

// Queries, keys and values of many rows, the latter into the cache.
int project(const Model& model, const Layer& layer, const Workspace& w, const int* start, const int* lengths, int batch,
            int length, Stream stream) {
    const int rows = batch * length, width = layer.qkv_width();
    Sequence run;
    run(layer_norm(w.x, nullptr, layer.ln1_gain, layer.ln1_bias, w.normal, rows, model.width, model.ld_width,
                   model.ld_width, model.epsilon, stream));
    run(multiply(model, w, w.normal, model.ld_width, layer.linear[kQkv].weight, model.ld_width, layer.linear[kQkv].bias, w.qkv, width, rows,
                 width, model.width, Epilogue::kHalf, stream));
    run(kv_append(w.qkv, width, layer.queries.heads, layer.cache, model.rotary, start, lengths, batch, length, stream));
    return run.error;
}

int add_attention(const Model& model, const Layer& layer, const Workspace& w, int rows, Stream stream) {
    const int all = layer.query_width();
    return multiply(model, w, w.attention, all, layer.linear[kOut].weight, all, layer.linear[kOut].bias, w.x, model.ld_width, rows,
                    model.width, all, Epilogue::kResidual, stream);
}

// LayerNorm and LM head of the rows that `rows` lists, or of the first `count`.
int head(const Model& model, const Workspace& w, const int* rows, int count, float* logits, int ld_logits,
         Stream stream) {
    if (count == 0) return 0;  // a chunk in which no sequence ends
    Sequence run;
    run(layer_norm(w.x, rows, model.lnf_gain, model.lnf_bias, w.normal, count, model.width, model.ld_width,
                   model.ld_width, model.epsilon, stream));
    run(multiply(model, w, w.normal, model.ld_width, model.wte, model.ld_width, nullptr, logits, ld_logits, count,
                 model.vocabulary, model.width, Epilogue::kFloat, stream));
    return run.error;
}

int decode_rows(const Model& model, const Workspace& w, unsigned* counters, const int* position, const int* lengths,
                int batch, int splits, float* logits, int ld_logits, bool dependent, Stream stream) {
    Sequence run;
    Matvec base{};
    base.x = w.x, base.ld_x = model.ld_width, base.epsilon = model.epsilon, base.rows = batch;
    const auto from_residual = [&](const half* gain, const half* shift, const half* weight, const half* bias, int n) {
        Matvec p = base;
        p.gain = gain, p.shift = shift, p.weight = weight, p.bias = bias, p.n = n, p.k = model.width;
        p.ld_weight = model.ld_width;
        return p;
    };
    const auto to_residual = [&](const half* x, int ld_x, const half* weight, const half* bias, int k) {
        Matvec p = base;
        p.x_half = x, p.ld_x = ld_x, p.weight = weight, p.bias = bias, p.n = model.width, p.k = k, p.ld_weight = ld_x;
        p.out = MatvecOut::kResidual, p.out_float = w.x, p.ld_out = model.ld_width;
        run(matvec(p, dependent, stream));
    };
    for (const Layer& layer : model.layers) {
        const int all = layer.query_width();
        Matvec qkv =
            from_residual(layer.ln1_gain, layer.ln1_bias, layer.linear[kQkv].weight, layer.linear[kQkv].bias, layer.qkv_width());
        qkv.out = MatvecOut::kQkv, qkv.out_half = w.qkv, qkv.ld_out = all, qkv.heads = layer.queries.heads;
        qkv.cache = layer.cache, qkv.rotary = model.rotary, qkv.position = position;
        run(matvec(qkv, dependent, stream));
        run(attention_decode(w.qkv, all, layer.queries, layer.cache, lengths, w.attention, all, batch, splits, w.partial,
                             counters, dependent, stream));
        to_residual(w.attention, all, layer.linear[kOut].weight, layer.linear[kOut].bias, all);
        Matvec fc = from_residual(layer.ln2_gain, layer.ln2_bias, layer.linear[kFc].weight, layer.linear[kFc].bias, model.inner);
        fc.out = MatvecOut::kGelu, fc.out_half = w.inner, fc.ld_out = model.ld_inner;
        run(matvec(fc, dependent, stream));
        to_residual(w.inner, model.ld_inner, layer.linear[kProj].weight, layer.linear[kProj].bias, model.inner);
    }
    Matvec last = from_residual(model.lnf_gain, model.lnf_bias, model.wte, nullptr, model.vocabulary);
    last.out = MatvecOut::kFloat, last.out_float = logits, last.ld_out = ld_logits;
    run(matvec(last, dependent, stream));
    return run.error;
}

}  // namespace

size_t workspace_bytes(const Model& model, int batch, int length) {
    return Workspace(model, nullptr, batch, length).bytes;
}

int prefill(const Model& model, void* workspace, const int* tokens, const int* start, const int* lengths,
            const int* rows, int row_count, int batch, int length, float* logits, int ld_logits, Stream stream) {
    const Workspace w(model, workspace, batch, length);
    Sequence run;
    run(embed(tokens, start, model.wte, model.wpe, w.x, batch, length, model.position_rows, model.ld_width, stream));
    for (const Layer& layer : model.layers) {
        run(project(model, layer, w, start, lengths, batch, length, stream));
        run(attention_prefill(w.qkv, layer.qkv_width(), layer.queries, layer.cache, start, lengths, w.attention,
                              layer.query_width(), batch, length, stream));
        run(add_attention(model, layer, w, batch * length, stream));
        run(feed_forward(model, layer, w, batch * length, stream));
    }
    run(head(model, w, rows, row_count, logits, ld_logits, stream));
    return run.error;
}

int variant_for(int m, int n) {
    constexpr int kBlocks = 100;
    const auto blocks = [&](int bm, int bn) { return ceil_div(m, bm) * ceil_div(n, bn); };
    if (m <= 16) return 4;
    if (m <= 32) return n < 4096 ? 5 : 3;
    if (blocks(128, 128) >= kBlocks) return 0;
    if (blocks(128, 64) >= kBlocks) return 1;
    return 2;
}

size_t counter_count(const Model& model, int batch) { return static_cast<size_t>(batch) * most_heads(model); }

int decode(const Model& model, void* workspace, unsigned* counters, const int* tokens, const int* position,
           const int* lengths, int batch, int splits, float* logits, int ld_logits, bool dependent, Stream stream) {
#if defined(HEADROOM_HOST)
    if (std::any_of(counters, counters + counter_count(model, batch), [](unsigned count) { return count != 0; }))
        return kCountersNotZero;
#endif
    const Workspace w(model, workspace, batch, 1);
    splits = std::clamp(splits, 1, kMaxSplits);
    Sequence run;
    run(embed(tokens, position, model.wte, model.wpe, w.x, batch, 1, model.position_rows, model.ld_width, stream));
    if (batch <= kMatvecRows && matvec_shared_bytes(batch, model.width) <= kSharedAlways) {
        run(decode_rows(model, w, counters, position, lengths, batch, splits, logits, ld_logits, dependent, stream));
        return run.error;
    }
    for (const Layer& layer : model.layers) {
        run(project(model, layer, w, position, nullptr, batch, 1, stream));
        run(attention_decode(w.qkv, layer.qkv_width(), layer.queries, layer.cache, lengths, w.attention,
                             layer.query_width(), batch, splits, w.partial, counters, false, stream));
        run(add_attention(model, layer, w, batch, stream));
        run(feed_forward(model, layer, w, batch, stream));
    }
    run(head(model, w, nullptr, batch, logits, ld_logits, stream));
    return run.error;
}

}  // namespace headroom
