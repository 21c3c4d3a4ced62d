// Which name of a kernel's PTX lies where in a warp's registers.
//
// A register is 32 lanes of 4 bytes (of 8 for 64-bit types) in a row, a predicate one mask. Constants and special
// registers such as %tid.x have registers of their own, filled when a warp begins.
#pragma once

#include <map>

#include "program.h"

namespace headroom::ptx {

// Of one lane, in bytes; 0 for predicates.
constexpr uint32_t kPredicate = 0, kNarrow = 4, kWide = 8;
constexpr uint32_t register_width(uint32_t type_bytes) {
    return type_bytes == 0 ? kPredicate : type_bytes == 8 ? kWide : kNarrow;
}

class Registers {
  public:
    struct Place {
        uint32_t at = kNone, width = 0;
        bool constant = false;
    };

    explicit Registers(Kernel& kernel) : kernel_(kernel) {}

    // ".reg .b32 %r<9>, x"
    void declare(const std::string& statement);
    void open_scope() { scopes_.emplace_back(); }
    void close_scope();

    // A register of that width to write to. Raises Fault where there is none.
    uint32_t target(const std::string& name, uint32_t width) const;
    // A register, constant or address of that width to read from. Raises Fault.
    uint32_t source(const std::string& operand, uint32_t width);
    // The same of any width; `width` is that of constants.
    Place find(const std::string& operand, uint32_t width);

  private:
    uint32_t make(uint32_t width);
    void declare_one(const std::string& name, uint32_t width);
    uint32_t constant(uint64_t value, bool wide);
    bool declare_special(const std::string& name);
    uint64_t value_of(const std::string& operand) const;

    Kernel& kernel_;
    std::map<std::string, Place> by_name_;
    std::vector<std::map<std::string, Place>> scopes_;  // what a scope's own names meant outside of it
    std::map<std::pair<uint64_t, bool>, uint32_t> constants_;
};

}  // namespace headroom::ptx
