// Statistics and codes of int8 quantization, for rows and for columns. Only kernel files include it.
#ifndef QCORE_CPU_INT8_CODES_H
#define QCORE_CPU_INT8_CODES_H

#include "lanes.h"

namespace qcore::cpu::QC_ISA {

constexpr float kRound = 0x1.8p23f;  // adding and taking it away rounds to an integer, ties to even, up to 2^22

inline I32 magnitude_bits(F32 x) { return (I32)x & 0x7fffffff; }
inline F32 magnitude(F32 x) { return (F32)magnitude_bits(x); }
inline float magnitude(float x) { return __builtin_fabsf(x); }

// QC-INT8-001: what a statistic leaves out. NaN fails every comparison.
inline bool inside(float x, float threshold) {
    return threshold > 0.0f ? magnitude(x) < threshold : magnitude(x) <= __builtin_inff();
}

// QC-INT8-003 for an element times its scale.
inline I8 code_of(F32 q) {
    q = q == q ? q : F32{};
    q = q > 127.0f ? splat(127.0f) : q;
    q = q < -127.0f ? splat(-127.0f) : q;
    return __builtin_convertvector(__builtin_convertvector(q + kRound - kRound, I32), I8);
}

inline int8_t code_of(float q) {
    q = q == q ? q : 0.0f;
    q = q > 127.0f ? 127.0f : q;
    q = q < -127.0f ? -127.0f : q;
    return static_cast<int8_t>(q + kRound - kRound);
}

#if defined(__AVX512BW__)
// 64 codes of values whose magnitude is below 127.5 or that the caller replaces (outliers become -128 or 127): no
// clamp.
template <class Round>
inline void store_codes(__m512 a, __m512 b, __m512 c, __m512 d, const Round &rounded, int8_t *out) {
    const __m512i words = _mm512_packs_epi32(rounded(a), rounded(b));
    const __m512i bytes = _mm512_packs_epi16(words, _mm512_packs_epi32(rounded(c), rounded(d)));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, bytes));
}
inline void store_codes(__m512 a, __m512 b, __m512 c, __m512 d, int8_t *out) {
    const auto rounded = [](__m512 q) {
        return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(q, q, _CMP_ORD_Q), q);  // NaN becomes 0
    };
    store_codes(a, b, c, d, rounded, out);
}
// The same where none is NaN.
inline void store_ordered_codes(__m512 a, __m512 b, __m512 c, __m512 d, int8_t *out) {
    store_codes(a, b, c, d, [](__m512 q) { return _mm512_cvtps_epi32(q); }, out);
}
#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_INT8_CODES_H
