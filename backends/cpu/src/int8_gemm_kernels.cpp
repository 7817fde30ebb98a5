// int8_gemm and int8_scaled_gemm: exact sums of int8 products, -128 included.
//  - AVX2: elements widened to 16 bits, pairs multiplied and added (no saturation: 2 * 128^2 fits).
//  - VNNI multiplies unsigned by signed bytes: b + 128 (one exclusive or) takes the place of b, and 128 times the sum
//    of a is taken away at the end. Sums may wrap on the way; the result does not (QC-INT8-005), so it is exact.
//  - Many rows of A go in tiles (tiles.h, by_tiles): AMX multiplies signed by signed, VNNI takes a + 128 there.
//
// Memory picture without tiles: a panel of rows of B of up to 256 KiB (L2) meets four rows of A at a time (L1), four
// columns at a time, sixteen sums in registers; with few rows of A, B is read once, straight through. B is fetched
// ahead into L2, or each row would begin by waiting for memory: one row of A by 576x1536 out of memory takes 0.6 of the
// time.
#include "int8_kernels.h"
#include "int8_scale.h"
#include "tile_lanes.h"
#include "tile_unit.h"

namespace qcore::cpu::QC_ISA {
namespace {

constexpr int64_t kStrip = 4;    // columns of C, rows of B
constexpr int64_t kFewRows = 4;  // rows of A at a time
constexpr int64_t kPanelBytes = 256 << 10;

#if defined(__AVX2__)
// The sum of all lanes, which may wrap; _mm512_reduce_add_epi32 adds int, whose overflow is undefined.
int32_t total_of(__m256i sum) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}
#endif
#if defined(__AVX512BW__)
int32_t total_of(__m512i sum) {
    return total_of(_mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1)));
}
#endif

// How kBytes elements of A and of B are multiplied into sums of Sum. `kOffset` says that B counts from -128.
struct Step {
#if defined(__AVX512VNNI__)
    using Sum = __m512i;
    static constexpr int kBytes = 64;
    static constexpr bool kOffset = true;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum load_a(const int8_t *a) { return _mm512_loadu_si512(a); }
    static Sum load_b(const int8_t *b) { return _mm512_xor_si512(_mm512_loadu_si512(b), _mm512_set1_epi8(-128)); }
    static Sum add(Sum sum, Sum a, Sum b) { return _mm512_dpbusd_epi32(sum, b, a); }
    static Sum ones() { return _mm512_set1_epi8(1); }
    static int32_t total(Sum sum) { return total_of(sum); }
#elif defined(__AVXVNNI__)
    using Sum = __m256i;
    static constexpr int kBytes = 32;
    static constexpr bool kOffset = true;
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum load_a(const int8_t *a) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(a)); }
    static Sum load_b(const int8_t *b) { return _mm256_xor_si256(load_a(b), _mm256_set1_epi8(-128)); }
    static Sum add(Sum sum, Sum a, Sum b) { return _mm256_dpbusd_avx_epi32(sum, b, a); }
    static Sum ones() { return _mm256_set1_epi8(1); }
    static int32_t total(Sum sum) { return total_of(sum); }
#elif defined(__AVX512BW__)
    using Sum = __m512i;
    static constexpr int kBytes = 32;
    static constexpr bool kOffset = false;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum load_a(const int8_t *a) { return load_b(a); }
    static Sum load_b(const int8_t *b) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b)));
    }
    static Sum add(Sum sum, Sum a, Sum b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
    static int32_t total(Sum sum) { return total_of(sum); }
#elif defined(__AVX2__)
    using Sum = __m256i;
    static constexpr int kBytes = 16;
    static constexpr bool kOffset = false;
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum load_a(const int8_t *a) { return load_b(a); }
    static Sum load_b(const int8_t *b) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(b)));
    }
    static Sum add(Sum sum, Sum a, Sum b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
    static int32_t total(Sum sum) { return total_of(sum); }
#else
    using Sum = I32;
    static constexpr int kBytes = kLanes;
    static constexpr bool kOffset = false;
    static Sum zero() { return Sum{}; }
    static Sum load_a(const int8_t *a) { return load_b(a); }
    static Sum load_b(const int8_t *b) { return __builtin_convertvector(load_vector<I8>(b), I32); }
    static Sum add(Sum sum, Sum a, Sum b) { return sum + a * b; }
    static int32_t total(Sum sum) {
        int32_t all = 0;
        for (int i = 0; i < kLanes; ++i) {
            all += sum[i];
        }
        return all;
    }
#endif
};

// The sum of the elements that are left after whole steps.
int32_t tail_product(const int8_t *a, const int8_t *b, int64_t first, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = first; i < k; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

// 128 times the sum of the whole steps of row `a`, modulo 2^32. (A template, so that `if constexpr` discards.)
template <class S>
uint32_t offset_of(const int8_t *a, int64_t whole) {
    uint32_t offset = 0;
    if constexpr (S::kOffset) {
        typename S::Sum sum = S::zero();
        for (int64_t i = 0; i < whole; i += S::kBytes) {
            sum = S::add(sum, S::load_a(a + i), S::ones());
        }
        offset = static_cast<uint32_t>(S::total(sum)) * 128u;
    }
    return offset;
}

// Bytes that B is fetched ahead, past the end of a row: the next ones lie there.
constexpr int64_t kAhead = 8 << 10;

// out[r][c] = the product of row r of A with row b[c] of B, of which each follows the one before; kFetch: and B is
// fetched ahead in the order in which it lies.
template <int kRows, bool kFetch>
void dot(const int8_t *a, const uint32_t *offset, const int8_t *const *b, int64_t k, int32_t *out, int64_t out_stride) {
    const int64_t whole = k / Step::kBytes * Step::kBytes;
    Step::Sum sum[kRows][kStrip];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kStrip; ++c) {
            sum[r][c] = Step::zero();
        }
    }
    for (int64_t i = 0; i < whole; i += Step::kBytes) {
        const auto b0 = Step::load_b(b[0] + i);
        const auto b1 = Step::load_b(b[1] + i);
        const auto b2 = Step::load_b(b[2] + i);
        const auto b3 = Step::load_b(b[3] + i);
        if (kFetch) {
#pragma GCC unroll 4
            for (int64_t byte = 0; byte < kStrip * Step::kBytes; byte += 64) {
                __builtin_prefetch(b[0] + kAhead + kStrip * i + byte, 0, 2);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const auto x = Step::load_a(a + r * k + i);
            sum[r][0] = Step::add(sum[r][0], x, b0);
            sum[r][1] = Step::add(sum[r][1], x, b1);
            sum[r][2] = Step::add(sum[r][2], x, b2);
            sum[r][3] = Step::add(sum[r][3], x, b3);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kStrip; ++c) {
            const uint32_t total = static_cast<uint32_t>(Step::total(sum[r][c])) - offset[r];
            out[r * out_stride + c] =
                static_cast<int32_t>(total + static_cast<uint32_t>(tail_product(a + r * k, b[c], whole, k)));
        }
    }
}

int64_t panel_columns(int64_t rows, int64_t k) {
    if (rows <= kFewRows) {
        return kStrip;
    }
    const int64_t fit = kPanelBytes / k / kStrip * kStrip;
    return fit < kStrip ? kStrip : fit > Int8GemmKernels::kColumns ? Int8GemmKernels::kColumns : fit;
}

void multiply_by_dots(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1) {
    const int64_t columns = panel_columns(rows, p.k);
    const int64_t whole = p.k / Step::kBytes * Step::kBytes;
    using Dot = void (*)(const int8_t *, const uint32_t *, const int8_t *const *, int64_t, int32_t *, int64_t);
    static constexpr Dot dots[kFewRows][2] = {
        {dot<1, false>, dot<1, true>},
        {dot<2, false>, dot<2, true>},
        {dot<3, false>, dot<3, true>},
        {dot<4, false>, dot<4, true>},
    };
    for (int64_t i = 0; i < kAhead && i < (n1 - n0) * p.k; i += 64) {
        __builtin_prefetch(p.b + n0 * p.k + i, 0, 2);
    }
    uint32_t offset[Int8GemmKernels::kRows];
    for (int64_t r = 0; r < rows; ++r) {
        offset[r] = offset_of<Step>(p.a + (row0 + r) * p.k, whole);
    }
    for (int64_t panel = n0; panel < n1; panel += columns) {
        const int64_t width = panel + columns < n1 ? columns : n1 - panel;
        for (int64_t r = 0; r < rows; r += kFewRows) {
            const int64_t some = r + kFewRows < rows ? kFewRows : rows - r;
            const int8_t *a = p.a + (row0 + r) * p.k;
            int32_t sums[kFewRows][Int8GemmKernels::kColumns];
            for (int64_t c = 0; c < width; c += kStrip) {
                const int8_t *b[kStrip];
                for (int64_t i = 0; i < kStrip; ++i) {  // beyond the last column, that one again
                    b[i] = p.b + (panel + (c + i < width ? c + i : width - 1)) * p.k;
                }
                dots[some - 1][r == 0](a, offset + r, b, p.k, &sums[0][c], Int8GemmKernels::kColumns);
            }
            for (int64_t i = 0; i < some; ++i) {
                put_row(p, sums[i], row0 + r + i, panel, width);
            }
        }
    }
}

#if defined(__AVX512VNNI__)

// Up to four rows are dot products: B is then read once either way, and not copied. Without a tile unit sixteen lanes
// have to be worth their while: on a Zen 4 dot products take less time up to twelve rows.
#if defined(__AMX_INT8__)
bool by_tiles(int64_t rows) { return rows > kFewRows; }
#else
bool by_tiles(int64_t rows) { return rows > 3 * kFewRows; }
#endif

int64_t packed_bytes(const Int8Gemm &p, int64_t rows) { return by_tiles(rows) ? x_tile_bytes(rows, p.k) : 0; }

int64_t scratch_bytes(const Int8Gemm &, int64_t rows, int64_t columns) {
    return by_tiles(rows) ? tile_scratch_bytes(rows, columns) : 0;
}

#if defined(__AMX_INT8__)

using Unit = TileUnit<Int8Tiles>;
constexpr int8_t kOffsetOfA = 0;

#else

using Unit = TileLanes<Int8Lanes>;
constexpr int8_t kOffsetOfA = -128;

#endif

void pack(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t group, void *packed) {
    if (by_tiles(rows)) {
        const int8_t *a = p.a + row0 * p.k;
        const __m512i offset = _mm512_set1_epi8(kOffsetOfA);
        pack_x_tiles(a, rows, p.k, group, offset, static_cast<uint8_t *>(packed));
    }
}

void multiply_in_tiles(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
                       void *scratch) {
    // The next of 32 rows side by side begins a new stream, which the processor notices late: what will be read of this
    // place's next turn is fetched into L2 meanwhile, along the row where only one panel waits, else of the next panel.
    const int64_t slice = tile_slice(rows, n1 - n0);
    const bool one_panel = slice == kTilePanel;
    alignas(64) int32_t sums_of_b[kTileSlice];  // the sums of the rows of B of a slice, where A has an offset
    const auto fill = [&](int64_t n, int64_t byte, int64_t bytes, uint8_t *out) {
        const int8_t *from = p.b + n * p.k + byte;
        const bool along = one_panel && byte + bytes < p.k;
        const int64_t ahead = along ? kTileSpan : kTilePanel * p.k - (one_panel ? byte : 0);
        __m512i sum = _mm512_setzero_si512();
        const auto put = [&](int64_t i, __mmask64 valid) {
            const __m512i v = _mm512_maskz_loadu_epi8(valid, from + i);
            _mm512_mask_storeu_epi8(out + i, valid, v);
            if (kOffsetOfA != 0) {
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), v);
            }
        };
        int64_t i = 0;
        for (; i + 64 <= bytes; i += 64) {
            _mm_prefetch(from + i + ahead, _MM_HINT_T1);
            put(i, ~__mmask64{0});
        }
        if (i < bytes) {
            put(i, (__mmask64{1} << (bytes - i)) - 1);
        }
        if (kOffsetOfA != 0) {
            int32_t &to = sums_of_b[(n - n0) % slice];
            to = total_of(sum) + (byte == 0 ? 0 : to);
        }
    };
    const auto finish = [&](int64_t n, int64_t count, int64_t group, const __m512i *v) {
        const int64_t some = rows - group * kTile < kTile ? rows - group * kTile : kTile;
        const auto valid = static_cast<__mmask16>((1u << count) - 1);
        const __m512i of_b = _mm512_maskz_loadu_epi32(valid, sums_of_b + (n - n0) % slice);
        for (int64_t i = 0; i < some; ++i) {
            int32_t sums[kTile];
            _mm512_storeu_si512(sums, kOffsetOfA != 0 ? _mm512_sub_epi32(v[i], _mm512_slli_epi32(of_b, 7)) : v[i]);
            put_row(p, sums, row0 + group * kTile + i, n, count);
        }
    };
    multiply_by_tiles<Unit>(rows, n0, n1, p.k, static_cast<const uint8_t *>(packed), scratch, fill, finish,
                            [](int64_t, int64_t) {});
}

#else

bool by_tiles(int64_t) { return false; }

int64_t packed_bytes(const Int8Gemm &, int64_t) { return 0; }

int64_t scratch_bytes(const Int8Gemm &, int64_t, int64_t) { return 0; }

void pack(const Int8Gemm &, int64_t, int64_t, int64_t, void *) {}

void multiply_in_tiles(const Int8Gemm &, int64_t, int64_t, int64_t, int64_t, const void *, void *) {}

#endif

void multiply(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
              void *scratch) {
    if (p.k == 0) {
        put_zeros(p, row0, rows, n0, n1);
    } else if (by_tiles(rows)) {
        multiply_in_tiles(p, row0, rows, n0, n1, packed, scratch);
    } else {
        multiply_by_dots(p, row0, rows, n0, n1);
    }
}

}  // namespace

const Int8GemmKernels int8_gemm_kernels = {packed_bytes, scratch_bytes, pack, multiply};

}  // namespace qcore::cpu::QC_ISA
