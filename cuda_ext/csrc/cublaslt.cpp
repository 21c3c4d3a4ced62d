// The library is opened at run time, so that neither a build nor a machine needs it: torch brings its own.
#include "cublaslt.h"

#if defined(__CUDACC__) && __has_include(<cublasLt.h>)

#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace headroom {
namespace {

struct Library {
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtMatmul) matmul;
    decltype(&cublasLtMatmulDescCreate) describe;
    decltype(&cublasLtMatmulDescSetAttribute) set;
    decltype(&cublasLtMatrixLayoutCreate) layout;
    decltype(&cublasLtMatmulPreferenceCreate) prefer;
    decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    cublasLtHandle_t handle = nullptr;

    Library() {
        const std::string name = "libcublasLt.so." + std::to_string(CUDART_VERSION / 1000);
        void* file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (file == nullptr) return;
        bool all = true;
        const auto find = [&](auto& function, const char* symbol) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, symbol));
            all = all && function != nullptr;
        };
        find(create, "cublasLtCreate");
        find(matmul, "cublasLtMatmul");
        find(describe, "cublasLtMatmulDescCreate");
        find(set, "cublasLtMatmulDescSetAttribute");
        find(layout, "cublasLtMatrixLayoutCreate");
        find(prefer, "cublasLtMatmulPreferenceCreate");
        find(set_preference, "cublasLtMatmulPreferenceSetAttribute");
        find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
        if (all && create(&handle) != CUBLAS_STATUS_SUCCESS) handle = nullptr;
    }
};

const Library& library() {
    static const Library opened;
    return opened;
}

// What does not change from call to call of one shape; kept for the life of the process, as there are few.
struct Product {
    cublasLtMatmulDesc_t description = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, a = nullptr, out = nullptr;
    cublasLtMatmulHeuristicResult_t found[kCublasLtChoices];
    int count = 0;

    explicit Product(const Gemm& p) {
        const Library& lt = library();
        const bool half_out = p.epilogue == Epilogue::kHalf || p.epilogue == Epilogue::kGelu;
        // Its matrices are column-major: out^T [n, m] = weight [n, k] a^T [k, m].
        const cublasOperation_t turn = CUBLAS_OP_T;
        lt.describe(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F);
        lt.set(description, CUBLASLT_MATMUL_DESC_TRANSA, &turn, sizeof(turn));
        cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
        if (p.epilogue == Epilogue::kGelu) epilogue = p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
        if (p.epilogue == Epilogue::kHalf && p.bias) epilogue = CUBLASLT_EPILOGUE_BIAS;
        lt.set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(epilogue));
        lt.layout(&weight, CUDA_R_16F, p.k, p.n, p.ld_weight);
        lt.layout(&a, CUDA_R_16F, p.k, p.m, p.ld_a);
        lt.layout(&out, half_out ? CUDA_R_16F : CUDA_R_32F, p.n, p.m, p.ld_out);
        cublasLtMatmulPreference_t preference;
        lt.prefer(&preference);
        const size_t bytes = kCublasLtBytes;
        lt.set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
        set_bias(p);
        if (lt.heuristic(lt.handle, description, weight, a, out, out, preference, kCublasLtChoices, found, &count) !=
            CUBLAS_STATUS_SUCCESS)
            count = 0;
    }

    void set_bias(const Gemm& p) const {
        if (p.bias != nullptr)
            library().set(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias, sizeof(p.bias));
    }
};

Product& product_for(const Gemm& p) {
    int device = 0;
    cudaGetDevice(&device);
    static std::map<std::tuple<int, int, int, int, int, int, int, int, bool>, Product> products;
    const std::tuple key{device, p.m, p.n, p.k, p.ld_a, p.ld_weight, p.ld_out, static_cast<int>(p.epilogue), p.bias != nullptr};
    const auto at = products.find(key);
    return at != products.end() ? at->second : products.emplace(key, p).first->second;
}

}  // namespace

bool cublaslt_is_there() { return library().handle != nullptr; }

int cublaslt_gemm(const Gemm& p, int choice, void* scratch, Stream stream) {
    static std::mutex one_at_a_time;  // the bias's address stands in the description
    const std::lock_guard lock(one_at_a_time);
    Product& product = product_for(p);
    if (choice >= product.count || product.found[choice].state != CUBLAS_STATUS_SUCCESS) return kCublasLtCannot;
    const bool adds = p.epilogue == Epilogue::kResidual, floats = adds || p.epilogue == Epilogue::kFloat;
    if (floats && p.bias != nullptr) {  // it knows no FP16 bias on FP32 sums
        if (!adds) return kCublasLtCannot;
        const int error = add_bias(p.bias, p.out_float, p.m, p.n, p.ld_out, stream);
        if (error != 0) return error;
    } else {
        product.set_bias(p);
    }
    const float one = 1.0f, before = adds ? 1.0f : 0.0f;
    void* out = floats ? static_cast<void*>(p.out_float) : p.out_half;
    const cublasStatus_t status =
        library().matmul(library().handle, product.description, &one, p.weight, product.weight, p.a, product.a, &before,
                         out, product.out, out, product.out, &product.found[choice].algo, scratch, kCublasLtBytes, stream);
    return status == CUBLAS_STATUS_SUCCESS ? 0 : kCublasLtCannot;
}

}  // namespace headroom

#else

namespace headroom {

bool cublaslt_is_there() { return false; }
int cublaslt_gemm(const Gemm&, int, void*, Stream) { return kCublasLtCannot; }

}  // namespace headroom

#endif
