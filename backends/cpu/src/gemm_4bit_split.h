// 4-bit weights as bfloat16 in split order: what the processor decodes with the fewest operations. Only kernel files
// include it.
//
// 64 bytes hold 128 weights: 32 words of four nibbles. Each of the four nibble positions, brought to the bottom of its
// word, indexes a table of 32 bfloat16 values with one vpermw, and gives one plane of 32 weights:
//     plane j, word w  =  element 4 * w + j of the 128       (split order)
// The table holds the 16 values of the block of elements 0 ... 63 and those of 64 ... 127; bit 4 of an index, set in
// the upper half of the words, chooses. X is brought into the same order once a call, so no weight is ever rearranged.
//
// What it costs for 128 weights, whose 72 bytes are read meanwhile: two multiplications and one conversion make the
// tables, five shifts and logic operations the indices, four permutations the weights. probe/cycles.cpp counts them.
//  - Intel, two ports of 512 bits: six, five and, since a permutation needs both ports, eight port cycles: 19, so 9.5
//    cycles, 18 GB/s a core at 2.4 GHz, about what one core draws from memory; 10.5 to 12 with the stores.
//  - Zen 4, four pipes of 256 bits, of which an operation of 512 bits takes two cycles or two pipes, and a conversion
//    four: 8, 10 and 8 of them. With four products, 8 more, 34, so 8.5 cycles. Vectors of 256 bits, whose indices
//    need no logic operations, would need 30, but take longer.
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

// What depends on the kind of weight: Split<Weight> has
//   Scales           what decoding needs besides the bytes, of a row from some element on
//   Room             for at most kScaleElements of a row
//   serves(w, k)     whether rows of k elements can be decoded this way
//   scales(w, n, k0, count, room)   of elements k0 ... of row n, where they lie or made in `room`; k0 and count are
//                    multiples of 64
//   regular(scales, count)
//   Units, Split(w).units(scales, g)   which of the scales group g of 128 has; the same for all rows from one element
//   on Split(w).decode(bytes, scales, units, plane)        such a group Split(w).decode_half(bytes, scales, units,
//   plane)   its first half; the other decodes to zeros
template <class Weight>
struct Split;

template <class Weight>
using Units = typename Split<Weight>::Units;

template <class Weight>
inline bool split_serves(const WeightProduct<Weight> &p) {
    return Split<Weight>::serves(p.w, p.k);
}

inline int64_t split_length(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }

// The four nibble positions of 32 words as indices, bit 4 set where `upper` says.
struct SplitIndices {
    __m512i low = _mm512_set1_epi16(0x0f0f);
    __m512i upper;

    explicit SplitIndices(__m512i upper_half) : upper(upper_half) {}

    void indices(__m512i bytes, __m512i *plane) const {
        constexpr int kAndOr = 0xea;  // (a & b) | c
        plane[0] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low, upper, kAndOr);
        plane[1] = _mm512_ternarylogic_epi32(bytes, low, upper, kAndOr);
        plane[2] = _mm512_srli_epi16(plane[0], 8);
        plane[3] = _mm512_srli_epi16(plane[1], 8);
    }
};

inline __m512i load_half_group(const uint8_t *bytes) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes)));
}

template <>
struct Split<Gemm4Weight> : SplitIndices {
    struct Scales {
        const float *scale;  // of each 64 elements
    };
    struct Room {
        float scale[kScaleElements / 64];
    };
    __m512 codes;

    explicit Split(const Gemm4Weight &w)
        : SplitIndices(_mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1)),
          codes(_mm512_loadu_ps(w.table)) {}

    // Rows must be made of whole halves of groups, each of one block.
    static bool serves(const Gemm4Weight &w, int64_t k) { return w.shift >= 6 && k % 64 == 0; }

    static Scales scales(const Gemm4Weight &w, int64_t n, int64_t k0, int64_t count, Room &room) {
        return {scale_run(w, kScaleUnit, (n * w.k + k0) >> kScaleUnit, count >> kScaleUnit, room.scale)};
    }

    static bool regular(const Scales &scales, int64_t count) { return regular_blocks(scales.scale, count >> 6); }

    void decode_scaled(__m512i bytes, float first, float second, __m512i *plane) const {
        const __m512 lower = _mm512_mul_ps(codes, _mm512_set1_ps(first));
        const __m512 higher = _mm512_mul_ps(codes, _mm512_set1_ps(second));
        const auto table = (__m512i)_mm512_cvtne2ps_pbh(higher, lower);
        indices(bytes, plane);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            plane[j] = _mm512_permutexvar_epi16(plane[j], table);
        }
    }
    using Units = int64_t;  // the first of two
    static Units units(const Scales &, int64_t g) { return 2 * g; }
    void decode(const uint8_t *bytes, const Scales &scales, Units unit, __m512i *plane) const {
        decode_scaled(_mm512_loadu_si512(bytes), scales.scale[unit], scales.scale[unit + 1], plane);
    }
    void decode_half(const uint8_t *bytes, const Scales &scales, Units unit, __m512i *plane) const {
        decode_scaled(load_half_group(bytes), scales.scale[unit], 0.0f, plane);
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

// The lower halves of four planes as two vectors and two of zeros: a half group without the zeros between.
inline void join_half_planes(__m512i *plane) {
    plane[0] = _mm512_inserti64x4(plane[0], _mm512_castsi512_si256(plane[1]), 1);
    plane[1] = _mm512_inserti64x4(plane[2], _mm512_castsi512_si256(plane[3]), 1);
    plane[2] = plane[3] = _mm512_setzero_si512();
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_SPLIT_H
