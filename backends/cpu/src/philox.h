// The random numbers of stochastic rounding (QC-OPT-007): Philox4x32-10 of Salmon et al., SC 2011. For kernel files.
#ifndef QCORE_CPU_PHILOX_H
#define QCORE_CPU_PHILOX_H

#include "scalar.h"

namespace qcore::cpu::QC_ISA {

// Numbers of elements 8 * first to 8 * (first + kPhilox) - 1. Plain loops over counters: the compiler makes vectors.
inline constexpr int kPhilox = 32;

inline void random_16_bits(uint64_t seed, uint64_t stream, uint64_t first, uint16_t (&out)[8 * kPhilox]) {
    uint32_t c0[kPhilox], c1[kPhilox], c2[kPhilox], c3[kPhilox];
    for (int i = 0; i < kPhilox; ++i) {
        const uint64_t counter = first + static_cast<uint64_t>(i);
        c0[i] = static_cast<uint32_t>(counter);
        c1[i] = static_cast<uint32_t>(counter >> 32);
        c2[i] = static_cast<uint32_t>(stream);
        c3[i] = static_cast<uint32_t>(stream >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        for (int i = 0; i < kPhilox; ++i) {
            const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i];
            const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2[i];
            const uint32_t a = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            const uint32_t b = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = static_cast<uint32_t>(p1);
            c3[i] = static_cast<uint32_t>(p0);
            c0[i] = a;
            c2[i] = b;
        }
    }
    for (int i = 0; i < kPhilox; ++i) {
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        for (int half = 0; half < 8; ++half) {
            out[8 * i + half] = static_cast<uint16_t>(words[half / 2] >> (16 * (half % 2)));
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_PHILOX_H
