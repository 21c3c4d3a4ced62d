// The CPU's side of device.h: device_gpu.h's names, so that g++ runs the kernels' own source.
//
// A launch makes one fiber a thread. Fibers change at scheduling points (barriers, warp operations, atomics,
// waits) in an order drawn from hr_host_seed; asynchronous copies arrive at a moment drawn from it too. A
// missing barrier, or a read before the copy is there, gives a wrong result under some seed. What can be
// judged at once (deadlock, divergence, misalignment, an address outside shared memory) ends the launch:
// launch() returns kHostFault, and hr_host_error() says what happened where.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define HR_KERNEL
#define HR_DEVICE inline
#define HR_ANY inline
#define HR_LAUNCH_BOUNDS(threads, blocks)
#define HR_SHARED(type, name) type* const name = reinterpret_cast<type*>(::headroom::host::shared_memory())

// Both ways of fetching weights run here: with bulk copies, and with -DHEADROOM_BULK_COPY=0 without.
#ifndef HEADROOM_BULK_COPY
#define HEADROOM_BULK_COPY 1
#endif

// ---- CUDA's own types and functions, as far as kernels use them ----

struct half {  // no arithmetic: kernels compute in FP32
#if defined(__aarch64__)
    __fp16 value;
#else
    _Float16 value;
#endif
};
static_assert(sizeof(half) == 2 && std::is_trivial_v<half>);

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

// Of the fiber that runs; set at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <typename T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int __float_as_int(float x) {
    return static_cast<int>(__float_as_uint(x));
}
inline float __int_as_float(int bits) {
    return __uint_as_float(static_cast<unsigned>(bits));
}

extern "C" {
// Starts anew: the order of all later scheduling, and no error. Nine seeds in a row go through all tempers
// of the schedule (how soon copies arrive, how long a warp may run ahead of the others).
void hr_host_seed(uint64_t seed);
// What went wrong since then, or "". After a fault every further launch is refused, as on a GPU.
const char* hr_host_error();
// From now on there are `count` devices (one, of 132 multiprocessors and 227 KiB, until this is called); the first is
// current.
void hr_host_devices(int count, const int* multiprocessors, const int* shared_bytes);
int hr_host_device();  // the current one
// A stream of a device, which takes launches while that device is current; a null stream is the current device's.
void* hr_host_stream(int device);
}

namespace headroom {

using Stream = void*;

struct Launch {
    dim3 grid, block;
    size_t shared_bytes = 0;
    Stream stream = nullptr;
    bool cooperative = false;  // all blocks at once, for grid_barrier
    bool dependent = false;    // may begin before the launch before it ends: here it never does
};

constexpr int kHostBadConfiguration = 9;  // cudaErrorInvalidConfiguration
constexpr int kHostBadDevice = 101;       // cudaErrorInvalidDevice
constexpr int kHostBadHandle = 400;       // cudaErrorInvalidResourceHandle
constexpr int kHostFault = 719;           // cudaErrorLaunchFailure

namespace host {

constexpr int kLanes = 32;

// One operation of a warp: what each lane brought, and what it takes home.
struct Exchange {
    alignas(16) unsigned char lane[kLanes][48];
};

int run(const Launch& how, const std::function<void()>& thread);
struct Device {
    int multiprocessors;
    size_t shared_bytes;  // of a block, at most
};
const Device& device();  // the current one
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* shared_memory();
int lane();
void schedule();  // a scheduling point
void meet_block();
void meet_grid(unsigned* counter, unsigned round);
// Waits for all 32 lanes; the last one to come runs `all_here` before anyone goes on.
Exchange& meet_warp(const char* operation, const void* brought, size_t bytes, void (*all_here)(Exchange&) = nullptr);
void multiply(Exchange& lanes);         // {a, b, d} -> {d}
void gather_matrices(Exchange& lanes);  // {address} -> {four registers}
void gather_matrices_trans(Exchange& lanes);
void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int groups_left);
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, unsigned bytes);
void barrier_wait(uint64_t* barrier, unsigned parity);

inline void check_aligned(const char* operation, const void* p, size_t bytes = 16) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
        fail("%s: the address %p is not %zu-byte aligned", operation, p, bytes);
    }
}

template <typename T>
T warp_exchange(const char* operation, T value, int from) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Exchange::lane[0]));
    const Exchange& all = meet_warp(operation, &value, sizeof(T));
    if (from >= 0 && from < kLanes) std::memcpy(&value, all.lane[from], sizeof(T));
    return value;
}

}  // namespace host

// ---- FP16 ----
HR_ANY float to_float(half value) {
    return static_cast<float>(value.value);
}
HR_ANY half to_half(float value) {
    return half{static_cast<decltype(half::value)>(value)};
}
HR_DEVICE float2 unpack_half2(uint32_t bits) {
    half both[2];
    std::memcpy(both, &bits, 4);
    return {to_float(both[0]), to_float(both[1])};
}
HR_DEVICE uint32_t pack_half2(float low, float high) {
    const half both[2] = {to_half(low), to_half(high)};
    uint32_t bits;
    std::memcpy(&bits, both, 4);
    return bits;
}

// ---- memory ----
HR_DEVICE uint4 load16(const void* p) {
    host::check_aligned("load16", p);
    return *static_cast<const uint4*>(p);
}
HR_DEVICE void store16(void* p, uint4 v) {
    host::check_aligned("store16", p);
    *static_cast<uint4*>(p) = v;
}
HR_DEVICE uint4 load16_stream(const void* p) {
    return load16(p);
}
HR_DEVICE float load_shared_across_blocks(const float* p) {
    host::schedule();
    return *p;
}
HR_DEVICE uint4 load16_across_blocks(const void* p) {
    host::schedule();
    return load16(p);
}
HR_DEVICE float atomic_add(float* p, float v) {
    host::schedule();
    const float before = *p;
    *p += v;
    return before;
}
HR_DEVICE unsigned atomic_add(unsigned* p, unsigned v) {
    host::schedule();
    const unsigned before = *p;
    *p += v;
    return before;
}
HR_DEVICE int atomic_min(int* p, int v) {
    host::schedule();
    const int before = *p;
    *p = v < before ? v : before;
    return before;
}
HR_DEVICE void fence_device() {
    host::schedule();
}

// ---- block and warp ----
HR_DEVICE void sync_block() {
    host::meet_block();
}
HR_DEVICE void sync_warp() {
    host::meet_warp("sync_warp", nullptr, 0);
}
template <typename T>
HR_DEVICE T warp_xor(T value, int mask) {
    return host::warp_exchange("warp_xor", value, host::lane() ^ mask);
}
template <typename T>
HR_DEVICE T warp_down(T value, int offset) {
    return host::warp_exchange("warp_down", value, host::lane() + offset);
}
template <typename T>
HR_DEVICE T warp_up(T value, int offset) {
    return host::warp_exchange("warp_up", value, host::lane() - offset);
}
template <typename T>
HR_DEVICE T warp_from(T value, int lane) {
    return host::warp_exchange("warp_from", value, lane & (host::kLanes - 1));
}
HR_DEVICE uint32_t warp_ballot(bool predicate) {
    const host::Exchange& all = host::meet_warp("warp_ballot", &predicate, 1);
    uint32_t votes = 0;
    for (int i = 0; i < host::kLanes; ++i) votes |= static_cast<uint32_t>(all.lane[i][0]) << i;
    return votes;
}

// ---- tensor cores ----
HR_DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - host::shared_memory());
}
HR_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    unsigned char brought[40];
    std::memcpy(brought, a, 16);
    std::memcpy(brought + 16, b, 8);
    std::memcpy(brought + 24, d, 16);
    const host::Exchange& all = host::meet_warp("mma_16816", brought, sizeof(brought), host::multiply);
    std::memcpy(d, all.lane[host::lane()], 16);
}
HR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const host::Exchange& all = host::meet_warp("ldmatrix_x4", &row, sizeof(row), host::gather_matrices);
    std::memcpy(r, all.lane[host::lane()], 16);
}
HR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    const host::Exchange& all = host::meet_warp("ldmatrix_x4_trans", &row, sizeof(row), host::gather_matrices_trans);
    std::memcpy(r, all.lane[host::lane()], 16);
}

// ---- asynchronous copies, global to shared ----
HR_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
    host::copy_async(shared, global, valid);
}
HR_DEVICE void cp_async_commit() {
    host::commit_copies();
}
template <int N>
HR_DEVICE void cp_async_wait() {
    host::wait_copies(N);
}

constexpr bool kBulkCopy = HEADROOM_BULK_COPY;
HR_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
    host::barrier_init(barrier, arrivals);
}
HR_DEVICE void mbarrier_expect_and_arrive(uint64_t* barrier, unsigned bytes) {
    host::barrier_arrive(barrier, bytes);
}
HR_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
    host::barrier_wait(barrier, parity);
}
HR_DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
    host::bulk_copy(shared, global, bytes, barrier);
}

// ---- between blocks and launches ----
HR_DEVICE void grid_barrier(unsigned* counter, unsigned round) {
    host::meet_grid(counter, round);
}
// No time passes here: a counter that goes up with each look.
HR_DEVICE uint64_t global_nanoseconds() {
    static uint64_t now = 0;
    return ++now;
}
HR_DEVICE void wait_for_previous_launch() {}
HR_DEVICE void let_next_launch_begin() {}

inline int current_device() {
    return hr_host_device();
}
int set_device(int device);  // returns 0 or kHostBadDevice

inline size_t most_shared_bytes() {
    return host::device().shared_bytes;
}
// There is room for any number of fibers; one block a multiprocessor is said to fit.
template <typename... Params>
int cooperative_blocks(void (*)(Params...), int threads, size_t shared_bytes) {
    return threads <= 1024 && shared_bytes <= most_shared_bytes() ? host::device().multiprocessors : 0;
}

// Returns 0, kHostBadConfiguration, kHostBadHandle or kHostFault.
template <typename... Params, typename... Args>
int launch(const Launch& how, void (*kernel)(Params...), Args&&... args) {
    const std::tuple<Params...> parameters(std::forward<Args>(args)...);
    return host::run(how, [&] { std::apply(kernel, parameters); });
}

}  // namespace headroom
