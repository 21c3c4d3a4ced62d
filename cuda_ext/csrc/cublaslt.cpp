// The library is opened at run time, so that neither a build nor a machine needs it: torch brings its own.
// HEADROOM_CUBLASLT names its header, where cuda_ext/build.py found one.
#include "cublaslt.h"

#if defined(HEADROOM_CUBLASLT)

#include HEADROOM_CUBLASLT
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace headroom {
namespace {

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(Algorithm));

struct Library {
    decltype(&cublasLtGetVersion) version;
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtMatmul) matmul;
    decltype(&cublasLtMatmulDescCreate) describe;
    decltype(&cublasLtMatmulDescDestroy) forget;
    decltype(&cublasLtMatmulDescSetAttribute) set;
    decltype(&cublasLtMatrixLayoutCreate) lay_out;
    decltype(&cublasLtMatrixLayoutDestroy) forget_layout;
    decltype(&cublasLtMatmulPreferenceCreate) prefer;
    decltype(&cublasLtMatmulPreferenceDestroy) forget_preference;
    decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    decltype(&cublasLtMatmulAlgoCheck) check;
    bool is_there = false;

    Library() {
        const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
        void* file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (file == nullptr) return;
        is_there = true;
        const auto find = [&](auto& function, const char* symbol) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, symbol));
            is_there = is_there && function != nullptr;
        };
        find(version, "cublasLtGetVersion");
        find(create, "cublasLtCreate");
        find(matmul, "cublasLtMatmul");
        find(describe, "cublasLtMatmulDescCreate");
        find(forget, "cublasLtMatmulDescDestroy");
        find(set, "cublasLtMatmulDescSetAttribute");
        find(lay_out, "cublasLtMatrixLayoutCreate");
        find(forget_layout, "cublasLtMatrixLayoutDestroy");
        find(prefer, "cublasLtMatmulPreferenceCreate");
        find(forget_preference, "cublasLtMatmulPreferenceDestroy");
        find(set_preference, "cublasLtMatmulPreferenceSetAttribute");
        find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
        find(check, "cublasLtMatmulAlgoCheck");
    }
};

const Library& library() {
    static const Library opened;
    return opened;
}

// The current device's, kept for the life of the process: NVIDIA wants one for each. Null where none can be made.
cublasLtHandle_t handle() {
    static std::mutex one_at_a_time;
    static std::map<int, cublasLtHandle_t> handles;
    if (!library().is_there) return nullptr;
    const std::lock_guard lock(one_at_a_time);
    cublasLtHandle_t& of_device = handles[current_device()];
    if (of_device == nullptr && library().create(&of_device) != CUBLAS_STATUS_SUCCESS) of_device = nullptr;
    return of_device;
}

bool in_floats(const Gemm& p) { return p.epilogue == Epilogue::kResidual || p.epilogue == Epilogue::kFloat; }

// A problem in cuBLASLt's words. Made for each call, which takes less than finding it again: it holds addresses.
struct Description {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, a = nullptr, out = nullptr;
    bool good = true;

    explicit Description(const Gemm& p) {
        // Its matrices are column-major: out^T [n, m] = weight [n, k] a^T [k, m].
        const Library& lt = library();
        tell(lt.describe(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        if (product == nullptr) return;
        set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
        // It knows no FP16 bias on FP32 sums.
        const bool bias = p.bias != nullptr && !in_floats(p);
        cublasLtEpilogue_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
        if (p.epilogue == Epilogue::kGelu) epilogue = bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        if (bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        tell(lt.lay_out(&weight, CUDA_R_16F, p.k, p.n, p.ld_weight));
        tell(lt.lay_out(&a, CUDA_R_16F, p.k, p.m, p.ld_a));
        tell(lt.lay_out(&out, in_floats(p) ? CUDA_R_32F : CUDA_R_16F, p.n, p.m, p.ld_out));
    }
    ~Description() {
        if (product != nullptr) library().forget(product);
        for (cublasLtMatrixLayout_t layout : {weight, a, out})
            if (layout != nullptr) library().forget_layout(layout);
    }
    Description(const Description&) = delete;
    Description& operator=(const Description&) = delete;

    // Whether the algorithm can do it, in the memory that there is.
    bool takes(const cublasLtMatmulAlgo_t& algorithm) const {
        cublasLtMatmulHeuristicResult_t result{};
        return good && library().check(handle(), product, weight, a, out, out, &algorithm, &result) ==
                           CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kCublasLtBytes;
    }

  private:
    void tell(cublasStatus_t status) { good = good && status == CUBLAS_STATUS_SUCCESS; }
    template <typename T>
    void set(cublasLtMatmulDescAttributes_t what, const T& value) {
        tell(library().set(product, what, &value, sizeof(value)));
    }
};

}  // namespace

bool cublaslt_is_there() { return library().is_there; }
int64_t cublaslt_version() { return cublaslt_is_there() ? static_cast<int64_t>(library().version()) : 0; }

int cublaslt_algorithms(const Gemm& p, int fewest, Algorithm* found, int most) {
    constexpr int kMost = 16;
    if (handle() == nullptr) return 0;
    const Description whole(p);
    cublasLtMatmulPreference_t preference = nullptr;
    if (!whole.good || library().prefer(&preference) != CUBLAS_STATUS_SUCCESS) return 0;
    const size_t bytes = kCublasLtBytes;
    library().set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
    cublasLtMatmulHeuristicResult_t likely[kMost];
    int count = 0;
    if (library().heuristic(handle(), whole.product, whole.weight, whole.a, whole.out, whole.out, preference,
                            most < kMost ? most : kMost, likely, &count) != CUBLAS_STATUS_SUCCESS)
        count = 0;
    library().forget_preference(preference);
    int good = 0;
    for (int i = 0; i < count; ++i) {
        bool takes = likely[i].state == CUBLAS_STATUS_SUCCESS;
        for (Gemm part = p; takes && part.m >= fewest; --part.m) takes = Description(part).takes(likely[i].algo);
        if (takes) std::memcpy(found[good++].words, &likely[i].algo, sizeof(Algorithm));
    }
    return good;
}

int cublaslt_gemm(const Gemm& p, const Algorithm& algorithm, void* scratch, Stream stream) {
    const bool adds = p.epilogue == Epilogue::kResidual;
    if (handle() == nullptr || (p.epilogue == Epilogue::kFloat && p.bias != nullptr)) return kCublasLtCannot;
    const Description d(p);
    if (!d.good) return kCublasLtCannot;
    cublasLtMatmulAlgo_t algo;
    std::memcpy(&algo, algorithm.words, sizeof(algo));
    const float one = 1.0f, before = adds ? 1.0f : 0.0f;
    void* out = in_floats(p) ? static_cast<void*>(p.out_float) : p.out_half;
    if (library().matmul(handle(), d.product, &one, p.weight, d.weight, p.a, d.a, &before, out, d.out, out, d.out, &algo,
                         scratch, kCublasLtBytes, stream) != CUBLAS_STATUS_SUCCESS)
        return kCublasLtCannot;
    return adds && p.bias != nullptr ? add_bias(p.bias, p.out_float, p.m, p.n, p.ld_out, stream) : 0;
}

}  // namespace headroom

#else

namespace headroom {

bool cublaslt_is_there() { return false; }
int64_t cublaslt_version() { return 0; }
int cublaslt_algorithms(const Gemm&, int, Algorithm*, int) { return 0; }
int cublaslt_gemm(const Gemm&, const Algorithm&, void*, Stream) { return kCublasLtCannot; }

}  // namespace headroom

#endif
