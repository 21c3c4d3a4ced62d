// A fiber: a call stack that is left and entered again by hand.
//
// swapcontext asks the kernel for the signal mask at every switch; a warp shuffle is 32 switches, so the
// switch here is ten instructions. AddressSanitizer is told of every change of stack.
#pragma once

#include <cstddef>

namespace headroom::host {

// Where a suspended fiber goes on. A default-made context stands for the thread's own stack.
struct Context {
    void* stack_pointer = nullptr;
    const void* bottom = nullptr;  // of the stack, as AddressSanitizer wants to know it
    size_t bytes = 0;
    void* fake_stack = nullptr;
};

// `context` gets a stack of its own, or keeps the one it has, and starts in `entry`, which must call
// `arrived` first and never return. False where no memory could be had.
bool prepare(Context& context, void (*entry)());
void arrived();

void switch_to(Context& from, Context& to);

}  // namespace headroom::host
