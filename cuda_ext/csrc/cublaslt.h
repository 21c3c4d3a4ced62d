// NVIDIA's own matrix products behind Gemm's interface, where their library can be loaded.
#pragma once

#include "ops.h"

namespace headroom {

constexpr int kCublasLtChoices = 4;                 // of its heuristic, the likeliest first
constexpr size_t kCublasLtBytes = 8 * 1024 * 1024;  // of device memory that a product may work in

// Whether libcublasLt was there to compile against, and is here to call.
bool cublaslt_is_there();

// As `gemm`. `scratch`: kCublasLtBytes. Returns kCublasLtCannot where its heuristic has no such choice.
constexpr int kCublasLtCannot = -1;
int cublaslt_gemm(const Gemm& problem, int choice, void* scratch, Stream stream);

}  // namespace headroom
