// gemm_4bit and gemm_int4: which of the ways to compute a product this instruction set takes for a shape. Only the
// kernel files of both include it.
//  - gemm_4bit_dot.h: dot products in float32; every instruction set, every dtype, every value.
//  - gemm_4bit_gemv.h: one row of X in float32 on AVX-512.
//  - bfloat16 products: gemm_4bit_short.h (a few rows of X), gemm_4bit_tiles.h (tiles; gemm_4bit_amx.h where a tile
//    unit multiplies them, gemm_4bit_lanes.h for a few of them where there is none), else dot products. Only where no
//    denormal can arise, since those instructions flush them: rows and columns where one can are computed again in
//    float32.
#ifndef QCORE_CPU_GEMM_4BIT_PRODUCT_H
#define QCORE_CPU_GEMM_4BIT_PRODUCT_H

#include "gemm_4bit_amx.h"
#include "gemm_4bit_gemv.h"
#include "gemm_4bit_lanes.h"
#include "gemm_4bit_short.h"
#include "irregular_rows.h"
#include "qcore_backend.h"

namespace qcore::cpu::QC_ISA {

inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Bytes for multiply_in_float; float_gemv_serves also depends on the weight, which workspace() does not know. The same
// goes for by_tiles() in scratch_bytes() and packed_bytes() where there is a tile unit.
inline int64_t float_scratch_bytes(const ProductOf4Bits &p, int64_t rows) {
    const int64_t row = p.m == 1 ? p.k * static_cast<int64_t>(sizeof(float)) : 0;
    return max64(DotScratch<InFloat<float>>::bytes(rows, p.k), row);
}

// In float32, from values of T: right for every value.
template <class T, class Problem>
void multiply_in_float(const Problem &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, void *scratch) {
#if defined(__AVX512BW__)
    if (float_gemv_serves(p)) {
        multiply_row<T>(p, n0, n1, scratch);
        return;
    }
#endif
    multiply_by_dots<InFloat<T>>(p, row0, rows, n0, n1, scratch, [](int64_t, int64_t) {});
}

#if defined(__AVX512BF16__)

// Rows of X up to which dot products take less time than sixteen lanes, most of them idle (on a Zen 4).
constexpr int64_t kMostDotRows = 12;

template <class Weight>
inline bool by_tiles(const WeightProduct<Weight> &p) {
#if defined(__AMX_BF16__)
    // One row only where it costs no more than decoding.
    return p.k > 0 && (p.m > 1 || split_serves(p));
#else
    return p.k > 0 && p.m > kMostDotRows;
#endif
}

// How gemm_4bit_tiles.h packs X: columns of a tile, and whether halves of groups are padded.
template <class Problem>
inline int64_t tile_columns(const Problem &p, int64_t rows) {
#if defined(__AMX_BF16__)
    return few_rows_columns(p, rows);
#else
    (void)p, (void)rows;
    return kTile;
#endif
}
template <class Problem>
inline bool tiles_are_padded(const Problem &p, int64_t rows) {
#if defined(__AMX_BF16__)
    return few_rows_serve(p, rows);
#else
    (void)p, (void)rows;
    return false;
#endif
}

template <class Problem>
int64_t packed_bytes(const Problem &p, int64_t rows) {
    if (p.dtype != QC_BF16) {
        return 0;
    }
#if defined(__AMX_BF16__)
    const int64_t columns = p.m == 1 ? 1 : kTile;
#else
    const int64_t columns = by_tiles(p) ? kTile : 0;
#endif
    return kFlagBytes + bf16_x_tile_bytes(p, rows) / kTile * columns;
}

template <class Problem>
void pack(const Problem &p, int64_t row0, int64_t rows, int64_t group, void *packed) {
    const Bfloat *x = static_cast<const Bfloat *>(p.x) + row0 * p.k;
    auto *flags = static_cast<uint8_t *>(packed);
    flag_rows(x, rows, p.k, group, flags, [&](const Bfloat *row) { return irregular_row(row, p.k); });
    if (by_tiles(p) && !short_rows_serve(p, rows)) {
        pack_bf16_x_tiles(p, x, rows, group, tile_columns(p, rows), tiles_are_padded(p, rows), flags + kFlagBytes);
    }
}

template <class Weight>
int64_t scratch_bytes(const WeightProduct<Weight> &p, int64_t rows, int64_t columns) {
    int64_t bytes = float_scratch_bytes(p, rows);
    if (p.dtype != QC_BF16) {
        return bytes;
    }
    const int64_t last = p.m % kProductRows;  // rows that are left for the end, where there are more than `rows`
    bytes = max64(bytes, max64(short_scratch_bytes(p, rows), last > 0 ? short_scratch_bytes(p, last) : 0));
#if defined(__AMX_BF16__)
    if (p.m > 1) {
        return max64(bytes, bf16_tile_scratch_bytes(rows, columns));
    }
    bytes = max64(bytes, static_cast<int64_t>(sizeof(FewRowsScratch)));
#else
    if (by_tiles(p)) {
        static_assert(sizeof(LanesScratch) <= kTileWeightBytes);
        return max64(bytes, tile_scratch_bytes(rows, columns));
    }
#endif
    return max64(bytes, DotScratch<InBf16>::bytes(rows, p.k));
}

// What short rows do not serve; OddPanel as in multiply_by_dots.
template <class Weight, class OddPanel>
void multiply_long_rows(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                        const uint8_t *flags, void *scratch, const OddPanel &odd_panel) {
    if (by_tiles(p)) {
#if defined(__AMX_BF16__)
        multiply_bf16_by_tiles(p, row0, rows, n0, n1, flags + kFlagBytes, scratch, odd_panel);
#else
        if (lanes_serve(p, rows)) {
            multiply_in_lanes(p, row0, rows, n0, n1, flags + kFlagBytes, scratch, odd_panel);
        } else {
            multiply_decoded<TileLanes<Bf16Lanes>>(p, row0, rows, n0, n1, flags + kFlagBytes, scratch, odd_panel);
        }
#endif
        return;
    }
    (void)flags;
    multiply_by_dots<InBf16>(p, row0, rows, n0, n1, scratch, odd_panel);
}

template <class Weight>
void multiply_bf16(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                   const void *packed, void *scratch) {
    const auto *flags = static_cast<const uint8_t *>(packed);
    const auto again = [&](int64_t first_row, int64_t some_rows, int64_t first, int64_t end) {
        multiply_in_float<Bfloat>(p, row0 + first_row, some_rows, first, end, scratch);
    };
    const auto odd_panel = [&](int64_t first, int64_t end) { again(0, rows, first, end); };
    if (short_rows_serve(p, rows)) {
        multiply_short_rows(p, row0, rows, n0, n1, scratch, odd_panel);
    } else {
        multiply_long_rows(p, row0, rows, n0, n1, flags, scratch, odd_panel);
    }
    for_irregular_rows(flags, rows, [&](int64_t first_row, int64_t some_rows) { again(first_row, some_rows, n0, n1); });
}

#else

template <class Problem>
int64_t packed_bytes(const Problem &, int64_t) {
    return 0;
}

template <class Problem>
void pack(const Problem &, int64_t, int64_t, int64_t, void *) {}

template <class Weight>
int64_t scratch_bytes(const WeightProduct<Weight> &p, int64_t rows, int64_t) {
    return float_scratch_bytes(p, rows);
}

template <class Problem>
void multiply_bf16(const Problem &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *, void *scratch) {
    multiply_in_float<Bfloat>(p, row0, rows, n0, n1, scratch);
}

#endif

template <class Problem>
void multiply(const Problem &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed, void *scratch) {
    switch (p.dtype) {
        case QC_F32:
            multiply_in_float<float>(p, row0, rows, n0, n1, scratch);
            break;
        case QC_F16:
            multiply_in_float<Half>(p, row0, rows, n0, n1, scratch);
            break;
        default:
            multiply_bf16(p, row0, rows, n0, n1, packed, scratch);
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_GEMM_4BIT_PRODUCT_H
