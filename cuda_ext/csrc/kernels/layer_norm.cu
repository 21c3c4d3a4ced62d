// LayerNorm (Ba et al. 2016) of FP32 rows to FP16. One warp a row, so that no barrier is needed; the mean first and
// then the squared differences from it, since a sum of squares would cancel where the mean is large.
#include "../ops.h"

namespace headroom {
namespace {

constexpr int kWarps = 4;

HR_KERNEL void layer_norm_kernel(const float* x, const int* rows, const half* gain, const half* bias, half* out,
                                 int count, int width, int ld_x, int ld_out, float epsilon) {
    const int row = static_cast<int>(blockIdx.x) * kWarps + warp_id();
    if (row >= count) return;  // a whole warp
    const float* in = x + static_cast<int64_t>(rows != nullptr ? rows[row] : row) * ld_x;
    float sum = 0.0f;
    for (int column = lane_id(); column < width; column += kWarp) sum += in[column];
    const float mean = warp_sum(sum) / static_cast<float>(width);
    float squares = 0.0f;
    for (int column = lane_id(); column < width; column += kWarp) {
        const float difference = in[column] - mean;
        squares += difference * difference;
    }
    const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(width) + epsilon);
    half* to = out + static_cast<int64_t>(row) * ld_out;
    for (int column = lane_id(); column < ld_out; column += kWarp) {
        const bool inside = column < width;
        const float normal = inside ? (in[column] - mean) * scale * to_float(gain[column]) + to_float(bias[column]) : 0.0f;
        to[column] = to_half(normal);
    }
}

}  // namespace

int layer_norm(const float* x, const int* rows, const half* gain, const half* bias, half* out, int count, int width,
               int ld_x, int ld_out, float epsilon, Stream stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kWarps)));
    return launch({grid, dim3(kWarps * kWarp), 0, stream}, layer_norm_kernel, x, rows, gain, bias, out, count, width,
                  ld_x, ld_out, epsilon);
}

}  // namespace headroom
