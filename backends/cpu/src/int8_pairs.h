// An int8 weight as the products X W take it. Only kernel files include it.
//
// The scale of a row of W goes to X (QC-INT8-011, `scaled`): M * N products, not N * K, and what is left of a weight
// is an integer of eight bits, which float32 and bfloat16 hold exactly. So a weight costs a conversion, and no weight
// is ever the reason for a denormal: a product is at least as large as its element of X.
//
// For a bfloat16 unit, sixteen columns of two rows side by side: two conversions to float32, whose upper halves are the
// bfloat16 values, one shift and one merge: 24 operations of the two vector ports for 128 weights, which is what one
// core draws from the L3 cache meanwhile.
#ifndef QCORE_CPU_INT8_PAIRS_H
#define QCORE_CPU_INT8_PAIRS_H

#include "int8_kernels.h"
#include "int8_stream.h"
#include "transposed_weight.h"

namespace qcore::cpu::QC_ISA {

template <>
struct TransposedWeight<Int8Weight> {
    static constexpr bool kStreams = true;

    static int64_t stream_bytes(const Int8Transposed &p) { return int8_stream_bytes(p); }
    template <class T>
    static void stream(const Int8Transposed &p, int64_t n0, int64_t n1, void *scratch) {
        stream_int8_rows<T>(p, n0, n1, scratch);
    }

    template <class T>
    static void decode(const Int8Weight &w, int64_t row, int64_t n, int64_t count, float *out) {
        const int8_t *codes = w.codes + row * w.k + n;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            store(out + i, __builtin_convertvector(load_signed(codes + i), F32));
        }
        for (; i < count; ++i) {
            out[i] = static_cast<float>(codes[i]);
        }
    }
    template <class T>
    static float x(const Int8Weight &w, T element, int64_t k) {
        return scaled_int8(w, element, k);
    }
    template <class T>
    static F32 x_lanes(const Int8Weight &w, const T *from, int64_t k) {
        return scaled_int8_lanes(w, from, k);
    }
#if defined(__AVX512BF16__)
    static __m512i x_pairs(const Int8Weight &w, const Bfloat *from, int64_t k, __mmask32 valid) {
        __m512 p[2];
        scaled(w, from, k, valid, p);
        return (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
    }
    // With elements of at least 2^-119 all products are multiples of 2^-126 (8 bits of significand).
    static bool irregular_row(const Int8Weight &w, const Bfloat *x, int64_t k) {
        const __m512i least = _mm512_castps_si512(_mm512_set1_ps(0x1p-119f));
        const __m512i one = _mm512_set1_epi32(1);
        __mmask16 found = 0;
        for (int64_t i = 0; i < k; i += 32) {
            const auto valid = static_cast<__mmask32>(k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1);
            __m512 p[2];
            scaled(w, x + i, i, valid, p);
            for (const __m512 half : p) {
                const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(half));
                // Zero wraps round to the top.
                found |= _mm512_cmplt_epu32_mask(_mm512_sub_epi32(bits, one), _mm512_sub_epi32(least, one));
            }
        }
        return found != 0;
    }

   private:
    // 32 elements, unrounded.
    static void scaled(const Int8Weight &w, const Bfloat *from, int64_t k, __mmask32 valid, __m512 *p) {
        const __m512i words = _mm512_maskz_loadu_epi16(valid, from);
        for (int half = 0; half < 2; ++half) {
            const __m256i part = half == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1);
            const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
            const __m512 stats =
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> (16 * half)), w.stats + k + 16 * half);
            p[half] = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_mul_ps(stats, _mm512_set1_ps(kInt8Reciprocal)));
        }
    }
#endif
};

#if defined(__AVX512BF16__)

// Vector j, dword i: column 16 * j + i of both rows.
template <>
class PairDecoder<Int8Weight> {
   public:
    static constexpr int64_t kScales = 0;

    // A row of a panel is one cache line, of a page of its own: few rows of X wait for those, and the fewer rows of W
    // side by side, the more of them the processor fetches ahead. Many rows of X want sums to stay in registers. On
    // Sapphire Rapids, 4096 by 4096, one thread: 32 in place of 128 halves the time of 2 and 16 rows, 64 in place of
    // 512 takes a fifth off that of 128, 256 a tenth off that of 512.
    // Rows that are shorter than a page do not have that trouble: 576 by 1536, two threads, 96 in place of 32 takes a
    // tenth off the time of 16 rows, 192 in place of 64 a tenth off that of 64 and a sixth off that of 128.
    static int64_t span(int64_t rows, int64_t columns) {
        const bool pages = columns >= 4096;
        if (rows <= 32) {
            return pages ? 32 : 96;
        }
        return rows > 128 ? 256 : pages ? 64 : 192;
    }

    explicit PairDecoder(const Int8Transposed &p) : codes_(p.w.codes), rows_(p.k), columns_(p.n) {}

    static int64_t bytes(int64_t columns) { return columns; }
    static bool split() { return false; }
    uint32_t prepare(int64_t, int64_t, int64_t, int64_t, float *) const { return 0; }

    template <class Take>
    bool decode(int64_t row, int64_t pairs, int64_t n, int64_t, int64_t ahead, const Take &take) const {
        const int8_t *first = codes_ + row * columns_ + n;
        const int64_t whole = n + kPairColumns <= columns_ ? whole_pairs(rows_, row, pairs) : 0;
        int64_t i = 0;
        for (; i < whole; ++i, first += 2 * columns_) {
            const int8_t *second = first + columns_;
            __m512i v[kPairVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kPairVectors; ++j) {
                v[j] = side_by_side(load(first + 16 * j), load(second + 16 * j));
            }
            _mm_prefetch(first + ahead, _MM_HINT_T1);
            _mm_prefetch(second + ahead, _MM_HINT_T1);
            take(i, v);
        }
        for (; i < pairs; ++i, first += 2 * columns_) {
            __m512i v[kPairVectors] = {};
            decode_part(first, rows_ - row - 2 * i, columns_ - n, v);
            take(i, v);
        }
        return true;
    }

   private:
    // Of `rows` rows, if those are so few, and `columns` columns.
    void decode_part(const int8_t *first, int64_t rows, int64_t columns, __m512i *v) const {
        for (int j = 0; j < kPairVectors && rows > 0; ++j) {
            const int64_t left = columns - 16 * j;
            const auto valid = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
            const auto there = static_cast<__mmask16>(rows > 1 ? valid : 0);
            v[j] = side_by_side(_mm_maskz_loadu_epi8(valid, first + 16 * j),
                                _mm_maskz_loadu_epi8(there, first + columns_ + 16 * j));
        }
    }

    static __m128i load(const int8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
    static __m512i bits(__m128i codes) { return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))); }
    static __m512i side_by_side(__m128i first, __m128i second) {
        constexpr int kSelect = 0xca;  // a ? b : c
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        return _mm512_ternarylogic_epi32(upper, bits(second), _mm512_srli_epi32(bits(first), 16), kSelect);
    }

    const int8_t *codes_;
    int64_t rows_, columns_;
};

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_INT8_PAIRS_H
