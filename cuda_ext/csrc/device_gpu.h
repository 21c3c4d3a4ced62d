// The GPU's side of device.h: CUDA intrinsics and inline PTX under the names that kernels use.
#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

#define HR_KERNEL __global__
#define HR_DEVICE __device__ __forceinline__
#define HR_ANY __host__ __device__ __forceinline__
#define HR_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// The block's dynamic shared memory, 128-byte aligned. Kernels carve all they need from it.
#define HR_SHARED(type, name)                                        \
    extern __shared__ __align__(128) unsigned char hr_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(hr_shared_memory)

namespace headroom {

using Stream = cudaStream_t;

// ---- FP16 ----
HR_ANY float to_float(half value) { return __half2float(value); }
HR_ANY half to_half(float value) { return __float2half_rn(value); }
HR_DEVICE float2 unpack_half2(uint32_t bits) { return __half22float2(*reinterpret_cast<half2*>(&bits)); }
HR_DEVICE uint32_t pack_half2(float low, float high) {
    half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
}

// ---- memory ----
HR_DEVICE uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
HR_DEVICE void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }
// For what is read once: weights. Not kept in L1.
HR_DEVICE uint4 load16_stream(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
// Past L1, for what another block wrote in this launch.
HR_DEVICE float load_shared_across_blocks(const float* p) { return __ldcg(p); }
HR_DEVICE uint4 load16_across_blocks(const void* p) { return __ldcg(reinterpret_cast<const uint4*>(p)); }
HR_DEVICE float atomic_add(float* p, float v) { return atomicAdd(p, v); }
HR_DEVICE unsigned atomic_add(unsigned* p, unsigned v) { return atomicAdd(p, v); }
HR_DEVICE int atomic_min(int* p, int v) { return atomicMin(p, v); }
HR_DEVICE void fence_device() { __threadfence(); }

// ---- block and warp ----
HR_DEVICE void sync_block() { __syncthreads(); }
HR_DEVICE void sync_warp() { __syncwarp(); }
template <typename T>
HR_DEVICE T warp_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
HR_DEVICE T warp_down(T value, int offset) {
    return __shfl_down_sync(0xffffffffu, value, offset);
}
template <typename T>
HR_DEVICE T warp_up(T value, int offset) {
    return __shfl_up_sync(0xffffffffu, value, offset);
}
template <typename T>
HR_DEVICE T warp_from(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
HR_DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// ---- tensor cores ----
HR_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// D[16x8] += A[16x16] B[16x8], FP16 in, FP32 sums; fragments as in PTX ISA, "mma.m16n8k16".
HR_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing has half the depth: two steps of k = 8
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

// Four 8x8 FP16 matrices from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
HR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
HR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// ---- asynchronous copies, global to shared ----
// 16 bytes, or zeros where !valid. Visible to the issuing thread after cp_async_wait, to others after a barrier too.
HR_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
#else
    store16(shared, valid ? load16(global) : make_uint4(0, 0, 0, 0));
#endif
}
HR_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most N of this thread's latest groups are still on their way.
template <int N>
HR_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Bulk copies need sm_90; elsewhere (and `kBulkCopy` says so) kernels use cp_async16.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopy = true;
#else
constexpr bool kBulkCopy = false;
#endif
HR_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
HR_DEVICE void mbarrier_expect_and_arrive(uint64_t* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}
HR_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nwait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\nbra.uni wait;\nover:\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}
// `bytes`, a multiple of 16, to 16-byte aligned shared memory; counts down the barrier's expected bytes.
HR_DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
#endif
}

// ---- time ----
// The GPU's own clock, the same for all multiprocessors; how finely it ticks is the card's affair.
HR_DEVICE uint64_t global_nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

// ---- between blocks and launches ----
// All blocks of a cooperative launch meet. `counter` starts at 0 and only grows; `round` is 1, 2, 3, ...
HR_DEVICE void grid_barrier(unsigned* counter, unsigned round) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < round * gridDim.x);
    }
    __syncthreads();
}
// Programmatic dependent launch: what the launch before this one wrote may be read only after this.
HR_DEVICE void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
HR_DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Launch {
    dim3 grid, block;
    size_t shared_bytes = 0;
    Stream stream = nullptr;
    bool cooperative = false;  // all blocks at once, for grid_barrier
    bool dependent = false;    // may begin before the launch before it ends (sm_90)
};

// The device that this thread's calls go to; -1 where there is none. `set_device` returns 0 or a CUDA error.
inline int current_device() {
    int device = -1;
    return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}
inline int set_device(int device) { return cudaSetDevice(device); }

// What a block may have of shared memory on this device; 0 where the device does not answer.
inline size_t most_shared_bytes() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    return static_cast<size_t>(bytes);
}

// How many blocks of a cooperative launch the device holds at once; 0 where it does not take even one.
template <typename... Params>
int cooperative_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
    int device = 0, processors = 0, blocks = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return 0;
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) != cudaSuccess) return 0;
    return blocks * processors;
}

// Returns 0 or the cudaError_t of the launch.
template <typename... Params, typename... Args>
int launch(const Launch& how, void (*kernel)(Params...), Args&&... args) {
    if (how.shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(how.shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = how.stream;
    cudaLaunchAttribute attributes[2];
    if (how.cooperative) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (how.dependent) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = attributes;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace headroom
