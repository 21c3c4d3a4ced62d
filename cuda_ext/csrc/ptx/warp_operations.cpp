// Shuffles, votes and warp barriers: what all lanes that are named do together.
#include <cstring>
#include <map>

#include "machine.h"
#include "opcodes.h"
#include "text.h"

namespace headroom::ptx {

namespace {

enum Way { kUp, kDown, kButterfly, kIndex };

struct Source {
    int lane;
    bool in_range;
};

// PTX ISA, "shfl.sync": c holds the clamp in bits 0-4 and the segment mask in bits 8-12.
Source source_of(int way, int lane, uint32_t b, uint32_t c) {
    const int by = static_cast<int>(b & 31), clamp = static_cast<int>(c & 31), segment = static_cast<int>(c >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    switch (way) {
        case kUp:
            return {lane - by, lane - by >= last};
        case kDown:
            return {lane + by, lane + by <= last};
        case kButterfly:
            return {lane ^ by, (lane ^ by) <= last};
        default: {
            const int from = first | (by & ~segment);
            return {from, from <= last};
        }
    }
}

void shuffle(Warp& w, const Instruction& i, Lanes lanes) {
    uint32_t given[kWarp];
    std::memcpy(given, w.at<uint32_t>(i.a), sizeof(given));  // the target may be the source
    const uint32_t *const b = w.at<uint32_t>(i.b), *const c = w.at<uint32_t>(i.c);
    uint32_t result[kWarp];
    Lanes in_range = 0;
    for_lanes(lanes, [&](int lane) {
        Source source = source_of(i.number, lane, b[lane], c[lane]);
        if (!source.in_range) source.lane = lane;
        if ((lanes >> source.lane & 1) == 0) {
            fault(w, i, lane, "a shuffle from lane " + std::to_string(source.lane) + ", which takes no part");
        }
        result[lane] = given[source.lane];
        in_range |= static_cast<Lanes>(source.in_range) << lane;
    });
    for_lanes(lanes, [&](int lane) { w.at<uint32_t>(i.to)[lane] = result[lane]; });
    if (i.to_predicate != kNone) {
        Lanes& to = *w.at<Lanes>(i.to_predicate);
        to = (to & ~lanes) | in_range;
    }
}

void ballot(Warp& w, const Instruction& i, Lanes lanes) {
    const Lanes votes = *w.at<Lanes>(i.a) & lanes;
    for_lanes(lanes, [&](int lane) { w.at<uint32_t>(i.to)[lane] = votes; });
}

}  // namespace

bool decode_warp_operation(Decoder& d) {
    Instruction& i = d.i;
    if (d.parts[0] == "shfl") {
        static const std::map<std::string, Way> ways = {
            {"up", kUp}, {"down", kDown}, {"bfly", kButterfly}, {"idx", kIndex}};
        i.number = ways.at(d.parts.at(2));
        const std::vector<std::string> to = split(d.operands.at(0), '|');
        i.to = d.registers.target(trim(to[0]), kNarrow);
        if (to.size() > 1) i.to_predicate = d.registers.target(trim(to[1]), kPredicate);
        i.a = d.source(1, kNarrow), i.b = d.source(2, kNarrow), i.c = d.source(3, kNarrow);
        i.lanes_named = d.source(4, kNarrow);
        i.execute = shuffle;
    } else if (i.opcode == "vote.sync.ballot.b32") {
        i.to = d.target(0, kNarrow);
        i.a = d.source(1, kPredicate);
        i.lanes_named = d.source(2, kNarrow);
        i.execute = ballot;
    } else if (i.opcode == "bar.warp.sync") {
        i.lanes_named = d.source(0, kNarrow);
        i.execute = [](Warp& w, const Instruction&, Lanes) { ++w.epoch; };
    } else {
        return false;
    }
    i.role = Role::kWarp;
    return true;
}

}  // namespace headroom::ptx
