// Arithmetic, logic, comparisons, conversions and moves: what each lane does with its registers alone.
#include <bit>
#include <unordered_map>

#include "machine.h"
#include "numbers.h"
#include "opcodes.h"
#include "text.h"

namespace headroom::ptx {

namespace {

using u32 = uint32_t;
using u64 = uint64_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;

// 16-bit values lie zero-extended in registers of 4 bytes.
struct Plain {
    Execute execute;
    uint32_t to, a, b, c;  // widths; kNone where there is no such operand
};

template <class T>
constexpr uint32_t width = sizeof(T) == 8 ? kWide : kNarrow;

template <class D, class A, class F>
Plain unary(F) {
    const auto execute = [](Warp& w, const Instruction& i, Lanes lanes) {
        D* const to = w.at<D>(i.to);
        const A* const a = w.at<A>(i.a);
        for_lanes(lanes, [&](int lane) { to[lane] = static_cast<D>(F{}(a[lane])); });
    };
    return {execute, width<D>, width<A>, kNone, kNone};
}

template <class D, class A, class B, class F>
Plain binary(F) {
    const auto execute = [](Warp& w, const Instruction& i, Lanes lanes) {
        D* const to = w.at<D>(i.to);
        const A* const a = w.at<A>(i.a);
        const B* const b = w.at<B>(i.b);
        for_lanes(lanes, [&](int lane) { to[lane] = static_cast<D>(F{}(a[lane], b[lane])); });
    };
    return {execute, width<D>, width<A>, width<B>, kNone};
}

template <class D, class A, class C, class F>
Plain ternary(F) {
    const auto execute = [](Warp& w, const Instruction& i, Lanes lanes) {
        D* const to = w.at<D>(i.to);
        const A *const a = w.at<A>(i.a), *const b = w.at<A>(i.b);
        const C* const c = w.at<C>(i.c);
        for_lanes(lanes, [&](int lane) { to[lane] = static_cast<D>(F{}(a[lane], b[lane], c[lane])); });
    };
    return {execute, width<D>, width<A>, width<A>, width<C>};
}

// All lanes' predicates are one mask.
template <class F>
Plain predicates(F, bool two) {
    const auto execute = [](Warp& w, const Instruction& i, Lanes lanes) {
        Lanes& to = *w.at<Lanes>(i.to);
        const Lanes a = *w.at<Lanes>(i.a), b = i.b == kNone ? 0 : *w.at<Lanes>(i.b);
        to = (to & ~lanes) | (F{}(a, b) & lanes);
    };
    return {execute, kPredicate, kPredicate, two ? kPredicate : kNone, kNone};
}

template <class T, class F>
Plain both(F run) {
    return binary<T, T, T>(run);
}

const std::unordered_map<std::string, Plain>& plain_opcodes() {
    static const auto add = [](auto a, auto b) { return a + b; };
    static const auto subtract = [](auto a, auto b) { return a - b; };
    static const auto multiply = [](auto a, auto b) { return a * b; };
    static const auto multiply_add = [](auto a, auto b, auto c) { return a * b + c; };
    static const auto divide = [](auto a, auto b) { return quotient(a, b); };
    static const auto modulo = [](auto a, auto b) { return remainder_of(a, b); };
    static const auto least = [](auto a, auto b) { return a < b ? a : b; };
    static const auto most = [](auto a, auto b) { return a < b ? b : a; };
    static const auto bit_and = [](auto a, auto b) { return a & b; };
    static const auto bit_or = [](auto a, auto b) { return a | b; };
    static const auto bit_xor = [](auto a, auto b) { return a ^ b; };
    static const auto bit_not = [](auto a) { return ~a; };
    static const auto negate = [](auto a) { return -a; };
    static const auto left = [](auto a, u32 by) { return shift_left(a, by); };
    static const auto right = [](auto a, u32 by) { return shift_right(a, by); };
    static const auto same = [](auto a) { return a; };
    static const auto low16 = [](u32 a) { return a & 0xffff; };
    static const auto sign16 = [](u32 a) { return static_cast<int16_t>(a); };
    static const auto fused = [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); };
    static const auto power_of_2 = [](f32 a) { return exp2_approximate(a); };
    static const auto reciprocal = [](f32 a) { return approximate(1.0 / static_cast<double>(a)); };
    static const auto reciprocal_root = [](f32 a) { return approximate(1.0 / std::sqrt(static_cast<double>(a))); };
    static const auto logarithm = [](f32 a) { return approximate(std::log2(static_cast<double>(a))); };
    static const auto tangent = [](f32 a) { return approximate(std::tanh(static_cast<double>(a))); };
    static const auto sine = [](f32 a) { return approximate(std::sin(static_cast<double>(a))); };
    static const auto cosine = [](f32 a) { return approximate(std::cos(static_cast<double>(a))); };

    static const std::unordered_map<std::string, Plain> table = {
        // Whole numbers: of two's complement, so that signed ones wrap as unsigned ones do.
        {"add.s32", both<u32>(add)},
        {"add.u32", both<u32>(add)},
        {"add.s64", both<u64>(add)},
        {"add.u64", both<u64>(add)},
        {"add.s16", both<u32>([](u32 a, u32 b) { return (a + b) & 0xffff; })},
        {"sub.s32", both<u32>(subtract)},
        {"sub.u32", both<u32>(subtract)},
        {"sub.s64", both<u64>(subtract)},
        {"sub.u64", both<u64>(subtract)},
        {"mul.lo.s32", both<u32>(multiply)},
        {"mul.lo.u32", both<u32>(multiply)},
        {"mul.lo.s64", both<u64>(multiply)},
        {"mul.lo.u64", both<u64>(multiply)},
        {"mul.lo.s16", both<u32>([](u32 a, u32 b) { return (a * b) & 0xffff; })},
        {"mul.hi.u32", both<u32>([](u32 a, u32 b) { return (u64{a} * b) >> 32; })},
        {"mul.hi.s32", both<s32>([](s32 a, s32 b) { return (s64{a} * b) >> 32; })},
        {"mul.wide.s32", binary<s64, s32, s32>([](s32 a, s32 b) { return s64{a} * b; })},
        {"mul.wide.u32", binary<u64, u32, u32>([](u32 a, u32 b) { return u64{a} * b; })},
        {"mad.lo.s32", ternary<u32, u32, u32>(multiply_add)},
        {"mad.lo.u32", ternary<u32, u32, u32>(multiply_add)},
        {"mad.lo.s64", ternary<u64, u64, u64>(multiply_add)},
        {"mad.lo.u64", ternary<u64, u64, u64>(multiply_add)},
        {"mad.wide.s32", ternary<s64, s32, s64>([](s32 a, s32 b, s64 c) { return s64{a} * b + c; })},
        {"mad.wide.u32", ternary<u64, u32, u64>([](u32 a, u32 b, u64 c) { return u64{a} * b + c; })},
        {"div.s32", both<s32>(divide)},
        {"div.u32", both<u32>(divide)},
        {"div.s64", both<s64>(divide)},
        {"div.u64", both<u64>(divide)},
        {"rem.s32", both<s32>(modulo)},
        {"rem.u32", both<u32>(modulo)},
        {"rem.s64", both<s64>(modulo)},
        {"rem.u64", both<u64>(modulo)},
        {"min.s32", both<s32>(least)},
        {"min.u32", both<u32>(least)},
        {"min.s64", both<s64>(least)},
        {"min.u64", both<u64>(least)},
        {"max.s32", both<s32>(most)},
        {"max.u32", both<u32>(most)},
        {"max.s64", both<s64>(most)},
        {"max.u64", both<u64>(most)},
        {"neg.s32", unary<u32, u32>([](u32 a) { return 0u - a; })},
        {"neg.s64", unary<u64, u64>([](u64 a) { return u64{0} - a; })},
        {"abs.s32", unary<u32, s32>([](s32 a) { return a < 0 ? 0u - static_cast<u32>(a) : static_cast<u32>(a); })},

        // Bits.
        {"and.b32", both<u32>(bit_and)},
        {"or.b32", both<u32>(bit_or)},
        {"xor.b32", both<u32>(bit_xor)},
        {"not.b32", unary<u32, u32>(bit_not)},
        {"and.b64", both<u64>(bit_and)},
        {"or.b64", both<u64>(bit_or)},
        {"xor.b64", both<u64>(bit_xor)},
        {"not.b64", unary<u64, u64>(bit_not)},
        {"and.b16", both<u32>(bit_and)},
        {"or.b16", both<u32>(bit_or)},
        {"xor.b16", both<u32>(bit_xor)},
        {"not.b16", unary<u32, u32>([](u32 a) { return ~a & 0xffff; })},
        {"shl.b32", binary<u32, u32, u32>(left)},
        {"shl.b64", binary<u64, u64, u32>(left)},
        {"shr.u32", binary<u32, u32, u32>(right)},
        {"shr.b32", binary<u32, u32, u32>(right)},
        {"shr.s32", binary<s32, s32, u32>(right)},
        {"shr.u64", binary<u64, u64, u32>(right)},
        {"shr.b64", binary<u64, u64, u32>(right)},
        {"shr.s64", binary<s64, s64, u32>(right)},
        {"popc.b32", unary<u32, u32>([](u32 a) { return std::popcount(a); })},
        {"clz.b32", unary<u32, u32>([](u32 a) { return std::countl_zero(a); })},
        {"brev.b32", unary<u32, u32>([](u32 a) {
             u32 reversed = 0;
             for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
             return reversed;
         })},

        // FP32.
        {"add.f32", both<f32>(add)},
        {"add.rn.f32", both<f32>(add)},
        {"sub.f32", both<f32>(subtract)},
        {"sub.rn.f32", both<f32>(subtract)},
        {"mul.f32", both<f32>(multiply)},
        {"mul.rn.f32", both<f32>(multiply)},
        {"div.rn.f32", both<f32>([](f32 a, f32 b) { return a / b; })},
        {"fma.rn.f32", ternary<f32, f32, f32>(fused)},
        {"fma.rm.f32", ternary<f32, f32, f32>([](f32 a, f32 b, f32 c) { return fma_towards_minus(a, b, c); })},
        {"max.f32", both<f32>([](f32 a, f32 b) { return max_of(a, b); })},
        {"min.f32", both<f32>([](f32 a, f32 b) { return min_of(a, b); })},
        {"neg.f32", unary<f32, f32>(negate)},
        {"abs.f32", unary<f32, f32>([](f32 a) { return std::fabs(a); })},
        {"copysign.f32", both<f32>([](f32 a, f32 b) { return std::copysign(b, a); })},
        {"rcp.rn.f32", unary<f32, f32>([](f32 a) { return 1.0f / a; })},
        {"sqrt.rn.f32", unary<f32, f32>([](f32 a) { return std::sqrt(a); })},
        {"ex2.approx.f32", unary<f32, f32>(power_of_2)},
        {"ex2.approx.ftz.f32",
         unary<f32, f32>([](f32 a) { return flush_subnormal(exp2_approximate(flush_subnormal(a))); })},
        {"rcp.approx.f32", unary<f32, f32>(reciprocal)},
        {"rcp.approx.ftz.f32", unary<f32, f32>([](f32 a) {
             return flush_subnormal(approximate(1.0 / static_cast<double>(flush_subnormal(a))));
         })},
        {"rsqrt.approx.f32", unary<f32, f32>(reciprocal_root)},
        {"lg2.approx.f32", unary<f32, f32>(logarithm)},
        {"tanh.approx.f32", unary<f32, f32>(tangent)},
        {"sin.approx.f32", unary<f32, f32>(sine)},
        {"cos.approx.f32", unary<f32, f32>(cosine)},

        // Conversions.
        {"cvt.f32.f16", unary<f32, u32>([](u32 a) { return half_to_float(a); })},
        {"cvt.rn.f16.f32", unary<u32, f32>([](f32 a) { return float_to_half(a); })},
        {"cvt.rn.f16x2.f32",
         binary<u32, f32, f32>([](f32 high, f32 low) { return float_to_half(high) << 16 | float_to_half(low); })},
        {"cvt.rn.f32.s32", unary<f32, s32>(same)},
        {"cvt.rn.f32.u32", unary<f32, u32>(same)},
        {"cvt.rn.f32.s64", unary<f32, s64>(same)},
        {"cvt.rn.f32.u64", unary<f32, u64>(same)},
        {"cvt.s64.s32", unary<s64, s32>(same)},
        {"cvt.u64.u32", unary<u64, u32>(same)},
        {"cvt.u32.u64", unary<u32, u64>(same)},
        {"cvt.s32.s64", unary<u32, u64>(same)},
        {"cvt.u32.u16", unary<u32, u32>(low16)},
        {"cvt.u16.u32", unary<u32, u32>(low16)},
        {"cvt.u64.u16", unary<u64, u32>(low16)},
        {"cvt.u16.u64", unary<u32, u64>([](u64 a) { return a & 0xffff; })},
        {"cvt.s32.s16", unary<s32, u32>(sign16)},
        {"cvt.s64.s16", unary<s64, u32>(sign16)},
        {"cvt.sat.f32.f32", unary<f32, f32>([](f32 a) { return saturate(a); })},

        // Address spaces: global and generic addresses are the same.
        {"cvta.to.global.u64", unary<u64, u64>(same)},
        {"cvta.global.u64", unary<u64, u64>(same)},
        {"cvta.shared.u64", unary<u64, u64>([](u64 a) { return a | kGenericShared; })},
        {"cvta.to.shared.u64", unary<u64, u64>([](u64 a) { return a & 0xffff'ffff; })},

        {"not.pred", predicates([](Lanes a, Lanes) { return ~a; }, false)},
        {"mov.pred", predicates([](Lanes a, Lanes) { return a; }, false)},
        {"and.pred", predicates([](Lanes a, Lanes b) { return a & b; }, true)},
        {"or.pred", predicates([](Lanes a, Lanes b) { return a | b; }, true)},
        {"xor.pred", predicates([](Lanes a, Lanes b) { return a ^ b; }, true)},
    };
    return table;
}

// The low half of a register that is wider than the conversion's source.
const std::unordered_map<std::string, Plain>& conversions_of_wide_registers() {
    static const std::unordered_map<std::string, Plain> table = {
        {"cvt.s64.s32", unary<s64, u64>([](u64 a) { return static_cast<s32>(a); })},
        {"cvt.u64.u32", unary<u64, u64>([](u64 a) { return static_cast<u32>(a); })},
    };
    return table;
}

// ---- comparisons ----

// The last of them, on NaN: "unordered" ones are true, others false.
template <class T, class F>
Plain comparison(F) {
    const auto execute = [](Warp& w, const Instruction& i, Lanes lanes) {
        using Register = std::conditional_t<sizeof(T) == 2, u32, T>;
        const Register *const a = w.at<Register>(i.a), *const b = w.at<Register>(i.b);
        Lanes holds = 0;
        for_lanes(lanes, [&](int lane) {
            holds |= static_cast<Lanes>(F{}(static_cast<T>(a[lane]), static_cast<T>(b[lane]))) << lane;
        });
        Lanes& to = *w.at<Lanes>(i.to);
        to = (to & ~lanes) | holds;
    };
    return {execute, kPredicate, width<T>, width<T>, kNone};
}

template <class T>
const Plain* comparison_of(const std::string& how) {
    static const auto equal = [](T a, T b) { return a == b; };
    static const auto less = [](T a, T b) { return a < b; };
    static const auto at_most = [](T a, T b) { return a <= b; };
    static const auto more = [](T a, T b) { return a > b; };
    static const auto at_least = [](T a, T b) { return a >= b; };
    static const std::unordered_map<std::string, Plain> table = {
        {"eq", comparison<T>(equal)},
        {"ne", comparison<T>([](T a, T b) { return a < b || a > b; })},
        {"lt", comparison<T>(less)},
        {"lo", comparison<T>(less)},
        {"le", comparison<T>(at_most)},
        {"ls", comparison<T>(at_most)},
        {"gt", comparison<T>(more)},
        {"hi", comparison<T>(more)},
        {"ge", comparison<T>(at_least)},
        {"hs", comparison<T>(at_least)},
        {"equ", comparison<T>([](T a, T b) { return !(a < b || a > b); })},
        {"neu", comparison<T>([](T a, T b) { return a != b; })},
        {"ltu", comparison<T>([](T a, T b) { return !(a >= b); })},
        {"leu", comparison<T>([](T a, T b) { return !(a > b); })},
        {"gtu", comparison<T>([](T a, T b) { return !(a <= b); })},
        {"geu", comparison<T>([](T a, T b) { return !(a < b); })},
        {"num", comparison<T>([](T a, T b) { return a == a && b == b; })},
        {"nan", comparison<T>([](T a, T b) { return a != a || b != b; })},
    };
    const auto it = table.find(how);
    return it == table.end() ? nullptr : &it->second;
}

const Plain* comparison_of(const std::string& how, const std::string& type) {
    if (type == "s32") return comparison_of<s32>(how);
    if (type == "u32" || type == "b32") return comparison_of<u32>(how);
    if (type == "s64") return comparison_of<s64>(how);
    if (type == "u64" || type == "b64") return comparison_of<u64>(how);
    if (type == "s16") return comparison_of<int16_t>(how);
    if (type == "u16" || type == "b16") return comparison_of<uint16_t>(how);
    if (type == "f32") return comparison_of<f32>(how);
    return nullptr;
}

template <class T>
void select(Warp& w, const Instruction& i, Lanes lanes) {
    T* const to = w.at<T>(i.to);
    const T *const a = w.at<T>(i.a), *const b = w.at<T>(i.b);
    const Lanes first = *w.at<Lanes>(i.c);
    for_lanes(lanes, [&](int lane) { to[lane] = first >> lane & 1 ? a[lane] : b[lane]; });
}

// ---- moves ----

template <class Whole, int kBits>
void join(Warp& w, const Instruction& i, Lanes lanes) {
    const u32 *const low = w.at<u32>(i.a), *const high = w.at<u32>(i.b);
    Whole* const to = w.at<Whole>(i.to);
    constexpr Whole kLow = (Whole{1} << kBits) - 1;
    for_lanes(lanes, [&](int lane) { to[lane] = (low[lane] & kLow) | static_cast<Whole>(high[lane]) << kBits; });
}

template <class Whole, int kBits>
void take_apart(Warp& w, const Instruction& i, Lanes lanes) {
    const Whole* const from = w.at<Whole>(i.a);
    u32 *const low = w.at<u32>(i.vector[0]), *const high = w.at<u32>(i.vector[1]);
    constexpr Whole kLow = (Whole{1} << kBits) - 1;
    for_lanes(lanes, [&](int lane) {
        const Whole value = from[lane];
        low[lane] = static_cast<u32>(value & kLow), high[lane] = static_cast<u32>(value >> kBits);
    });
}

void decode_move(Decoder& d) {
    const uint32_t bytes = type_bytes(d.type()), whole = register_width(bytes);
    const std::vector<std::string> to = elements(d.operands.at(0)), from = elements(d.operands.at(1));
    Instruction& i = d.i;
    if (to.size() == 1 && from.size() == 1) {
        i.to = d.target(0, whole), i.a = d.source(1, whole);
        const auto same = [](auto a) { return a; };
        i.execute = whole == kWide ? unary<u64, u64>(same).execute : unary<u32, u32>(same).execute;
    } else if (to.size() == 1 && from.size() == 2 && bytes >= 4) {
        i.to = d.target(0, whole);
        i.a = d.registers.source(from[0], kNarrow), i.b = d.registers.source(from[1], kNarrow);
        i.execute = whole == kWide ? join<u64, 32> : join<u32, 16>;
    } else if (to.size() == 2 && from.size() == 1 && bytes >= 4) {
        for (size_t n = 0; n < 2; ++n) i.vector[n] = d.registers.target(to[n], kNarrow);
        i.a = d.source(1, whole);
        i.execute = whole == kWide ? take_apart<u64, 32> : take_apart<u32, 16>;
    } else {
        throw Fault("unknown move");
    }
}

void set_operands(Decoder& d, const Plain& plain) {
    const size_t count = 2u + (plain.b != kNone) + (plain.c != kNone);
    if (d.operands.size() != count) throw Fault(std::to_string(count) + " operands were expected");
    d.i.execute = plain.execute;
    d.i.to = d.target(0, plain.to), d.i.a = d.source(1, plain.a);
    if (plain.b != kNone) d.i.b = d.source(2, plain.b);
    if (plain.c != kNone) d.i.c = d.source(3, plain.c);
}

}  // namespace

bool decode_arithmetic(Decoder& d) {
    const std::string& head = d.parts[0];
    if (head == "mov" && d.type() != "pred") {
        decode_move(d);
    } else if (head == "setp") {
        const Plain* const plain = d.parts.size() == 3 ? comparison_of(d.parts[1], d.type()) : nullptr;
        if (plain == nullptr) throw Fault("unknown instruction " + d.i.opcode);
        set_operands(d, *plain);
    } else if (head == "selp") {
        const uint32_t wide = register_width(type_bytes(d.type()));
        set_operands(d, {wide == kWide ? select<u64> : select<u32>, wide, wide, wide, kPredicate});
    } else {
        const auto it = plain_opcodes().find(d.i.opcode);
        if (it == plain_opcodes().end()) return false;
        const auto wide = conversions_of_wide_registers().find(d.i.opcode);
        const bool from_wide =
            wide != conversions_of_wide_registers().end() && d.registers.find(d.operands.at(1), kNarrow).width == kWide;
        set_operands(d, from_wide ? wide->second : it->second);
    }
    return true;
}

}  // namespace headroom::ptx
