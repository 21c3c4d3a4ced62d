#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr size_t kStackBytes = 512 * 1024;  // its frames are several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// Saves what a callee must keep, stores the stack pointer in *save, and goes on where `load` was saved.
extern "C" __attribute__((visibility("hidden"))) void headroom_switch_stack(void** save, void* load);

#if defined(__x86_64__)  // System V ABI: rbx, rbp, r12-r15
constexpr size_t kReturnWord = 6, kFrameWords = 8;
asm(R"(
    .text
    .globl headroom_switch_stack
    .hidden headroom_switch_stack
    .type headroom_switch_stack, @function
headroom_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size headroom_switch_stack, . - headroom_switch_stack
)");
#elif defined(__aarch64__)  // AAPCS64: x19-x30, d8-d15
constexpr size_t kReturnWord = 11, kFrameWords = 20;
asm(R"(
    .text
    .globl headroom_switch_stack
    .hidden headroom_switch_stack
    .type headroom_switch_stack, %function
headroom_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size headroom_switch_stack, . - headroom_switch_stack
)");
#else
#error "the host runtime's fibers are written for x86-64 and aarch64"
#endif

namespace headroom::host {

namespace {
Context* left = nullptr;     // the context of the last switch's start ...
Context* entered = nullptr;  // ... and of its end
}  // namespace

bool prepare(Context& context, void (*entry)()) {
    if (context.bottom == nullptr) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        // The lowest page stays closed: a stack that overflows faults instead of writing into its neighbour.
        void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) return false;
        context.bottom = static_cast<char*>(memory) + page;
        context.bytes = kStackBytes;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(context.bottom, context.bytes);  // what an abandoned fiber left behind
#endif
    uintptr_t top = reinterpret_cast<uintptr_t>(context.bottom) + context.bytes;
    void** frame = reinterpret_cast<void**>(top) - kFrameWords;
    std::memset(frame, 0, kFrameWords * sizeof(void*));
    frame[kReturnWord] = reinterpret_cast<void*>(entry);
    context.stack_pointer = frame;
    context.fake_stack = nullptr;
    return true;
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(entered->fake_stack, &bottom, &bytes);
    if (left->bottom == nullptr) {
        left->bottom = bottom;
        left->bytes = bytes;
    }
#endif
}

void switch_to(Context& from, Context& to) {
    left = &from;
    entered = &to;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
    headroom_switch_stack(&from.stack_pointer, to.stack_pointer);
    arrived();
}

}  // namespace headroom::host
