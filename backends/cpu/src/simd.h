// The vector vocabulary of the quantization kernels: the same names for each instruction set, in its namespace.
//
//   kLanes                     32-bit lanes of a vector
//   Float, Int                 vectors
//   load(const T *)            kLanes elements as floats
//   store(T *, Float)          rounded once (QC-NUM-003)
//   broadcast(float)
//   multiply(a, b)             IEEE, one rounding
//   magnitude(x)               the bits of |x|, ordered as |x|, any NaN above infinity
//   maximum(a, b), highest(a)  signed integers, by lane and over all lanes
//   load_codes(const uint8_t *)  kLanes bytes as integers
//   gather(table, index)       table[index] by lane
//   pack_bytes(c, out)         the low byte of G vectors: G * kLanes bytes
//   pack_nibbles(c, out)       codes 0 to 15 of G vectors, first in the high nibble: G * kLanes / 2 bytes
//   Nf4Codes(), Fp4Codes()     objects: scaled values -> codes (QC-NF4-002, QC-FP4-002)
//   CodebookCodes(codebook)    scaled values -> codes (QC-Q8-004)
//   NibbleTable<T>(table, s)   object: 32 packed codes -> table[code] * s as T (QC-4BIT-003)
#ifndef QCORE_CPU_SIMD_H
#define QCORE_CPU_SIMD_H

#if defined(QC_ISA_avx512) || defined(QC_ISA_avx512_vnni) || defined(QC_ISA_avx512_bf16)
#include "simd_avx512.h"
#elif defined(QC_ISA_avx2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

#endif  // QCORE_CPU_SIMD_H
