// gemm_4bit for bfloat16 on AMX tiles. Many rows of X go the way of gemm_4bit_tiles.h.
//
// Memory picture for few rows of X (multiply_few_rows): W is read once, sixteen of its rows side by side, 128 elements
// of each at a time, into 4 KiB of scratch, while the tile unit multiplies the 4 KiB before by sixteen or 32 rows of X.
// Decoding (split order, gemm_4bit_split.h) keeps the vector ports busy for 152 cycles a step, the four or eight tile
// products of the step the tile unit for 64 or 128: so one row of X or 32 cost little more than the decoding. More rows
// are taken 32 at a time, each time decoding W again, which is the better way as long as decoding beside the products
// costs less than decoding before them. The tiles of up to sixteen rows of X are as narrow as there are rows, so that
// they are small; what the next sixteen rows of W will need is fetched into L2 meanwhile (NextRows). As few tiles as
// possible are in use: see tile_unit.h on why.
#ifndef QCORE_CPU_GEMM_4BIT_AMX_H
#define QCORE_CPU_GEMM_4BIT_AMX_H

#include "gemm_4bit_tiles.h"

#if defined(__AMX_BF16__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kFewTileRows = 128;                // rows of X up to which multiply_few_rows takes them
constexpr int64_t kStepBytes = kTile * kGroupBytes;  // of 16 rows of W, decoded
constexpr int64_t kStepsOfSpan = kTileSpan / kGroupBytes;

template <class Problem>
inline bool few_rows_serve(const Problem &p, int64_t rows) {
    return rows <= kFewTileRows && split_serves(p);
}

// Columns of a tile of X.
template <class Problem>
inline int64_t few_rows_columns(const Problem &p, int64_t rows) {
    return rows < kTile && few_rows_serve(p, rows) ? rows : kTile;
}

// What multiply_few_rows needs to itself: two steps of decoded W, a tile of sums.
struct FewRowsScratch {
    alignas(64) uint8_t step[2][kStepBytes];
    alignas(64) float sums[2][kTile * kTile];
};

// What is read of a row of W.
template <class Weight>
struct RowOfWeight {
    const uint8_t *bytes;
    typename Split<Weight>::Scales scales;
};

// Fetches the kTile rows of W after those that are decoded, and their scales, a share with every step: line after line
// as they lie in memory, because that is what the processor's own prefetching can follow.
template <class Weight>
class NextRows {
   public:
    NextRows(const WeightProduct<Weight> &p, const RowScales<Weight, kTile> &scales, int64_t n)
        : rows_(reinterpret_cast<const char *>(p.w.packed) + ((n * p.k) >> 1)) {
        const Extent extent = scales.lies(n, kTile);
        scales_ = extent.first;
        const int64_t share = 64 * (split_length(p.k) / kGroup);
        lines_ = (extent.bytes + share - 1) / share;
    }
    void fetch_row(int64_t step, int64_t i) const { _mm_prefetch(rows_ + 64 * (kTile * step + i), _MM_HINT_T1); }
    void fetch_scales(int64_t step) const {
        for (int64_t i = 0; i < lines_; ++i) {
            _mm_prefetch(scales_ + 64 * (lines_ * step + i), _MM_HINT_T1);
        }
    }

   private:
    const char *rows_;
    const char *scales_;
    int64_t lines_;  // of scales, for a step
};

// Group g of a row of W, or its first half, to a row of four tiles.
template <bool kHalf, class Weight>
inline void decode_row(const Split<Weight> &decoder, const RowOfWeight<Weight> &row, int64_t g,
                       const Units<Weight> &units, uint8_t *out) {
    const uint8_t *bytes = row.bytes + 64 * g;
    __m512i plane[4];
    if (kHalf) {
        decoder.decode_half(bytes, row.scales, units, plane);
    } else {
        decoder.decode(bytes, row.scales, units, plane);
    }
    for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(out + j * kTileBytes, plane[j]);
    }
}

// Decodes group g of sixteen rows, of which there are kHalves halves, and, with kMultiply, multiplies the group before
// it by kGroups groups of tiles, at `x[i]`. `step` counts the groups of whole rows. What works on tiles stands apart,
// because it holds up all that is behind it until a tile register is free.
template <int kHalves, bool kMultiply, int kGroups, class Weight>
inline void few_rows_step(const Split<Weight> &decoder, const RowOfWeight<Weight> *rows, int64_t g,
                          const NextRows<Weight> &next, int64_t step, FewRowsScratch *scratch,
                          const uint8_t *const (&x)[kGroups], int64_t columns) {
    if (kHalves > 0) {
        next.fetch_scales(step);
    }
    const auto units = decoder.units(rows[0].scales, g);
    uint8_t *out = scratch->step[g & 1];
    const uint8_t *w = scratch->step[(g & 1) ^ 1];
    for (int j = 0; j < 4; ++j) {
        const auto decode = [&](int i) {
            if (kHalves > 0) {
                next.fetch_row(step, 4 * j + i);
                decode_row<kHalves == 1>(decoder, rows[4 * j + i], g, units, out + (4 * j + i) * kTileRowBytes);
            }
        };
        decode(0);
        if (kMultiply) {
            _tile_loadd(2, w + j * kTileBytes, kTileRowBytes);
        }
        decode(1);
        if (kMultiply) {
            _tile_loadd(3, x[0] + j * 16 * columns, columns);
        }
        decode(2);
        if (kMultiply && kGroups == 2) {
            _tile_dpbf16ps(0, 2, 3);
            _tile_loadd(3, x[kGroups - 1] + j * 16 * columns, columns);
        }
        decode(3);
        if (kMultiply) {
            if (kGroups == 2) {
                _tile_dpbf16ps(1, 2, 3);
            } else {
                _tile_dpbf16ps(0, 2, 3);
            }
        }
    }
    asm volatile("" ::: "memory");  // the tile loads do not tell the compiler what they read
}

// Columns n0 ... n1 - 1 of the rows of `kGroups` groups of sixteen, of `rows` rows in all;
// odd_panel(first, end) is called for columns that are not regular.
template <int kGroups, class Weight, class OddPanel>
inline void multiply_few_rows(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t group, int64_t n0,
                              int64_t n1, const uint8_t *x, void *scratch_bytes, const OddPanel &odd_panel) {
    auto &scratch = *static_cast<FewRowsScratch *>(scratch_bytes);
    const int64_t groups = row_tiles(rows);
    const int64_t columns = few_rows_columns(p, rows) * 4;  // bytes of a row of the tiles of X and of sums
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        const bool of_w = tile == 2;
        config.row_bytes[tile] = static_cast<uint16_t>(of_w ? kTileRowBytes : columns);
    }
    const Split<Weight> decoder(p.w);
    RowScales<Weight, kTile> scales(p.w);
    load_tile_config(config);
    for (int64_t n = n0; n < n1; n += kTile) {
        const int64_t count = n1 - n < kTile ? n1 - n : kTile;
        _tile_zero(0);
        _tile_zero(1);
        bool regular = true;
        const NextRows<Weight> next(p, scales, n + kTile);
        for (int64_t k0 = 0; k0 < p.k; k0 += kScaleElements) {
            const int64_t length = p.k - k0 < kScaleElements ? p.k - k0 : kScaleElements;
            const int64_t steps = split_length(length) / kGroup;
            const int64_t whole = length / kGroup;
            RowOfWeight<Weight> w_rows[kTile];
            regular &= scales.load(n, count, k0, length);
            for (int64_t i = 0; i < kTile; ++i) {  // beyond the last column, that one again
                const int64_t row = i < count ? i : count - 1;
                w_rows[i] = {p.w.packed + (((n + row) * p.k + k0) >> 1), scales.at(row)};
            }
            const int64_t step = k0 / kGroup;
            const uint8_t *at[kGroups];
            const auto tiles_of = [&](int64_t of) {
                for (int i = 0; i < kGroups; ++i) {
                    const int64_t tile = x_tile(of / kStepsOfSpan, groups, group + i) + of % kStepsOfSpan * kStepBytes;
                    at[i] = x + tile / kTileRowBytes * columns;
                }
            };
            if (whole > 0) {
                few_rows_step<2, false, kGroups>(decoder, w_rows, 0, next, step, &scratch, at, columns);
            } else {
                few_rows_step<1, false, kGroups>(decoder, w_rows, 0, next, step, &scratch, at, columns);
            }
            for (int64_t g = 1; g < whole; ++g) {
                tiles_of(step + g - 1);
                few_rows_step<2, true, kGroups>(decoder, w_rows, g, next, step + g, &scratch, at, columns);
            }
            if (whole > 0 && whole < steps) {
                tiles_of(step + whole - 1);
                few_rows_step<1, true, kGroups>(decoder, w_rows, whole, next, step + whole, &scratch, at, columns);
            }
            tiles_of(step + steps - 1);
            few_rows_step<0, true, kGroups>(decoder, w_rows, steps, next, step + steps, &scratch, at, columns);
        }
        _tile_stored(0, scratch.sums[0], kTileRowBytes);
        if (kGroups == 2) {
            _tile_stored(1, scratch.sums[1], kTileRowBytes);
        }
        for (int i = 0; i < kGroups && regular; ++i) {
            const int64_t some = rows - (group + i) * kTile;
            const auto valid = static_cast<__mmask16>(some < kTile ? (1u << some) - 1 : 0xFFFFu);
            __m512i v[kTile];
            for (int j = 0; j < kTile; ++j) {
                v[j] = _mm512_maskz_loadu_epi32(valid, scratch.sums[i] + kTile * j);
            }
            transpose_16x16(v);
            finish_tile(p, row0, rows, n, count, group + i, v);
        }
        if (!regular) {
            odd_panel(n, n + count);
        }
    }
    _tile_release();
}

inline int64_t bf16_tile_scratch_bytes(int64_t rows, int64_t columns) {
    const auto few = static_cast<int64_t>(sizeof(FewRowsScratch));
    const int64_t many = tile_scratch_bytes(rows, columns);
    return rows <= kFewTileRows && few > many ? few : many;
}

// Columns n0 ... n1 - 1 of all rows; odd_panel(first, end) is called for columns that are not regular.
template <class Weight, class OddPanel>
inline void multiply_bf16_by_tiles(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                                   const uint8_t *x, void *scratch, const OddPanel &odd_panel) {
    if (few_rows_serve(p, rows)) {
        const int64_t groups = row_tiles(rows);
        for (int64_t group = 0; group < groups; group += 2) {
            if (groups - group >= 2) {
                multiply_few_rows<2>(p, row0, rows, group, n0, n1, x, scratch, odd_panel);
            } else {
                multiply_few_rows<1>(p, row0, rows, group, n0, n1, x, scratch, odd_panel);
            }
        }
        return;
    }
    multiply_decoded<TileUnit<Bf16Tiles>>(p, row0, rows, n0, n1, x, scratch, odd_panel);
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_AMX_H
