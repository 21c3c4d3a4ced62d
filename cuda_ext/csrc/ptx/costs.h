// What a PTX instruction is to a multiprocessor: of which kind, how many issue slots it takes, when its result is
// there.
//
// Estimates, for all architectures alike: ptxas decides. Arithmetic takes 4 cycles, shared memory and mma about 30 (Jia
// et al. 2019, "Dissecting the NVidia Turing T4 GPU via microbenchmarking"; Luo et al. 2024, "Benchmarking and
// dissecting the Nvidia Hopper GPU architecture"); divisions are sequences of instructions, whose lengths are rounded
// counts.
#pragma once

#include "program.h"

namespace headroom::ptx {

enum class Kind : uint8_t {
    kFree,  // ptxas folds it into others: moves, address spaces, parameters
    kLoadGlobal,
    kStoreGlobal,
    kAtomic,
    kAsyncCopy,
    kShared,
    kTensor,
    kFloat,
    kInteger,
    kDivision,
    kConvert,
    kSpecial,
    kControl,
    kWarp,
    kBarrier,
    kWait,
    kCount
};
extern const char* const kKindNames[static_cast<size_t>(Kind::kCount)];

struct Cost {
    Kind kind;
    uint8_t slots;     // of a warp scheduler
    uint16_t latency;  // cycles; of global loads it depends on where they find what they ask for
};

Cost cost_of(const Instruction& i);

}  // namespace headroom::ptx
