// gemm_4bit as dot products along K: any instruction set, any alignment of the rows, any value. Only kernel files
// include it.
//
// Memory picture: a panel of up to 64 rows of W, 1024 elements of K at a time, is decoded into scratch (256 KiB, L2);
// four (AVX-512: six) rows of X are converted beside it (L1) and meet it four columns at a time, all sums in registers.
// With few rows of X the panel is four rows of W (16 KiB, L1) and W is read once, at half a byte an element.
//
// Rounding: a lane takes one step per kLanes (bfloat16: 2 * kLanes, each two steps) elements, lanes and spans of 1024
// are added at the end: fewer than K / 4 + 8 in all for 8 lanes and more (gemm_4bit.cpp declares it).
#ifndef QCORE_CPU_GEMM_4BIT_DOT_H
#define QCORE_CPU_GEMM_4BIT_DOT_H

#include "gemm_int4_decode.h"
#include "qcore_backend.h"

namespace qcore::cpu::QC_ISA {

constexpr int64_t kSpan = 1024;
// Of rows of k elements in scratch: an odd number of cache lines spreads rows that are read side by side over the sets
// of L1. Short rows get short ones, so that a small product needs no more than a stack has.
template <class Element>
inline int64_t row_stride(int64_t k) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Element));
    return (((k < kSpan ? k : kSpan) + kLine - 1) / kLine | 1) * kLine;
}
constexpr int64_t kStrip = 4;  // columns of Y, rows of W
// Rows of X at a time, and up to which a panel is one strip. Six by four sums, four vectors of W and one of X fill the
// registers of AVX-512; each vector of W that comes from L2 then meets six rows.
#if defined(__AVX512F__)
constexpr int64_t kFewRows = 6;
#else
constexpr int64_t kFewRows = 4;
#endif

inline constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// How the elements of a product are held in scratch and multiplied.
template <class T>
struct InFloat {
    using X = T;
    using Element = float;
    using Sum = F32;
    static constexpr int kStep = kLanes;

    template <class Weight>
    static bool decode_row(const Weight &w, int64_t n, int64_t first, int64_t count, float *out) {
        decode<T>(w, n, first, count, out);
        return true;
    }
    static void convert(const T *x, int64_t count, float *out) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            store(out + i, load(x + i));
        }
        for (; i < count; ++i) {
            out[i] = to_float(x[i]);
        }
    }
    static F32 add_product(const float *x, F32 w, F32 sum) { return multiply_add(load(x), w, sum); }
    static F32 weights(const float *w) { return load(w); }
};

#if defined(__AVX512BF16__)
// Two products a lane and step. Flushes denormals: the caller sees to it that there are none (regular_block).
struct InBf16 {
    using X = Bfloat;
    using Element = Bfloat;
    using Sum = F32;
    static constexpr int kStep = 2 * kLanes;

    template <class Weight>
    static bool decode_row(const Weight &w, int64_t n, int64_t first, int64_t count, Bfloat *out) {
        return decode_bf16(w, n, first, count, out);
    }
    static void convert(const Bfloat *x, int64_t count, Bfloat *out) {
        __builtin_memcpy(out, x, static_cast<size_t>(count) * sizeof *x);
    }
    static F32 add_product(const Bfloat *x, __m512i w, F32 sum) {
        return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)w);
    }
    static __m512i weights(const Bfloat *w) { return _mm512_loadu_si512(w); }
};
#endif

// The sums over the lanes of four vectors, in the fixed order of a tree.
inline void sum_lanes(F32 a, F32 b, F32 c, F32 d, float *out) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 lo = _mm512_shuffle_ps(ab, cd, 0x44);
    const __m512 hi = _mm512_shuffle_ps(ab, cd, 0xee);
    const __m512 all = _mm512_add_ps(lo, hi);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b);
    const __m256 cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    const F32 sums[kStrip] = {a, b, c, d};
    for (int i = 0; i < kStrip; ++i) {
        out[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
    }
#endif
}

// out[r][0 ... 3] += the products of kRows rows of X with four rows of W over `count` elements, a multiple of kStep.
template <class How, int kRows>
inline void dot(const typename How::Element *x, const typename How::Element *w, int64_t stride, int64_t count,
                float *out, int64_t out_stride) {
    typename How::Sum sum[kRows][kStrip] = {};
    for (int64_t i = 0; i < count; i += How::kStep) {
        const auto w0 = How::weights(w + i);
        const auto w1 = How::weights(w + stride + i);
        const auto w2 = How::weights(w + 2 * stride + i);
        const auto w3 = How::weights(w + 3 * stride + i);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            sum[r][0] = How::add_product(x + r * stride + i, w0, sum[r][0]);
            sum[r][1] = How::add_product(x + r * stride + i, w1, sum[r][1]);
            sum[r][2] = How::add_product(x + r * stride + i, w2, sum[r][2]);
            sum[r][3] = How::add_product(x + r * stride + i, w3, sum[r][3]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        float total[kStrip];
        sum_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3], total);
        for (int c = 0; c < kStrip; ++c) {
            out[r * out_stride + c] += total[c];
        }
    }
}

// bias[n0 ... n0 + count - 1] as float32; nothing where there is none.
inline void load_bias(const ProductOf4Bits &p, int64_t n0, int64_t count, float *out) {
    for (int64_t c = 0; c < count && p.bias != nullptr; ++c) {
        switch (p.bias_dtype) {
            case QC_F32:
                out[c] = static_cast<const float *>(p.bias)[n0 + c];
                break;
            case QC_BF16:
                out[c] = to_float(static_cast<const Bfloat *>(p.bias)[n0 + c]);
                break;
            default:
                out[c] = to_float(static_cast<const Half *>(p.bias)[n0 + c]);
        }
    }
}

// QC-GEMM4-003 for one row of a panel.
template <class T>
inline void finish_row(const ProductOf4Bits &p, const float *sums, const float *bias, int64_t count, T *y) {
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
        store(y + c, p.bias != nullptr ? load(sums + c) + load(bias + c) : load(sums + c));
    }
    for (; c < count; ++c) {
        y[c] = from_float<T>(p.bias != nullptr ? sums[c] + bias[c] : sums[c]);
    }
}

inline int64_t panel_columns(int64_t rows) { return rows <= kFewRows ? kStrip : kPanelColumns; }

template <class How>
struct DotScratch {
    typename How::Element *w, *x;
    float *sums;

    static int64_t bytes(int64_t rows, int64_t k) {
        const int64_t columns = panel_columns(rows);
        return (columns + kFewRows) * row_stride<typename How::Element>(k) *
                   static_cast<int64_t>(sizeof(typename How::Element)) +
               round_up(rows * columns * 4, 64);
    }
    DotScratch(void *scratch, int64_t rows, int64_t k) {
        w = static_cast<typename How::Element *>(scratch);
        x = w + panel_columns(rows) * row_stride<typename How::Element>(k);
        sums = reinterpret_cast<float *>(x + kFewRows * row_stride<typename How::Element>(k));
    }
};

// Y for the rows row0 ... row0 + rows - 1 and the columns n0 ... n1 - 1. How::decode_row may answer false: then the
// part of the panel that it belongs to is left out and `odd_panel(first column, end)` is called for it. Ranges of
// columns are made of whole parts, so what is left out does not depend on how columns are cut.
template <class How, class Problem, class OddPanel>
inline void multiply_by_dots(const Problem &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, void *scratch_bytes,
                             const OddPanel &odd_panel) {
    using X = typename How::X;
    const int64_t stride = row_stride<typename How::Element>(p.k);
    const DotScratch<How> scratch(scratch_bytes, rows, p.k);
    const int64_t columns = panel_columns(rows);
    constexpr int64_t kPart = ProductOf4Bits::kRangeColumns;
    const X *x = static_cast<const X *>(p.x) + row0 * p.k;
    X *y = static_cast<X *>(p.out) + row0 * p.n;
    for (int64_t panel = n0; panel < n1; panel += columns) {
        const int64_t width = panel + columns < n1 ? columns : n1 - panel;
        __builtin_memset(scratch.sums, 0, static_cast<size_t>(rows * columns) * sizeof(float));
        const uint32_t all = (1u << ((width + kPart - 1) / kPart)) - 1;
        uint32_t odd = 0;  // a bit for each part
        for (int64_t k0 = 0; k0 < p.k && odd != all; k0 += kSpan) {
            const int64_t span = k0 + kSpan < p.k ? kSpan : p.k - k0;
            const int64_t padded = round_up(span, How::kStep);
            const auto tail = static_cast<size_t>(padded - span) * sizeof(typename How::Element);
            for (int64_t c = 0; c < round_up(width, kStrip); ++c) {
                typename How::Element *row = scratch.w + c * stride;
                if (c >= width) {
                    __builtin_memset(row, 0, static_cast<size_t>(padded) * sizeof *row);
                    continue;
                }
                odd |= static_cast<uint32_t>(!How::decode_row(p.w, panel + c, k0, span, row)) << (c / kPart);
                __builtin_memset(row + span, 0, tail);
            }
            for (int64_t r = 0; r < rows && odd != all; r += kFewRows) {
                const int64_t some = r + kFewRows < rows ? kFewRows : rows - r;
                for (int64_t i = 0; i < some; ++i) {
                    How::convert(x + (r + i) * p.k + k0, span, scratch.x + i * stride);
                    __builtin_memset(scratch.x + i * stride + span, 0, tail);
                }
                for (int64_t c = 0; c < width; c += kStrip) {
                    float *sums = scratch.sums + r * columns + c;
                    const typename How::Element *w = scratch.w + c * stride;
                    switch (some) {
                        case 1:
                            dot<How, 1>(scratch.x, w, stride, padded, sums, columns);
                            break;
                        case 2:
                            dot<How, 2>(scratch.x, w, stride, padded, sums, columns);
                            break;
                        case 3:
                            dot<How, 3>(scratch.x, w, stride, padded, sums, columns);
                            break;
                        case 4:
                            dot<How, 4>(scratch.x, w, stride, padded, sums, columns);
                            break;
                        case 5:
                            dot<How, 5>(scratch.x, w, stride, padded, sums, columns);
                            break;
                        default:
                            dot<How, kFewRows>(scratch.x, w, stride, padded, sums, columns);
                    }
                }
            }
        }
        const auto for_parts = [&](bool are_odd, const auto &function) {
            for (int64_t first = 0; first < width; first += kPart) {
                if (((odd >> (first / kPart) & 1) != 0) == are_odd) {
                    function(first, width - first < kPart ? width - first : kPart);
                }
            }
        };
        for_parts(false, [&](int64_t first, int64_t count) {
            float bias[kPart];
            load_bias(p, panel + first, count, bias);
            for (int64_t r = 0; r < rows; ++r) {
                finish_row(p, scratch.sums + r * columns + first, bias, count, y + r * p.n + panel + first);
            }
        });
        // These take the scratch for themselves.
        for_parts(true, [&](int64_t first, int64_t count) { odd_panel(panel + first, panel + first + count); });
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_GEMM_4BIT_DOT_H
