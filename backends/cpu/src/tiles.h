// Matrix products of bfloat16 and int8 in tiles: Y^T = W X^T. Only kernel files include it.
//
// A tile of W is sixteen of its rows by 64 bytes of K, exactly as they lie in memory or are decoded; a tile of X holds
// sixteen of its rows with groups of four bytes interleaved, and is made once (pack_x_tiles): what the tile unit wants
// as its second operand (tile_unit.h), and what vectors multiply by four bytes of W that are broadcast (tile_lanes.h).
// So the weights, which are many, are never rearranged. A tile of sums has columns of Y down and rows of Y across, and
// is turned when it is finished.
//
// Memory picture: 32 rows of W, 1024 bytes at a time, are brought into 34 KiB of scratch (L1) and meet every tile of X
// of that span, their sums in registers. With more than 32 rows of X the sums of kTileSlice columns wait in scratch
// between spans (L2), so that a span of X is read once for all of them.
#ifndef QCORE_CPU_TILES_H
#define QCORE_CPU_TILES_H

#include "lanes.h"

#if defined(__AVX512VNNI__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kTile = 16;  // rows of a tile
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTile * kTileRowBytes;
constexpr int64_t kTileSpan = 1024;  // bytes of K at a time
constexpr int64_t kTilesOfSpan = kTileSpan / kTileRowBytes;
constexpr int64_t kTilePanel = 32;   // rows of W at a time
constexpr int64_t kTileSlice = 256;  // columns whose sums wait in scratch
// Stride of rows of W: an odd number of cache lines spreads them over the sets.
constexpr int64_t kTileStride = kTileSpan + 64;
constexpr int64_t kTileWeightBytes = kTilePanel * kTileStride;

// Lane j of v[i] <-> lane i of v[j].
inline void transpose_16x16(__m512i *v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline int64_t row_tiles(int64_t rows) { return (rows + kTile - 1) / kTile; }

inline int64_t tile_slice(int64_t rows, int64_t columns) {
    const int64_t most = row_tiles(rows) <= 2 ? kTilePanel : kTileSlice;
    const int64_t wanted = (columns + kTilePanel - 1) / kTilePanel * kTilePanel;
    return wanted < most ? wanted : most;
}

// Tiles of X lie by span, then by group of sixteen rows, then along K.
inline int64_t x_tile(int64_t span, int64_t groups, int64_t group) {
    return (span * groups + group) * kTilesOfSpan * kTileBytes;
}

inline int64_t x_tile_bytes(int64_t rows, int64_t k_bytes) {
    return x_tile((k_bytes + kTileSpan - 1) / kTileSpan, row_tiles(rows), 0);
}

inline int64_t tile_scratch_bytes(int64_t rows, int64_t columns) {
    return kTileWeightBytes + tile_slice(rows, columns) / kTile * row_tiles(rows) * kTileBytes;
}

// Packs rows 16 * group ... of `rows` rows: part(row, byte, v) gives v[0 ... kParts - 1], 64 bytes each from `byte` on,
// padded with zeros. A tile is `columns` dwords wide.
template <int kParts, class Part>
inline void pack_x_tiles(int64_t rows, int64_t k_bytes, int64_t group, int64_t columns, const Part &part,
                         uint8_t *tiles) {
    const int64_t some = rows - group * kTile < kTile ? rows - group * kTile : kTile;
    const auto valid = static_cast<__mmask16>((1u << columns) - 1);
    for (int64_t b = 0; b < k_bytes; b += kParts * kTileRowBytes) {
        __m512i v[kTile][kParts];
        for (int64_t i = 0; i < kTile; ++i) {
            for (int j = 0; j < kParts; ++j) {
                v[i][j] = _mm512_setzero_si512();
            }
            if (i < some) {
                part(group * kTile + i, b, v[i]);
            }
        }
        uint8_t *tile = tiles + x_tile(b / kTileSpan, row_tiles(rows), group) / kTile * columns;
        tile += b % kTileSpan * columns;  // a tile has as many bytes a column as a row of W is long: 64
        for (int j = 0; j < kParts; ++j) {
            __m512i t[kTile];
            for (int i = 0; i < kTile; ++i) {
                t[i] = v[i][j];
            }
            transpose_16x16(t);
            for (int i = 0; i < kTile; ++i, tile += 4 * columns) {
                _mm512_mask_storeu_epi32(tile, valid, t[i]);
            }
        }
    }
}

// The rows as they lie in memory, k_bytes each, every byte of theirs under an exclusive or with `flip`.
inline void pack_x_tiles(const void *x_rows, int64_t rows, int64_t k_bytes, int64_t group, __m512i flip,
                         uint8_t *tiles) {
    const auto plain = [&](int64_t row, int64_t b, __m512i *v) {
        const __mmask64 valid = k_bytes - b >= kTileRowBytes ? ~__mmask64{0} : (__mmask64{1} << (k_bytes - b)) - 1;
        const __m512i bytes = _mm512_maskz_loadu_epi8(valid, static_cast<const uint8_t *>(x_rows) + row * k_bytes + b);
        *v = _mm512_xor_si512(bytes, flip);
    };
    pack_x_tiles<1>(rows, k_bytes, group, kTile, plain, tiles);
}

// Columns n0 ... n1 - 1 of `rows` rows, k_bytes > 0. What multiplies:
//   Unit                                that unit for as long as the object lives
//   Unit::groups(left)                  how many of these groups of sixteen rows of X it takes next
//   Unit::multiply(w, x, groups, count, first, upper, lower)
//                                       sums += 32 rows of W * so many groups of tiles of X, over `count` tiles of K;
//                                       tiles of sums lie side by side, those of the upper 16 rows of W from `upper` on
// and the caller's functions:
//   fill(n, first byte, bytes, out)     brings part of row n of W into scratch
//   finish(n, count, group, v)          takes finished sums: lane j of v[i] belongs to row 16 * group + i and column
//                                       n + j, `count` columns
//   slice_done(first column, end)
template <class Unit, class Fill, class Finish, class SliceDone>
inline void multiply_by_tiles(int64_t rows, int64_t n0, int64_t n1, int64_t k_bytes, const uint8_t *x, void *scratch,
                              const Fill &fill, const Finish &finish, const SliceDone &slice_done) {
    [[maybe_unused]] const Unit unit;
    auto *w = static_cast<uint8_t *>(scratch);
    uint8_t *sums = w + kTileWeightBytes;
    const int64_t groups = row_tiles(rows);
    const int64_t slice = tile_slice(rows, n1 - n0);
    for (int64_t first = n0; first < n1; first += slice) {
        const int64_t end = first + slice < n1 ? first + slice : n1;
        for (int64_t b = 0; b < k_bytes; b += kTileSpan) {
            const int64_t span = b + kTileSpan < k_bytes ? kTileSpan : k_bytes - b;
            const int64_t count = (span + kTileRowBytes - 1) / kTileRowBytes;
            for (int64_t n = first; n < end; n += kTilePanel) {
                for (int64_t i = 0; i < kTilePanel; ++i) {
                    uint8_t *row = w + i * kTileStride;
                    const int64_t filled = n + i < end ? span : 0;
                    if (filled > 0) {
                        fill(n + i, b, span, row);
                    }
                    if (filled < count * kTileRowBytes) {
                        __builtin_memset(row + filled, 0, static_cast<size_t>(count * kTileRowBytes - filled));
                    }
                }
                asm volatile("" ::: "memory");  // the tile loads do not tell the compiler what they read
                for (int64_t group = 0, some; group < groups; group += some) {
                    some = Unit::groups(groups - group);
                    uint8_t *upper = sums + ((n - first) / kTile * groups + group) * kTileBytes;
                    Unit::multiply(w, x + x_tile(b / kTileSpan, groups, group), some, count, b == 0, upper,
                                   upper + groups * kTileBytes);
                }
            }
        }
        for (int64_t n = first; n < end; n += kTile) {
            const uint8_t *tile = sums + (n - first) / kTile * groups * kTileBytes;
            for (int64_t group = 0; group < groups; ++group, tile += kTileBytes) {
                __m512i v[16];
                for (int i = 0; i < 16; ++i) {
                    v[i] = _mm512_loadu_si512(tile + 64 * i);
                }
                transpose_16x16(v);
                finish(n, end - n < kTile ? end - n : kTile, group, v);
            }
        }
        slice_done(first, end);
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_TILES_H
