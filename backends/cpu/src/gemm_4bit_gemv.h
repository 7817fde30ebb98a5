// gemm_4bit for one row of X on AVX-512, by products in float32.
//
// Memory picture: W is read once, half a byte an element, straight through; X is 2 KiB per 1024 elements and stays in
// L1. The limit is the two vector ports, not memory: 26 port cycles for 128 weights on a processor of Intel.
//
// X is brought into the order [16 even][16 odd] of the nibbles of 16 bytes, spread over 16 dwords.
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

// The products of one row in float32: two chains, each fed by every other group.
struct FloatSums {
    F32 s0 = {}, s1 = {}, s2 = {}, s3 = {};

    // The 32 weights of 16 bytes by the table of their block, `x` in the order of split_even_odd.
    void add(const uint8_t *bytes, __m512 table, const float *x) {
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
    }
    float total() const {
        float sums[kStrip];
        sum_lanes(s0, s1, s2, s3, sums);
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
};

// The absmax of one row of W after the other: a run does not end with a row, or short rows would each pay for a whole
// vector of them.
class AbsmaxRuns {
   public:
    // No more than the first `end` will be asked for.
    AbsmaxRuns(const Gemm4Weight &w, int64_t end) : w_(w), end_(end) {}

    const float *at(int64_t first, int64_t count) {
        if (first < first_ || first + count > stop_) {
            first_ = first;
            stop_ = first + kAbsmaxRun < end_ ? first + kAbsmaxRun : end_;
            values_ = absmax_run(w_, first, stop_ - first, made_);
        }
        return values_ + (first - first_);
    }

   private:
    const Gemm4Weight &w_;
    int64_t end_, first_ = 0, stop_ = 0;
    const float *values_ = nullptr;
    float made_[kAbsmaxRun];
};

// What float_gemv_row takes from one row to the next, before row `end`.
inline AbsmaxRuns float_scales(const Gemm4 &p, int64_t end) { return {p.w, end * (p.k >> p.w.shift)}; }

// The sum of one row of W, rounded to T, with `x` in the order of split_even_odd.
template <class T>
inline float float_gemv_row(const Gemm4 &p, int64_t n, const float *x, AbsmaxRuns &scales) {
    const Gemm4Weight &w = p.w;
    const uint8_t *bytes = w.packed + ((n * p.k) >> 1);
    const int64_t blocks = p.k >> w.shift;
    const int64_t groups = int64_t{1} << (w.shift - 5);
    FloatSums sums;
    for (int64_t b0 = 0; b0 < blocks; b0 += kAbsmaxRun) {
        const int64_t count = b0 + kAbsmaxRun < blocks ? kAbsmaxRun : blocks - b0;
        const float *absmax = scales.at(n * blocks + b0, count);
        for (int64_t b = 0; b < count; ++b) {
            const auto table = (__m512)rounded_to<T>(load(w.table) * splat(absmax[b]));
            for (int64_t g = 0; g < groups; ++g) {
                sums.add(bytes, table, x);
                bytes += 16;
                x += 32;
            }
        }
    }
    return sums.total();
}

// Rows must be made of 32 weights of one group each.
inline bool float_gemv_serves(const GemmInt4 &p) {
    return p.m == 1 && p.k % 32 == 0 && (p.w.group_size % 32 == 0 || p.w.groups == 1);
}

struct ConvertedScales {
    float value[kAbsmaxRun];
};

inline ConvertedScales float_scales(const GemmInt4 &, int64_t) { return {}; }

// The same for integers.
template <class T>
inline float float_gemv_row(const GemmInt4 &p, int64_t n, const float *x, ConvertedScales &scales) {
    const Int4Weight &w = p.w;
    const uint8_t *bytes = w.packed + n * w.row_bytes;
    FloatSums sums;
    for (int64_t j0 = 0; j0 < w.groups; j0 += kAbsmaxRun) {
        const int64_t groups = j0 + kAbsmaxRun < w.groups ? kAbsmaxRun : w.groups - j0;
        convert_scales(w, n * w.groups + j0, groups, scales.value);
        for (int64_t j = 0; j < groups; ++j) {
            const float *grid = group_grid(w, n * w.groups + j0 + j);
            const auto table = (__m512)rounded_to<T>(load(grid) * splat(scales.value[j]));
            const int64_t left = p.k - (j0 + j) * w.group_size;
            for (int64_t i = left < w.group_size ? left : w.group_size; i > 0; i -= 32) {
                sums.add(bytes, table, x);
                bytes += 16;
                x += 32;
            }
        }
    }
    return sums.total();
}

// Columns n0 ... n1 - 1 of the only row; scratch for p.k floats.
template <class T, class Problem>
inline void multiply_row(const Problem &p, int64_t n0, int64_t n1, void *scratch) {
    auto *x = static_cast<float *>(scratch);
    split_even_odd(static_cast<const T *>(p.x), p.k, x);
    auto scales = float_scales(p, n1);
    for (int64_t n = n0; n < n1; ++n) {
        float bias;
        const float sum = float_gemv_row<T>(p, n, x, scales);
        load_bias(p, n, 1, &bias);
        finish_row(p, &sum, &bias, 1, static_cast<T *>(p.out) + n);
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_GEMV_H
