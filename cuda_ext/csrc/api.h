// The library's surface: plain C, so that one build serves every version of torch and Python. cuda_ext/ops.py
// calls it with the addresses of tensors and of torch's current stream.
//
// `table`, int64 on the host, describes a model: its layout's number, its length, then what cuda_ext/packing.py writes
// and api.cpp reads. All other pointers are the device's. `device`, its number, need not be the current one, and
// `stream` is one of its streams. Everything returns 0 or an error code; sizes are negative where the table is none.
// hr_error_text says what a code means.
#pragma once

#include <cstdint>

extern "C" {

int64_t hr_workspace_bytes(const int64_t* table, int batch, int length);
int hr_prefill(const int64_t* table, void* workspace, const int* tokens, const int* start, const int* lengths,
               const int* rows, int row_count, int batch, int length, float* logits, int ld_logits, int device,
               void* stream);
int64_t hr_counters(const int64_t* table, int batch);  // how many hr_decode wants: uint32, zero before and after it
int hr_decode(const int64_t* table, void* workspace, void* counters, const int* tokens, const int* position,
              const int* lengths, int batch, int splits, float* logits, int ld_logits, int dependent, int device,
              void* stream);

// `how`: ops.h's Sampling, in device memory.
int hr_sample(const float* logits, int ld_logits, int vocabulary, int batch, const void* how, int* step, int* tokens,
              int device, void* stream);
int hr_advance(int* tokens, int* position, int* lengths, int* step, int* finished, int* history, const void* how,
               int batch, int history_capacity, int capacity, int device, void* stream);

// Ways to multiply: see product.h. `variant`: one of our tiles, or -1 for `algorithm` (8 words on the host) of
// cuBLASLt. `epilogue` as in ops.h; `scratch`: hr_product_scratch_bytes() on the device.
int hr_product(const void* a, int ld_a, const void* weight, int ld_weight, const void* bias, void* out, int ld_out, int m,
               int n, int k, int epilogue, int variant, const uint64_t* algorithm, void* scratch, int device,
               void* stream);
int hr_product_variants();
const char* hr_product_variant_name(int variant);
int hr_product_variant_for(int m, int n);  // the one that is taken where nothing was measured
int64_t hr_product_scratch_bytes();
int64_t hr_cublaslt_version();  // 0: it is not there
// Up to `most` algorithms for products of fewest_rows to m rows, into found[8 * most]; returns how many.
int hr_cublaslt_algorithms(int m, int n, int k, int ld_a, int ld_weight, int ld_out, int epilogue, const void* bias,
                           int fewest_rows, uint64_t* found, int most, int device);

// Decoding in one launch, see decode_persistent.h. `layers`: what hr_layers wrote, on the device.
int64_t hr_layers(const int64_t* table, void* layers);  // returns its size in bytes; writes unless null
int hr_persistent_blocks(const int64_t* table, int batch, int threads, int device);  // 0: the model does not fit
int64_t hr_persistent_bytes(const int64_t* table, int blocks, int threads);
int hr_decode_persistent(const int64_t* table, const void* layers, void* workspace, int* tokens, int* position,
                         int* lengths, int* step, int* finished, int* history, int history_capacity, const void* how,
                         int batch, int greedy, int steps, float* logits, int ld_logits, int blocks, int threads,
                         int work, uint64_t* stamps, int stamps_each, int device, void* stream);

const char* hr_error_text(int code);
}
