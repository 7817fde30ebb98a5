// The products of tiles.h on vectors of 512 bits, where there is no tile unit. Only kernel files include it.
//
// A lane is a row of X: four bytes of a row of W, broadcast as they are read, meet a line of up to three tiles of X, so
// nothing is added up across lanes and no operand is rearranged. 8 rows of W by 48 of X are 24 sums in registers, fed
// by 3 loads of lines and 8 of four bytes: a product a cycle needs half of the load ports. A span of three groups of X
// (48 KiB, L2) is read at 8 bytes a cycle, the rows of W from L1.
//
// Rounding: a chain along the span, half a kilobyte of bfloat16 values, and the chains of spans are then added.
#ifndef QCORE_CPU_TILE_LANES_H
#define QCORE_CPU_TILE_LANES_H

#include "tiles.h"

#if defined(__AVX512VNNI__) && !defined(__AMX_TILE__)

namespace qcore::cpu::QC_ISA {

#if defined(__AVX512BF16__)
struct Bf16Lanes {
    using Sum = __m512;
    static __m512 zero() { return _mm512_setzero_ps(); }
    static __m512 add(__m512 sum, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
    static void put(uint8_t *to, bool first, __m512 sum) {
        _mm512_store_ps(to, first ? sum : _mm512_add_ps(_mm512_load_ps(to), sum));
    }
};
#endif

// Bytes of X count from -128: 128 times the sum of a row of W is to be taken away from its sums.
struct Int8Lanes {
    using Sum = __m512i;
    static __m512i zero() { return _mm512_setzero_si512(); }
    static __m512i add(__m512i sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
    static void put(uint8_t *to, bool first, __m512i sum) {
        _mm512_store_si512(to, first ? sum : _mm512_add_epi32(_mm512_load_si512(to), sum));
    }
};

// For multiply_by_tiles.
template <class Product>
class TileLanes {
   public:
    static int64_t groups(int64_t left) { return left == 4 ? 2 : left < 3 ? left : 3; }

    static void multiply(const uint8_t *w, const uint8_t *x, int64_t groups, int64_t count, bool first, uint8_t *upper,
                         uint8_t *lower) {
        for (int half = 0; half < 2; ++half) {
            const uint8_t *rows = w + half * kTile * kTileStride;
            uint8_t *sums = half == 0 ? upper : lower;
            switch (groups) {
                case 1:
                    block<16, 1>(rows, x, count, first, sums);
                    break;
                case 2:
                    block<8, 2>(rows, x, count, first, sums);
                    block<8, 2>(rows + 8 * kTileStride, x, count, first, sums + 8 * kTileRowBytes);
                    break;
                default:
                    block<8, 3>(rows, x, count, first, sums);
                    block<8, 3>(rows + 8 * kTileStride, x, count, first, sums + 8 * kTileRowBytes);
            }
        }
    }

   private:
    static constexpr int64_t kAhead = 512;  // bytes of X, which comes from L2
    // kRows rows of W by kGroups groups of X.
    template <int kRows, int kGroups>
    static void block(const uint8_t *w, const uint8_t *x, int64_t count, bool first, uint8_t *sums) {
        typename Product::Sum sum[kRows][kGroups];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
            for (int g = 0; g < kGroups; ++g) {
                sum[r][g] = Product::zero();
            }
        }
        for (const uint8_t *end = w + count * kTileRowBytes; w < end; w += 4, x += kTileRowBytes) {
            __m512i line[kGroups];
#pragma GCC unroll 3
            for (int g = 0; g < kGroups; ++g) {
                line[g] = _mm512_load_si512(x + g * kTilesOfSpan * kTileBytes);
                _mm_prefetch(x + g * kTilesOfSpan * kTileBytes + kAhead, _MM_HINT_T0);
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                int32_t four;
                __builtin_memcpy(&four, w + r * kTileStride, sizeof four);
                const __m512i broadcast = _mm512_set1_epi32(four);
#pragma GCC unroll 3
                for (int g = 0; g < kGroups; ++g) {
                    sum[r][g] = Product::add(sum[r][g], line[g], broadcast);
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
            for (int g = 0; g < kGroups; ++g) {
                Product::put(sums + r * kTileRowBytes + g * kTileBytes, first, sum[r][g]);
            }
        }
    }
};

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_TILE_LANES_H
