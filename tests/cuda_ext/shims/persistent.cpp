// decode_persistent for ctypes: sizes and addresses as int64 [...], in the order in which they are read here.
#include "decode_persistent.h"

#include <vector>

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

// `layers` must stay where it is as long as the result is used.
PersistentDecode read(const int64_t* numbers, float epsilon, std::vector<Layer>& layers) {
    Reader r{numbers};
    PersistentDecode p{};
    p.width = r.number(), p.inner = r.number(), p.vocabulary = r.number(), p.context = r.number();
    p.head_dim = r.number(), p.ld_width = r.number(), p.ld_inner = r.number();
    p.epsilon = epsilon;
    p.wte = r.address(), p.wpe = r.address(), p.lnf_gain = r.address(), p.lnf_bias = r.address();
    Advance& s = p.state;
    s.batch = r.number(), s.capacity = r.number();
    s.tokens = r.address<int>(), s.position = r.address<int>(), s.lengths = r.address<int>(), s.step = r.address<int>();
    s.finished = r.address<int>(), s.history = r.address<int>(), s.history_capacity = r.number();
    s.stop = r.address<int>(), s.stop_count = r.number(), s.pad = r.number();
    p.greedy = r.number() != 0;
    p.logits = r.address<float>(), p.ld_logits = r.number(), p.workspace = r.address<void>();
    p.blocks = r.number(), p.threads = r.number(), p.splits = r.number();
    p.shared_bytes = static_cast<size_t>(r.number());
    p.work = static_cast<PersistentWork>(r.number());
    p.stamps = r.address<uint64_t>(), p.stamps_each = r.number();
    layers.resize(static_cast<size_t>(r.number()));
    for (Layer& layer : layers) {
        layer.heads = r.number();
        for (const half** part : {&layer.ln1_gain, &layer.ln1_bias, &layer.qkv_weight, &layer.qkv_bias, &layer.out_weight,
                                  &layer.out_bias, &layer.ln2_gain, &layer.ln2_bias, &layer.fc_weight, &layer.fc_bias,
                                  &layer.proj_weight, &layer.proj_bias})
            *part = r.address();
        half* k = r.address();
        layer.cache = {k, r.address(), layer.heads, s.capacity, p.head_dim};
        if (layer.heads > p.most_heads) p.most_heads = layer.heads;
    }
    p.layers = layers.data(), p.layer_count = static_cast<int>(layers.size());
    return p;
}

}  // namespace

extern "C" {

int hr_test_persistent(const int64_t* numbers, float epsilon, int steps) {
    std::vector<Layer> layers;
    return decode_persistent(read(numbers, epsilon, layers), steps, nullptr);
}

int64_t hr_test_persistent_workspace(const int64_t* numbers) {
    std::vector<Layer> layers;
    return static_cast<int64_t>(persistent_workspace_bytes(read(numbers, 0.0f, layers)));
}

int hr_test_persistent_max_blocks(const int64_t* numbers) {
    std::vector<Layer> layers;
    return persistent_max_blocks(read(numbers, 0.0f, layers));
}
}
