// Pairs of rows of a 4-bit weight as bfloat16, side by side: what TDPBF16PS and VDPBF16PS take where the sum runs over
// the rows. Only kernel files include it.
//
// Of 64 columns of two rows, 32 bytes each, the words are interleaved with one permutation: a dword then holds four
// columns of the one row and the same four of the other, and each of its nibble positions indexes a table of 32
// bfloat16 values, those of the one row's block and those of the other's (gemm_4bit_split.h has the same with two
// blocks of one row). That gives four vectors:
//     vector j, dword i  =  column 4 * i + j of both rows      (split order)
// so no weight is transposed; the columns of the result are put in order when they are finished. 17 cycles of the two
// vector ports for 128 weights, where rows side by side take 15.
#ifndef QCORE_CPU_GEMM_4BIT_PAIRS_H
#define QCORE_CPU_GEMM_4BIT_PAIRS_H

#include "gemm_4bit_decode.h"
#include "gemm_4bit_split.h"
#include "transposed_weight.h"

namespace qcore::cpu::QC_ISA {

template <>
struct TransposedWeight<Gemm4Weight> {
    static constexpr bool kStreams = false;

    template <class T>
    static void decode(const Gemm4Weight &w, int64_t row, int64_t n, int64_t count, float *out) {
        qcore::cpu::QC_ISA::decode<T>(w, row, n, count, out);
    }
    template <class T>
    static float x(const Gemm4Weight &, T element, int64_t) {
        return to_float(element);
    }
    template <class T>
    static F32 x_lanes(const Gemm4Weight &, const T *from, int64_t) {
        return load(from);
    }
#if defined(__AVX512BF16__)
    static __m512i x_pairs(const Gemm4Weight &, const Bfloat *from, int64_t, __mmask32 valid) {
        return _mm512_maskz_loadu_epi16(valid, from);
    }
    static bool irregular_row(const Gemm4Weight &, const Bfloat *x, int64_t k) {
        return qcore::cpu::QC_ISA::irregular_row(x, k);
    }
#endif
};

#if defined(__AVX512BF16__)

// Every panel of 64 columns is whole and lies, in each row, in one block.
inline bool pairs_in_split_order(const Gemm4Transposed &p) { return p.w.shift >= 6 && p.n % kPairColumns == 0; }

// Decodes rows row0 ... of kPairColumns columns from column n0 on, pair by pair.
template <>
class PairDecoder<Gemm4Weight> {
   public:
    static constexpr int64_t kScales = kMostPanels;

    // Few enough for two panels in L1 where decoding is the greater part of the work.
    static int64_t span(int64_t rows) { return rows <= 32 ? 128 : 512; }

    explicit PairDecoder(const Gemm4Transposed &p)
        : weight_(p.w),
          rows_(p.k),
          columns_(p.n),
          codes_(_mm512_loadu_ps(p.w.table)),
          split_(pairs_in_split_order(p)) {}

    static int64_t bytes(int64_t columns) { return columns >> 1; }
    bool split() const { return split_; }

    // Makes the scales of `rows` rows from `row0` on for the panels of columns n0 ... n1 - 1; a set bit of the result
    // is a panel with a block that is not regular. Not in split order, decode() says that.
    uint32_t prepare(int64_t row0, int64_t rows, int64_t n0, int64_t n1, float *scales) {
        scales_ = scales;
        row0_ = row0;
        if (!split_) {
            return 0;
        }
        const int64_t panels = (n1 - n0) / kPairColumns;
        const auto valid = static_cast<__mmask16>((1u << panels) - 1);
        const __m512i least = _mm512_castps_si512(_mm512_set1_ps(0x1p-28f));
        const __m512i one = _mm512_set1_epi32(1);
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        __mmask16 odd = 0;
        for (int64_t r = 0; r < rows; ++r) {
            float made[kScales];
            const float *run = scale_run(weight_, kScaleUnit, ((row0 + r) * columns_ + n0) >> kScaleUnit, panels, made);
            const __m512i scale = _mm512_castps_si512(_mm512_maskz_loadu_ps(valid, run));
            const __m512i bits = _mm512_sub_epi32(_mm512_and_si512(scale, magnitude), one);  // zero wraps round
            odd |= _mm512_cmplt_epu32_mask(bits, _mm512_sub_epi32(least, one));
            _mm512_storeu_ps(scales + r * kScales, _mm512_castsi512_ps(scale));
        }
        return odd & valid;
    }

    // Rows `row` and `row` + 1 (zeros if there is no such row) of the `panel`th panel since prepare(), which begins at
    // column n; false if a block is not regular. Fetches what lies `ahead` bytes further.
    bool decode(int64_t row, int64_t n, int64_t panel, int64_t ahead, __m512i *v) const {
        if (!split_) {
            return decode_any(row, n, v);
        }
        const float *scale = scales_ + (row - row0_) * kScales + panel;
        const bool both = row + 1 < rows_;
        const uint8_t *first = weight_.packed + ((row * columns_ + n) >> 1);
        const uint8_t *second = both ? first + (columns_ >> 1) : first;
        _mm_prefetch(first + ahead, _MM_HINT_T1);
        _mm_prefetch(second + ahead, _MM_HINT_T1);
        const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(load_256(first)), load_256(second), 1);
        const __m512i bytes = _mm512_permutexvar_epi16(interleave_, words);
        const __m512 a = _mm512_mul_ps(codes_, _mm512_set1_ps(scale[0]));
        const __m512 b = _mm512_mul_ps(codes_, _mm512_set1_ps(both ? scale[kScales] : 0.0f));
        const auto table = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512i odd = _mm512_ternarylogic_epi32(bytes, low_, upper_, kAndOr);
        const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low_, upper_, kAndOr);
        v[0] = _mm512_permutexvar_epi16(even, table);
        v[1] = _mm512_permutexvar_epi16(odd, table);
        v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
        v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
        return true;
    }

   private:
    static __m256i load_256(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

    // Any block size and any number of columns: vector j, dword i is column 16 * j + i.
    bool decode_any(int64_t row, int64_t n, __m512i *v) const {
        alignas(64) Bfloat first[kPairColumns] = {};
        alignas(64) Bfloat second[kPairColumns] = {};
        const int64_t count = columns_ - n < kPairColumns ? columns_ - n : kPairColumns;
        bool regular = decode_bf16(weight_, row, n, count, first);
        if (row + 1 < rows_) {
            regular &= decode_bf16(weight_, row + 1, n, count, second);
        }
        for (int half = 0; half < 2; ++half) {
            const __m512i words = _mm512_load_si512(first + 32 * half);
            const __m512i others = _mm512_load_si512(second + 32 * half);
            v[2 * half] = _mm512_permutex2var_epi16(words, side_by_side_, others);
            v[2 * half + 1] =
                _mm512_permutex2var_epi16(words, _mm512_add_epi16(side_by_side_, _mm512_set1_epi16(16)), others);
        }
        return regular;
    }

    // Word i and word `step` + i beside each other.
    static __m512i beside(int step) {
        const __m512i dword = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_or_si512(dword, _mm512_slli_epi32(_mm512_add_epi32(dword, _mm512_set1_epi32(step)), 16));
    }

    Gemm4Weight weight_;
    int64_t rows_, columns_;
    const float *scales_ = nullptr;
    int64_t row0_ = 0;
    __m512 codes_;
    __m512i low_ = _mm512_set1_epi16(0x0f0f);
    __m512i upper_ = _mm512_set1_epi32(0x10100000);
    __m512i interleave_ = beside(16);
    __m512i side_by_side_ = beside(32);
    bool split_;
};

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_GEMM_4BIT_PAIRS_H
