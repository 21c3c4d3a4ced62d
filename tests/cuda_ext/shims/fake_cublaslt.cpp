// csrc/cublaslt.cpp over a cuBLASLt of our own, on the CPU: it multiplies in double, refuses what it is told to, and
// counts what is made and not freed. Only the names that cublaslt.cpp uses; their numbers are arbitrary.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "ops.h"

#define CUBLAS_VER_MAJOR 13
#define HEADROOM_CUBLASLT "ops.h"

using headroom::to_float;
using headroom::to_half;

struct Handle {
    int device;
};
struct Description {
    int epilogue = 0;
    bool transposed = false;
    const half* bias = nullptr;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t ld;
};
struct Preference {
    size_t bytes = 0;
};
using cublasLtHandle_t = Handle*;
using cublasLtMatmulDesc_t = Description*;
using cublasLtMatrixLayout_t = Layout*;
using cublasLtMatmulPreference_t = Preference*;
struct cublasLtMatmulAlgo_t {
    uint64_t data[8];
};
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
};
enum cublasOperation_t { CUBLAS_OP_T = 1 };
enum cudaDataType_t { CUDA_R_16F = 2, CUDA_R_32F = 0 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_DESC_EPILOGUE,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER
};
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36
};

namespace {

// Algorithms are told apart by their first word. 1 and 5 do anything; 2, an even number of rows; 3 wants more memory
// than there is; the heuristic itself takes back 4.
enum { kAny = 1, kEvenRows, kTooMuchMemory, kTakenBack, kAnyToo };
int refused = 0, living = 0, products = 0;  // `refused`: the algorithm that fails when it is run
std::map<int, int> handles;                 // of each device
std::vector<int> devices;                   // of each product, and of its handle

}  // namespace

template <typename T>
cublasStatus_t make(T** made, T value) {
    ++living;
    *made = new T(value);
    return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
cublasStatus_t drop(T* made) {
    --living;
    delete made;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion() { return 130100; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    ++handles[headroom::current_device()];
    *handle = new Handle{headroom::current_device()};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType_t) {
    return make(made, Description{});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) { return drop(made); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t of, cublasLtMatmulDescAttributes_t what,
                                              const void* value, size_t bytes) {
    if (what == CUBLASLT_MATMUL_DESC_TRANSA) of->transposed = true;
    if (what == CUBLASLT_MATMUL_DESC_EPILOGUE) std::memcpy(&of->epilogue, value, bytes);
    if (what == CUBLASLT_MATMUL_DESC_BIAS_POINTER) std::memcpy(&of->bias, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType_t type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
    return make(made, Layout{type, rows, columns, ld});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) { return drop(made); }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) { return make(made, Preference{}); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) { return drop(made); }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t of,
                                                    cublasLtMatmulPreferenceAttributes_t, const void* value,
                                                    size_t bytes) {
    std::memcpy(&of->bytes, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t* algo, cublasLtMatmulHeuristicResult_t* result) {
    result->workspaceSize = algo->data[0] == kTooMuchMemory ? size_t{1} << 30 : 0;
    return algo->data[0] == kEvenRows && b->columns % 2 != 0 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t* found, int* count) {
    if (preference->bytes == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    *count = 0;
    for (const uint64_t id : {kTakenBack, kEvenRows, kTooMuchMemory, kAny, kAnyToo}) {
        if (*count == most) break;
        const cublasStatus_t state = id == kTakenBack ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
        found[(*count)++] = {{{id, ~uint64_t{0}, 0, 0, 0, 0, 0, id}}, 0, state, 1.0f};
    }
    return CUBLAS_STATUS_SUCCESS;
}
// d[column-major, n x m] = a^T [n, k] b [k, m] + beta c, through the epilogue.
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t how, const void*, const void* a,
                              cublasLtMatrixLayout_t a_is, const void* b, cublasLtMatrixLayout_t b_is, const void* beta,
                              const void*, cublasLtMatrixLayout_t, void* d, cublasLtMatrixLayout_t d_is,
                              const cublasLtMatmulAlgo_t* algo, void*, size_t, void*) {
    cublasLtMatmulHeuristicResult_t ignored;
    const bool whole = algo->data[1] == ~uint64_t{0} && algo->data[7] == algo->data[0] && how->transposed;
    if (!whole || algo->data[0] == static_cast<uint64_t>(refused) ||
        cublasLtMatmulAlgoCheck(handle, how, a_is, b_is, d_is, d_is, algo, &ignored) != CUBLAS_STATUS_SUCCESS)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    ++products;
    devices = {handle->device, headroom::current_device()};
    for (uint64_t column = 0; column < d_is->columns; ++column) {
        for (uint64_t row = 0; row < d_is->rows; ++row) {
            const half* left = static_cast<const half*>(a) + row * a_is->ld;
            const half* right = static_cast<const half*>(b) + column * b_is->ld;
            double sum = 0;
            for (uint64_t i = 0; i < a_is->rows; ++i) sum += double{to_float(left[i])} * to_float(right[i]);
            if (how->bias != nullptr) sum += to_float(how->bias[row]);
            if (how->epilogue & CUBLASLT_EPILOGUE_GELU) sum = headroom::gelu_tanh(static_cast<float>(sum));
            const size_t at = column * d_is->ld + row;
            if (d_is->type == CUDA_R_16F) {
                static_cast<half*>(d)[at] = to_half(static_cast<float>(sum));
            } else {
                float& out = static_cast<float*>(d)[at];
                const float factor = *static_cast<const float*>(beta);
                out = static_cast<float>(sum) + (factor != 0 ? factor * out : 0);
            }
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

void* fake_open(const char* name, int) { return std::strcmp(name, "libcublasLt.so.13") == 0 ? &living : nullptr; }
void* fake_find(void*, const std::string& name) {
#define FAKE(function) {#function, reinterpret_cast<void*>(&function)}
    static const std::map<std::string, void*> functions = {
        FAKE(cublasLtGetVersion), FAKE(cublasLtCreate), FAKE(cublasLtMatmul), FAKE(cublasLtMatmulDescCreate),
        FAKE(cublasLtMatmulDescDestroy), FAKE(cublasLtMatmulDescSetAttribute), FAKE(cublasLtMatrixLayoutCreate),
        FAKE(cublasLtMatrixLayoutDestroy), FAKE(cublasLtMatmulPreferenceCreate), FAKE(cublasLtMatmulPreferenceDestroy),
        FAKE(cublasLtMatmulPreferenceSetAttribute), FAKE(cublasLtMatmulAlgoGetHeuristic), FAKE(cublasLtMatmulAlgoCheck)};
    return functions.at(name);
}
#define dlopen fake_open
#define dlsym fake_find
#include "cublaslt.cpp"

extern "C" {

void fake_refuse(int algorithm) { refused = algorithm; }
int fake_living() { return living; }
int fake_products() { return products; }
int fake_handles(int device) { return handles[device]; }
bool fake_devices_agree() { return devices.size() == 2 && devices[0] == devices[1]; }
}
