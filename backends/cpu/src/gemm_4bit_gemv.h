// gemm_4bit for one row of X on AVX-512: bfloat16 products on AVX512-BF16, float32 on all.
//
// Memory picture: W is read once, half a byte an element, straight through; X is 2 KiB per 1024 elements and stays in
// L1. A block of 64 weights costs ten operations on the two vector ports: three make its table (multiply, round), one
// spreads 32 bytes over 32 words, two cut out the nibbles, two look up, two multiply and add (32 products each), so
// about five cycles.
//
// The words hold the even elements of the 64 in their high nibbles and the odd ones in their low nibbles, so X is
// brought into that order: [32 even][32 odd]. In float32 the same happens by 32 elements, [16 even][16 odd].
#ifndef QCORE_CPU_GEMM_4BIT_GEMV_H
#define QCORE_CPU_GEMM_4BIT_GEMV_H

#include "gemm_4bit_dot.h"

#if defined(__AVX512BW__)

namespace qcore::cpu::QC_ISA {

// Rows must be made of whole blocks, and so of whole groups of 32.
inline bool float_gemv_serves(const Gemm4 &p) { return p.m == 1 && p.k % (int64_t{1} << p.w.shift) == 0; }

template <class T>
inline void split_even_odd(const T *x, int64_t k, float *out) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t i = 0; i < k; i += 32) {
        const auto a = (__m512)load(x + i);
        const auto b = (__m512)load(x + i + 16);
        _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(a, even, b));
        _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(a, odd, b));
    }
}

// The sum of one row of W, rounded to T, with `x` in split order.
template <class T>
inline float float_gemv_row(const Gemm4 &p, int64_t n, const float *x) {
    const Gemm4Weight &w = p.w;
    const uint8_t *bytes = w.packed + ((n * p.k) >> 1);
    const int64_t blocks = p.k >> w.shift;
    const int64_t groups = int64_t{1} << (w.shift - 5);
    float decoded[kAbsmaxRun];
    F32 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t b0 = 0; b0 < blocks; b0 += kAbsmaxRun) {
        const int64_t count = b0 + kAbsmaxRun < blocks ? kAbsmaxRun : blocks - b0;
        const float *absmax = absmax_run(w, n * blocks + b0, count, decoded);
        for (int64_t b = 0; b < count; ++b) {
            const auto table = (__m512)rounded_to<T>(load(w.table) * splat(absmax[b]));
            for (int64_t g = 0; g < groups; ++g) {
                _mm_prefetch(bytes + kPrefetch, _MM_HINT_T0);
                const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)));
                const auto high = (F32)_mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), table);
                const auto low = (F32)_mm512_permutexvar_ps(pair, table);
                const F32 even = multiply_add(load(x), high, s0);
                const F32 odd = multiply_add(load(x + 16), low, s1);
                s0 = s2;
                s1 = s3;
                s2 = even;
                s3 = odd;
                bytes += 16;
                x += 32;
            }
        }
    }
    float sums[kStrip];
    sum_lanes(s0, s1, s2, s3, sums);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Columns n0 ... n1 - 1 of the only row; scratch for p.k floats.
template <class T>
inline void multiply_row(const Gemm4 &p, int64_t n0, int64_t n1, void *scratch) {
    auto *x = static_cast<float *>(scratch);
    split_even_odd(static_cast<const T *>(p.x), p.k, x);
    for (int64_t n = n0; n < n1; ++n) {
        float bias;
        const float sum = float_gemv_row<T>(p, n, x);
        load_bias(p, n, 1, &bias);
        finish_row(p, &sum, &bias, 1, static_cast<T *>(p.out) + n);
    }
}

#if defined(__AVX512BF16__)

// Rows must be made of whole blocks and whole groups of 64.
inline bool gemv_serves(const Gemm4 &p) {
    return p.dtype == QC_BF16 && p.m == 1 && p.w.shift >= 6 && p.k % (int64_t{1} << p.w.shift) == 0;
}

inline void split_even_odd(const Bfloat *x, int64_t k, Bfloat *out) {
    alignas(64) uint16_t even[32];
    for (int i = 0; i < 32; ++i) {
        even[i] = static_cast<uint16_t>(2 * i);
    }
    const __m512i pick = _mm512_load_si512(even);
    const __m512i one = _mm512_set1_epi16(1);
    for (int64_t i = 0; i < k; i += 64) {
        const __m512i a = _mm512_loadu_si512(x + i);
        const __m512i b = _mm512_loadu_si512(x + i + 32);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(a, pick, b));
        _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(a, _mm512_add_epi16(pick, one), b));
    }
}

// The sum of one row of W with `x` in split order; false if a block is not regular.
inline bool gemv_row(const Gemm4 &p, int64_t n, const Bfloat *x, float *sum) {
    const Gemm4Weight &w = p.w;
    const __m512 codes = _mm512_loadu_ps(w.table);
    const uint8_t *bytes = w.packed + ((n * p.k) >> 1);
    const int64_t blocks = p.k >> w.shift;
    const int64_t groups = int64_t{1} << (w.shift - 6);
    const __m512i low_nibble = _mm512_set1_epi16(15);
    float decoded[kAbsmaxRun];
    F32 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t b0 = 0; b0 < blocks; b0 += kAbsmaxRun) {
        const int64_t count = b0 + kAbsmaxRun < blocks ? kAbsmaxRun : blocks - b0;
        const float *absmax = absmax_run(w, n * blocks + b0, count, decoded);
        if (!regular_blocks(absmax, count)) {
            return false;
        }
        for (int64_t b = 0; b < count; ++b) {
            const __m512i table = _mm512_castsi256_si512(bf16_values(codes, absmax[b]));
            for (int64_t g = 0; g < groups; ++g) {
                _mm_prefetch(bytes + kPrefetch, _MM_HINT_T0);
                const __m512i pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
                const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(pair, 4), table);
                const __m512i low = _mm512_permutexvar_epi16(_mm512_and_si512(pair, low_nibble), table);
                const F32 even = InBf16::add_product(x, high, s0);
                const F32 odd = InBf16::add_product(x + 32, low, s1);
                s0 = s2;
                s1 = s3;
                s2 = even;
                s3 = odd;
                bytes += 32;
                x += 64;
            }
        }
    }
    float sums[kStrip];
    sum_lanes(s0, s1, s2, s3, sums);
    *sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return true;
}

#endif

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_GEMV_H
