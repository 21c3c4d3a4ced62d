// Small things that parsing needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace headroom::ptx {

std::string trim(const std::string& text);
// At `separator`s outside of brackets and braces; nothing for an empty text.
std::vector<std::string> split(const std::string& text, char separator);
// "{%r1, %r2}" -> %r1 and %r2; "%r1" -> itself.
std::vector<std::string> elements(const std::string& operand);
// Of "f32", "b64", ...: 0 for "pred", kNone for what is no type.
uint32_t type_bytes(const std::string& type);

}  // namespace headroom::ptx
