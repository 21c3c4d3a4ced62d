#include "text.h"

#include "program.h"

namespace headroom::ptx {

std::string trim(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\r\n");
    if (first == std::string::npos) return "";
    return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (const char c : text) {
        if (c == '{' || c == '[') ++depth;
        if (c == '}' || c == ']') --depth;
        if (c == separator && depth == 0) {
            parts.push_back(part);
            part.clear();
        } else {
            part += c;
        }
    }
    if (!part.empty()) parts.push_back(part);
    return parts;
}

std::vector<std::string> elements(const std::string& operand) {
    if (operand[0] != '{') return {operand};
    std::vector<std::string> parts = split(operand.substr(1, operand.size() - 2), ',');
    for (std::string& part : parts) part = trim(part);
    return parts;
}

uint32_t type_bytes(const std::string& type) {
    if (type == "pred") return 0;
    if (type == "f16x2") return 4;
    if (type == "bf16") return 2;
    if (type.size() < 2 || std::string("bsuf").find(type[0]) == std::string::npos) return kNone;
    const std::string bits = type.substr(1);
    if (bits == "8") return 1;
    if (bits == "16") return 2;
    if (bits == "32") return 4;
    if (bits == "64") return 8;
    return kNone;
}

}  // namespace headroom::ptx
