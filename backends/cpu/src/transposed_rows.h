// X W as sums of rows of W: any instruction set, any alignment of the rows, any value. Only kernel
// files include it.
//
// Memory picture: a panel, 64 columns of kRowSpan rows of W, is decoded into scratch (32 KiB, L1), and kRowBlock rows
// of X meet it, their elements broadcast, all sums of kRowVectors vectors in registers: 24 products for 10 loads on
// AVX-512. X is converted to float32 beside each panel; pairs of bfloat16 values are made once a call (pack_pairs).
//
// Rounding: a product is added to a chain of at most kRowSpan, the chains of spans are then added: at most k in all.
#ifndef QCORE_CPU_TRANSPOSED_ROWS_H
#define QCORE_CPU_TRANSPOSED_ROWS_H

#include "transposed_weight.h"

namespace qcore::cpu::QC_ISA {

constexpr int64_t kRowPanel = 64;  // columns
constexpr int64_t kRowSpan = 128;  // rows of W, or pairs of rows
#if defined(__AVX512F__)
constexpr int kRowVectors = 4;
constexpr int kRowBlock = 6;
#else
constexpr int kRowVectors = 2;
constexpr int kRowBlock = 4;
#endif

// Rows of X, a dword for each dword of a column of W; `stride` of them from one row to the next.
struct XSpan {
    const float *x;
    int64_t stride;
};

// How the elements of a product are held in scratch, a dword each, and multiplied.
template <class Weight, class T>
struct RowsInFloat {
    using X = T;
    using Of = TransposedWeight<Weight>;
    static constexpr int64_t kRowsOfDword = 1;

    RowsInFloat(const TransposedProduct<Weight> &p, int64_t row0)
        : p_(p), x_(static_cast<const T *>(p.x) + row0 * p.k) {}

    bool decode(int64_t k0, int64_t count, int64_t n, int64_t width, float *out) {
        for (int64_t i = 0; i < count; ++i, out += kRowPanel) {
            Of::template decode<T>(p_.w, k0 + i, n, width, out);
            __builtin_memset(out + width, 0, static_cast<size_t>(kRowPanel - width) * sizeof *out);
        }
        return true;
    }
    // Elements k0 ... of `rows` rows of X, `row` after the first, as they are multiplied: kRowSpan apart, in `room`.
    XSpan x_span(int64_t row, int64_t rows, int64_t k0, int64_t count, float *room) const {
        for (int64_t r = 0; r < rows; ++r) {
            const T *from = x_ + (row + r) * p_.k + k0;
            float *out = room + r * kRowSpan;
            int64_t i = 0;
            for (; i + kLanes <= count; i += kLanes) {
                store(out + i, Of::x_lanes(p_.w, from + i, k0 + i));
            }
            for (; i < count; ++i) {
                out[i] = Of::x(p_.w, from[i], k0 + i);
            }
        }
        return {room, kRowSpan};
    }
    static F32 add_product(const float *x, F32 w, F32 sum) { return multiply_add(splat(*x), w, sum); }
    void finish(const float *sums, int64_t width, T *y) const {
        int64_t c = 0;
        for (; c + kLanes <= width; c += kLanes) {
            store(y + c, load(sums + c));
        }
        for (; c < width; ++c) {
            y[c] = from_float<T>(sums[c]);
        }
    }

   private:
    const TransposedProduct<Weight> &p_;
    const T *x_;
};

#if defined(__AVX512BF16__)
// Two products a lane and step. Flushes denormals: the caller sees to it that there are none.
template <class Weight>
struct RowsInBf16 {
    using X = Bfloat;
    static constexpr int64_t kRowsOfDword = 2;

    // `x`: from pack_pairs.
    RowsInBf16(const TransposedProduct<Weight> &p, const uint8_t *x)
        : x_(reinterpret_cast<const float *>(x)), stride_(pair_row_bytes(p.k) / 4), decoder_(p) {}

    bool decode(int64_t k0, int64_t count, int64_t n, int64_t width, float *out) {
        bool regular = true;
        const int64_t ahead = decoder_.bytes(width);
        if (decoder_.split()) {
            regular = decoder_.prepare(k0, count, n, n + width, scales_) == 0;
        }
        const bool decoded = decoder_.decode(k0, (count + 1) / 2, n, 0, ahead, [&](int64_t i, const __m512i *v) {
            for (int j = 0; j < kPairVectors; ++j) {
                _mm512_storeu_si512(out + i * kRowPanel + 16 * j, v[j]);
            }
        });
        return regular && decoded;
    }
    XSpan x_span(int64_t row, int64_t, int64_t k0, int64_t, float *) const {
        return {x_ + row * stride_ + k0 / 2, stride_};
    }
    static F32 add_product(const float *x, F32 w, F32 sum) {
        int32_t pair;
        __builtin_memcpy(&pair, x, sizeof pair);
        return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
    }
    void finish(const float *sums, int64_t width, Bfloat *y) const {
        const float *const parts[kPairVectors] = {sums, sums + 16, sums + 32, sums + 48};
        finish_pairs(decoder_.split(), parts, width, y);
    }

   private:
    const float *x_;
    int64_t stride_;
    PairDecoder<Weight> decoder_;
    float scales_[2 * kRowSpan * PairDecoder<Weight>::kScales + 1];
};
#endif

// sums[r][0 ... kRowPanel - 1] += the products of kRows rows of X with `count` dwords of the panel.
template <class How, int kRows>
inline void add_rows(XSpan x, const float *w, int64_t count, float *sums) {
    constexpr int kWidth = kRowVectors * kLanes;
    for (int c = 0; c < kRowPanel; c += kWidth) {
        F32 sum[kRows][kRowVectors] = {};
        for (int64_t i = 0; i < count; ++i) {
            F32 v[kRowVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kRowVectors; ++j) {
                v[j] = load(w + i * kRowPanel + c + j * kLanes);
            }
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int j = 0; j < kRowVectors; ++j) {
                    sum[r][j] = How::add_product(x.x + r * x.stride + i, v[j], sum[r][j]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int j = 0; j < kRowVectors; ++j) {
                float *to = sums + r * kRowPanel + c + j * kLanes;
                store(to, load(to) + sum[r][j]);
            }
        }
    }
}

struct RowScratch {
    alignas(64) float w[kRowSpan * kRowPanel];
    alignas(64) float x[kRowBlock * kRowSpan];
    alignas(64) float sums[1];  // and as many as the rows need

    static int64_t bytes(int64_t rows) {
        return static_cast<int64_t>(sizeof(RowScratch)) + rows * kRowPanel * static_cast<int64_t>(sizeof(float));
    }
};

// Columns n0 ... n1 - 1 of the rows row0 ... row0 + rows - 1. How::decode may answer false: then the panel is left out
// and `odd_panel(first column, end)` is called for it.
template <class How, class Weight, class OddPanel>
inline void multiply_by_rows(How how, const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0,
                             int64_t n1, void *scratch_bytes, const OddPanel &odd_panel) {
    using X = typename How::X;
    constexpr int64_t kSpanOfW = kRowSpan * How::kRowsOfDword;
    auto &scratch = *static_cast<RowScratch *>(scratch_bytes);
    X *y = static_cast<X *>(p.out) + row0 * p.n;
    for (int64_t n = n0; n < n1; n += kRowPanel) {
        const int64_t width = n + kRowPanel < n1 ? kRowPanel : n1 - n;
        __builtin_memset(scratch.sums, 0, static_cast<size_t>(rows * kRowPanel) * sizeof(float));
        bool served = true;
        for (int64_t k0 = 0; k0 < p.k && served; k0 += kSpanOfW) {
            const int64_t span = k0 + kSpanOfW < p.k ? kSpanOfW : p.k - k0;
            const int64_t count = (span + How::kRowsOfDword - 1) / How::kRowsOfDword;
            served = how.decode(k0, span, n, width, scratch.w);
            for (int64_t r = 0; r < rows && served; r += kRowBlock) {
                const int64_t some = r + kRowBlock < rows ? kRowBlock : rows - r;
                const XSpan x = how.x_span(r, some, k0, span, scratch.x);
                float *sums = scratch.sums + r * kRowPanel;
                switch (some) {
                    case 1:
                        add_rows<How, 1>(x, scratch.w, count, sums);
                        break;
                    case 2:
                        add_rows<How, 2>(x, scratch.w, count, sums);
                        break;
                    case 3:
                        add_rows<How, 3>(x, scratch.w, count, sums);
                        break;
                    case 4:
                        add_rows<How, 4>(x, scratch.w, count, sums);
                        break;
                    case 5:
                        add_rows<How, 5 < kRowBlock ? 5 : kRowBlock>(x, scratch.w, count, sums);
                        break;
                    default:
                        add_rows<How, kRowBlock>(x, scratch.w, count, sums);
                }
            }
        }
        if (!served) {
            odd_panel(n, n + width);
            continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
            how.finish(scratch.sums + r * kRowPanel, width, y + r * p.n + n);
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_TRANSPOSED_ROWS_H
