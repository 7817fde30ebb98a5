// X W for a few rows of X in bfloat16, with VDPBF16PS. Only kernel files include it.
//
// Memory picture: pairs of rows of W are decoded in registers and multiplied there, by pairs of X that are broadcast,
// so a decoded weight is never stored; sums of a panel stay in registers for a span of W, 512 rows or fewer, and wait
// in scratch (L1) between spans. A panel takes 32 or 64 bytes of a row: a span of it is at most 32 KiB, so the other
// half of its lines is in L1 for the next panel. To decode 128 weights takes 17 or 24 operations of the two vector
// ports, to multiply them four a row; tiles take none for that, but a store, a load and a wait for each decoded vector.
#ifndef QCORE_CPU_TRANSPOSED_FEW_H
#define QCORE_CPU_TRANSPOSED_FEW_H

#include "transposed_weight.h"

#if defined(__AVX512BF16__)

namespace qcore::cpu::QC_ISA {

#if defined(__AMX_BF16__)
constexpr int64_t kFewRows = 2;
#else
constexpr int64_t kFewRows = 4;
#endif
constexpr int64_t kFewSpan = 512;  // rows of W at a time, at most

// Scratch: scales of a span, then sums of kMostPanels panels.
template <class Weight>
inline int64_t few_scale_floats() {
    return kFewSpan * PairDecoder<Weight>::kScales;
}

template <class Weight>
inline int64_t few_scratch_bytes(int64_t rows) {
    return (few_scale_floats<Weight>() + rows * kMostPanels * kPairColumns) * static_cast<int64_t>(sizeof(float));
}

// sums[r] += pairs of W, `pairs` of them from `row` on, times those of row r of X. False: an odd panel.
template <int kRows, class Weight>
inline bool add_few_rows(const PairDecoder<Weight> &decoder, int64_t row, int64_t pairs, int64_t n, int64_t panel,
                         int64_t ahead, const uint8_t *x, int64_t x_stride, float *sums) {
    __m512 sum[kRows][kPairVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kPairVectors; ++j) {
            sum[r][j] = _mm512_loadu_ps(sums + r * kPairColumns + 16 * j);
        }
    }
    const bool regular = decoder.decode(row, pairs, n, panel, ahead, [&](int64_t i, const __m512i *v) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, x + r * x_stride + 4 * i, sizeof pair);
#pragma GCC unroll 4
            for (int j = 0; j < kPairVectors; ++j) {
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)v[j], (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    });
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kPairVectors; ++j) {
            _mm512_storeu_ps(sums + r * kPairColumns + 16 * j, sum[r][j]);
        }
    }
    return regular;
}

// Columns n0 ... n1 - 1 of the rows row0 ... row0 + kRows - 1, packed in `x`.
template <int kRows, class Weight, class OddPanel>
inline void multiply_few_rows(const TransposedProduct<Weight> &p, int64_t row0, int64_t n0, int64_t n1,
                              const uint8_t *x, void *scratch, const OddPanel &odd_panel) {
    constexpr int64_t kSumsOfPanel = kRows * kPairColumns;
    PairDecoder<Weight> decoder(p);
    auto *scales = static_cast<float *>(scratch);
    float *sums = scales + few_scale_floats<Weight>();
    const int64_t x_stride = pair_row_bytes(p.k);
    const int64_t span = even_span(p.k, kFewSpan, 2);
    for (int64_t first = n0; first < n1; first += kMostPanels * kPairColumns) {
        const int64_t end = first + kMostPanels * kPairColumns < n1 ? first + kMostPanels * kPairColumns : n1;
        const int64_t panels = (end - first + kPairColumns - 1) / kPairColumns;
        __builtin_memset(sums, 0, static_cast<size_t>(panels * kSumsOfPanel) * sizeof *sums);
        uint32_t odd = 0;
        for (int64_t k0 = 0; k0 < p.k; k0 += span) {
            const int64_t rows = p.k - k0 < span ? p.k - k0 : span;
            odd |= decoder.prepare(k0, rows, first, end, scales);
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t n = first + panel * kPairColumns;
                // The panel after the next; the last two lead to the first of the next span.
                const int64_t reach = panel + 2 < panels ? 2 * kPairColumns : span * p.n - panel * kPairColumns;
                const bool regular =
                    add_few_rows<kRows>(decoder, k0, (rows + 1) / 2, n, panel, PairDecoder<Weight>::bytes(reach),
                                        x + 2 * k0, x_stride, sums + panel * kSumsOfPanel);
                odd |= static_cast<uint32_t>(!regular) << panel;
            }
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t n = first + panel * kPairColumns;
            const int64_t count = end - n < kPairColumns ? end - n : kPairColumns;
            for (int64_t r = 0; r < kRows && (odd >> panel & 1) == 0; ++r) {
                const float *sum = sums + panel * kSumsOfPanel + r * kPairColumns;
                const float *const parts[kPairVectors] = {sum, sum + 16, sum + 32, sum + 48};
                finish_pairs(decoder.split(), parts, count, static_cast<Bfloat *>(p.out) + (row0 + r) * p.n + n);
            }
        }
        for (int64_t n = first; odd != 0; n += kPairColumns, odd >>= 1) {  // these take the scratch for themselves
            if ((odd & 1) != 0) {
                odd_panel(n, n + kPairColumns < end ? n + kPairColumns : end);
            }
        }
    }
}

template <class Weight, class OddPanel>
inline void multiply_few_rows(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                              const uint8_t *x, void *scratch, const OddPanel &odd_panel) {
    switch (rows) {
        case 1:
            multiply_few_rows<1>(p, row0, n0, n1, x, scratch, odd_panel);
            break;
        case 2:
            multiply_few_rows<2>(p, row0, n0, n1, x, scratch, odd_panel);
            break;
        case 3:
            multiply_few_rows < kFewRows<3 ? kFewRows : 3>(p, row0, n0, n1, x, scratch, odd_panel);
            break;
        default:
            multiply_few_rows<kFewRows>(p, row0, n0, n1, x, scratch, odd_panel);
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_TRANSPOSED_FEW_H
