#include "opcodes.h"

#include <algorithm>
#include <cstdlib>

#include "machine.h"
#include "settings.h"
#include "text.h"

namespace headroom::ptx {

bool Decoder::has(const std::string& part) const {
    return std::find(parts.begin(), parts.end(), part) != parts.end();
}

void Decoder::address(size_t operand) {
    const std::string& text = operands.at(operand);
    if (text.front() != '[' || text.back() != ']') throw Fault("no address: " + text);
    const std::string inside = trim(text.substr(1, text.size() - 2));
    const size_t sign = inside.find_first_of("+-", 1);
    i.offset = 0;
    if (sign != std::string::npos) {
        i.offset = std::strtoll(trim(inside.substr(inside[sign] == '+' ? sign + 1 : sign)).c_str(), nullptr, 0);
    }
    const uint32_t constant_width = i.space == Space::kShared ? kNarrow : kWide;
    const Registers::Place base = registers.find(trim(inside.substr(0, sign)), constant_width);
    i.wide_address = base.width == kWide;
    i.a = base.at;
}

uint32_t Decoder::bare_address(size_t operand, uint32_t width) {
    const std::string& text = operands.at(operand);
    return registers.source(trim(text.substr(1, text.size() - 2)), width);
}

bool decode_clock(Decoder& d) {
    if (d.i.opcode != "mov.u64" || d.operands.at(1) != "%globaltimer") return false;
    d.i.to = d.target(0, kWide);
    d.i.execute = [](Warp& warp, const Instruction& i, Lanes lanes) {
        static uint64_t looks = 0;  // a clock that goes up with each look
        ++looks;
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
            if ((lanes >> lane & 1) != 0) warp.at<uint64_t>(i.to)[lane] = looks;
        }
    };
    return true;
}

bool decode_control(Decoder& d) {
    const std::string& opcode = d.i.opcode;
    if (opcode == "ret" || opcode == "exit") {
        d.i.role = Role::kExit;
    } else if (opcode == "bar.sync" || opcode == "barrier.sync" || opcode == "barrier.sync.aligned") {
        if (d.operands.size() != 1 || d.operands[0] != "0") throw Fault("only barrier 0, of all threads, is known");
        d.i.role = Role::kBlockBarrier;
    } else if (opcode == "griddepcontrol.wait") {
        d.i.role = Role::kLaunchWait;
    } else if (opcode == "griddepcontrol.launch_dependents") {
        d.i.execute = [](Warp& warp, const Instruction&, Lanes) {
            if (!warp.block->let_next_begin) ++warp.block->grid->let_next_begin;
            warp.block->let_next_begin = true;
        };
    } else {
        return false;
    }
    return true;
}

void decode(Instruction& i, Kernel& kernel, Registers& registers, const std::vector<std::string>& operands) {
    Decoder d{i, kernel, registers, operands, split(i.opcode, '.')};
    for (const auto family : {decode_clock, decode_arithmetic, decode_memory, decode_async_copy, decode_warp_operation,
                              decode_tensor_core, decode_control}) {
        if (family(d)) return;
    }
    throw Fault("unknown instruction " + i.opcode);
}

}  // namespace headroom::ptx
