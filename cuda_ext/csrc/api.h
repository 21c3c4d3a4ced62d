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
int hr_decode(const int64_t* table, void* workspace, const int* tokens, const int* position, const int* lengths,
              int batch, int splits, float* logits, int ld_logits, int dependent, void* stream);
int hr_sample(const float* logits, int ld_logits, int vocabulary, int batch, float temperature, int top_k, float top_p,
              uint64_t seed, int* step, int* tokens, void* stream);
int hr_advance(int* tokens, int* position, int* lengths, int* step, int* finished, int* history, const int* stop,
               int stop_count, int pad, int batch, int history_capacity, int capacity, void* stream);
const char* hr_error_text(int code);
}
