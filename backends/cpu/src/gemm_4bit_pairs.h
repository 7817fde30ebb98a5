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

    // Few enough for two panels in L1 where decoding is the greater part of the work; with more rows of X, for two
    // columns of tiles in what another thread of the core leaves of it. On Sapphire Rapids, 4096 by 4096, two threads:
    // 96 in place of 128 takes a fifth off the time of 16 rows, 288 in place of 512 a twentieth off that of 64 to 512.
    static int64_t span(int64_t rows, int64_t) { return rows <= 32 ? 96 : 288; }

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
        if (weight_.absmax == nullptr && weight_.shift == kScaleUnit && 2 * panels <= kScales) {
            return prepare_nested(row0, rows, n0, panels, scales);
        }
        const auto valid = static_cast<__mmask16>((1u << panels) - 1);
        __mmask16 odd = 0;
        for (int64_t r = 0; r < rows; ++r) {
            float made[kScales];
            const float *run = scale_run(weight_, kScaleUnit, ((row0 + r) * columns_ + n0) >> kScaleUnit, panels, made);
            const __m512 scale = _mm512_maskz_loadu_ps(valid, run);
            odd |= odd_scales(scale);
            _mm512_storeu_ps(scales + r * kScales, scale);
        }
        return odd & valid;
    }

    // Pairs of rows from `row` on of the `panel`th panel since prepare(), which begins at column n: take(i, v) has the
    // i-th of them. Rows that W does not have are zeros. False if a block is not regular. Fetches what lies `ahead`
    // bytes further.
    template <class Take>
    bool decode(int64_t row, int64_t pairs, int64_t n, int64_t panel, int64_t ahead, const Take &take) const {
        if (!split_) {
            bool regular = true;
            for (int64_t i = 0; i < pairs; ++i) {
                __m512i v[kPairVectors] = {};
                regular &= row + 2 * i >= rows_ || decode_any(row + 2 * i, n, v);
                take(i, v);
            }
            return regular;
        }
        const int64_t stride = columns_ >> 1;
        const float *scale = scales_ + (row - row0_) * kScales + panel;
        const uint8_t *first = weight_.packed + row * stride + (n >> 1);
        const int64_t whole = whole_pairs(rows_, row, pairs);
        int64_t i = 0;
        for (; i < whole; ++i, first += 2 * stride, scale += 2 * kScales) {
            __m512i v[kPairVectors];
            decode_split(first, first + stride, scale[0], scale[kScales], v);
            _mm_prefetch(first + ahead, _MM_HINT_T1);
            _mm_prefetch(first + stride + ahead, _MM_HINT_T1);
            take(i, v);
        }
        for (; i < pairs; ++i) {
            __m512i v[kPairVectors] = {};
            if (row + 2 * i < rows_) {
                decode_split(first, first, scale[0], 0.0f, v);
            }
            take(i, v);
        }
        return true;
    }

   private:
    // Those that regular_block() refuses.
    static __mmask16 odd_scales(__m512 scale) {
        const __m512i least = _mm512_castps_si512(_mm512_set1_ps(0x1p-28f));
        const __m512i one = _mm512_set1_epi32(1);
        const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(scale), _mm512_set1_epi32(0x7fffffff));
        return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(magnitude, one), _mm512_sub_epi32(least, one));  // zero wraps
    }

    // Nested scales (QC-NEST-003) of a few panels: of as many rows at a time as one vector holds.
    uint32_t prepare_nested(int64_t row0, int64_t rows, int64_t n0, int64_t panels, float *scales) const {
        const int64_t together = kScales / panels;
        alignas(64) int32_t offsets[kScales] = {};  // of blocks
        for (int64_t i = 0; i < together * panels; ++i) {
            offsets[i] = static_cast<int32_t>(i / panels * (columns_ >> kScaleUnit) + i % panels);
        }
        const __m512i offset = _mm512_load_si512(offsets);
        const __m512i zero = _mm512_setzero_si512();
        const auto of_row = static_cast<__mmask16>((1u << panels) - 1);
        const int32_t shift = weight_.nested_shift;
        uint32_t odd = 0;
        for (int64_t r = 0; r < rows; r += together) {
            const int64_t some = rows - r < together ? rows - r : together;
            const auto valid = static_cast<__mmask16>((1u << (some * panels)) - 1);
            const int64_t first = ((row0 + r) * columns_ + n0) >> kScaleUnit;
            const int64_t group = first >> shift;
            // Bytes out of the aligned dwords that hold them: none lies on another page.
            const uint8_t *codes = weight_.codes + first;
            const auto beyond = static_cast<int32_t>(reinterpret_cast<uintptr_t>(codes) % 4);
            const __m512i byte = _mm512_add_epi32(offset, _mm512_set1_epi32(beyond));
            const __m512i dword = _mm512_andnot_si512(_mm512_set1_epi32(3), byte);
            const __m512i dwords = _mm512_mask_i32gather_epi32(zero, valid, dword, codes - beyond, 1);
            const __m512i shifts = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(3)), 3);
            const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(dwords, shifts), _mm512_set1_epi32(255));
            const __m512i block =
                _mm512_add_epi32(offset, _mm512_set1_epi32(static_cast<int32_t>(first - (group << shift))));
            const __m512i owner = _mm512_srli_epi32(block, static_cast<unsigned>(shift));
            const __m512 nothing = _mm512_setzero_ps();
            const __m512 value = _mm512_mask_i32gather_ps(nothing, valid, code, weight_.nested_code, 4);
            const __m512 absmax = _mm512_mask_i32gather_ps(nothing, valid, owner, weight_.nested_absmax + group, 4);
            const __m512 scale = _mm512_add_ps(_mm512_mul_ps(value, absmax), _mm512_set1_ps(weight_.nested_offset));
            const uint32_t found = odd_scales(scale) & valid;
            for (int64_t i = 0; i < some; ++i) {
                const auto lanes = static_cast<__mmask16>(of_row << (i * panels));
                _mm512_mask_storeu_ps(scales + (r + i) * kScales - i * panels, lanes, scale);
                odd |= found >> (i * panels) & of_row;
            }
        }
        return odd;
    }

    static __m256i load_256(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

    void decode_split(const uint8_t *first, const uint8_t *second, float scale, float other, __m512i *v) const {
        const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(load_256(first)), load_256(second), 1);
        const __m512i bytes = _mm512_permutexvar_epi16(interleave_, words);
        const __m512 a = _mm512_mul_ps(codes_, _mm512_set1_ps(scale));
        const __m512 b = _mm512_mul_ps(codes_, _mm512_set1_ps(other));
        const auto table = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512i odd = _mm512_ternarylogic_epi32(bytes, low_, upper_, kAndOr);
        const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low_, upper_, kAndOr);
        v[0] = _mm512_permutexvar_epi16(even, table);
        v[1] = _mm512_permutexvar_epi16(odd, table);
        v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
        v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
    }

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
