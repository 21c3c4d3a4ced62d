// NVIDIA's own matrix products behind Gemm's interface, where their library can be loaded.
#pragma once

#include "ops.h"

namespace headroom {

constexpr size_t kCublasLtBytes = 8 * 1024 * 1024;  // of device memory that a product may work in
constexpr int kCublasLtCannot = -1;

// A cublasLtMatmulAlgo_t. NVIDIA documents that it may be written down and read again by the same version: it says the
// kernel, its tile, stages, split-K and all else that it chooses, and nothing about the sizes of the problem.
constexpr int kAlgorithmWords = 8;
struct Algorithm {
    uint64_t words[kAlgorithmWords];
};

// Whether its header was there to compile against, and the library is here to call; its version, or 0.
bool cublaslt_is_there();
int64_t cublaslt_version();

// The likeliest algorithms for this problem, at most `most`, of those that can do any number of rows from `fewest` to
// problem.m; returns how many. Nothing is multiplied. On the current device.
int cublaslt_algorithms(const Gemm& problem, int fewest, Algorithm* found, int most);

// As `gemm`, on the current device. `scratch`: kCublasLtBytes. Returns kCublasLtCannot, and leaves `out` as it was,
// where the algorithm cannot do it.
int cublaslt_gemm(const Gemm& problem, const Algorithm& algorithm, void* scratch, Stream stream);

}  // namespace headroom
