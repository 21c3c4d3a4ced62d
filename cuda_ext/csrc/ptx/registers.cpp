#include "registers.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "settings.h"
#include "text.h"

namespace headroom::ptx {

namespace {

constexpr uint32_t kAlignment = 64;  // so that loops over lanes can be vectors

const char* const kSpecial[] = {"%tid.x",   "%tid.y",   "%tid.z",    "%ntid.x",   "%ntid.y",   "%ntid.z", "%ctaid.x",
                                "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"};

}  // namespace

uint32_t Registers::make(uint32_t width) {
    const uint32_t bytes = width == kPredicate ? sizeof(Lanes) : width * kWarp;
    if (width != kPredicate)
        kernel_.register_bytes = (kernel_.register_bytes + kAlignment - 1) / kAlignment * kAlignment;
    const uint32_t at = kernel_.register_bytes;
    kernel_.register_bytes += bytes;
    return at;
}

void Registers::declare(const std::string& statement) {
    const size_t type = statement.find('.', 4), names = statement.find_first_of(" \t", type);
    const uint32_t width = register_width(type_bytes(statement.substr(type + 1, names - type - 1)));
    for (const std::string& part : split(statement.substr(names), ',')) {
        const std::string name = trim(part);
        const size_t many = name.find('<');
        if (many == std::string::npos) {
            declare_one(name, width);
            continue;
        }
        const int count = std::atoi(name.c_str() + many + 1);
        for (int n = 0; n < count; ++n) declare_one(name.substr(0, many) + std::to_string(n), width);
    }
}

void Registers::declare_one(const std::string& name, uint32_t width) {
    Place& place = by_name_[name];
    if (!scopes_.empty()) scopes_.back().try_emplace(name, place);
    place = {make(width), width};
}

void Registers::close_scope() {
    for (const auto& [name, outside] : scopes_.back()) {
        if (outside.at == kNone) {
            by_name_.erase(name);
        } else {
            by_name_[name] = outside;
        }
    }
    scopes_.pop_back();
}

bool Registers::declare_special(const std::string& name) {
    if (std::find(std::begin(kSpecial), std::end(kSpecial), name) == std::end(kSpecial)) return false;
    auto [it, fresh] = kernel_.special.try_emplace(name, 0);
    if (fresh) it->second = make(kNarrow);
    by_name_[name] = {it->second, kNarrow};
    return true;
}

uint32_t Registers::target(const std::string& name, uint32_t width) const {
    const auto it = by_name_.find(name);
    if (it == by_name_.end()) throw Fault("no register " + name);
    if (it->second.width != width) throw Fault("the width of " + name);
    return it->second.at;
}

uint32_t Registers::source(const std::string& operand, uint32_t width) {
    const Place place = find(operand, width);
    if (place.width != width) throw Fault("the width of " + operand);
    return place.at;
}

Registers::Place Registers::find(const std::string& operand, uint32_t width) {
    const auto it = by_name_.find(operand);
    if (it != by_name_.end()) return it->second;
    if (declare_special(operand)) return by_name_[operand];
    return {constant(value_of(operand), width == kWide), width, true};
}

uint32_t Registers::constant(uint64_t value, bool wide) {
    if (!wide) value = static_cast<uint32_t>(value);
    auto [it, fresh] = constants_.try_emplace({value, wide}, 0);
    if (fresh) {
        it->second = make(wide ? kWide : kNarrow);
        kernel_.constants.push_back({it->second, value, wide});
    }
    return it->second;
}

uint64_t Registers::value_of(const std::string& operand) const {
    const char first = operand[0];
    const char second = operand.size() > 2 ? static_cast<char>(std::tolower(operand[1])) : ' ';
    if (first == '0' && (second == 'f' || second == 'd')) return std::strtoull(operand.c_str() + 2, nullptr, 16);
    if (first == '-') return static_cast<uint64_t>(std::strtoll(operand.c_str(), nullptr, 0));
    if (std::isdigit(static_cast<unsigned char>(first)) != 0) return std::strtoull(operand.c_str(), nullptr, 0);
    for (const Parameter& parameter : kernel_.parameters) {
        if (parameter.name == operand) return parameter.offset;
    }
    const std::vector<std::string>& shared = kernel_.module->shared_names;
    if (std::find(shared.begin(), shared.end(), operand) != shared.end()) return kSharedBase;
    throw Fault("unknown operand " + operand);
}

}  // namespace headroom::ptx
