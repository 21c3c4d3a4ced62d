// What follows a sampled token, on the device: stop tokens, the history, the next position. One thread a sequence.
#include "../ops.h"

namespace headroom {
namespace {

HR_KERNEL void advance_kernel(Advance s) {
    const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= s.batch) return;
    const bool over = s.finished[row] != 0;
    const int token = over ? s.how->pad : s.tokens[row];
    s.tokens[row] = token;
    const int place = s.step[row] - 1;  // `sample` has counted this token already
    if (place >= 0 && place < s.history_capacity) s.history[static_cast<int64_t>(row) * s.history_capacity + place] = token;
    if (over) return;
    for (int i = 0; i < s.how->stop_count; ++i) {
        if (token == s.how->stop[i]) s.finished[row] = 1;
    }
    if (s.position[row] + 1 < s.capacity) {
        s.position[row] += 1;
        s.lengths[row] += 1;
    } else {
        s.finished[row] = 1;  // no room for the next token
    }
}

}  // namespace

int advance(const Advance& state, Stream stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(state.batch, kWarp)));
    return launch({grid, dim3(kWarp), 0, stream}, advance_kernel, state);
}

}  // namespace headroom
