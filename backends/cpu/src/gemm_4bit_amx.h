// gemm_4bit for bfloat16 on AMX tiles (tiles.h): rows of W are decoded where the tiles are loaded from.
//
// TDPBF16PS flushes denormals and is therefore right for regular rows and panels only (regular_block, irregular_row);
// the others are computed again as float32 dot products.
//
// Memory picture for few rows of X (multiply_few_rows): W is read once, sixteen of its rows side by side, 128 elements
// of each at a time, into 4 KiB of scratch, while the tile unit multiplies the 4 KiB before. Decoding (split order,
// gemm_4bit_split.h) keeps the vector ports busy for 152 cycles a step, the four tile products of the step the tile
// unit for 64, so one row of X or sixteen cost about what the decoding costs. The tiles of X are as narrow as X has
// rows, so that they are small; the lines that the next sixteen rows of W will need are fetched into L2 meanwhile. One
// tile of sums for all: see tiles.h on why as few tiles as possible are in use.
#ifndef QCORE_CPU_GEMM_4BIT_AMX_H
#define QCORE_CPU_GEMM_4BIT_AMX_H

#include "gemm_4bit_short.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kFewTileRows = 16;                 // rows of X up to which multiply_few_rows takes them
constexpr int64_t kStepBytes = kTile * kGroupBytes;  // of 16 rows of W, decoded

template <class Problem>
inline bool few_rows_serve(const Problem &p, int64_t rows) {
    return rows <= kFewTileRows && split_serves(p);
}

// Bytes of K in the tiles.
template <class Problem>
inline int64_t tile_k_bytes(const Problem &p) {
    return (split_serves(p) ? split_length(p.k) : p.k) * static_cast<int64_t>(sizeof(Bfloat));
}

// Sizes are asked for before the weight is known, so they suffice for any block size.
inline int64_t bf16_x_tile_bytes(const ProductOf4Bits &p, int64_t rows) {
    return x_tile_bytes(rows, split_length(p.k) * static_cast<int64_t>(sizeof(Bfloat)));
}

// Packs group `group` of the `rows` rows from `x` on.
template <class Problem>
inline void pack_bf16_x_tiles(const Problem &p, const Bfloat *x, int64_t rows, int64_t group, uint8_t *tiles) {
    if (!split_serves(p)) {
        pack_x_tiles(x, rows, tile_k_bytes(p), group, tiles);
        return;
    }
    const auto split = [&](int64_t row, int64_t byte, __m512i *v) {
        const int64_t first = byte / static_cast<int64_t>(sizeof(Bfloat));
        split_planes(x + row * p.k + first, p.k - first, v);
    };
    pack_x_tiles<4>(rows, tile_k_bytes(p), group, few_rows_serve(p, rows) ? rows : kTile, split, tiles);
}

// Lane j of v[i] is the sum of row 16 * group + i and column n + j; `count` columns.
inline void finish_tile(const ProductOf4Bits &p, int64_t row0, int64_t rows, int64_t n, int64_t count, int64_t group,
                        const __m512i *v) {
    const auto valid = static_cast<__mmask16>((1u << count) - 1);
    float bias_values[kTile] = {};
    load_bias(p, n, count, bias_values);
    const F32 bias = load(bias_values);
    Bfloat *y = static_cast<Bfloat *>(p.out) + (row0 + group * kTile) * p.n + n;
    const int64_t some = rows - group * kTile < kTile ? rows - group * kTile : kTile;
    for (int64_t i = 0; i < some; ++i) {
        const F32 sum = p.bias != nullptr ? (F32)v[i] + bias : (F32)v[i];
        _mm256_mask_storeu_epi16(y + i * p.n, valid, (__m256i) __builtin_convertvector(bf16_bits(sum), U16));
    }
}

// What multiply_few_rows needs to itself: two steps of decoded W, a tile of sums.
struct FewRowsScratch {
    alignas(64) uint8_t step[2][kStepBytes];
    alignas(64) float sums[kTile * kTile];
};

// What is read of a row of W.
template <class Weight>
struct RowOfWeight {
    const uint8_t *bytes;
    typename Split<Weight>::Scales scales;
};

// Group g of a row of W, or its first half, to a row of four tiles.
template <bool kHalf, class Weight>
inline void decode_row(const Split<Weight> &decoder, const RowOfWeight<Weight> &row, int64_t g, int64_t ahead,
                       uint8_t *out) {
    const uint8_t *bytes = row.bytes + 64 * g;
    _mm_prefetch(bytes + ahead, _MM_HINT_T1);
    __m512i plane[4];
    if (kHalf) {
        decoder.decode_half(bytes, row.scales, g, plane);
    } else {
        decoder.decode(bytes, row.scales, g, plane);
    }
    for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(out + j * kTileBytes, plane[j]);
    }
}

// Decodes group g of sixteen rows, of which there are kHalves halves, and, with kMultiply, multiplies the group before
// it by the tiles at `x`. What works on tiles stands apart, because it holds up all that is behind it until a tile
// register is free.
template <int kHalves, bool kMultiply, class Weight>
inline void few_rows_step(const Split<Weight> &decoder, const RowOfWeight<Weight> *rows, int64_t g, int64_t ahead,
                          FewRowsScratch *scratch, const uint8_t *x, int64_t columns) {
    uint8_t *out = scratch->step[g & 1];
    const uint8_t *w = scratch->step[(g & 1) ^ 1];
    for (int j = 0; j < 4; ++j) {
        const auto decode = [&](int i) {
            if (kHalves > 0) {
                decode_row<kHalves == 1>(decoder, rows[4 * j + i], g, ahead, out + (4 * j + i) * kTileRowBytes);
            }
        };
        decode(0);
        if (kMultiply) {
            _tile_loadd(1, w + j * kTileBytes, kTileRowBytes);
        }
        decode(1);
        if (kMultiply) {
            _tile_loadd(2, x + j * 16 * columns, columns);
        }
        decode(2);
        decode(3);
        if (kMultiply) {
            _tile_dpbf16ps(0, 1, 2);
        }
    }
    asm volatile("" ::: "memory");  // the tile loads do not tell the compiler what they read
}

// Columns n0 ... n1 - 1 of up to kFewTileRows rows; odd_panel(first, end) is called for columns that are not regular.
template <class Weight, class OddPanel>
inline void multiply_few_rows(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                              const uint8_t *x, void *scratch_bytes, const OddPanel &odd_panel) {
    auto &scratch = *static_cast<FewRowsScratch *>(scratch_bytes);
    const int64_t columns = 4 * rows;  // bytes of a row of the tiles of X and of sums
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        const bool of_w = tile == 1;
        config.row_bytes[tile] = static_cast<uint16_t>(of_w ? kTileRowBytes : columns);
    }
    const Split<Weight> decoder(p.w);
    RowScales<Weight, kTile> scales(p.w);
    const int64_t ahead = kTile * p.k / 2;
    load_tile_config(config);
    for (int64_t n = n0; n < n1; n += kTile) {
        const int64_t count = n1 - n < kTile ? n1 - n : kTile;
        _tile_zero(0);
        bool regular = true;
        for (int64_t k0 = 0; k0 < p.k; k0 += kScaleElements) {
            const int64_t length = p.k - k0 < kScaleElements ? p.k - k0 : kScaleElements;
            const int64_t groups = split_length(length) / kGroup;
            const int64_t whole = length / kGroup;
            RowOfWeight<Weight> w_rows[kTile];
            regular &= scales.load(n, count, k0, length);
            for (int64_t i = 0; i < kTile; ++i) {  // beyond the last column, that one again
                const int64_t row = i < count ? i : count - 1;
                w_rows[i] = {p.w.packed + (((n + row) * p.k + k0) >> 1), scales.at(row)};
            }
            const uint8_t *x_at = x + k0 / 32 * kTileRowBytes * rows;
            if (whole > 0) {
                few_rows_step<2, false>(decoder, w_rows, 0, ahead, &scratch, x_at, columns);
            } else {
                few_rows_step<1, false>(decoder, w_rows, 0, ahead, &scratch, x_at, columns);
            }
            for (int64_t g = 1; g < whole; ++g, x_at += 64 * columns) {
                few_rows_step<2, true>(decoder, w_rows, g, ahead, &scratch, x_at, columns);
            }
            if (whole > 0 && whole < groups) {
                few_rows_step<1, true>(decoder, w_rows, whole, ahead, &scratch, x_at, columns);
                x_at += 64 * columns;
            }
            few_rows_step<0, true>(decoder, w_rows, groups, ahead, &scratch, x_at, columns);
        }
        _tile_stored(0, scratch.sums, kTileRowBytes);
        const auto valid = static_cast<__mmask16>((1u << rows) - 1);
        __m512i v[kTile];
        for (int i = 0; i < kTile; ++i) {
            v[i] = _mm512_maskz_loadu_epi32(valid, scratch.sums + kTile * i);
        }
        if (regular) {
            transpose_16x16(v);
            finish_tile(p, row0, rows, n, count, 0, v);
        } else {
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

// `count` elements of row n of W, at most a span, in split order, and zeros to the end of their last group; false if a
// block is not regular. Fetches what lies `ahead` bytes further into L2.
template <class Weight>
inline bool decode_split(const WeightProduct<Weight> &p, const Split<Weight> &decoder, int64_t n, int64_t k0,
                         int64_t count, int64_t ahead, uint8_t *out) {
    typename Split<Weight>::Room room;
    const auto scales = Split<Weight>::scales(p.w, n, k0, count, room);
    const uint8_t *bytes = p.w.packed + ((n * p.k + k0) >> 1);
    for (int64_t g = 0; g * kGroup < count; ++g, out += kGroupBytes) {
        _mm_prefetch(bytes + 64 * g + ahead, _MM_HINT_T1);
        __m512i plane[4];
        if (count - g * kGroup < kGroup) {
            decoder.decode_half(bytes + 64 * g, scales, g, plane);
        } else {
            decoder.decode(bytes + 64 * g, scales, g, plane);
        }
        for (int j = 0; j < 4; ++j) {
            _mm512_storeu_si512(out + j * kPlaneBytes, plane[j]);
        }
    }
    return Split<Weight>::regular(scales, count);
}

// Columns n0 ... n1 - 1 of all rows; odd_panel(first, end) is called for columns that are not regular.
template <class Weight, class OddPanel>
inline void multiply_bf16_by_tiles(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                                   const uint8_t *x, void *scratch, const OddPanel &odd_panel) {
    if (few_rows_serve(p, rows)) {
        multiply_few_rows(p, row0, rows, n0, n1, x, scratch, odd_panel);
        return;
    }
    constexpr int64_t kSize = sizeof(Bfloat);
    uint32_t odd = 0;  // a bit for each panel of the slice
    const int64_t slice = tile_slice(rows, n1 - n0);
    const bool split = split_serves(p);
    const Split<Weight> decoder(p.w);
    const auto fill = [&](int64_t n, int64_t byte, int64_t bytes, uint8_t *out) {
        const int64_t first = byte / kSize;
        const int64_t left = p.k - first < bytes / kSize ? p.k - first : bytes / kSize;
        const bool regular = split ? decode_split(p, decoder, n, first, left, kTilePanel * p.k / 2, out)
                                   : decode_bf16(p.w, n, first, left, reinterpret_cast<Bfloat *>(out));
        if (!regular) {
            odd |= 1u << ((n - n0) % slice / kTilePanel);
        }
    };
    const auto finish = [&](int64_t n, int64_t count, int64_t group, const __m512i *v) {
        finish_tile(p, row0, rows, n, count, group, v);
    };
    const auto slice_done = [&](int64_t first, int64_t end) {
        for (int64_t n = first; odd != 0; n += kTilePanel, odd >>= 1) {
            if ((odd & 1) != 0) {
                odd_panel(n, n + kTilePanel < end ? n + kTilePanel : end);
            }
        }
    };
    multiply_by_tiles<Bf16Tiles>(rows, n0, n1, tile_k_bytes(p), x, scratch, fill, finish, slice_done);
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_AMX_H
