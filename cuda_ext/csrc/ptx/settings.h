// How a run goes: what is checked, and which of the orders that hardware may take is taken.
#pragma once

#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace headroom::ptx {

// What the interpreter finds wrong with a program, in one sentence.
struct Fault : std::runtime_error {
    using runtime_error::runtime_error;
};

// When an asynchronous copy arrives.
enum class Copies { kAtTheWait, kAtOnce, kEither };

struct Settings {
    uint64_t seed = 0;
    Copies copies = Copies::kAtTheWait;
    bool any_order = false;         // any side of a divergent branch first, not the one with the lowest address
    bool weak_memory = false;       // blocks read stale lines, and see each other's stores late
    bool always_weak = false;       // that, under every seed
    bool races = true;              // accesses of shared memory that nothing orders are faults
    bool named_memory = false;      // global accesses must lie within what hr_ptx_name_memory named
    bool rough = false;             // tensor cores truncate sums, approximate functions are 2 ulp off
    uint64_t budget = 300'000'000;  // warp instructions that one call may run
};

extern Settings settings;
extern std::mt19937_64 chance;  // all that is left open is drawn from here

// Nine seeds in a row go through each way of copies with the lowest address first, any order, and weak memory.
void seed_settings(uint64_t seed);
// Raises std::out_of_range for a name that is none.
void change_setting(const std::string& name, int64_t value);

// Remarks that are no faults, each once.
extern std::vector<std::string> notes;
void note(const std::string& what);

}  // namespace headroom::ptx
