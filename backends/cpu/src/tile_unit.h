// The products of tiles.h on the AMX tile unit. Only kernel files include it.
//
// Four tiles are in use, not the eight of the usual two by two sums. Both threads of a core rename from one pool of
// tile registers, it seems: a processor at 2.05 GHz has two states, minutes long, in which a product with its loads
// from L1 takes, in ns,
//     two by two sums, eight tiles   7.3 or 31       two sums, four tiles   7.3 or 15
//     one sum, three tiles           7.3 or 15       one sum, no loads      7.3 or 7.6
// and loads alone take 3.8 or 4.9 into two tiles in turn, 3.8 or 13.6 into all eight.
#ifndef QCORE_CPU_TILE_UNIT_H
#define QCORE_CPU_TILE_UNIT_H

#include "tiles.h"

#if defined(__AMX_TILE__)

namespace qcore::cpu::QC_ISA {

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void load_tile_config(const TileConfig &config) {
    // The intrinsic tells the compiler that the first eight bytes are read; this, that all are.
    asm volatile("" : : "m"(config));
    _tile_loadconfig(&config);
}

// Tile kSum, 0 or 1, += tile 2 * tile 3.
struct Bf16Tiles {
    template <int kSum>
    static void add() {
        if constexpr (kSum == 0) {
            _tile_dpbf16ps(0, 2, 3);
        } else {
            _tile_dpbf16ps(1, 2, 3);
        }
    }
};

struct Int8Tiles {
    template <int kSum>
    static void add() {
        if constexpr (kSum == 0) {
            _tile_dpbssd(0, 2, 3);
        } else {
            _tile_dpbssd(1, 2, 3);
        }
    }
};

// For multiply_by_tiles: one group of sixteen rows of X, two tiles of sums.
template <class Product>
class TileUnit {
   public:
    TileUnit() { load_tile_config(TileConfig()); }
    ~TileUnit() { _tile_release(); }
    TileUnit(const TileUnit &) = delete;
    TileUnit &operator=(const TileUnit &) = delete;

    static int64_t groups(int64_t) { return 1; }

    static void multiply(const uint8_t *w, const uint8_t *x, int64_t, int64_t count, bool first, uint8_t *upper,
                         uint8_t *lower) {
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
        } else {
            _tile_loadd(0, upper, 64);
            _tile_loadd(1, lower, 64);
        }
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t line = 0; line < kTileBytes; line += 64) {  // a product takes as long as a line from L2
                _mm_prefetch(x + (t + 1) * kTileBytes + line, _MM_HINT_T0);
            }
            _tile_loadd(3, x + t * kTileBytes, 64);
            _tile_loadd(2, w + t * kTileRowBytes, kTileStride);
            Product::template add<0>();
            _tile_loadd(2, w + kTile * kTileStride + t * kTileRowBytes, kTileStride);
            Product::template add<1>();
        }
        _tile_stored(0, upper, 64);
        _tile_stored(1, lower, 64);
    }
};

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_TILE_UNIT_H
