// What the optimizers need of an instruction set beyond simd.h. For kernel files.
//
//   square_root(x)              IEEE, one rounding; so are + - * / of two Floats
//   sign(x)                     1, -1, and 0 for zeros and NaN
//   minimum(a, b), add(a, b)    signed integers, by lane
//   bits(x)                     the bits of a Float
//   Decoder(table)              object: 4 * kLanes codes -> 4 vectors table[code]
#ifndef QCORE_CPU_OPTIMIZER_SIMD_H
#define QCORE_CPU_OPTIMIZER_SIMD_H

#include "simd.h"

namespace qcore::cpu::QC_ISA {

inline constexpr int kVectors = 4;  // at a time
inline constexpr int kGroup = kVectors * kLanes;

#if defined(__AVX512F__)

inline Float square_root(Float x) { return _mm512_sqrt_ps(x); }
inline Float sign(Float x) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(above, _mm512_set1_ps(1.0f)), below, _mm512_set1_ps(-1.0f));
}
inline Int minimum(Int a, Int b) { return _mm512_min_epi32(a, b); }
inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline Int bits(Float x) { return _mm512_castps_si512(x); }
inline Int broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }

#elif defined(__AVX2__)

inline Float square_root(Float x) { return _mm256_sqrt_ps(x); }
inline Float sign(Float x) {
    const Float above = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ);
    const Float below = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_or_ps(_mm256_and_ps(above, _mm256_set1_ps(1.0f)), _mm256_and_ps(below, _mm256_set1_ps(-1.0f)));
}
inline Int minimum(Int a, Int b) { return _mm256_min_epi32(a, b); }
inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Int bits(Float x) { return _mm256_castps_si256(x); }
inline Int broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }

#else

inline Float square_root(Float x) {
    for (int i = 0; i < kLanes; ++i) {
        x[i] = __builtin_sqrtf(x[i]);
    }
    return x;
}
inline Float sign(Float x) {
    const Int above = x > 0.0f;  // a lane that compares true is -1
    const Int below = x < 0.0f;
    return __builtin_convertvector(below - above, Float);
}
inline Int minimum(Int a, Int b) { return a < b ? a : b; }
inline Int add(Int a, Int b) { return a + b; }
inline Int bits(Float x) { return reinterpret_cast<Int>(x); }
inline Int broadcast_int(int32_t x) { return Int{x, x, x, x}; }

#endif

class Decoder {
   public:
    explicit Decoder(const float *table) : table_(table) {}
    void operator()(const uint8_t *codes, Float (&out)[kVectors]) const {
        for (int v = 0; v < kVectors; ++v) {
            out[v] = gather(table_, load_codes(codes + v * kLanes));
        }
    }

   private:
    const float *table_;
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_OPTIMIZER_SIMD_H
