// Token plus position embedding: one block a row, 16 bytes a load.
#include "../ops.h"

namespace headroom {
namespace {

constexpr int kThreads = 128;

HR_KERNEL void embed_kernel(const int* tokens, const int* start, const half* wte, const half* wpe, float* x, int length,
                            int rows, int ld) {
    const int64_t row = blockIdx.x;
    const int t = static_cast<int>(row % length);
    const int position = min(start[row / length] + t, rows - 1);
    const half* token = wte + static_cast<int64_t>(tokens[row]) * ld;
    const half* place = wpe + static_cast<int64_t>(position) * ld;
    for (int column = static_cast<int>(threadIdx.x) * 8; column < ld; column += kThreads * 8) {
        const uint4 a = load16(token + column), b = load16(place + column);
        const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
        float* out = x + row * ld + column;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 u = unpack_half2(left[i]), v = unpack_half2(right[i]);
            out[2 * i] = u.x + v.x;
            out[2 * i + 1] = u.y + v.y;
        }
    }
}

}  // namespace

int embed(const int* tokens, const int* start, const half* wte, const half* wpe, float* x, int batch, int length,
          int rows, int ld, Stream stream) {
    const dim3 grid(static_cast<unsigned>(batch * length));
    return launch({grid, dim3(kThreads), 0, stream}, embed_kernel, tokens, start, wte, wpe, x, length, rows, ld);
}

}  // namespace headroom
