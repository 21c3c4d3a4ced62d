// Arithmetic as the GPU has it, where C++'s differs or leaves it open.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "settings.h"

namespace headroom::ptx {

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

inline float half_to_float(uint32_t bits) {
    const auto low = static_cast<uint16_t>(bits);
    Half value;
    std::memcpy(&value, &low, sizeof(value));
    return static_cast<float>(value);
}

inline uint32_t float_to_half(float value) {  // to the nearest, ties to even
    const Half rounded = static_cast<Half>(value);
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    return bits;
}

inline float flush_subnormal(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// Under settings.rough: off by up to 2 ulp, which the ISA allows its approximate functions.
inline float approximate(double exact) {
    float x = static_cast<float>(exact);
    if (!settings.rough || !std::isfinite(x) || x == 0) return x;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    constexpr uint32_t kHash = 2654435761u;
    const int off = static_cast<int>((bits * kHash >> 16) % 5) - 2;
    const float towards = off < 0 ? 0.0f : std::copysign(std::numeric_limits<float>::max(), x);
    for (int step = 0; step < std::abs(off); ++step) x = std::nextafter(x, towards);
    return x;
}

inline float exp2_approximate(float x) {  // exact at whole numbers on all GPUs
    const double exact = std::exp2(static_cast<double>(x));
    return x == std::floor(x) ? static_cast<float>(exact) : approximate(exact);
}

inline float fma_towards_minus(float a, float b, float c) {
    const int before = std::fegetround();
    std::fesetround(FE_DOWNWARD);
    volatile float x = a, y = b, z = c;  // computed here, between the two
    volatile float result = std::fma(x, y, z);
    std::fesetround(before);
    return result;
}

// NaN only where both are, and -0 below 0.
inline float max_of(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}
inline float min_of(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}
inline float saturate(float a) {
    return std::isnan(a) ? 0.0f : std::fmin(std::fmax(a, 0.0f), 1.0f);
}

// By zero the result is not defined; all ones are what GPUs give.
template <class T>
T quotient(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1))
        return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    return static_cast<T>(a / b);
}
template <class T>
T remainder_of(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
}

// Shifts by more than the width give 0, or the sign.
template <class T>
T shift_left(T a, uint32_t by) {
    return by >= 8 * sizeof(T) ? 0 : static_cast<T>(a << by);
}
template <class T>
T shift_right(T a, uint32_t by) {
    constexpr uint32_t kMost = 8 * sizeof(T) - 1;
    if (std::is_unsigned_v<T> && by > kMost) return 0;
    return static_cast<T>(a >> (by > kMost ? kMost : by));
}

}  // namespace headroom::ptx
