// A stack of its own that a GPU thread runs on: switched to and from in a few nanoseconds, never preempted.
#ifndef QCORE_SIMT_FIBER_H
#define QCORE_SIMT_FIBER_H

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || !defined(__ELF__)
#include <ucontext.h>
#endif

namespace qcore::simt {

// One suspended flow of control. `prepare` makes it start `entry` at the next switch to it; `entry` never returns.
struct Fiber {
#if defined(__x86_64__) && defined(__ELF__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context = {};
#endif
    void prepare(char *stack, size_t bytes, void (*entry)());
    static void switch_between(Fiber &from, Fiber &to);
};

}  // namespace qcore::simt

#endif  // QCORE_SIMT_FIBER_H
