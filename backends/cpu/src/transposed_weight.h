// What the products X W take from a kind of weight. Only kernel files include it.
//
// TransposedWeight<Weight> has
//   kStreams                          whether one row of X has a way of its own: stream_bytes(p), stream<T>(p, ...)
//   decode<T>(w, row, n, count, out)  elements n ... n + count - 1 of a row as float32, as products in T take them
//   x(w, element, k)                  element k of a row of X as float32, as they take it; x_lanes(w, from, k): kLanes
// and, where there is a bfloat16 unit,
//   x_pairs(w, from, k, valid)        32 elements of X from k on as bfloat16, zeros where `valid` is not set
//   irregular_row(w, x, k)            whether a row of X may make denormals, which those units flush
// PairDecoder<Weight> decodes pairs of rows for such a unit:
//   kScales                    floats a row that prepare() writes
//   span(rows, columns)        rows of W at a time, at most, for so many rows of X and columns of W
//   bytes(columns)             that a row has for so many columns
//   split()                    whether columns come in split order (finish_pairs)
//   prepare(row0, rows, n0, n1, scales)         before decode() of these; a set bit of the result is an odd panel
//   decode(row, pairs, n, panel, ahead, take)   so many pairs of rows of a panel, to take(i, v); false: it is odd
// An odd panel has weights that may make denormals.
#ifndef QCORE_CPU_TRANSPOSED_WEIGHT_H
#define QCORE_CPU_TRANSPOSED_WEIGHT_H

#include "lanes.h"
#include "transposed_kernels.h"

namespace qcore::cpu::QC_ISA {

constexpr int64_t kPairColumns = 64;  // of a panel
constexpr int64_t kPairVectors = kPairColumns / 16;
constexpr int64_t kMostPanels = 16;  // prepared at a time

template <class Weight>
struct TransposedWeight;

template <class Weight>
class PairDecoder;

#if defined(__AVX512BF16__)

// How many of `pairs` pairs of rows from `row` on have both of them.
inline int64_t whole_pairs(int64_t rows, int64_t row, int64_t pairs) {
    const int64_t whole = rows > row ? (rows - row) / 2 : 0;
    return whole < pairs ? whole : pairs;
}

// Rows of W at a time: spans of one length, as near as multiples of `unit` allow, and none longer than `most`.
inline int64_t even_span(int64_t k, int64_t most, int64_t unit) {
    const int64_t spans = k > most ? (k + most - 1) / most : 1;
    const int64_t span = (k + spans - 1) / spans;
    return span > 0 ? (span + unit - 1) / unit * unit : unit;
}

// X as VDPBF16PS takes it: rows of bfloat16 with zeros behind their end.
inline int64_t pair_row_bytes(int64_t k) { return (k + 31) / 32 * 64; }

// Rows first ... end - 1 of X.
template <class Weight>
inline void pack_pairs(const Weight &w, const Bfloat *x, int64_t first, int64_t end, int64_t k, uint8_t *packed) {
    for (int64_t r = first; r < end; ++r) {
        for (int64_t i = 0; i < k; i += 32) {
            const auto valid = static_cast<__mmask32>(k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1);
            _mm512_storeu_si512(packed + r * pair_row_bytes(k) + 2 * i,
                                TransposedWeight<Weight>::x_pairs(w, x + r * k + i, i, valid));
        }
    }
}

// Columns 16 * j ... of a row of sums.
inline __m512 pair_sums(bool split, const float *const *sums, int j) {
    if (!split) {
        return _mm512_loadu_ps(sums[j]);
    }
    const __m512i column = _mm512_set_epi32(19, 3, 19, 3, 18, 2, 18, 2, 17, 1, 17, 1, 16, 0, 16, 0);
    const __m512i pick = _mm512_add_epi32(column, _mm512_set1_epi32(4 * j));
    const __m512 ab = _mm512_permutex2var_ps(_mm512_loadu_ps(sums[0]), pick, _mm512_loadu_ps(sums[1]));
    const __m512 cd = _mm512_permutex2var_ps(_mm512_loadu_ps(sums[2]), pick, _mm512_loadu_ps(sums[3]));
    return _mm512_mask_blend_ps(0xcccc, ab, cd);
}

// One row of kPairColumns sums, in the order of PairDecoder, to the result: the first `count` columns from y on.
inline void finish_pairs(bool split, const float *const *sums, int64_t count, Bfloat *y) {
    __m512 v[kPairVectors];
    __mmask16 odd = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kPairVectors; ++j) {
        constexpr int kNanOrDenormal = 0xa1;
        v[j] = pair_sums(split, sums, j);
        odd |= _mm512_fpclass_ps_mask(v[j], kNanOrDenormal);
    }
    if (count >= kPairColumns && odd == 0) {  // what the instruction rounds as QC-NUM-003 does
        _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
        _mm512_storeu_si512(y + 32, (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]));
        return;
    }
    for (int j = 0; j < kPairVectors && 16 * j < count; ++j) {
        const int64_t left = count - 16 * j;
        const auto valid = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
        _mm256_mask_storeu_epi16(y + 16 * j, valid, (__m256i) __builtin_convertvector(bf16_bits((F32)v[j]), U16));
    }
}

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_TRANSPOSED_WEIGHT_H
