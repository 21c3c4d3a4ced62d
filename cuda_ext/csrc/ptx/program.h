// A program as it is run: PTX whose names have become places in a warp's registers.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace headroom::ptx {

using Lanes = uint32_t;  // a bit for each lane of a warp
constexpr int kWarp = 32;
constexpr uint32_t kNone = ~0u;

// The generic address space: what lies from here on is shared memory, all else global.
constexpr uint64_t kGenericShared = 0xF000'0000'0000'0000;
// Where a block's shared memory begins: sm_80 and later keep the first KiB for the system.
constexpr uint32_t kSharedBase = 1024;

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&, Lanes);

// What the scheduler must know of an instruction.
enum class Role : uint8_t {
    kPlain,         // each lane by itself
    kBranch,        // may split the warp
    kExit,          // ends lanes
    kWarp,          // waits for all lanes that it names
    kWholeWarp,     // .aligned: needs all 32 lanes
    kBlockBarrier,  // waits for the block
    kPolls,         // a loop may go around it: others get their turn
    kLaunchWait,    // waits for the launch before
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParameter, kLocal };

// Operands are byte offsets into a warp's registers.
struct Instruction {
    Execute execute = nullptr;
    Role role = Role::kPlain;
    uint32_t guard = kNone;  // a predicate
    bool guard_negated = false;

    uint32_t to = kNone, to_predicate = kNone, a = kNone, b = kNone, c = kNone;
    uint32_t lanes_named = kNone;  // of warp operations: the register with their mask
    uint32_t vector[12] = {};      // elements of vectors and fragments
    int number = 0;                // an immediate: a group count, a way to shuffle, an atomic's kind
    int target = -1;               // of a branch

    // Of memory operations.
    Space space = Space::kGlobal;
    bool wide_address = true;  // of 64 bits
    int64_t offset = 0;
    uint8_t elements = 1, bytes = 4;  // bytes: of one element
    bool is_signed = false, wide_registers = false;
    bool past_l1 = false, read_only = false, acquire = false, release = false, transposed = false;

    std::string opcode, text;
    uint32_t line = 0;                          // in the PTX
    uint32_t source_file = 0, source_line = 0;  // of the .cu, by .loc
    uint32_t caller_file = 0, caller_line = 0;  // where a wrapper was inlined, or the same
    mutable uint64_t executions = 0;            // by how many warps
};

struct Parameter {
    std::string name;
    uint32_t offset, bytes;
};

struct Constant {
    uint32_t at;
    uint64_t value;
    bool wide;
};

struct Module;

struct Kernel {
    const Module* module = nullptr;
    std::string name;
    std::string body;  // PTX, until the first launch assembles it
    uint32_t body_line = 0;
    std::vector<Parameter> parameters;
    uint32_t parameter_bytes = 0;
    uint32_t most_threads = 1024;

    bool assembled = false;
    std::vector<Instruction> code;
    uint32_t register_bytes = 0;
    std::vector<Constant> constants;
    std::map<std::string, uint32_t> special;  // "%tid.x" and the like: where they lie
    bool reads_only = false;                  // has ld.global.nc
    uint64_t launches = 0;

    std::string title() const;                      // "gemm_kernel<Tile<64, 64, 2>>", for people
    std::string place(const Instruction& i) const;  // "device_gpu.h:81"
    std::string caller(const Instruction& i) const;  // "gemm.cu:81", where a wrapper such as device_gpu.h's is called
    std::string place(uint32_t file, uint32_t line) const;
};

struct Module {
    uint32_t architecture = 80;
    std::map<uint32_t, std::string> files;  // of .loc
    std::vector<std::string> shared_names;  // of .extern .shared arrays: all begin at kSharedBase
    std::vector<std::unique_ptr<Kernel>> kernels;
};

}  // namespace headroom::ptx
