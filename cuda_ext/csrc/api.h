// The library's surface: plain C, so that one build serves every version of torch and Python. cuda_ext/ops.py
// calls it with the addresses of tensors and of torch's current stream.
//
// `table`, int64 on the host, describes a model; cuda_ext/packing.py writes it, api.cpp reads it. All other pointers
// are the device's. Everything returns 0 or an error code; hr_error_text says what it means.
#pragma once

#include <cstdint>

extern "C" {

int64_t hr_workspace_bytes(const int64_t* table, int batch, int length);
int hr_prefill(const int64_t* table, void* workspace, const int* tokens, const int* start, const int* lengths,
               const int* rows, int row_count, int batch, int length, float* logits, int ld_logits, void* stream);
int64_t hr_counters(const int64_t* table, int batch);  // how many hr_decode wants: uint32, zero before and after it
int hr_decode(const int64_t* table, void* workspace, void* counters, const int* tokens, const int* position,
              const int* lengths, int batch, int splits, float* logits, int ld_logits, int dependent, void* stream);
int hr_sample(const float* logits, int ld_logits, int vocabulary, int batch, float temperature, int top_k, float top_p,
              uint64_t seed, int* step, int* tokens, void* stream);
int hr_advance(int* tokens, int* position, int* lengths, int* step, int* finished, int* history, const int* stop,
               int stop_count, int pad, int batch, int history_capacity, int capacity, void* stream);

// Ways to multiply: see product.h. `epilogue` as in ops.h; `scratch`: hr_product_scratch_bytes() on the device.
int hr_product(const void* a, int ld_a, const void* weight, int ld_weight, const void* bias, void* out, int ld_out, int m,
               int n, int k, int epilogue, int way, void* scratch, void* stream);
int hr_product_ways();
const char* hr_product_way_name(int way);
int64_t hr_product_scratch_bytes();

// Decoding in one launch, see decode_persistent.h. `layers`: what hr_layers wrote, on the device.
int64_t hr_layers(const int64_t* table, void* layers);  // returns its size in bytes; writes unless null
int hr_persistent_blocks(const int64_t* table, int batch, int threads);  // 0: the model does not fit the device
int64_t hr_persistent_bytes(const int64_t* table, int blocks, int threads);
int hr_decode_persistent(const int64_t* table, const void* layers, void* workspace, int* tokens, int* position,
                         int* lengths, int* step, int* finished, int* history, int history_capacity, const int* stop,
                         int stop_count, int pad, int batch, int greedy, int steps, float* logits, int ld_logits,
                         int blocks, int threads, int work, uint64_t* stamps, int stamps_each, void* stream);

const char* hr_error_text(int code);
}
