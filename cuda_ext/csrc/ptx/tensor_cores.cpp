// ldmatrix and mma: fragments as the PTX ISA lays them out ("Matrix fragments for mma.m16n8k16", "ldmatrix").
#include <cstring>

#include "addresses.h"
#include "machine.h"
#include "numbers.h"
#include "opcodes.h"
#include "shared_memory.h"
#include "text.h"

namespace headroom::ptx {

namespace {

constexpr int kSide = 8;  // of the matrices that ldmatrix reads
constexpr uint32_t kRowBytes = 16;
constexpr int kM = 16, kN = 8;
constexpr int kSums = 4;  // FP32 ones that a lane holds of a 16x8 tile
constexpr int kStep = 8;  // products that a tensor core adds up at once

// Lane i gives the address of row i % 8 of matrix i / 8. It receives row i / 4, columns i % 4 * 2 and the next one.
void load_matrices(Warp& w, const Instruction& i, Lanes) {
    const Lanes rows_given = i.elements == 4 ? ~0u : (1u << kSide * i.elements) - 1;
    const Addresses addresses(w, i, rows_given, kRowBytes, false);
    uint32_t result[4][kWarp];
    for (int matrix = 0; matrix < i.elements; ++matrix) {
        uint16_t held[kSide][kSide];
        for (int row = 0; row < kSide; ++row) {
            const int lane = matrix * kSide + row;
            const auto address = static_cast<uint32_t>(addresses[lane]);
            check_shared(w, i, lane, address, kRowBytes, kRowBytes);
            touch_shared(w, i, lane, address, kRowBytes, Touch::kRead);
            std::memcpy(held[row], shared_at(w, address), kRowBytes);
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            const uint32_t low = i.transposed ? held[column][row] : held[row][column];
            const uint32_t high = i.transposed ? held[column + 1][row] : held[row][column + 1];
            result[matrix][lane] = low | high << 16;
        }
    }
    for (int matrix = 0; matrix < i.elements; ++matrix) {
        std::memcpy(w.at<uint32_t>(i.vector[matrix]), result[matrix], sizeof(result[matrix]));
    }
}

// A sum as tensor cores may make it: each term cut to 24 bits below the largest exponent, then the result to FP32.
float truncated_sum(const double* terms, int count) {
    constexpr int kBits = 24;
    int top = std::numeric_limits<int>::min();
    double plain = 0;
    for (int n = 0; n < count; ++n) {
        plain += terms[n];
        if (terms[n] != 0 && std::isfinite(terms[n])) top = std::max(top, std::ilogb(terms[n]));
    }
    if (!std::isfinite(plain) || top == std::numeric_limits<int>::min()) return static_cast<float>(plain);
    double sum = 0;
    for (int n = 0; n < count; ++n) sum += std::ldexp(std::trunc(std::ldexp(terms[n], kBits - top)), top - kBits);
    const float rounded = static_cast<float>(sum);
    return std::fabs(static_cast<double>(rounded)) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

// sum + the products of a row of A and a column of B
float dot(float sum, const float* a, const float* b, int depth) {
    if (!settings.rough) {
        double exact = sum;
        for (int k = 0; k < depth; ++k) exact += static_cast<double>(a[k]) * b[k];
        return static_cast<float>(exact);
    }
    for (int first = 0; first < depth; first += kStep) {
        double terms[kStep + 1];
        for (int k = 0; k < kStep; ++k) terms[k] = static_cast<double>(a[first + k]) * b[first + k];
        terms[kStep] = sum;
        sum = truncated_sum(terms, kStep + 1);
    }
    return sum;
}

// D = A B + C in place, m16n8 and k of 16 or 8 (i.number). `vector`: four sums, then A's registers, then B's.
void multiply(Warp& w, const Instruction& i, Lanes) {
    const int depth = i.number, a_registers = depth / 4, b_registers = depth / 8;
    float a[kM][16], b[kN][16];  // b: by columns
    for (int lane = 0; lane < kWarp; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int r = 0; r < a_registers; ++r) {
            const uint32_t both = w.at<uint32_t>(i.vector[kSums + r])[lane];
            float* const to = &a[group + r % 2 * 8][pair + r / 2 * 8];
            to[0] = half_to_float(both), to[1] = half_to_float(both >> 16);
        }
        for (int r = 0; r < b_registers; ++r) {
            const uint32_t both = w.at<uint32_t>(i.vector[kSums + a_registers + r])[lane];
            float* const to = &b[group][pair + r * 8];
            to[0] = half_to_float(both), to[1] = half_to_float(both >> 16);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int r = 0; r < kSums; ++r) {
            float& sum = w.at<float>(i.vector[r])[lane];
            sum = dot(sum, a[lane / 4 + r / 2 * 8], b[lane % 4 * 2 + r % 2], depth);
        }
    }
}

void decode_load_matrices(Decoder& d) {
    Instruction& i = d.i;
    i.elements = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
    i.transposed = d.has("trans");
    i.space = Space::kShared;
    const std::vector<std::string> to = elements(d.operands.at(0));
    if (to.size() != i.elements || !d.has("m8n8") || d.type() != "b16") throw Fault("unknown instruction " + i.opcode);
    for (size_t n = 0; n < to.size(); ++n) i.vector[n] = d.registers.target(to[n], kNarrow);
    d.address(1);
    i.execute = load_matrices;
}

void decode_multiply(Decoder& d) {
    Instruction& i = d.i;
    i.number = d.has("m16n8k16") ? 16 : d.has("m16n8k8") ? 8 : 0;
    const bool known = i.number != 0 && i.opcode.find(".row.col.f32.f16.f16.f32") != std::string::npos;
    if (!known) throw Fault("unknown instruction " + i.opcode);
    const size_t counts[] = {kSums, static_cast<size_t>(i.number) / 4, static_cast<size_t>(i.number) / 8, kSums};
    size_t place = 0;
    for (size_t n = 0; n < 4; ++n) {
        const std::vector<std::string> fragment = elements(d.operands.at(n));
        if (fragment.size() != counts[n]) throw Fault("a fragment of another size");
        if (n == 3 && fragment != elements(d.operands[0])) throw Fault("an mma that is not in place");
        if (n == 3) break;
        for (const std::string& name : fragment) i.vector[place++] = d.registers.source(name, kNarrow);
    }
    i.execute = multiply;
}

}  // namespace

bool decode_tensor_core(Decoder& d) {
    if (d.parts[0] == "ldmatrix") {
        decode_load_matrices(d);
    } else if (d.parts[0] == "mma") {
        decode_multiply(d);
    } else {
        return false;
    }
    d.i.role = Role::kWholeWarp;
    return true;
}

}  // namespace headroom::ptx
