#include "dispatch.h"

#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qcore::cpu {
namespace {

constexpr const char *kNames[kIsaCount] = {"portable",    "avx2",        "avx_vnni", "avx512",
                                           "avx512_vnni", "avx512_bf16", "amx"};

#ifdef __x86_64__

#ifndef QC_EMULATE_AMX

// Linux hands out the 8 KiB of tile state per process and on request; it refuses if a signal stack is too small.
bool amx_permitted() {
#ifdef __linux__
    constexpr long kArchReqXcompPerm = 0x1023;
    constexpr long kXfeatureXtiledata = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
    return false;
#endif
}

#endif
#endif

struct Machine {
    bool has[kIsaCount] = {};
    bool &operator[](Isa isa) { return has[static_cast<int>(isa)]; }
};

Machine probe() {
    Machine machine;
    machine[Isa::portable] = true;
#ifdef __x86_64__
    // __builtin_cpu_supports also asks XGETBV whether the operating system saves the registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    machine[Isa::avx2] = avx2;
    machine[Isa::avx_vnni] = avx2 && __builtin_cpu_supports("avxvnni");
    machine[Isa::avx512] = avx512;
    machine[Isa::avx512_vnni] = vnni;
    machine[Isa::avx512_bf16] = bf16;
#ifdef QC_EMULATE_AMX
    machine[Isa::amx] = bf16;
#else
    machine[Isa::amx] = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                        __builtin_cpu_supports("amx-bf16") && amx_permitted();
#endif
#endif
    return machine;
}

IsaChoice choose() {
    IsaChoice choice;
    std::string available;
    for (int i = 0; i < kIsaCount; ++i) {
        if (machine_has(static_cast<Isa>(i))) {
            choice.isa = static_cast<Isa>(i);
            available += available.empty() ? kNames[i] : std::string(", ") + kNames[i];
        }
    }
    const char *wanted = std::getenv("QCORE_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        return choice;
    }
    for (int i = 0; i < kIsaCount; ++i) {
        if (std::string(wanted) == kNames[i]) {
            if (machine_has(static_cast<Isa>(i))) {
                choice.isa = static_cast<Isa>(i);
            } else {
                choice.error = std::string("QCORE_CPU_ISA=") + wanted + ": this machine does not have it; it has " +
                               available + ". Unset the variable, or name one of these";
            }
            return choice;
        }
    }
    choice.error = std::string("QCORE_CPU_ISA=") + wanted + ": no such instruction set; this machine has " + available;
    return choice;
}

}  // namespace

const char *isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool machine_has(Isa isa) {
    static const Machine machine = probe();
    return machine.has[static_cast<int>(isa)];
}

bool prefetches_into_l2() {
#ifdef __x86_64__
    static const bool amd = [] {
        __builtin_cpu_init();
        return __builtin_cpu_is("amd") != 0;
    }();
    return amd;
#else
    return false;
#endif
}

const IsaChoice &isa_choice() {
    static const IsaChoice choice = choose();
    return choice;
}

}  // namespace qcore::cpu
