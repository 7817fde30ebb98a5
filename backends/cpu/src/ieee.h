// IEEE arithmetic whatever the caller's control register says (QC-NUM-001): torch.set_flush_denormal and some other
// libraries leave it in a state in which denormals read as zero.
#ifndef QCORE_CPU_IEEE_H
#define QCORE_CPU_IEEE_H

#include <cstdint>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace qcore::cpu {

// For the life of the object, on the thread that made it. The compiler may move arithmetic across it, so what it
// guards stands behind a call into another file or through a pointer.
class IeeeArithmetic {
   public:
#if defined(__x86_64__)
    IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
    ~IeeeArithmetic() { _mm_setcsr(saved_); }

   private:
    static constexpr unsigned kDefault = 0x1F80;  // exceptions masked, nearest even, no FTZ, no DAZ
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeArithmetic() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~IeeeArithmetic() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

   private:
    uint64_t saved_;
#else
    IeeeArithmetic() {}
    ~IeeeArithmetic() {}
#endif

   public:
    IeeeArithmetic(const IeeeArithmetic &) = delete;
    IeeeArithmetic &operator=(const IeeeArithmetic &) = delete;
};

}  // namespace qcore::cpu

#endif  // QCORE_CPU_IEEE_H
