// gemm_4bit for bfloat16 on AMX tiles: Y^T = W X^T.
//
// A tile of W is sixteen of its rows by 32 elements of K, exactly as they are decoded; a tile of X holds sixteen of its
// rows with pairs of elements interleaved, as TDPBF16PS wants its second operand, and is made once (pack_group). So the
// weights, which are many, are never rearranged. A tile of sums has columns of Y down and rows of Y across, and is
// turned when it is finished.
//
// Memory picture: 32 rows of W, 512 elements at a time, are decoded into 33 KiB of scratch (L1) and meet every tile of
// X of that span (512 rows: 512 KiB, L2), four tiles of sums in registers. With more than 32 rows of X the sums of 512
// columns wait in scratch between spans (1 MiB, L2), so that a span of X is read once for all of them.
//
// TDPBF16PS flushes denormals and is therefore used for regular rows and panels only (regular_block, irregular_row);
// the others are computed again as float32 dot products.
#ifndef QCORE_CPU_GEMM_4BIT_AMX_H
#define QCORE_CPU_GEMM_4BIT_AMX_H

#include "gemm_4bit_gemv.h"

#if defined(__AMX_BF16__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kTile = 16;           // rows of a tile
constexpr int64_t kTileK = 32;          // elements of K in a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileSpan = 512;
constexpr int64_t kTilePanel = 32;      // rows of W decoded together
constexpr int64_t kTileSlice = 512;     // columns whose sums wait in scratch
constexpr int64_t kTileRow = kTileSpan + 32;  // stride of decoded rows: 17 cache lines, so that they spread over the sets

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// rows[i] lane j <-> rows[j] lane i.
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
    const int64_t wanted = round_up(columns, kTilePanel);
    return wanted < most ? wanted : most;
}

// Tiles of X: by span, by group of sixteen rows, by 32 elements.
inline int64_t x_tile(int64_t span, int64_t tiles, int64_t group, int64_t kt) {
    return ((span * tiles + group) * (kTileSpan / kTileK) + kt) * kTileBytes;
}

inline void pack_x_tiles(const Gemm4 &p, int64_t row0, int64_t rows, int64_t group, uint8_t *tiles) {
    const Bfloat *x = static_cast<const Bfloat *>(p.x) + (row0 + group * kTile) * p.k;
    const int64_t some = rows - group * kTile < kTile ? rows - group * kTile : kTile;
    for (int64_t k0 = 0; k0 < p.k; k0 += kTileK) {
        const auto valid = static_cast<__mmask32>(p.k - k0 >= kTileK ? 0xffffffffu : (1u << (p.k - k0)) - 1);
        __m512i v[16];
        for (int64_t i = 0; i < kTile; ++i) {
            v[i] = i < some ? _mm512_maskz_loadu_epi16(valid, x + i * p.k + k0) : _mm512_setzero_si512();
        }
        transpose_16x16(v);
        uint8_t *tile = tiles + x_tile(k0 / kTileSpan, row_tiles(rows), group, k0 % kTileSpan / kTileK);
        for (int i = 0; i < 16; ++i) {
            _mm512_storeu_si512(tile + 64 * i, v[i]);
        }
    }
}

// sums += W tiles * X tiles over `count` tiles of K; kTwo: two groups of rows of X, else one.
template <bool kTwo>
inline void multiply_tiles(const Bfloat *w, const uint8_t *x, int64_t count, bool first, uint8_t *upper, uint8_t *lower) {
    const uint8_t *x2 = x + kTileSpan / kTileK * kTileBytes;
    if (first) {
        _tile_zero(0);
        _tile_zero(2);
        if (kTwo) {
            _tile_zero(1);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, upper, 64);
        _tile_loadd(2, lower, 64);
        if (kTwo) {
            _tile_loadd(1, upper + kTileBytes, 64);
            _tile_loadd(3, lower + kTileBytes, 64);
        }
    }
    for (int64_t kt = 0; kt < count; ++kt) {
        _tile_loadd(4, w + kt * kTileK, kTileRow * sizeof(Bfloat));
        _tile_loadd(6, x + kt * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w + kTile * kTileRow + kt * kTileK, kTileRow * sizeof(Bfloat));
        _tile_dpbf16ps(2, 5, 6);
        if (kTwo) {
            _tile_loadd(7, x2 + kt * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, upper, 64);
    _tile_stored(2, lower, 64);
    if (kTwo) {
        _tile_stored(1, upper + kTileBytes, 64);
        _tile_stored(3, lower + kTileBytes, 64);
    }
}

// Turns the finished sums of sixteen columns from `n` on into rows of Y.
inline void finish_tiles(const Gemm4 &p, int64_t row0, int64_t rows, int64_t n, int64_t count, const uint8_t *sums) {
    const auto valid = static_cast<__mmask16>(count >= kTile ? 0xffff : (1 << count) - 1);
    float bias_values[kTile] = {};
    load_bias(p, n, count < kTile ? count : kTile, bias_values);
    const F32 bias = load(bias_values);
    Bfloat *y = static_cast<Bfloat *>(p.out) + row0 * p.n + n;
    for (int64_t group = 0; group < row_tiles(rows); ++group) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) {
            v[i] = _mm512_loadu_si512(sums + group * kTileBytes + 64 * i);
        }
        transpose_16x16(v);
        const int64_t some = rows - group * kTile < kTile ? rows - group * kTile : kTile;
        for (int64_t i = 0; i < some; ++i) {
            const F32 sum = p.bias != nullptr ? (F32)v[i] + bias : (F32)v[i];
            _mm256_mask_storeu_epi16(y + (group * kTile + i) * p.n, valid,
                                     (__m256i)__builtin_convertvector(bf16_bits(sum), U16));
        }
    }
}

struct TileScratch {
    static constexpr int64_t kWeightBytes = kTilePanel * kTileRow * static_cast<int64_t>(sizeof(Bfloat));

    static int64_t bytes(int64_t rows, int64_t columns) {
        return kWeightBytes + tile_slice(rows, columns) / kTile * row_tiles(rows) * kTileBytes;
    }
};

// Columns n0 ... n1 - 1 of all rows; odd_panel(first, end) is called for columns that are not regular.
template <class OddPanel>
inline void multiply_by_tiles(const Gemm4 &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const uint8_t *x,
                              void *scratch, const OddPanel &odd_panel) {
    const TileConfig config;
    _tile_loadconfig(&config);
    Bfloat *w = static_cast<Bfloat *>(scratch);
    uint8_t *sums = static_cast<uint8_t *>(scratch) + TileScratch::kWeightBytes;
    const int64_t tiles = row_tiles(rows);
    const int64_t slice = tile_slice(rows, n1 - n0);
    for (int64_t first = n0; first < n1; first += slice) {
        const int64_t end = first + slice < n1 ? first + slice : n1;
        uint32_t odd = 0;  // a bit for each panel of the slice
        for (int64_t k0 = 0; k0 < p.k; k0 += kTileSpan) {
            const int64_t span = k0 + kTileSpan < p.k ? kTileSpan : p.k - k0;
            const int64_t count = (span + kTileK - 1) / kTileK;
            for (int64_t n = first; n < end; n += kTilePanel) {
                for (int64_t i = 0; i < kTilePanel; ++i) {
                    Bfloat *row = w + i * kTileRow;
                    int64_t filled = 0;
                    if (n + i < end) {
                        if (!decode_bf16(p.w, (n + i) * p.k + k0, span, row)) {
                            odd |= 1u << ((n - first) / kTilePanel);
                        }
                        filled = span;
                    }
                    __builtin_memset(row + filled, 0, static_cast<size_t>(count * kTileK - filled) * sizeof *row);
                }
                asm volatile("" ::: "memory");  // the tile loads below do not tell the compiler what they read
                for (int64_t group = 0; group < tiles; group += 2) {
                    uint8_t *upper = sums + ((n - first) / kTile * tiles + group) * kTileBytes;
                    uint8_t *lower = upper + tiles * kTileBytes;
                    const uint8_t *x_span = x + x_tile(k0 / kTileSpan, tiles, group, 0);
                    if (group + 1 < tiles) {
                        multiply_tiles<true>(w, x_span, count, k0 == 0, upper, lower);
                    } else {
                        multiply_tiles<false>(w, x_span, count, k0 == 0, upper, lower);
                    }
                }
            }
        }
        for (int64_t n = first; n < end; n += kTile) {
            finish_tiles(p, row0, rows, n, end - n, sums + (n - first) / kTile * tiles * kTileBytes);
        }
        for (int64_t n = first; n < end; n += kTilePanel) {
            if ((odd >> ((n - first) / kTilePanel) & 1) != 0) {
                odd_panel(n, n + kTilePanel < end ? n + kTilePanel : end);
            }
        }
    }
    _tile_release();
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_AMX_H
