#include "fiber.h"

#include <cstring>

#if defined(__x86_64__) && defined(__ELF__)

// The System V ABI lets a callee destroy everything but these six registers and the stack pointer; the rounding mode
// and the other control words are the same in every fiber.
extern "C" void qcore_simt_switch(void **save, void *load);
asm(R"(
    .text
    .hidden qcore_simt_switch
    .globl qcore_simt_switch
    .type qcore_simt_switch, @function
qcore_simt_switch:
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
    .size qcore_simt_switch, .-qcore_simt_switch
)");

namespace qcore::simt {

void Fiber::prepare(char *stack, size_t bytes, void (*entry)()) {
    // Six registers, then the address that `ret` jumps to; at the entry the stack is 8 beside a multiple of 16, as
    // after a call.
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    auto *frame = reinterpret_cast<void **>(top) - 8;
    std::memset(frame, 0, 8 * sizeof(void *));
    std::memcpy(frame + 6, &entry, sizeof entry);
    stack_pointer = frame;
}

void Fiber::switch_between(Fiber &from, Fiber &to) { qcore_simt_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace qcore::simt

#else

namespace qcore::simt {

void Fiber::prepare(char *stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

void Fiber::switch_between(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }

}  // namespace qcore::simt

#endif
