// A few rows of X in bfloat16, with short rows of W or, where there is no tile unit, any: the sums of four rows of W at
// a time.
//
// One row of W after the other would cost some eighty cycles for each, whatever its length, beside its products: to
// look for its scales, to add sixteen lanes of four chains, to round and store one value. Tiles (gemm_4bit_amx.h) spend
// five hundred on sixteen rows, waiting for what was just stored. Here four rows are added up together, and sixteen
// share the look at their scales and the way out. A row has one chain of sums; four rows keep the units as busy as four
// chains of one.
//
// Memory picture: W is read once, four rows side by side, and the sixteen rows after them are fetched meanwhile into
// L2, in the order in which they lie, and their scales. X stays in L1.
#ifndef QCORE_CPU_GEMM_4BIT_SHORT_H
#define QCORE_CPU_GEMM_4BIT_SHORT_H

#include "gemm_4bit_dot.h"
#include "gemm_4bit_scales.h"

#if defined(__AVX512BF16__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kShortRows = 16;    // of W, whose results are finished together
constexpr int64_t kShortRowsOfX = 4;  // at a time

// Elements of a row of W up to which this serves so many rows of X. Measured on one thread of a Xeon with AMX at 2 GHz,
// in microseconds, the least of forty turns, tiles (gemm_4bit_amx.h) / this way, NF4 and then integers in groups of 64:
//     N x K      M = 1                 2                     3
//     64x64      2.3/1.4  2.8/1.7      2.3/1.7  2.9/2.0      2.2/2.0  2.7/2.3
//     64x128     2.2/1.5  3.0/1.9      2.3/1.8  2.9/2.3      2.4/2.1  3.1/2.6
//     128x128    3.3/2.5  4.1/3.3      3.3/2.9  4.7/4.1      3.0/3.4  4.4/4.3
//     128x256    4.6/4.0  7.0/5.1      4.4/4.5  5.8/5.9      4.6/5.7  6.5/7.5
//     256x384    9.8/10   14/13        10/12    15/17
//     256x512    12/13    19/17        12/16    19/21
//     1536x576   68/88    119/116      74/111   110/145
// and with four rows of X tiles win at K = 64 (2.5/2.5, 2.6/3.1). Without a tile unit, panels (gemm_4bit_dot.h) / this
// way:
//     64x64                            3.4/1.7  3.5/2.1      4.2/2.1  4.1/2.5
//     256x512                          30/16    44/21        36/21    52/26
//     576x1536                         180/100  270/131      224/129  323/165
// and, in milliseconds, panels / lanes (tile_lanes.h) / this way on two cores of a Zen 4, 4096x4096, NF4:
//     M = 2 1.43/-/0.52   4 1.88/-/0.92   6 1.83/1.98/0.94   8 1.38/1.86/0.97   12 2.02/2.12/1.84   16 2.42/2.09/-
// and at 1536x576 panels take 0.12, this way 0.14 for twelve rows: so up to eight. benchmarks/two_builds.py compares a
// build with one that has other limits.
#if defined(__AMX_BF16__)
constexpr int64_t kMostShortRows = 3;
inline bool short_row(int64_t k, int64_t rows) {
    constexpr int64_t kShortRow[kMostShortRows] = {384, 128, 64};
    return rows <= kMostShortRows && k > 0 && k <= kShortRow[rows - 1];
}
#else
constexpr int64_t kMostShortRows = 8;
inline bool short_row(int64_t k, int64_t rows) { return rows <= kMostShortRows && k > 0; }
#endif

template <class Problem>
inline bool short_rows_serve(const Problem &p, int64_t rows) {
    return short_row(p.k, rows) && split_serves(p);
}

// Asked for before the weight is known.
inline int64_t short_scratch_bytes(const ProductOf4Bits &p, int64_t rows) {
    return short_row(p.k, rows) ? rows * split_length(p.k) * static_cast<int64_t>(sizeof(Bfloat)) : 0;
}

// sums[r][0 ... 3] += of the rows n + first ... + 3 of W with each row of X, `x` in split order: of `length` elements
// from k0 on, a multiple of kGroup. Fetches the rows that come sixteen later, in the order in which they lie: memory
// gives them faster so.
template <int kRows, class Weight>
inline void sum_four_rows(const WeightProduct<Weight> &p, const Split<Weight> &decoder,
                          const RowScales<Weight, kShortRows> &row_scales, int64_t n, int64_t first, int64_t count,
                          int64_t k0, int64_t length, const Bfloat *x, float *sums) {
    F32 sum[kRows][kStrip] = {};
    const uint8_t *bytes[kStrip];
    typename Split<Weight>::Scales scales[kStrip];
    for (int i = 0; i < kStrip; ++i) {  // beyond the last row, that one again
        const int64_t row = first + i < count ? first + i : count - 1;
        bytes[i] = p.w.packed + (((n + row) * p.k + k0) >> 1);
        scales[i] = row_scales.at(row);
    }
    const int64_t stride = split_length(p.k);
    const uint8_t *next = p.w.packed + (((n + first + kShortRows) * p.k + kStrip * k0) >> 1);
    const auto add_products = [&](int64_t g, int i, const __m512i *plane) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                sum[r][i] = InBf16::add_product(x + r * stride + g * kGroup + 32 * j, plane[j], sum[r][i]);
            }
        }
    };
    x += k0;
    const int64_t whole = length / kGroup;
    for (int64_t g = 0; g < whole; ++g) {
        const auto units = decoder.units(scales[0], g);
#pragma GCC unroll 4
        for (int i = 0; i < kStrip; ++i) {
            __m512i plane[4];
            _mm_prefetch(next + 64 * (kStrip * g + i), _MM_HINT_T1);
            decoder.decode(bytes[i] + 64 * g, scales[i], units, plane);
            add_products(g, i, plane);
        }
    }
    if (length % kGroup != 0) {
        const auto units = decoder.units(scales[0], whole);
#pragma GCC unroll 4
        for (int i = 0; i < kStrip; ++i) {
            __m512i plane[4];
            decoder.decode_half(bytes[i] + 64 * whole, scales[i], units, plane);
            add_products(whole, i, plane);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        float total[kStrip];
        sum_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3], total);
        for (int i = 0; i < kStrip; ++i) {
            sums[r * kShortRows + i] += total[i];
        }
    }
}

template <class Weight>
inline void sum_four_rows(int64_t rows, const WeightProduct<Weight> &p, const Split<Weight> &decoder,
                          const RowScales<Weight, kShortRows> &row_scales, int64_t n, int64_t first, int64_t count,
                          int64_t k0, int64_t length, const Bfloat *x, float *sums) {
    switch (rows) {
        case 1:
            return sum_four_rows<1>(p, decoder, row_scales, n, first, count, k0, length, x, sums);
        case 2:
            return sum_four_rows<2>(p, decoder, row_scales, n, first, count, k0, length, x, sums);
        case 3:
            return sum_four_rows<3>(p, decoder, row_scales, n, first, count, k0, length, x, sums);
        default:
            return sum_four_rows<kShortRowsOfX>(p, decoder, row_scales, n, first, count, k0, length, x, sums);
    }
}

inline void fetch(const Extent &extent) {
    for (int64_t i = 0; i < extent.bytes; i += 64) {
        _mm_prefetch(extent.first + i, _MM_HINT_T1);
    }
}

// k values of a row of X in split order (gemm_4bit_split.h), split_length(k) values.
inline void split_row(const Bfloat *x, int64_t k, Bfloat *out) {
    for (int64_t i = 0; i < k; i += kGroup) {
        __m512i plane[4];
        split_planes(x + i, k - i, plane);
        for (int j = 0; j < 4; ++j) {
            _mm512_storeu_si512(out + i + 32 * j, plane[j]);
        }
    }
}

// Columns n0 ... n1 - 1 of the rows row0 ... row0 + rows - 1, with short_scratch_bytes of scratch. odd_rows(first, end)
// is called for rows of W that are not regular; it may use the scratch.
template <class Weight, class OddRows>
inline void multiply_short_rows(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                                void *scratch, const OddRows &odd_rows) {
    auto *x = static_cast<Bfloat *>(scratch);
    const Split<Weight> decoder(p.w);
    RowScales<Weight, kShortRows> scales(p.w);
    const int64_t stride = split_length(p.k);
    const int64_t parts = (rows + kShortRowsOfX - 1) / kShortRowsOfX;
    const int64_t together = (rows + parts - 1) / parts;
    const auto split_x = [&] {
        for (int64_t r = 0; r < rows; ++r) {
            split_row(static_cast<const Bfloat *>(p.x) + (row0 + r) * p.k, p.k, x + r * stride);
        }
    };
    // The first rows meanwhile: where a model is larger than the caches, each weight starts in memory.
    fetch(scales.lies(n0, kShortRows));
    fetch({reinterpret_cast<const char *>(p.w.packed) + ((n0 * p.k) >> 1), kShortRows * p.k >> 1});
    split_x();
    for (int64_t n = n0; n < n1; n += kShortRows) {
        const int64_t count = n1 - n < kShortRows ? n1 - n : kShortRows;
        float sums[round_up(kMostShortRows, kShortRowsOfX)][kShortRows] = {}, bias[kShortRows];
        bool regular = true;
        for (int64_t k0 = 0; k0 < p.k && regular; k0 += kScaleElements) {
            const int64_t length = p.k - k0 < kScaleElements ? p.k - k0 : kScaleElements;
            regular = scales.load(n, count, k0, length);
            for (int64_t r = 0; r < rows && regular; r += together) {
                const int64_t some = rows - r < together ? rows - r : together;
                for (int64_t i = 0; i < count; i += kStrip) {
                    if (r == 0 && k0 == 0) {
                        fetch(scales.lies(n + kShortRows + i, kStrip));
                    }
                    sum_four_rows(some, p, decoder, scales, n, i, count, k0, length, x + r * stride, sums[r] + i);
                }
            }
        }
        if (!regular) {
            odd_rows(n, n + count);
            split_x();
            continue;
        }
        load_bias(p, n, count, bias);
        for (int64_t r = 0; r < rows; ++r) {
            finish_row(p, sums[r], bias, count, static_cast<Bfloat *>(p.out) + (row0 + r) * p.n + n);
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_SHORT_H
