// A matrix product by any way there is: our tiles, or an algorithm of cuBLASLt's.
#pragma once

#include "cublaslt.h"

namespace headroom {

// One of gemm's variants; or, where `variant` is -1, cuBLASLt's algorithm.
struct Way {
    int variant;
    Algorithm algorithm;
};

// The variant where nothing was measured: the largest tile that still gives a large GPU's multiprocessors something to
// do each.
int variant_for(int m, int n);

constexpr int kNoVariant = -4;

// `scratch`: kCublasLtBytes. Returns 0, a CUDA error, or kCublasLtCannot or kNoVariant, with `out` as it was.
inline int product(const Gemm& problem, const Way& way, void* scratch, Stream stream) {
    if (way.variant < -1 || way.variant >= gemm_variants()) return kNoVariant;
    return way.variant >= 0 ? gemm(problem, way.variant, stream)
                            : cublaslt_gemm(problem, way.algorithm, scratch, stream);
}

}  // namespace headroom
