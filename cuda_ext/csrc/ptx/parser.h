// PTX text to programs.
#pragma once

#include "program.h"

namespace headroom::ptx {

// Kernels with their parameters; their bodies are kept as text. Raises Fault.
std::unique_ptr<Module> parse(const std::string& text);
// A body to instructions. Raises Fault that names kernel, line and statement where one is not known.
void assemble(Kernel& kernel);

}  // namespace headroom::ptx
