// int8 quantization by columns. Only kernel files include it.
//
// Memory picture: a column's scale is known only at its end, so the matrix is read twice, 2 to 4 bytes an element each
// time, and one byte is written. Columns are taken in strips whose statistics and scales fit L1. Strips so narrow that
// all their rows fit L2 do not pay: with 4096 rows they are 128 columns wide, every row of a strip lies in a page of
// its own and is too short to be fetched ahead, and the first read takes longer than two of long rows (measured: 8.9 ms
// for strips of 128 bfloat16 columns, 6.7 for 512, 4.6 for 2048; the same order in float32 and, less so, with 512
// rows). The second read runs backwards instead: what the first has read last is still in the caches.
//
// Magnitudes are compared by their bits, as integers as wide as they are.
#ifndef QCORE_CPU_INT8_COLUMNS_H
#define QCORE_CPU_INT8_COLUMNS_H

#include "int8_codes.h"

namespace qcore::cpu::QC_ISA {

constexpr int64_t kStripColumns = 2048;

// What one call computes: columns k0 ... k1 - 1 of a[m, k], from row `start` on and then round.
template <class T>
struct ColumnsProblem {
    const T *a;
    int64_t m, k;
    float threshold;
    int64_t start;
    int8_t *out;
    float *col_stats;

    const T *row(int64_t r, int64_t strip) const { return a + wrapped(r) * k + strip; }
    int8_t *codes(int64_t r, int64_t strip) const { return out + wrapped(r) * k + strip; }

   private:
    int64_t wrapped(int64_t r) const { return r + start < m ? r + start : r + start - m; }
};

#if defined(__AVX512BW__)

// Integers of the size of T in a vector.
template <int kBytes>
struct Magnitudes;

template <>
struct Magnitudes<2> {
    using Bits = uint16_t;
    using Mask = __mmask32;
    static constexpr Bits kAll = 0x7fff;

    static __m512i splat(Bits x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
    static __m512i load(Mask some, const void *p) { return _mm512_maskz_loadu_epi16(some, p); }
    static Mask at_most(__m512i v, __m512i limit) { return _mm512_cmple_epu16_mask(v, limit); }
    static __m512i most(__m512i a, Mask some, __m512i b) { return _mm512_mask_max_epu16(a, some, a, b); }
};

template <>
struct Magnitudes<4> {
    using Bits = uint32_t;
    using Mask = __mmask16;
    static constexpr Bits kAll = 0x7fffffff;

    static __m512i splat(Bits x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
    static __m512i load(Mask some, const void *p) { return _mm512_maskz_loadu_epi32(some, p); }
    static Mask at_most(__m512i v, __m512i limit) { return _mm512_cmple_epu32_mask(v, limit); }
    static __m512i most(__m512i a, Mask some, __m512i b) { return _mm512_mask_max_epu32(a, some, a, b); }
};

// The bits of the largest magnitude that inside() takes.
template <class T>
inline auto most_inside(float threshold) {
    typename Magnitudes<sizeof(T)>::Bits bits;
    T most = from_float<T>(threshold > 0.0f ? threshold : __builtin_inff());
    __builtin_memcpy(&bits, &most, sizeof bits);
    while (threshold > 0.0f && !(to_float(most) < threshold)) {
        --bits;
        __builtin_memcpy(&most, &bits, sizeof bits);
    }
    return bits;
}

// stats[i]: of column strip + i. Answers whether every element is finite and inside the threshold.
template <class T>
inline bool column_stats(const ColumnsProblem<T> &p, int64_t strip, int64_t width, float *stats) {
    using M = Magnitudes<sizeof(T)>;
    constexpr int64_t kEach = 64 / sizeof(T);
    constexpr int64_t kRows = 4;  // side by side: a vector of maxima is loaded and stored once for them
    alignas(64) T most[kStripColumns] = {};
    const __m512i limit = M::splat(most_inside<T>(p.threshold));
    const __m512i all = M::splat(M::kAll);
    auto clean = static_cast<typename M::Mask>(-1);
    for (int64_t r = 0; r < p.m; r += kRows) {
        const T *x[kRows];
        for (int64_t j = 0; j < kRows; ++j) {  // beyond the last row, that one again
            x[j] = p.row(r + j < p.m ? r + j : p.m - 1, strip);
        }
        for (int64_t i = 0; i < width; i += kEach) {
            const int64_t left = width - i;
            const auto some = static_cast<typename M::Mask>(left >= kEach ? ~0u : (1u << left) - 1);
            __m512i highest = _mm512_load_si512(most + i);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kRows; ++j) {
                const __m512i v = _mm512_and_si512(M::load(some, x[j] + i), all);
                const auto within = M::at_most(v, limit);
                highest = M::most(highest, within, v);
                clean = static_cast<typename M::Mask>(clean & within);
            }
            _mm512_store_si512(most + i, highest);
        }
    }
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
        stats[i] = to_float(most[i]);
        finite &= stats[i] < __builtin_inff();
    }
    return finite && clean == static_cast<typename M::Mask>(-1);
}

#else

template <class T>
inline bool column_stats(const ColumnsProblem<T> &p, int64_t strip, int64_t width, float *stats) {
    const float limit = p.threshold > 0.0f ? p.threshold : 0.0f;
    __builtin_memset(stats, 0, static_cast<size_t>(width) * sizeof *stats);
    for (int64_t r = 0; r < p.m; ++r) {
        const T *x = p.row(r, strip);
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            F32 v = magnitude(load(x + i));
            if (limit > 0.0f) {
                v = (F32)((I32)v & (v < limit));
            }
            const F32 most = load(stats + i);
            store(stats + i, v > most ? v : most);
        }
        for (; i < width; ++i) {
            const float v = magnitude(to_float(x[i]));
            if (inside(v, p.threshold) && v > stats[i]) {
                stats[i] = v;
            }
        }
    }
    return false;
}

#endif

// Codes of the columns first ... width - 1 of one row of a strip.
template <class T>
inline void column_codes(const T *x, int64_t first, int64_t width, float threshold, const float *scale, int8_t *codes) {
    const float limit = threshold > 0.0f ? threshold : 0.0f;
    int64_t i = first;
    for (; i + kLanes <= width; i += kLanes) {
        F32 v = load(x + i);
        if (limit > 0.0f) {
            v = (F32)((I32)v & (magnitude(v) < limit));
        }
        store_vector(codes + i, code_of(v * load(scale + i)));
    }
    for (; i < width; ++i) {
        const float v = to_float(x[i]);
        codes[i] = inside(v, threshold) ? code_of(v * scale[i]) : int8_t{0};
    }
}

template <class T>
inline void columns_of(const ColumnsProblem<T> &p, int64_t k0, int64_t k1) {
    for (int64_t strip = k0; strip < k1; strip += kStripColumns) {
        const int64_t width = strip + kStripColumns < k1 ? kStripColumns : k1 - strip;
        float *stats = p.col_stats + strip;
        [[maybe_unused]] const bool clean = column_stats(p, strip, width, stats);
        float scale[kStripColumns];
        [[maybe_unused]] bool finite = true;
        for (int64_t i = 0; i < width; ++i) {
            scale[i] = stats[i] == 0.0f ? 0.0f : 127.0f / stats[i];
            finite &= scale[i] <= 0x1.fffffep+127f;
        }
        for (int64_t r = p.m - 1; r >= 0; --r) {
            const T *x = p.row(r, strip);
            int8_t *codes = p.codes(r, strip);
            int64_t i = 0;
#if defined(__AVX512BW__)
            const auto scaled = [&](int64_t at) { return (__m512)(load(x + at) * load(scale + at)); };
            const auto kept = [&](int64_t at) {
                const F32 v = load(x + at);
                const F32 in = p.threshold > 0.0f ? (F32)((I32)v & (magnitude(v) < p.threshold)) : v;
                return (__m512)(in * load(scale + at));
            };
            for (; clean && finite && i + 64 <= width; i += 64) {
                store_ordered_codes(scaled(i), scaled(i + 16), scaled(i + 32), scaled(i + 48), codes + i);
            }
            for (; finite && i + 64 <= width; i += 64) {
                store_codes(kept(i), kept(i + 16), kept(i + 32), kept(i + 48), codes + i);
            }
#endif
            column_codes(x, i, width, p.threshold, scale, codes);
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_INT8_COLUMNS_H
