// One launch decodes a token, or many, through all layers: kernels/decode_persistent.cu.
//
// All blocks stay for the whole launch and meet at grid barriers. Weights do not depend on activations, so every
// warp fetches its share of the next matrices into shared memory while it waits. Batches of 1 to 4; bit-reproducible
// for a given launch geometry. `Layer` lies in model.h.
#pragma once

#include "model.h"

namespace headroom {

constexpr int kPersistentBatch = 4;

// What of the work is done: all; fetching weights and barriers; barriers alone. The last two measure overheads.
enum class PersistentWork { kAll, kCopies, kBarriers };

struct PersistentDecode {
    // The model, as in Model; but `layers` [layer_count] lies in device memory.
    const Layer* layers;
    int layer_count, most_heads;
    int width, inner, vocabulary, position_rows, head_dim, ld_width, ld_inner;
    Rotary rotary;
    float epsilon;
    const half *wte, *wpe, *lnf_gain, *lnf_bias;

    // tokens, position and batch say what to decode. If `greedy`, the likeliest token follows each step as after
    // `sample` at temperature 0 and `advance`, in all of the state's fields; otherwise the rest may be null.
    Advance state;
    bool greedy;
    float* logits;  // [batch, vocabulary] of the last step, rows ld_logits apart
    int ld_logits;
    void* workspace;  // persistent_workspace_bytes(), zeros before the first launch; one launch at a time

    int blocks, threads;  // at most persistent_max_blocks(); threads: a multiple of 32 up to 384, width <= 8 * threads
    int splits;           // over how many blocks a head's keys are spread at most; 0: chosen by the blocks there are
    size_t shared_bytes;  // of each block; 0: all that the device gives
    PersistentWork work;
    uint64_t* stamps;   // null, or [blocks, stamps_each] nanoseconds: when a block began, came to a barrier, left it,
    int stamps_each;    // came to the next, ..., ended; at least persistent_stamps(). What was not reached stays
};

// How many stamps a block writes in a launch of `steps`.
int persistent_stamps(const PersistentDecode& what, int steps);

// Up to `steps` tokens a sequence, fewer where all sequences have finished; more than one only if greedy.
// Returns 0, the CUDA error of the launch, or cudaErrorInvalidValue for sizes that do not fit.
int decode_persistent(const PersistentDecode& what, int steps, Stream stream);

size_t persistent_workspace_bytes(const PersistentDecode& what);

// How many blocks of these threads and shared bytes the device holds at once; 0 where the model does not fit.
int persistent_max_blocks(const PersistentDecode& what);

}  // namespace headroom
