#include "api.h"

#include <cstring>
#include <fstream>
#include <iterator>

#include "global_memory.h"
#include "machine.h"
#include "parser.h"

using namespace headroom::ptx;

namespace {

enum Error { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719 };  // cudaError_t's

// Kept as long as the process: libraries with kernels are never unloaded.
std::vector<std::unique_ptr<Module>> modules;
std::vector<std::unique_ptr<Grid>> queue;
std::string error;
uint64_t launches;
const char* (*rewrite)(const char*) = nullptr;

constexpr uint32_t kMostGridYZ = 65535;

std::string quoted(const std::string& text) {
    std::string json = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') json += '\\';
        json += c == '\n' || c == '\t' ? ' ' : c;
    }
    return json + "\"";
}

void write_kernel(std::ostream& out, const Kernel& k) {
    out << R"({"kernel": )" << quoted(k.name) << R"(, "title": )" << quoted(k.title()) << R"(, "architecture": )"
        << k.module->architecture << R"(, "launches": )" << k.launches << R"(, "instructions": [)";
    const char* comma = "";
    for (const Instruction& i : k.code) {
        if (&i == &k.code.back()) break;  // the end that the assembler has added
        out << comma << "[" << i.line << ", " << quoted(k.place(i)) << ", " << quoted(i.opcode) << ", " << i.executions
            << ", " << quoted(i.text) << "]";
        comma = ", ";
    }
    out << "]}\n";
}

template <class F>
int guarded(F run) {
    try {
        run();
        return kSuccess;
    } catch (const std::exception& what) {
        error = what.what();
        return kLaunchFailure;
    }
}

}  // namespace

void* hr_ptx_load(const char* text) {
    const int code = guarded([&] { modules.push_back(parse(rewrite == nullptr ? text : rewrite(text))); });
    return code == kSuccess ? modules.back().get() : nullptr;
}

void* hr_ptx_kernel(void* module, const char* name) {
    for (const auto& kernel : static_cast<Module*>(module)->kernels) {
        if (kernel->name == name) return kernel.get();
    }
    error = std::string("no kernel ") + name;
    return nullptr;
}

unsigned hr_ptx_architecture(void* module) {
    return static_cast<Module*>(module)->architecture;
}

int hr_ptx_launch(void* kernel, const uint32_t* grid, const uint32_t* block, uint32_t shared_bytes, int cooperative,
                  int dependent, void* const* arguments) {
    if (!error.empty()) return kLaunchFailure;
    auto& k = *static_cast<Kernel*>(kernel);
    auto g = std::make_unique<Grid>();
    g->kernel = &k;
    std::memcpy(g->size, grid, sizeof(g->size));
    std::memcpy(g->block_size, block, sizeof(g->block_size));
    const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
    g->blocks = grid[0] * grid[1] * grid[2];
    if (g->blocks == 0 || threads == 0 || threads > k.most_threads) return kInvalidConfiguration;
    if (grid[1] > kMostGridYZ || grid[2] > kMostGridYZ) return kInvalidConfiguration;
    g->shared_bytes = shared_bytes;
    g->cooperative = cooperative != 0;
    g->dependent = dependent != 0 && k.module->architecture >= 90;  // elsewhere launches follow each other
    g->parameters.resize(k.parameter_bytes);
    for (size_t n = 0; n < k.parameters.size(); ++n) {
        std::memcpy(g->parameters.data() + k.parameters[n].offset, arguments[n], k.parameters[n].bytes);
    }
    const int code = guarded([&] { assemble(k); });
    if (code != kSuccess) return code;
    g->before = queue.empty() ? nullptr : queue.back().get();
    ++k.launches;
    g->number = launches++;
    queue.push_back(std::move(g));
    return kSuccess;
}

int hr_ptx_finish() {
    if (queue.empty()) return kSuccess;
    const int code = guarded([] { run(queue); });
    queue.clear();
    forget_read_only();
    return code;
}

void hr_host_seed(uint64_t seed) {
    seed_settings(seed);
    error.clear();
}

const char* hr_host_error() {
    return error.c_str();
}

int hr_ptx_set(const char* name, int64_t value) {
    return guarded([&] { change_setting(name, value); });
}

void hr_ptx_name_memory(const void* begin, uint64_t bytes) {
    name_memory(reinterpret_cast<uint64_t>(begin), bytes);
}
void hr_ptx_forget_named_memory() {
    forget_named_memory();
}

void hr_ptx_rewrite(const char* (*with)(const char*)) {
    rewrite = with;
}
uint64_t hr_ptx_launches() {
    return launches;
}

const char* hr_ptx_unknown() {
    static std::string lines;
    lines.clear();
    for (const auto& module : modules) {
        for (const auto& kernel : module->kernels) {
            try {
                assemble(*kernel);
            } catch (const std::exception& what) {
                lines += std::string(what.what()) + "\n";
            }
        }
    }
    return lines.c_str();
}

int hr_ptx_report(const char* path) {
    std::ofstream out(path);
    const std::string unknown = hr_ptx_unknown();
    for (const auto& module : modules) {
        for (const auto& kernel : module->kernels) write_kernel(out, *kernel);
    }
    out << R"({"notes": [)";
    for (size_t n = 0; n < notes.size(); ++n) out << (n == 0 ? "" : ", ") << quoted(notes[n]);
    out << R"(], "unknown": )" << quoted(unknown) << "}\n";
    return out.good() ? kSuccess : kInvalidValue;
}
