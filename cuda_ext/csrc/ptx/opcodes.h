// What an opcode does, after the PTX ISA 9.0. Exactly those that our kernels use, and few that they may come to.
#pragma once

#include <optional>

#include "program.h"
#include "registers.h"

namespace headroom::ptx {

// An instruction as it is taken apart: its opcode's parts, and where its operands' names lie.
struct Decoder {
    Instruction& i;
    Kernel& kernel;
    Registers& registers;
    const std::vector<std::string>& operands;
    std::vector<std::string> parts;  // of the opcode, between its dots

    bool has(const std::string& part) const;
    const std::string& type() const { return parts.back(); }
    uint32_t target(size_t operand, uint32_t width) const { return registers.target(operands.at(operand), width); }
    uint32_t source(size_t operand, uint32_t width) { return registers.source(operands.at(operand), width); }
    // "[%r1+4]": into i.a, i.offset and i.wide_address.
    void address(size_t operand);
    // What stands in "[%r1]", of that width and without an offset.
    uint32_t bare_address(size_t operand, uint32_t width);
};

// Fills `i` in from its opcode and operands. Raises Fault for what is not known.
void decode(Instruction& i, Kernel& kernel, Registers& registers, const std::vector<std::string>& operands);

// Each knows a family, and returns whether the opcode is one of it.
bool decode_clock(Decoder& d);
bool decode_arithmetic(Decoder& d);
bool decode_memory(Decoder& d);
bool decode_async_copy(Decoder& d);
bool decode_warp_operation(Decoder& d);
bool decode_tensor_core(Decoder& d);
bool decode_control(Decoder& d);

}  // namespace headroom::ptx
