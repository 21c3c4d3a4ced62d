// x[row, column] += bias[column]: for products whose own epilogue cannot.
#include "../ops.h"

namespace headroom {
namespace {

constexpr int kThreads = 256;

HR_KERNEL void add_bias_kernel(const half* bias, float* x, int n, int ld) {
    const int column = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (column < n) x[static_cast<int64_t>(blockIdx.y) * ld + column] += to_float(bias[column]);
}

}  // namespace

int add_bias(const half* bias, float* x, int m, int n, int ld, Stream stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(n, kThreads)), static_cast<unsigned>(m));
    return launch({grid, dim3(kThreads), 0, stream}, add_bias_kernel, bias, x, n, ld);
}

}  // namespace headroom
