// The interpreter for its users: Python, which gives PTX as text, and cudart.cpp, which finds it in nvcc's objects.
#pragma once

#include <cstdint>

extern "C" {
// Errors are numbers of cudaError_t. Null, or an error, leaves a sentence in hr_host_error.
void* hr_ptx_load(const char* text);
void* hr_ptx_kernel(void* module, const char* name);
unsigned hr_ptx_architecture(void* module);
// Puts a launch into the queue: a kernel's arguments by their addresses, as cudaLaunchKernel takes them.
int hr_ptx_launch(void* kernel, const uint32_t* grid, const uint32_t* block, uint32_t shared_bytes, int cooperative,
                  int dependent, void* const* arguments);
// Runs the queue.
int hr_ptx_finish();

// As the host runtime's: a seed clears the error, and until then nothing more is launched.
void hr_host_seed(uint64_t seed);
const char* hr_host_error();

// By the names of settings.h.
int hr_ptx_set(const char* name, int64_t value);
void hr_ptx_name_memory(const void* begin, uint64_t bytes);
void hr_ptx_forget_named_memory();

// Every module that is loaded from now on goes through `rewrite` first; null: as it is.
void hr_ptx_rewrite(const char* (*rewrite)(const char* text));
// Launches so far.
uint64_t hr_ptx_launches();
// Assembles all kernels that were loaded: a line for each that holds something unknown.
const char* hr_ptx_unknown();
// A line of JSON for each kernel: its name, architecture, launches and instructions [PTX line, place in the source,
// opcode, how many warps executed it, text]; and one line with all notes and what hr_ptx_unknown says.
int hr_ptx_report(const char* path);
// From here on launches are profiled (profile.cpp), with these latencies of loads in cycles; until the end, which
// writes a line of JSON for each launch.
void hr_ptx_profile_begin(uint32_t dram, uint32_t l2, uint32_t l1);
int hr_ptx_profile_end(const char* path);
}
