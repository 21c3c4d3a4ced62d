#include "parser.h"

#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdlib>
#include <sstream>
#include <string_view>

#include "opcodes.h"
#include "registers.h"
#include "settings.h"
#include "text.h"

namespace headroom::ptx {

std::string Kernel::title() const {
    int status = 0;
    char* const demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string text = status == 0 ? demangled : name;
    std::free(demangled);
    const std::string hidden = "(anonymous namespace)::";
    for (size_t at = text.find(hidden); at != std::string::npos; at = text.find(hidden)) text.erase(at, hidden.size());
    text = text.substr(0, text.find('('));
    const size_t scope = text.rfind("::", text.find('<'));
    return scope == std::string::npos ? text : text.substr(scope + 2);
}

std::string Kernel::place(const Instruction& i) const { return place(i.source_file, i.source_line); }

std::string Kernel::caller(const Instruction& i) const { return place(i.caller_file, i.caller_line); }

std::string Kernel::place(uint32_t number, uint32_t line) const {
    const auto file = module->files.find(number);
    return file == module->files.end() ? "?" : file->second + ":" + std::to_string(line);
}

namespace {

bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$';
}

// Line numbers stay.
std::string without_comments(const std::string& text) {
    std::string plain;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text.compare(i, 2, "//") == 0) {
            i = std::min(text.find('\n', i), text.size());
            plain += '\n';
        } else if (text.compare(i, 2, "/*") == 0) {
            const size_t end = std::min(text.find("*/", i), text.size());
            plain.append(static_cast<size_t>(std::count(text.begin() + static_cast<long>(i),
                                                        text.begin() + static_cast<long>(end), '\n')),
                         '\n');
            i = end + 1;
        } else {
            plain += text[i];
        }
    }
    return plain;
}

std::vector<std::string> words(const std::string& text) {
    std::istringstream in(text);
    std::vector<std::string> found;
    for (std::string word; in >> word;) found.push_back(word);
    return found;
}

// ".file 2 "/where/gemm.cu""
std::map<uint32_t, std::string> file_names(const std::string& text) {
    std::map<uint32_t, std::string> names;
    for (size_t at = text.find(".file"); at != std::string::npos; at = text.find(".file", at + 5)) {
        const size_t open = text.find('"', at), close = text.find('"', open + 1);
        if (close == std::string::npos) break;
        const std::string path = text.substr(open + 1, close - open - 1);
        names[static_cast<uint32_t>(std::atoi(text.c_str() + at + 5))] = path.substr(path.rfind('/') + 1);
    }
    return names;
}

// ".extern .shared .align 128 .b8 name[];"
std::vector<std::string> shared_names(const std::string& text) {
    std::vector<std::string> names;
    for (size_t at = text.find(".extern .shared"); at != std::string::npos; at = text.find(".extern .shared", at + 1)) {
        const std::string name = words(text.substr(at, text.find(';', at) - at)).back();
        names.push_back(name.substr(0, name.find('[')));
    }
    return names;
}

// ".param .align 8 .b8 name[200]": after the ISA, each at its own alignment.
Parameter parameter(const std::string& text, uint32_t first_free) {
    const std::vector<std::string> parts = words(text);
    uint32_t alignment = 0, bytes = 0, count = 1;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
        const uint32_t of_type = parts[i][0] == '.' ? type_bytes(parts[i].substr(1)) : kNone;
        if (parts[i] == ".align") alignment = static_cast<uint32_t>(std::atoi(parts[i + 1].c_str()));
        if (of_type != kNone) bytes = of_type;
    }
    const size_t array = parts.back().find('[');
    if (array != std::string::npos) count = static_cast<uint32_t>(std::atoi(parts.back().c_str() + array + 1));
    if (alignment == 0) alignment = bytes;
    return {parts.back().substr(0, array), (first_free + alignment - 1) / alignment * alignment, bytes * count};
}

// ".maxntid 256, 1, 1"
uint32_t most_threads(const std::string& directives) {
    const size_t at = directives.find(".maxntid");
    if (at == std::string::npos) return 1024;
    uint32_t product = 1;
    std::istringstream numbers(directives.substr(at + 8));
    for (uint32_t n = 0; numbers >> n;) {
        product *= n;
        char comma = ' ';
        if (!(numbers >> comma) || comma != ',') break;
    }
    return product;
}

size_t closing_brace(const std::string& text, size_t open) {
    int depth = 0;
    for (size_t at = open; at < text.size(); ++at) {
        if (text[at] == '{') ++depth;
        if (text[at] == '}' && --depth == 0) return at;
    }
    throw Fault("a { without its }");
}

std::unique_ptr<Kernel> kernel_at(const Module& module, const std::string& text, size_t entry) {
    auto kernel = std::make_unique<Kernel>();
    kernel->module = &module;
    const size_t body = text.find('{', entry), list = std::min(text.find('(', entry), body);
    kernel->name = trim(text.substr(entry, list - entry));
    size_t head_end = list;
    if (text[list] == '(') {
        head_end = text.find(')', list);
        for (const std::string& part : split(text.substr(list + 1, head_end - list - 1), ',')) {
            kernel->parameters.push_back(parameter(part, kernel->parameter_bytes));
            kernel->parameter_bytes = kernel->parameters.back().offset + kernel->parameters.back().bytes;
        }
    }
    kernel->most_threads = most_threads(text.substr(head_end, body - head_end));
    kernel->body = text.substr(body + 1, closing_brace(text, body) - body - 1);
    kernel->body_line =
        1 + static_cast<uint32_t>(std::count(text.begin(), text.begin() + static_cast<long>(body), '\n'));
    return kernel;
}

using Location = std::array<uint32_t, 3>;  // file, line, column
constexpr std::string_view kInlinedAt = "inlined_at";

// Goes through a body's statements, labels and scopes.
class Assembler {
  public:
    explicit Assembler(Kernel& kernel) : kernel_(kernel), registers_(kernel), line_(kernel.body_line) {}

    void run() {
        const std::string& text = kernel_.body;
        for (size_t at = 0; at < text.size(); ++at) take(text, at);
        for (const auto& [jump, label] : jumps_) {
            const auto it = labels_.find(label);
            Instruction& i = kernel_.code[jump];
            if (it == labels_.end()) throw unknown("no label " + label, i.line, i.text);
            i.target = static_cast<int>(it->second);
        }
        Instruction end;
        end.role = Role::kExit;
        end.opcode = end.text = "(end)";
        end.line = line_;
        kernel_.code.push_back(end);
    }

  private:
    void take(const std::string& text, size_t& at) {
        const char c = text[at];
        if (c == '\n') ++line_;
        const bool blank = trim(now_).empty();
        if (blank) now_line_ = line_;
        if (blank && text.compare(at, 4, ".loc") == 0 && !is_word(text[at + 4])) {
            take_location(text, at);
        } else if (depth_ == 0 && blank && c == '{') {
            open_scope(text, at);
            now_.clear();
        } else if (depth_ == 0 && c == '}') {
            if (!blank) throw Fault(kernel_.name + ": unfinished statement " + now_);
            registers_.close_scope();
            scopes_.pop_back();
            now_.clear();
        } else if (c == ';') {
            take_statement(trim(now_));
            now_.clear();
        } else if (c == ':' && depth_ == 0 && is_label(text, at)) {
            labels_[label(trim(now_))] = static_cast<uint32_t>(kernel_.code.size());
            now_.clear();
        } else {
            if (c == '{') ++depth_;
            if (c == '}') --depth_;
            now_ += c;
        }
    }

    // ".loc 2 81 9, function_name ..., inlined_at 1 12 5" up to the line's end
    void take_location(const std::string& text, size_t& at) {
        const size_t end = std::min(text.find('\n', at), text.size());
        const std::string line = text.substr(at + 4, end - at - 4);
        const Location here = location(line);
        source_file_ = here[0], source_line_ = here[1];
        const size_t inlined = line.find(kInlinedAt);
        if (inlined != std::string::npos) {
            callers_[here] = location(line.substr(inlined + kInlinedAt.size()));
        } else {
            callers_.erase(here);
        }
        Location caller = here;  // the frame nearest to it that is no wrapper; frames come before what they call
        while (is_wrapper(caller[0]) && callers_.count(caller) != 0) caller = callers_.at(caller);
        caller_file_ = caller[0], caller_line_ = caller[1];
        at = end;
        ++line_;
    }

    static Location location(const std::string& text) {
        char* rest = nullptr;
        Location found{static_cast<uint32_t>(std::strtoul(text.c_str(), &rest, 10))};
        for (size_t n = 1; n < found.size(); ++n) found[n] = static_cast<uint32_t>(std::strtoul(rest, &rest, 10));
        return found;
    }

    // device.h, device_gpu.h and the toolkit's: their lines tell little.
    bool is_wrapper(uint32_t file) const {
        const auto found = kernel_.module->files.find(file);
        if (found == kernel_.module->files.end()) return false;
        const std::string& name = found->second;
        return name.compare(0, 6, "device") == 0 || name.compare(std::max<size_t>(name.size(), 4) - 4, 4, ".hpp") == 0;
    }

    bool is_label(const std::string& text, size_t colon) const {
        if (text[colon + 1] == ':' || (colon > 0 && text[colon - 1] == ':')) return false;
        const std::string word = trim(now_);
        return !word.empty() && std::all_of(word.begin(), word.end(), is_word);
    }

    // A scope's labels hide those outside; they are gathered before its statements, which may jump ahead.
    void open_scope(const std::string& text, size_t open) {
        registers_.open_scope();
        std::map<std::string, std::string>& own = scopes_.emplace_back();
        const size_t close = closing_brace(text, open);
        int depth = 0;
        std::string word;
        for (size_t at = open; at < close; ++at) {
            if (text[at] == '{') ++depth;
            if (text[at] == '}') --depth;
            const bool single = text[at] == ':' && text[at + 1] != ':' && text[at - 1] != ':';
            if (single && depth == 1 && !word.empty()) own[word] = word + "#" + std::to_string(unique_);
            word = is_word(text[at]) ? word + text[at] : "";
        }
        ++unique_;
    }

    std::string label(const std::string& name) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            const auto it = scope->find(name);
            if (it != scope->end()) return it->second;
        }
        return name;
    }

    void take_statement(const std::string& statement) {
        if (statement.empty() || statement.compare(0, 7, ".pragma") == 0) return;
        try {
            if (statement.compare(0, 4, ".reg") == 0) {
                registers_.declare(statement);
            } else if (statement[0] == '.') {
                throw Fault("unknown directive");
            } else {
                kernel_.code.push_back(instruction(statement));
            }
        } catch (const std::exception& error) {
            throw unknown(error.what(), now_line_, statement);
        }
    }

    Fault unknown(const std::string& what, uint32_t line, const std::string& statement) const {
        return Fault(what + " -- " + kernel_.title() + ", PTX line " + std::to_string(line) + ": " + statement);
    }

    Instruction instruction(const std::string& statement) {
        Instruction i;
        i.text = statement, i.line = now_line_;
        i.source_file = source_file_, i.source_line = source_line_;
        i.caller_file = caller_file_, i.caller_line = caller_line_;
        std::string rest = statement;
        if (rest[0] == '@') {
            const size_t end = rest.find_first_of(" \t");
            i.guard_negated = rest[1] == '!';
            i.guard =
                registers_.target(rest.substr(i.guard_negated ? 2 : 1, end - (i.guard_negated ? 2 : 1)), kPredicate);
            rest = trim(rest.substr(end));
        }
        const size_t end = std::min(rest.find_first_of(" \t\n"), rest.size());
        i.opcode = rest.substr(0, end);
        std::vector<std::string> operands = split(rest.substr(end), ',');
        for (std::string& operand : operands) operand = trim(operand);
        if (i.opcode == "bra" || i.opcode == "bra.uni") {
            i.role = Role::kBranch;
            jumps_.emplace_back(kernel_.code.size(), label(operands.at(0)));
        } else {
            decode(i, kernel_, registers_, operands);
        }
        return i;
    }

    Kernel& kernel_;
    Registers registers_;
    std::vector<std::map<std::string, std::string>> scopes_;  // labels as written -> unique ones
    std::map<std::string, uint32_t> labels_;
    std::vector<std::pair<size_t, std::string>> jumps_;
    std::string now_;  // the statement so far
    uint32_t line_, now_line_ = 0, source_file_ = 0, source_line_ = 0, caller_file_ = 0, caller_line_ = 0;
    std::map<Location, Location> callers_;  // of what was inlined
    int depth_ = 0, unique_ = 0;
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& original) {
    const std::string text = without_comments(original);
    auto module = std::make_unique<Module>();
    const size_t target = text.find(".target sm_");
    if (target == std::string::npos) throw Fault("no .target: this is no PTX");
    module->architecture = static_cast<uint32_t>(std::atoi(text.c_str() + target + 11));
    module->files = file_names(text);
    module->shared_names = shared_names(text);
    for (size_t at = text.find(".entry"); at != std::string::npos; at = text.find(".entry", at + 6)) {
        module->kernels.push_back(kernel_at(*module, text, at + 6));
    }
    return module;
}

void assemble(Kernel& kernel) {
    if (kernel.assembled) return;
    Assembler(kernel).run();
    kernel.assembled = true;
}

}  // namespace headroom::ptx
