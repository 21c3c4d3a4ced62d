// LayerNorm (Ba et al. 2016) of one FP32 row by one warp: no barrier, 1024 columns on their way at once.
//
// The mean first and then the squared differences from it: a sum of squares would cancel where the mean is large.
// After the first of the three passes the row comes from L1.
#pragma once

#include "device.h"

namespace headroom {

// Eight columns of a row of `width`; `fill` behind its end. Rows are 16-byte aligned.
HR_DEVICE void load_columns(const float* row, int column, int width, float fill, float (&x)[8]) {
    if (column + 8 <= width) {
        const float4 low = *reinterpret_cast<const float4*>(row + column);
        const float4 high = *reinterpret_cast<const float4*>(row + column + 4);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = column + i < width ? row[column + i] : fill;
}

HR_DEVICE void load_columns(const half* row, int column, int width, float (&x)[8]) {
    if (column + 8 <= width) {
        unpack8(load16(row + column), x);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
}

// use(column, x) for this lane's columns of 0..end-1, eight at a time.
template <typename Use>
HR_DEVICE void each_eight(const float* row, int width, int end, float fill, Use use) {
    constexpr int kTogether = 4;
    for (int base = lane_id() * 8; base < end; base += kTogether * kWarp * 8) {
        float x[kTogether][8];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) load_columns(row, base + i * kWarp * 8, width, fill, x[i]);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int column = base + i * kWarp * 8;
            if (column < end) use(column, x[i]);
        }
    }
}

// `out`: columns width..ld_out-1 become zeros; ld_out is a multiple of 8. Gain, shift and both rows: 16-byte aligned.
HR_DEVICE void row_norm(const float* in, const half* gain, const half* shift, half* out, int width, int ld_out,
                        float epsilon) {
    float sum = 0.0f, squares = 0.0f;
    each_eight(in, width, width, 0.0f, [&](int, const float(&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x[i];
    });
    const float mean = warp_sum(sum) / static_cast<float>(width);
    each_eight(in, width, width, mean, [&](int, const float(&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += (x[i] - mean) * (x[i] - mean);
    });
    const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(width) + epsilon);
    each_eight(in, width, ld_out, mean, [&](int column, const float(&x)[8]) {
        float g[8], s[8], y[8];  // zeros behind the width, as gain and shift are
        load_columns(gain, column, width, g);
        load_columns(shift, column, width, s);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = (x[i] - mean) * scale * g[i] + s[i];
        store16(out + column, make_uint4(pack_half2(y[0], y[1]), pack_half2(y[2], y[3]), pack_half2(y[4], y[5]),
                                         pack_half2(y[6], y[7])));
    });
}

}  // namespace headroom
