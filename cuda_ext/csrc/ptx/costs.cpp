#include "costs.h"

#include <string_view>

namespace headroom::ptx {

const char* const kKindNames[] = {"free",    "load_global", "store_global", "atomic",   "async_copy", "shared",
                                  "tensor",  "fma",         "integer",      "division", "convert",    "special",
                                  "control", "warp",        "barrier",      "wait"};

namespace {

struct Row {
    std::string_view prefix;
    Cost cost;
};

// The first whose prefix fits.
constexpr Row kRows[] = {
    {"ld.param", {Kind::kFree, 0, 0}},
    {"ld.shared", {Kind::kShared, 1, 29}},
    {"st.shared", {Kind::kShared, 1, 0}},
    {"ldmatrix", {Kind::kShared, 1, 33}},
    {"ld.acquire", {Kind::kWait, 1, 0}},
    {"ld", {Kind::kLoadGlobal, 1, 0}},
    {"st", {Kind::kStoreGlobal, 1, 0}},
    {"atom.shared", {Kind::kShared, 1, 60}},
    {"atom", {Kind::kAtomic, 1, 0}},
    {"red", {Kind::kAtomic, 1, 0}},
    {"membar", {Kind::kWait, 1, 0}},
    {"fence", {Kind::kWait, 1, 0}},
    {"cp.async.commit", {Kind::kControl, 1, 0}},
    {"cp.async.wait", {Kind::kWait, 1, 0}},
    {"cp.async", {Kind::kAsyncCopy, 1, 0}},
    {"mbarrier", {Kind::kWait, 1, 20}},
    {"griddepcontrol", {Kind::kWait, 1, 0}},
    {"bar.warp", {Kind::kWarp, 1, 4}},
    {"bar", {Kind::kBarrier, 1, 20}},
    {"shfl", {Kind::kWarp, 1, 23}},
    {"vote", {Kind::kWarp, 1, 12}},
    {"mma", {Kind::kTensor, 1, 33}},
    {"mov", {Kind::kFree, 0, 0}},
    {"cvta", {Kind::kFree, 0, 0}},
    {"cvt.u64", {Kind::kInteger, 1, 4}},
    {"cvt.s64", {Kind::kInteger, 1, 4}},
    {"cvt.u32", {Kind::kFree, 0, 0}},
    {"cvt.u16", {Kind::kFree, 0, 0}},
    {"cvt", {Kind::kConvert, 2, 6}},  // a quarter of the arithmetic's rate on the way to and from FP16 scalars
    {"bra", {Kind::kControl, 1, 0}},
    {"ret", {Kind::kControl, 1, 0}},
    {"exit", {Kind::kControl, 1, 0}},
    {"setp", {Kind::kControl, 1, 4}},
    {"selp", {Kind::kControl, 1, 4}},
    {"not.pred", {Kind::kControl, 1, 4}},
    {"and.pred", {Kind::kControl, 1, 4}},
    {"or.pred", {Kind::kControl, 1, 4}},
    {"xor.pred", {Kind::kControl, 1, 4}},
    {"div.rn.f32", {Kind::kSpecial, 10, 60}},
    {"sqrt.rn.f32", {Kind::kSpecial, 9, 50}},
    {"rcp.rn.f32", {Kind::kSpecial, 7, 40}},
    {"ex2", {Kind::kSpecial, 2, 22}},
    {"rcp", {Kind::kSpecial, 2, 22}},
    {"rsqrt", {Kind::kSpecial, 2, 22}},
    {"lg2", {Kind::kSpecial, 2, 22}},
    {"tanh", {Kind::kSpecial, 2, 22}},
};

bool ends_with_any(std::string_view text, std::initializer_list<std::string_view> ends) {
    for (const std::string_view end : ends) {
        if (text.size() >= end.size() && text.substr(text.size() - end.size()) == end) return true;
    }
    return false;
}

}  // namespace

Cost cost_of(const Instruction& i) {
    const std::string_view opcode = i.opcode;
    for (const Row& row : kRows) {
        if (opcode.substr(0, row.prefix.size()) == row.prefix) return row.cost;
    }
    if (ends_with_any(opcode, {".f32", ".f16", ".f16x2"})) return {Kind::kFloat, 1, 4};
    const bool divides = opcode.substr(0, 3) == "div" || opcode.substr(0, 3) == "rem";
    const bool wide = ends_with_any(opcode, {"64"});
    if (divides) return wide ? Cost{Kind::kDivision, 40, 130} : Cost{Kind::kDivision, 20, 110};
    if (opcode.substr(0, 6) == "mul.lo" && wide) return {Kind::kInteger, 4, 12};
    return wide ? Cost{Kind::kInteger, 2, 8} : Cost{Kind::kInteger, 1, 4};
}

}  // namespace headroom::ptx
