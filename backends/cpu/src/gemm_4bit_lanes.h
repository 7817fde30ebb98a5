// gemm_4bit for bfloat16 where there is no tile unit, 13 to 64 rows of X: rows of X in lanes as in tile_lanes.h,
// and the rows of W that come next are decoded between the products. Only kernel files include it.
//
// Memory picture: 128 elements of 16 or eight rows of W (a step) are decoded into scratch (L1) while the step before,
// beside it, meets sixteen or 32 rows of X. With sixteen a step is 1024 products, which keep the multiplier busy for as
// many cycles, and 16 groups to decode, 12 operations and four stores each, for which the other ports have room: on a
// Zen 4 all of it takes 1050 cycles. Decoding before the products takes 300 more, so W is decoded again for each 32
// rows of X. X comes from L2 at 4 or 8 bytes a cycle.
//
// Eight or fewer rows beside others are lanes of vectors of 256 bits, of which two are multiplied a cycle.
//
// Billions of operations a second on one thread of that processor, tiles / this way, NF4 (benchmarks/two_builds.py
// --threads 1, with a build whose kMostLaneRows is 0, and for 512 rows one where it is 512):
//     N x K       M = 16    32        40        64        512
//     512x576     149/162   175/194   156/176   192/190   201/196
//     576x1536    167/185   188/199   164/179   203/208   203/192
//     256x4096    169/191   189/195   162/177   192/191   173/173
//
// Rounding: a chain along a step, and the chains of steps are then added.
#ifndef QCORE_CPU_GEMM_4BIT_LANES_H
#define QCORE_CPU_GEMM_4BIT_LANES_H

#include <type_traits>

#include "gemm_4bit_tiles.h"

#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kMostLaneRows = 64;

template <class Problem>
inline bool lanes_serve(const Problem &p, int64_t rows) {
    return rows <= kMostLaneRows && split_serves(p);
}

// What is multiplied and decoded of W at a time: group `g` of 128 elements, or the first half of it, of the rows n ...
struct LaneStep {
    int64_t n, g;
    bool half, first, last;  // the first, the last of its rows
    bool regular;
};

// One step after the other through the rows n0 ... n1 - 1 of W, kRows at a time.
template <class Weight, int kRows>
class LaneSteps {
   public:
    LaneSteps(const WeightProduct<Weight> &p, int64_t n0, int64_t n1) : p_(p), scales_(p.w), n_(n0), n1_(n1) { load(); }

    LaneStep step() const {
        const int64_t left = p_.k - k0_ - g_ * kGroup;
        return {n_, k0_ / kGroup + g_, left < kGroup, k0_ + g_ == 0, left <= kGroup, regular_};
    }
    // False at the end.
    bool advance() {
        if (++g_ * kGroup < length_) {
            return true;
        }
        k0_ += length_;
        if (k0_ == p_.k) {
            k0_ = 0;
            n_ += kRows;
        }
        if (n_ < n1_) {
            load();
        }
        return n_ < n1_;
    }
    Units<Weight> units(const Split<Weight> &decoder) const { return decoder.units(row_scales_[0], g_); }
    // Row i of the step to `out`, kGroupBytes or half of them.
    template <bool kHalf>
    void decode(const Split<Weight> &decoder, const Units<Weight> &units, int64_t i, uint8_t *out) const {
        const uint8_t *bytes = bytes_[i] + 64 * g_;
        _mm_prefetch(bytes + kRows * p_.k / 2, _MM_HINT_T1);
        __m512i plane[4];
        if (kHalf) {
            decoder.decode_half(bytes, row_scales_[i], units, plane);
            store_half_group(plane, out);
        } else {
            decoder.decode(bytes, row_scales_[i], units, plane);
            store_group(plane, out);
        }
    }

   private:
    void load() {
        g_ = 0;
        length_ = p_.k - k0_ < kScaleElements ? p_.k - k0_ : kScaleElements;
        const int64_t count = n1_ - n_ < kRows ? n1_ - n_ : kRows;
        regular_ = scales_.load(n_, count, k0_, length_);
        for (int64_t i = 0; i < kRows; ++i) {  // beyond the last row, that one again
            const int64_t row = i < count ? i : count - 1;
            bytes_[i] = p_.w.packed + (((n_ + row) * p_.k + k0_) >> 1);
            row_scales_[i] = scales_.at(row);
        }
    }

    const WeightProduct<Weight> &p_;
    RowScales<Weight, kRows> scales_;
    const uint8_t *bytes_[kRows];
    typename Split<Weight>::Scales row_scales_[kRows];
    int64_t n_, n1_, k0_ = 0, length_ = 0, g_ = 0;  // g_: group of those from k0_ on
    bool regular_ = true;
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;
constexpr int64_t kGroupsOfSpan = kTileSpan / kGroupBytes;

struct LanesScratch {
    alignas(64) uint8_t step[2][kTile * kGroupBytes];
    alignas(64) float sums[2][kTile][kTile];  // of a group of sixteen rows of X: columns down, rows of X across
};

inline __m512 add_lanes(__m512 sum, const uint8_t *x, __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(x), (__m512bh)w);
}
inline __m256 add_lanes(__m256 sum, const uint8_t *x, __m512i w) {
    const __m256i eight = _mm256_load_si256(reinterpret_cast<const __m256i *>(x));
    return _mm256_dpbf16_ps(sum, (__m256bh)eight, (__m256bh)_mm512_castsi512_si256(w));
}
inline void put_lanes(float *to, bool first, __m512 sum) {
    _mm512_store_ps(to, first ? sum : _mm512_add_ps(_mm512_load_ps(to), sum));
}
inline void put_lanes(float *to, bool first, __m256 sum) {
    _mm256_store_ps(to, first ? sum : _mm256_add_ps(_mm256_load_ps(to), sum));
}

// Decodes the next step, of which there are kHalves halves, between the products of a step that is kLines pairs of
// elements long and lies at `w`, with kWide groups of sixteen rows of X, and with kNarrow eight more. The sums go to
// rows `column` ... of `sums`.
template <int kRows, int kWide, bool kNarrow, int kHalves, int kLines, class Weight>
inline void multiply_step(const LaneSteps<Weight, kRows> &next, const Split<Weight> &decoder, const uint8_t *w,
                          uint8_t *out, const uint8_t *const (&x)[2], bool first, int64_t column,
                          float (*sums)[kTile][kTile]) {
    __m512 wide[kRows][2];
    __m256 narrow[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        wide[r][0] = wide[r][1] = _mm512_setzero_ps();
        narrow[r] = _mm256_setzero_ps();
    }
    const uint8_t *lines[2] = {x[0], x[1]};
    const auto units = next.units(decoder);
    for (int i = 0; i < kRows; ++i) {
        if (kHalves > 0) {
            next.template decode<kHalves == 1>(decoder, units, i, out + i * kGroupBytes);
        }
#pragma GCC unroll 8
        for (int l = 0; l < kLines / kRows; ++l) {
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                int32_t pair;
                __builtin_memcpy(&pair, w + r * kGroupBytes + 4 * l, sizeof pair);
                const __m512i broadcast = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
                for (int g = 0; g < kWide; ++g) {
                    wide[r][g] = add_lanes(wide[r][g], lines[g] + l * kTileRowBytes, broadcast);
                }
                if (kNarrow) {
                    narrow[r] = add_lanes(narrow[r], lines[kWide] + l * kTileRowBytes, broadcast);
                }
            }
        }
        w += 4 * (kLines / kRows);
        lines[0] += kLines / kRows * kTileRowBytes;
        lines[1] += kLines / kRows * kTileRowBytes;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows && kLines > 0; ++r) {
#pragma GCC unroll 2
        for (int g = 0; g < kWide; ++g) {
            put_lanes(sums[g][column + r], first, wide[r][g]);
        }
        if (kNarrow) {
            put_lanes(sums[kWide][column + r], first, narrow[r]);
        }
    }
}

// Columns n0 ... n1 - 1 of the rows of X from group `group` on that kWide and kNarrow say, of `rows` rows in all;
// odd_panel(first, end) is called for columns that are not regular, and may use the scratch.
template <int kWide, bool kNarrow, class Weight, class OddPanel>
inline void multiply_in_lanes(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t group, int64_t n0,
                              int64_t n1, const uint8_t *x, void *scratch_bytes, const OddPanel &odd_panel) {
    constexpr int kGroups = kWide + kNarrow;
    constexpr int kRows = kGroups == 1 ? 16 : 8;
    auto &scratch = *static_cast<LanesScratch *>(scratch_bytes);
    const Split<Weight> decoder(p.w);
    LaneSteps<Weight, kRows> steps(p, n0, n1);
    bool regular = true, more = true;
    int buffer = 0;
    const auto multiply = [&](auto halves, auto lines, int64_t g, bool first, int64_t column) {
        const uint8_t *at[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t own = group + (i < kGroups ? i : 0);
            at[i] = x + x_tile(g / kGroupsOfSpan, row_tiles(rows), own) + g % kGroupsOfSpan * kTile * kGroupBytes;
        }
        multiply_step<kRows, kWide, kNarrow, halves(), lines()>(
            steps, decoder, scratch.step[buffer], scratch.step[buffer ^ 1], at, first, column, scratch.sums);
    };
    const auto choose = [&](auto lines, int64_t g, bool first, int64_t column) {
        if (!more) {
            multiply(Constant<0>(), lines, g, first, column);
        } else if (steps.step().half) {
            multiply(Constant<1>(), lines, g, first, column);
        } else {
            multiply(Constant<2>(), lines, g, first, column);
        }
        buffer ^= 1;
    };
    choose(Constant<0>(), 0, true, 0);
    while (more) {
        const LaneStep now = steps.step();
        const int64_t column = (now.n - n0) % kTile;
        regular &= now.regular;
        more = steps.advance();
        if (now.half) {
            choose(Constant<kGroup / 4>(), now.g, now.first, column);
        } else {
            choose(Constant<kGroup / 2>(), now.g, now.first, column);
        }
        if (!now.last || (more && column + kRows < kTile)) {
            continue;
        }
        const int64_t n = now.n - column;
        const int64_t count = n1 - n < kTile ? n1 - n : kTile;
        for (int i = 0; i < kGroups && regular; ++i) {
            __m512i v[kTile];
            for (int j = 0; j < kTile; ++j) {
                v[j] = _mm512_load_si512(scratch.sums[i][j]);
            }
            transpose_16x16(v);
            finish_tile(p, row0, rows, n, count, group + i, v);
        }
        if (!regular) {
            odd_panel(n, n + count);
            if (more) {  // what was decoded is lost
                choose(Constant<0>(), 0, true, 0);
            }
            regular = true;
        }
    }
}

template <class Weight, class OddPanel>
inline void multiply_in_lanes(const WeightProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                              const uint8_t *x, void *scratch, const OddPanel &odd_panel) {
    constexpr int64_t kNarrowRows = kTile / 2;
    for (int64_t group = 0; group < row_tiles(rows); group += 2) {
        const int64_t left = rows - group * kTile;
        if (left > kTile + kNarrowRows) {
            multiply_in_lanes<2, false>(p, row0, rows, group, n0, n1, x, scratch, odd_panel);
        } else if (left > kTile) {
            multiply_in_lanes<1, true>(p, row0, rows, group, n0, n1, x, scratch, odd_panel);
        } else if (left > kNarrowRows) {
            multiply_in_lanes<1, false>(p, row0, rows, group, n0, n1, x, scratch, odd_panel);
        } else {
            multiply_in_lanes<0, true>(p, row0, rows, group, n0, n1, x, scratch, odd_panel);
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_LANES_H
