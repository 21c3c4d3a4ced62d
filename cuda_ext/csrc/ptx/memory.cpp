// Loads, stores, atomics and fences.
#include <cstring>

#include "addresses.h"
#include "global_memory.h"
#include "machine.h"
#include "opcodes.h"
#include "shared_memory.h"
#include "text.h"

namespace headroom::ptx {

namespace {

constexpr uint32_t kMostBytes = 16;  // of one lane's access

enum Atomic { kAdd, kMinimum, kMaximum, kExchange };

bool is_shared(const Instruction& i, uint64_t address) {
    return i.space == Space::kShared || (i.space == Space::kGeneric && address >= kGenericShared);
}

void element_to_register(Warp& w, const Instruction& i, int lane, uint32_t place, const uint8_t* from) {
    uint64_t value = 0;
    std::memcpy(&value, from, i.bytes);
    const int unused = 64 - 8 * i.bytes;
    if (i.is_signed) value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
    if (i.wide_registers) {
        w.at<uint64_t>(place)[lane] = value;
    } else {
        w.at<uint32_t>(place)[lane] = static_cast<uint32_t>(value);
    }
}

void read_parameter(Warp& w, const Instruction& i, int lane, uint64_t address, void* to, uint32_t bytes) {
    const std::vector<uint8_t>& parameters = w.block->grid->parameters;
    if (address + bytes > parameters.size()) fault(w, i, lane, "out of bounds: beyond the kernel's parameters");
    if (address % bytes != 0) fault(w, i, lane, "misaligned: a parameter");
    std::memcpy(to, parameters.data() + address, bytes);
}

void load(Warp& w, const Instruction& i, Lanes lanes) {
    const uint32_t bytes = i.bytes * i.elements;
    const Addresses addresses(w, i, lanes, bytes, false);
    for_lanes(lanes, [&](int lane) {
        const uint64_t address = addresses[lane];
        uint8_t held[kMostBytes];
        if (i.space == Space::kParameter) {
            read_parameter(w, i, lane, address, held, bytes);
        } else if (is_shared(i, address)) {
            const auto place = static_cast<uint32_t>(address);
            check_shared(w, i, lane, place, bytes, bytes);
            touch_shared(w, i, lane, place, bytes, Touch::kRead);
            std::memcpy(held, shared_at(w, place), bytes);
        } else {
            check_global(w, i, lane, address, bytes, bytes);
            read_global(w, i, lane, address, held, bytes, i.past_l1 || i.acquire);
            if (i.acquire) acquire(w);
        }
        for (int n = 0; n < i.elements; ++n) element_to_register(w, i, lane, i.vector[n], held + n * i.bytes);
    });
}

void store(Warp& w, const Instruction& i, Lanes lanes) {
    const uint32_t bytes = i.bytes * i.elements;
    const Addresses addresses(w, i, lanes, bytes, true);
    for_lanes(lanes, [&](int lane) {
        const uint64_t address = addresses[lane];
        uint8_t held[kMostBytes];
        for (int n = 0; n < i.elements; ++n) {
            const uint64_t value =
                i.wide_registers ? w.at<uint64_t>(i.vector[n])[lane] : w.at<uint32_t>(i.vector[n])[lane];
            std::memcpy(held + n * i.bytes, &value, i.bytes);
        }
        if (is_shared(i, address)) {
            const auto place = static_cast<uint32_t>(address);
            check_shared(w, i, lane, place, bytes, bytes);
            touch_shared(w, i, lane, place, bytes, Touch::kWrite);
            std::memcpy(shared_at(w, place), held, bytes);
        } else {
            check_global(w, i, lane, address, bytes, bytes);
            if (i.release) release(w, lane);
            write_global(w, i, lane, address, held, bytes);
        }
    });
}

template <class T>
T changed(int how, T old, T value) {
    switch (how) {
        case kAdd:
            return old + value;
        case kMinimum:
            return value < old ? value : old;
        case kMaximum:
            return old < value ? value : old;
        default:
            return value;
    }
}

// They meet in L2, past what blocks hold of their own, or in the shared memory itself.
template <class T>
void atomic(Warp& w, const Instruction& i, Lanes lanes) {
    const Addresses addresses(w, i, lanes, sizeof(T), true);
    for_lanes(lanes, [&](int lane) {
        const uint64_t address = addresses[lane];
        T* place;
        if (is_shared(i, address)) {
            check_shared(w, i, lane, static_cast<uint32_t>(address), sizeof(T), sizeof(T));
            touch_shared(w, i, lane, static_cast<uint32_t>(address), sizeof(T), Touch::kAtomic);
            place = reinterpret_cast<T*>(shared_at(w, static_cast<uint32_t>(address)));
        } else {
            check_global(w, i, lane, address, sizeof(T), sizeof(T));
            settle(*w.block, address, sizeof(T));
            if (i.release) release(w, lane);
            place = reinterpret_cast<T*>(address);
        }
        const T old = *place;
        *place = changed(i.number, old, w.at<T>(i.b)[lane]);
        note_progress();
        if (i.acquire) acquire(w);
        if (i.to != kNone) w.at<T>(i.to)[lane] = old;
    });
}

void fence(Warp& w, const Instruction&, Lanes lanes) {
    for_lanes(lanes, [&](int lane) { release(w, lane); });
    acquire(w);
}

Space space_of(const Decoder& d) {
    if (d.has("global")) return Space::kGlobal;
    if (d.has("shared") || d.has("shared::cta")) return Space::kShared;
    if (d.has("param")) return Space::kParameter;
    if (d.has("local")) throw Fault("local memory is not known here");
    return Space::kGeneric;
}

void decode_load_or_store(Decoder& d, bool loads) {
    Instruction& i = d.i;
    i.space = space_of(d);
    i.elements = d.has("v4") ? 4 : d.has("v2") ? 2 : 1;
    const uint32_t bytes = type_bytes(d.type());
    if (bytes == kNone || bytes == 0 || bytes * i.elements > kMostBytes) throw Fault("unknown instruction " + i.opcode);
    i.bytes = static_cast<uint8_t>(bytes);
    i.is_signed = d.type()[0] == 's';
    i.past_l1 = d.has("cg") || d.has("volatile") || d.has("relaxed");
    i.read_only = d.has("nc");
    i.acquire = d.has("acquire"), i.release = d.has("release");
    d.kernel.reads_only = d.kernel.reads_only || i.read_only;
    const std::vector<std::string> values = elements(d.operands.at(loads ? 0 : 1));
    if (values.size() != i.elements) throw Fault("a vector of another length");
    for (size_t n = 0; n < values.size(); ++n) {
        const Registers::Place place = d.registers.find(values[n], register_width(bytes));
        if (loads && place.constant) throw Fault("a load to what is no register");
        if (n > 0 && i.wide_registers != (place.width == kWide)) throw Fault("registers of two widths");
        i.vector[n] = place.at, i.wide_registers = place.width == kWide;
    }
    d.address(loads ? 1 : 0);
    i.execute = loads ? load : store;
    if (i.acquire) i.role = Role::kPolls;
}

void decode_atomic(Decoder& d) {
    Instruction& i = d.i;
    i.space = space_of(d);
    i.number = d.has("add") ? kAdd : d.has("min") ? kMinimum : d.has("max") ? kMaximum : d.has("exch") ? kExchange : -1;
    if (i.number < 0 || type_bytes(d.type()) != 4) throw Fault("unknown instruction " + i.opcode);
    i.release = d.has("release") || d.has("acq_rel"), i.acquire = d.has("acquire") || d.has("acq_rel");
    const bool returns = d.parts[0] == "atom";
    if (returns) i.to = d.target(0, kNarrow);
    d.address(returns ? 1 : 0);
    i.b = d.source(returns ? 2 : 1, kNarrow);
    i.execute = d.type() == "f32" ? atomic<float> : d.type() == "s32" ? atomic<int32_t> : atomic<uint32_t>;
}

}  // namespace

Addresses::Addresses(Warp& w, const Instruction& i, Lanes lanes, uint32_t bytes, bool is_write) {
    for_lanes(lanes, [&](int lane) {
        const uint64_t base = i.wide_address ? w.at<uint64_t>(i.a)[lane] : w.at<uint32_t>(i.a)[lane];
        at_[lane] = base + static_cast<uint64_t>(i.offset);
    });
    if (observer == nullptr || i.space == Space::kParameter) return;
    const bool shared = is_shared(i, at_[__builtin_ctz(lanes)]);
    uint64_t seen[kWarp];
    for_lanes(lanes,
              [&](int lane) { seen[lane] = shared ? static_cast<uint32_t>(at_[lane]) - kSharedBase : at_[lane]; });
    observer->accesses(w, i, {shared ? Space::kShared : Space::kGlobal, is_write, lanes, bytes, seen});
}

bool decode_memory(Decoder& d) {
    const std::string& head = d.parts[0];
    const std::string& opcode = d.i.opcode;
    if (head == "ld" || head == "st") {
        decode_load_or_store(d, head == "ld");
    } else if (head == "atom" || head == "red") {
        decode_atomic(d);
    } else if (opcode == "membar.gl" || opcode == "fence.acq_rel.gpu" || opcode == "fence.sc.gpu") {
        d.i.execute = fence;
    } else if (opcode == "membar.cta" || opcode == "fence.acq_rel.cta") {
        d.i.execute = [](Warp&, const Instruction&, Lanes) {};  // a block sees its own stores at once
    } else {
        return false;
    }
    return true;
}

}  // namespace headroom::ptx
