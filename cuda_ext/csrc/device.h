// What a kernel may use: the only header kernels include besides their own.
//
// nvcc compiles a kernel for the GPU; g++ compiles the same source for host/runtime.h, which runs it on
// the CPU. So hardware is touched here alone, through thin wrappers, and both sides offer the same names.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include "device_gpu.h"
#else
#include "host/runtime.h"
#endif

namespace headroom {

constexpr int kWarp = 32;

// ---- small helpers, the same on both sides ----

HR_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
HR_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

template <typename T>
HR_ANY T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

template <typename T>
HR_ANY T round_up(T a, T b) {
    return ceil_div(a, b) * b;
}

HR_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += warp_xor(value, offset);
    return value;
}

HR_DEVICE float warp_max(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, warp_xor(value, offset));
    return value;
}

// The sum over a block, in every thread. `scratch`: one float a warp, in shared memory; free again on return.
HR_DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (lane_id() == 0) scratch[warp_id()] = value;
    sync_block();
    const int warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp;
    float total = lane_id() < warps ? scratch[lane_id()] : 0.0f;
    total = warp_sum(total);
    sync_block();
    return total;
}

// Eight FP16 numbers as they lie in memory.
HR_DEVICE void unpack8(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 both = unpack_half2(words[i]);
        x[2 * i] = both.x;
        x[2 * i + 1] = both.y;
    }
}

// The calls of a scope go to `device`, those behind it to the device that was current before. Streams, attributes of
// kernels, occupancy and handles of libraries belong to one device.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device)
        : before_(current_device()), changed_(device != before_), error(changed_ ? set_device(device) : 0) {}
    ~DeviceGuard() {
        if (changed_) set_device(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    const int before_;
    const bool changed_;

  public:
    const int error;  // 0, or the CUDA error for a device that is not there
};

// GPT-2's GELU: the tanh approximation (Hendrycks and Gimpel 2016, section 2).
HR_DEVICE float gelu_tanh(float x) {
    constexpr float kRoot2OverPi = 0.7978845608028654f;
    return 0.5f * x * (1.0f + tanhf(kRoot2OverPi * (x + 0.044715f * x * x * x)));
}

}  // namespace headroom
