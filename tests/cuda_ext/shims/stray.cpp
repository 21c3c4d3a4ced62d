// A kernel with the faults that AddressSanitizer and UBSan find.
#include "device.h"

namespace headroom {
namespace {

// 1 reads and 2 writes past a row, 3 writes past shared memory, 4 reads a misaligned vector, 5 shifts too far.
HR_KERNEL void stray(int fault, const float* x, float* out, int n) {
    HR_SHARED(float, shared);
    const int i = static_cast<int>(threadIdx.x);
    shared[i] = 0;
    sync_block();
    if (fault == 1) out[0] = x[n];
    if (fault == 2 && i == 31) out[n] = 0;
    if (fault == 3) shared[i + 1] = 0;
    if (fault == 4) out[0] = reinterpret_cast<const float4*>(x + 1)->x;
    if (fault == 5) out[0] = static_cast<float>(1 << (n + i));
}

}  // namespace
}  // namespace headroom

using namespace headroom;

extern "C" {
int hr_test_stray(int fault, const float* x, float* out, int n) {
    return launch({dim3(1), dim3(32), 32 * sizeof(float)}, stray, fault, x, out, n);
}
bool hr_test_bulk_copy() {
    return kBulkCopy;
}
}
