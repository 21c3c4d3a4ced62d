// The part of libcudart that our host code calls, on top of the interpreter. Device memory is the process's own.
//
// nvcc's objects register their fatbins and kernels when they are loaded; a launch puts the kernel's PTX into the
// interpreter's queue. Names that begin with __cuda are what nvcc generates calls of.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "api.h"

namespace {

constexpr unsigned kPlainShared = 48 * 1024;  // more has to be asked for

std::map<const void*, void*>& kernels() {  // by the host's stub; called before main, so made at first use
    static std::map<const void*, void*> by_stub;
    return by_stub;
}
std::map<const void*, unsigned> asked_for;  // of shared memory, by stub
unsigned architecture = 80;

unsigned most_shared() {
    return architecture >= 90 ? 227 * 1024 : architecture >= 80 ? 163 * 1024 : 64 * 1024;
}

// A fatbin's header, and that of each of its entries; after cuobjdump's output, for there is no specification.
struct Wrapper {
    int magic, version;
    const char* data;
};
struct Header {
    unsigned magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
};
struct Entry {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;
};
constexpr uint16_t kPtx = 1;

void* load(const char* fatbin) {
    Header header;
    std::memcpy(&header, fatbin, sizeof(header));
    const char* at = fatbin + header.header_bytes;
    for (const char* const end = at + header.bytes; at < end;) {
        Entry entry;
        std::memcpy(&entry, at, sizeof(entry));
        if (entry.kind == kPtx) return hr_ptx_load(std::string(at + entry.header_bytes, entry.bytes).c_str());
        at += entry.header_bytes + entry.bytes;
    }
    return nullptr;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
    void* const module = load(static_cast<Wrapper*>(wrapper)->data);
    if (module == nullptr) {
        std::fprintf(stderr, "no PTX in an object of nvcc: %s\n", hr_host_error());
        return nullptr;
    }
    architecture = hr_ptx_architecture(module);
    return static_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    if (module != nullptr) kernels()[stub] = hr_ptx_kernel(module, name);
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
    return 1;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
    return cudaErrorUnknown;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) {
    return cudaErrorUnknown;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorUnknown;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
        *value = static_cast<int>(most_shared());
    } else if (attribute == cudaDevAttrMultiProcessorCount) {
        *value = 4;
    } else {
        return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    if (value < 0 || static_cast<unsigned>(value) > most_shared()) return cudaErrorInvalidValue;
    asked_for[stub] = static_cast<unsigned>(value);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                                   unsigned) {
    *blocks = threads > 0 && threads <= 1024 && shared <= most_shared() ? 1 : 0;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}

const char* cudaGetErrorString(cudaError_t) {
    return hr_host_error();
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* stub, void** arguments) {
    const auto kernel = kernels().find(stub);
    if (kernel == kernels().end() || kernel->second == nullptr) return cudaErrorInvalidDeviceFunction;
    bool cooperative = false, dependent = false;
    for (unsigned n = 0; n < how->numAttrs; ++n) {
        const cudaLaunchAttribute& attribute = how->attrs[n];
        if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative != 0;
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
        }
    }
    const auto asked = asked_for.find(stub);
    const unsigned allowed = asked == asked_for.end() || asked->second < kPlainShared ? kPlainShared : asked->second;
    if (how->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
    const dim3 g = how->gridDim, b = how->blockDim;
    const uint32_t grid[3] = {g.x, g.y, g.z}, block[3] = {b.x, b.y, b.z};
    return static_cast<cudaError_t>(hr_ptx_launch(
        kernel->second, grid, block, static_cast<uint32_t>(how->dynamicSmemBytes), cooperative, dependent, arguments));
}
}
