// A matrix product by any way there is: our tiles first, then cuBLASLt's choices.
#pragma once

#include "cublaslt.h"

namespace headroom {

// `scratch`: kCublasLtBytes. Returns 0, a CUDA error, or kCublasLtCannot.
inline int product(const Gemm& problem, int way, void* scratch, Stream stream) {
    const int ours = gemm_variants();
    return way < ours ? gemm(problem, way, stream) : cublaslt_gemm(problem, way - ours, scratch, stream);
}

inline int product_ways() { return gemm_variants() + (cublaslt_is_there() ? kCublasLtChoices : 0); }

inline const char* product_way_name(int way) {
    static const char* const names[kCublasLtChoices] = {"cuBLASLt 1", "cuBLASLt 2", "cuBLASLt 3", "cuBLASLt 4"};
    return way < gemm_variants() ? gemm_variant_name(way) : names[way - gemm_variants()];
}

}  // namespace headroom
