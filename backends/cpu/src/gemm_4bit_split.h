// 4-bit weights as bfloat16 in split order: what the processor decodes with the fewest operations. Only kernel files
// include it.
//
// 64 bytes hold 128 weights: 32 words of four nibbles. Each of the four nibble positions, brought to the bottom of its
// word, indexes a table of 32 bfloat16 values with one vpermw, and gives one plane of 32 weights:
//     plane j, word w  =  element 4 * w + j of the 128       (split order)
// The table holds the 16 values of the block of elements 0 ... 63 and those of 64 ... 127; bit 4 of an index, set in
// the upper half of the words, chooses. X is brought into the same order once a call, so no weight is ever rearranged.
//
// On the two vector ports, for 128 weights: two multiplications and one conversion (four port cycles) make the tables,
// five shifts and logic operations the indices, four permutations the weights: 15 port cycles, 7.5 cycles for the 72
// bytes that are read. That is 21 GB/s a core at 2.2 GHz: about what one core draws from the L3 cache.
#ifndef QCORE_CPU_GEMM_4BIT_SPLIT_H
#define QCORE_CPU_GEMM_4BIT_SPLIT_H

#include "gemm_4bit_decode.h"

#if defined(__AVX512BF16__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kGroup = 128;                               // elements
constexpr int64_t kGroupBytes = 256;                          // of bfloat16
constexpr int64_t kPlaneBytes = 64;                           // 32 weights
constexpr int32_t kScaleUnit = 6;                             // log2 of the elements that one scale is looked up for
constexpr int64_t kScaleElements = kAbsmaxRun << kScaleUnit;  // of a row of W whose scales are made at a time

// Rows must be made of whole halves of groups, each of one block.
inline bool split_serves(const Gemm4 &p) { return p.w.shift >= 6 && p.k % 64 == 0; }

inline int64_t split_length(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }

// The scales of elements first ... first + count - 1, as scale_run() gives them.
inline const float *split_scales(const Gemm4Weight &w, int64_t first, int64_t count, float *out) {
    return scale_run(w, kScaleUnit, first >> kScaleUnit, count >> kScaleUnit, out);
}

struct SplitDecoder {
    __m512 codes;
    __m512i low = _mm512_set1_epi16(0x0f0f);
    __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1);

    explicit SplitDecoder(const float *table) : codes(_mm512_loadu_ps(table)) {}

    // `bytes` of the 128 weights whose halves have the scales `scale[0]` and `scale[1]`.
    void decode(__m512i bytes, const float *scale, __m512i *plane) const {
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512 first = _mm512_mul_ps(codes, _mm512_set1_ps(scale[0]));
        const __m512 second = _mm512_mul_ps(codes, _mm512_set1_ps(scale[1]));
        const auto table = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        const __m512i odd = _mm512_ternarylogic_epi32(bytes, low, upper, kAndOr);
        const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low, upper, kAndOr);
        plane[0] = _mm512_permutexvar_epi16(even, table);
        plane[1] = _mm512_permutexvar_epi16(odd, table);
        plane[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
        plane[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
    }

    // The same for a half group; the other half decodes to zeros.
    void decode_half(const uint8_t *bytes, const float *scale, __m512i *plane) const {
        const float scales[2] = {scale[0], 0.0f};
        decode(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes))), scales, plane);
    }
};

// The planes of 128 elements of X; only the first `count` are read, the others are zeros.
inline void split_planes(const Bfloat *x, int64_t count, __m512i *plane) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) {
        const int64_t left = count - 32 * i;
        const auto valid = static_cast<__mmask32>(left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1);
        v[i] = _mm512_maskz_loadu_epi16(valid, x + 32 * i);
    }
    __m512i pick = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 0,
                                                         4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60));
    for (int j = 0; j < 4; ++j) {
        const __m512i lower = _mm512_permutex2var_epi16(v[0], pick, v[1]);
        const __m512i upper = _mm512_permutex2var_epi16(v[2], pick, v[3]);
        plane[j] = _mm512_inserti64x4(lower, _mm512_castsi512_si256(upper), 1);
        pick = _mm512_add_epi16(pick, _mm512_set1_epi16(1));
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_SPLIT_H
