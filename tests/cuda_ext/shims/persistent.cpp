// decode_persistent for ctypes: sizes and addresses as int64 [...], in the order in which they are read here.
#include "decode_persistent.h"

using namespace headroom;

namespace {

struct Reader {
    const int64_t* next;
    int number() { return static_cast<int>(*next++); }
    template <typename T = half>
    T* address() {
        return reinterpret_cast<T*>(*next++);
    }
};

// The table of layers is written to the memory that the numbers name for it.
PersistentDecode read(const int64_t* numbers, float epsilon) {
    Reader r{numbers};
    PersistentDecode p{};
    p.width = r.number(), p.inner = r.number(), p.vocabulary = r.number(), p.position_rows = r.number();
    p.rotary = {r.address<const float2>(), r.number(), r.number()};
    p.head_dim = r.number(), p.ld_width = r.number(), p.ld_inner = r.number();
    p.epsilon = epsilon;
    p.wte = r.address(), p.wpe = r.address(), p.lnf_gain = r.address(), p.lnf_bias = r.address();
    Advance& s = p.state;
    s.batch = r.number(), s.capacity = r.number();
    s.tokens = r.address<int>(), s.position = r.address<int>(), s.lengths = r.address<int>(), s.step = r.address<int>();
    s.finished = r.address<int>(), s.history = r.address<int>(), s.history_capacity = r.number();
    s.how = r.address<Sampling>();
    p.greedy = r.number() != 0;
    p.logits = r.address<float>(), p.ld_logits = r.number(), p.workspace = r.address<void>();
    p.blocks = r.number(), p.threads = r.number(), p.splits = r.number();
    p.shared_bytes = static_cast<size_t>(r.number());
    p.work = static_cast<PersistentWork>(r.number());
    p.stamps = r.address<uint64_t>(), p.stamps_each = r.number();
    Layer* const layers = r.address<Layer>();
    p.layers = layers, p.layer_count = r.number();
    for (int i = 0; i < p.layer_count; ++i) {
        Layer& layer = layers[i] = {};
        const int heads = r.number(), kv_heads = r.number();
        const Queries queries{heads, r.address<const int>(), r.number()};
        Linear* const linear = layer.linear;
        for (const half** part :
             {&layer.ln1_gain, &layer.ln1_bias, &linear[kQkv].weight, &linear[kQkv].bias, &linear[kOut].weight,
              &linear[kOut].bias, &layer.ln2_gain, &layer.ln2_bias, &linear[kFc].weight, &linear[kFc].bias,
              &linear[kProj].weight, &linear[kProj].bias})
            *part = r.address();
        half* k = r.address();
        const KvCache cache{k, r.address(), kv_heads, s.capacity, p.head_dim};
        layer.set_sizes(queries, cache, p.width, p.inner, p.ld_width, p.ld_inner);
        if (heads > p.most_heads) p.most_heads = heads;
    }
    return p;
}

}  // namespace

extern "C" {

int64_t hr_test_persistent_layer_bytes() { return sizeof(Layer); }

int hr_test_persistent(const int64_t* numbers, float epsilon, int steps) {
    return decode_persistent(read(numbers, epsilon), steps, nullptr);
}

int64_t hr_test_persistent_workspace(const int64_t* numbers) {
    return static_cast<int64_t>(persistent_workspace_bytes(read(numbers, 0.0f)));
}

int hr_test_persistent_max_blocks(const int64_t* numbers) {
    return persistent_max_blocks(read(numbers, 0.0f));
}
}
