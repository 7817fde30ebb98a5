// gemm_4bit for bfloat16 on AMX tiles (tiles.h): rows of W are decoded where the tiles are loaded from.
//
// TDPBF16PS flushes denormals and is therefore right for regular rows and panels only (regular_block, irregular_row);
// the others are computed again as float32 dot products.
#ifndef QCORE_CPU_GEMM_4BIT_AMX_H
#define QCORE_CPU_GEMM_4BIT_AMX_H

#include "gemm_4bit_gemv.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace qcore::cpu::QC_ISA {

// Columns n0 ... n1 - 1 of all rows; odd_panel(first, end) is called for columns that are not regular.
template <class OddPanel>
inline void multiply_bf16_by_tiles(const Gemm4 &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const uint8_t *x,
                                   void *scratch, const OddPanel &odd_panel) {
    constexpr int64_t kSize = sizeof(Bfloat);
    uint32_t odd = 0;  // a bit for each panel of the slice
    const int64_t slice = tile_slice(rows, n1 - n0);
    const auto fill = [&](int64_t n, int64_t byte, int64_t bytes, uint8_t *out) {
        if (!decode_bf16(p.w, n * p.k + byte / kSize, bytes / kSize, reinterpret_cast<Bfloat *>(out))) {
            odd |= 1u << ((n - n0) % slice / kTilePanel);
        }
    };
    const auto finish = [&](int64_t n, int64_t count, int64_t group, const __m512i *v) {
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
    };
    const auto slice_done = [&](int64_t first, int64_t end) {
        for (int64_t n = first; odd != 0; n += kTilePanel, odd >>= 1) {
            if ((odd & 1) != 0) {
                odd_panel(n, n + kTilePanel < end ? n + kTilePanel : end);
            }
        }
    };
    multiply_by_tiles<Bf16Tiles>(rows, n0, n1, p.k * kSize, x, scratch, fill, finish, slice_done);
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_AMX_H
