// LayerNorm of many rows, a warp each.
#include "../ops.h"
#include "../row_norm.h"

namespace headroom {
namespace {

constexpr int kWarps = 4;

HR_KERNEL void layer_norm_kernel(const float* x, const int* rows, const half* gain, const half* bias, half* out,
                                 int count, int width, int ld_x, int ld_out, float epsilon) {
    const int row = static_cast<int>(blockIdx.x) * kWarps + warp_id();
    if (row >= count) return;  // a whole warp
    const float* in = x + static_cast<int64_t>(rows != nullptr ? rows[row] : row) * ld_x;
    row_norm(in, gain, bias, out + static_cast<int64_t>(row) * ld_out, width, ld_out, epsilon);
}

}  // namespace

int layer_norm(const float* x, const int* rows, const half* gain, const half* bias, half* out, int count, int width,
               int ld_x, int ld_out, float epsilon, Stream stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kWarps)));
    return launch({grid, dim3(kWarps * kWarp), 0, stream}, layer_norm_kernel, x, rows, gain, bias, out, count, width,
                  ld_x, ld_out, epsilon);
}

}  // namespace headroom
