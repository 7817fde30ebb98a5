// gemm_4bit for bfloat16 in tiles (tiles.h): rows of W are decoded where the tiles are read from. Only kernel files
// include it.
//
// The units that multiply tiles flush denormals, so they are right for regular rows and panels only (regular_block,
// irregular_row); the others are computed again as float32 dot products.
#ifndef QCORE_CPU_GEMM_4BIT_TILES_H
#define QCORE_CPU_GEMM_4BIT_TILES_H

#include "gemm_4bit_short.h"
#include "tile_lanes.h"
#include "tile_unit.h"

#if defined(__AVX512BF16__)

namespace qcore::cpu::QC_ISA {

// Bytes of K in the tiles.
inline int64_t tile_k_bytes(const ProductOf4Bits &p) { return p.k * static_cast<int64_t>(sizeof(Bfloat)); }

// Sizes are asked for before the weight is known, so they suffice for any block size.
inline int64_t bf16_x_tile_bytes(const ProductOf4Bits &p, int64_t rows) {
    return x_tile_bytes(rows, split_length(p.k) * static_cast<int64_t>(sizeof(Bfloat)));
}

// Packs group `group` of the `rows` rows from `x` on, in tiles of `columns` columns. A half of a group at the end of K
// is half as long or, with `padded`, as long as a whole one.
template <class Problem>
inline void pack_bf16_x_tiles(const Problem &p, const Bfloat *x, int64_t rows, int64_t group, int64_t columns,
                              bool padded, uint8_t *tiles) {
    if (!split_serves(p)) {
        pack_x_tiles(x, rows, tile_k_bytes(p), group, _mm512_setzero_si512(), tiles);
        return;
    }
    const auto split = [&](int64_t row, int64_t byte, __m512i *v) {
        const int64_t first = byte / static_cast<int64_t>(sizeof(Bfloat));
        split_planes(x + row * p.k + first, p.k - first, v);
        if (!padded && p.k - first < kGroup) {
            join_half_planes(v);
        }
    };
    pack_x_tiles<4>(rows, tile_k_bytes(p), group, columns, split, tiles);
}

inline void store_group(const __m512i *plane, uint8_t *out) {
    for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(out + j * kPlaneBytes, plane[j]);
    }
}

// Of a decoded half of a group, without the zeros.
inline void store_half_group(const __m512i *plane, uint8_t *out) {
    for (int j = 0; j < 4; ++j) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + j * kPlaneBytes / 2), _mm512_castsi512_si256(plane[j]));
    }
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

// `count` elements of row n of W, at most a span, in split order; false if a block is not regular. Fetches what lies
// `ahead` bytes further into L2.
template <class Weight>
inline bool decode_split(const WeightProduct<Weight> &p, const Split<Weight> &decoder, int64_t n, int64_t k0,
                         int64_t count, int64_t ahead, uint8_t *out) {
    typename Split<Weight>::Room room;
    const auto scales = Split<Weight>::scales(p.w, n, k0, count, room);
    const uint8_t *bytes = p.w.packed + ((n * p.k + k0) >> 1);
    for (int64_t g = 0; g * kGroup < count; ++g, out += kGroupBytes) {
        _mm_prefetch(bytes + 64 * g + ahead, _MM_HINT_T1);
        const auto units = decoder.units(scales, g);
        __m512i plane[4];
        if (count - g * kGroup < kGroup) {
            decoder.decode_half(bytes + 64 * g, scales, units, plane);
            store_half_group(plane, out);
        } else {
            decoder.decode(bytes + 64 * g, scales, units, plane);
            store_group(plane, out);
        }
    }
    return Split<Weight>::regular(scales, count);
}

// Columns n0 ... n1 - 1 of all rows; odd_panel(first, end) is called for columns that are not regular.
template <class Unit, class Weight, class OddPanel>
inline void multiply_decoded(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                             const uint8_t *x, void *scratch, const OddPanel &odd_panel) {
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
    multiply_by_tiles<Unit>(rows, n0, n1, tile_k_bytes(p), x, scratch, fill, finish, slice_done);
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_TILES_H
