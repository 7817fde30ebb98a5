// Which instruction set this process uses, and how a kernel is added.
//
// An op has two halves:
//  - the driver, <family>.cpp: checks the arguments (abi.h), cuts the work into chunks (parallel.h) and calls kernels.
//    It is compiled once, for the baseline processor.
//  - the kernels, <family>_kernels.cpp: compiled once per instruction set that CMakeLists.txt names for it, with
//    QC_ISA=avx512 (the namespace, also an enumerator of Isa) and QC_ISA_avx512=1 (for #if around intrinsics).
//
// To add a family `foo`:
//  1. foo_kernels.h, a plain table of functions and one declaration per instruction set:
//         struct FooKernels { void (*run)(const float *x, int64_t n); };
//         namespace portable { extern const FooKernels foo_kernels; }
//         #ifdef __x86_64__
//         namespace avx512 { extern const FooKernels foo_kernels; }
//         #endif
//  2. foo_kernels.cpp: `namespace qcore::cpu::QC_ISA { ... const FooKernels foo_kernels = {run}; }`, and in
//     CMakeLists.txt `qcore_add_kernels(src/foo_kernels.cpp portable avx512)`. Every family has a portable version.
//  3. foo.cpp: `static const FooKernels &kernels = select<FooKernels>({{Isa::portable, &portable::foo_kernels}, ...})`
//     inside the op, so that nothing runs when the library is loaded.
//  4. api.cpp: put the op into the table; until then its entry is NULL ("unsupported").
//
// Rule for kernel files: everything with code in it lives in namespace QC_ISA (or is an intrinsic). Nothing else that
// is inline or a template may be used there, std:: included (std::max, std::vector ...): the linker keeps one copy of
// such a function for the whole library, possibly the one compiled for AVX-512, and another processor would die in it.
// cmake/CheckKernelSymbols.cmake checks the object files for it.
#ifndef QCORE_CPU_DISPATCH_H
#define QCORE_CPU_DISPATCH_H

#include <cstdint>
#include <initializer_list>
#include <string>

namespace qcore::cpu {

// In ascending order of preference. A level says what the processor has; kernels may use all of it (CMakeLists.txt has
// the compiler flags). x86-64 has them all, every other architecture only `portable`.
enum class Isa : int {
    portable,
    avx2,         // AVX2, FMA, F16C
    avx_vnni,     // avx2 + AVX-VNNI
    avx512,       // avx2 + AVX-512 F, BW, DQ, VL
    avx512_vnni,  // avx512 + VNNI, VBMI
    avx512_bf16,  // avx512_vnni + BF16
    amx,          // avx512_bf16 + AMX tile, int8, bf16, and the kernel's permission to use the tile registers
};
inline constexpr int kIsaCount = 7;

const char *isa_name(Isa isa);

// Whether this machine can run `isa`, whatever QCORE_CPU_ISA says.
bool machine_has(Isa isa);

// Whether a loop over long arrays does better to fetch into L2 than into L1: so measured on a Zen 4
// (optimizer_block.h), and otherwise on a Sapphire Rapids.
bool prefetches_into_l2();

// The level in use: the machine's best, or the one that QCORE_CPU_ISA names. Decided at the first call, once.
struct IsaChoice {
    Isa isa = Isa::portable;
    std::string error;  // why QCORE_CPU_ISA cannot be honoured; every op then answers QC_NO_DEVICE with this text
};
const IsaChoice &isa_choice();

template <class Kernels>
struct Candidate {
    Isa isa;
    const Kernels *kernels;
};

// The best candidate at or below the level in use that the machine can run. Candidates stand in ascending order, the
// portable one first.
template <class Kernels>
const Kernels &select(std::initializer_list<Candidate<Kernels>> candidates) {
    const Kernels *best = candidates.begin()->kernels;
    for (const Candidate<Kernels> &candidate : candidates) {
        if (candidate.isa <= isa_choice().isa && machine_has(candidate.isa)) {
            best = candidate.kernels;
        }
    }
    return *best;
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_DISPATCH_H
