// int8 quantization by rows and columns, and back. A row is read once for its statistics and, still in L1, once for its
// codes: 2 to 4 bytes read and one written an element. int8_columns.h has the columns.
#include "int8_kernels.h"

#include "int8_columns.h"
#include "int8_scale.h"

namespace qcore::cpu::QC_ISA {
namespace {

constexpr int64_t kChunk = 256;  // elements after which a row is looked through for outliers

bool any(I32 mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#else
    int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) {
        all |= mask[i];
    }
    return all != 0;
#endif
}

float highest(F32 x) {
    float most = 0.0f;
    for (int i = 0; i < kLanes; ++i) {
        most = x[i] > most ? x[i] : most;
    }
    return most;
}

// Sets the bytes of the columns first ... end - 1 in which `x` is an outlier; other rows may be setting theirs.
template <class T>
void mark_outliers(const T *x, int64_t first, int64_t end, float threshold, uint8_t *outlier_cols) {
    for (int64_t i = first; i < end; ++i) {
        if (!inside(to_float(x[i]), threshold)) {
            __atomic_store_n(outlier_cols + i, uint8_t{1}, __ATOMIC_RELAXED);
        }
    }
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Whole vectors of a row: the largest magnitude inside the threshold, and the columns of what lies outside. Returns the
// number of elements that it took.
int64_t row_stat_of_vectors(const float *x, int64_t k, float threshold, uint8_t *outlier_cols, float &most) {
    if (!(threshold > 0.0f)) {
        return 0;
    }
    const __m512 limit = (__m512)splat(threshold);
    __m512 highest[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
        for (int j = 0; j < 2; ++j) {
            const int64_t at = i + j * kLanes;
            const __m512 a = (__m512)magnitude(load(x + at));
            const __mmask16 within = _mm512_cmp_ps_mask(a, limit, _CMP_LT_OQ);
            highest[j] = _mm512_mask_max_ps(highest[j], within, highest[j], a);
            if (__builtin_expect(within != 0xFFFF, 0)) {  // other rows may be setting theirs
                _mm_mask_storeu_epi8(outlier_cols + at, static_cast<__mmask16>(~within), _mm_set1_epi8(1));
            }
        }
    }
    most = _mm512_reduce_max_ps(_mm512_max_ps(highest[0], highest[1]));
    return i;
}

// The least magnitude of T that is not inside, as its 15 bits.
uint16_t limit_bits(float threshold, const Bfloat *) {
    uint32_t bits;
    __builtin_memcpy(&bits, &threshold, sizeof bits);
    return static_cast<uint16_t>(threshold > 0.0f ? (bits + 0xffff) >> 16 : 0x7f81);  // a NaN
}
uint16_t limit_bits(float threshold, const Half *) {
    return threshold > 0.0f ? static_cast<uint16_t>(_cvtss_sh(threshold, _MM_FROUND_TO_POS_INF)) : 0x7c01;
}

// Values of 16 bits are in the order of their bits but for the sign, so none is converted.
template <class T>
int64_t row_stat_of_vectors(const T *x, int64_t k, float threshold, uint8_t *outlier_cols, float &most) {
    constexpr int kStep = 32;
    const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(limit_bits(threshold, x)));
    const __m512i magnitude_of = _mm512_set1_epi16(0x7fff);
    __m512i highest[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 2 * kStep <= k; i += 2 * kStep) {
        for (int j = 0; j < 2; ++j) {
            const int64_t at = i + j * kStep;
            const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x + at), magnitude_of);
            const __mmask32 within = _mm512_cmplt_epu16_mask(a, limit);
            highest[j] = _mm512_mask_max_epu16(highest[j], within, highest[j], a);
            if (__builtin_expect(within != 0xFFFFFFFF && threshold > 0.0f, 0)) {  // other rows may be setting theirs
                _mm256_mask_storeu_epi8(outlier_cols + at, static_cast<__mmask32>(~within), _mm256_set1_epi8(1));
            }
        }
    }
    const __m512i all = _mm512_max_epu16(highest[0], highest[1]);
    const __m512i dwords =
        _mm512_max_epu32(_mm512_srli_epi32(all, 16), _mm512_and_si512(all, _mm512_set1_epi32(0xffff)));
    const auto bits = static_cast<uint16_t>(_mm512_reduce_max_epu32(dwords));
    T value;
    __builtin_memcpy(&value, &bits, sizeof value);
    most = to_float(value);
    return i;
}
#endif

template <class T>
float row_stat_of(const T *x, int64_t k, float threshold, uint8_t *outlier_cols) {
    const F32 limit = splat(threshold > 0.0f ? threshold : __builtin_inff());
    F32 most = {};
    float rest = 0.0f;
    int64_t done = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    done = row_stat_of_vectors(x, k, threshold, outlier_cols, rest);
#endif
    for (int64_t i0 = done; i0 < k; i0 += kChunk) {
        const int64_t end = i0 + kChunk < k ? i0 + kChunk : k;
        I32 outside = {};
        bool scalar_outside = false;
        int64_t i = i0;
        if (threshold > 0.0f) {
            for (; i + kLanes <= end; i += kLanes) {
                const F32 a = magnitude(load(x + i));
                const I32 within = a < limit;
                outside |= ~within;
                const F32 kept = (F32)((I32)a & within);
                most = kept > most ? kept : most;
            }
        } else {
            F32 other = most;  // two chains
            for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
                const F32 a = magnitude(load(x + i));
                const F32 b = magnitude(load(x + i + kLanes));
                most = a > most ? a : most;
                other = b > other ? b : other;
            }
            most = other > most ? other : most;
        }
        for (; i < end; ++i) {
            const float value = to_float(x[i]);
            if (inside(value, threshold)) {
                rest = magnitude(value) > rest ? magnitude(value) : rest;
            } else {
                scalar_outside = true;
            }
        }
        if (threshold > 0.0f && (scalar_outside || any(outside))) {
            mark_outliers(x, i0, end, threshold, outlier_cols);
        }
    }
    const float vector = highest(most);
    return vector > rest ? vector : rest;
}

template <class T>
void row_codes_of(const T *x, int64_t k, float stat, int8_t *out) {
    const float scale = stat == 0.0f ? 0.0f : 127.0f / stat;  // x is then 0, NaN or in an outlier column: code 0
    int64_t i = 0;
#if defined(__AVX512BW__)
    if (scale <= 0x1.fffffep+127f) {  // else x * scale may be infinite, and its code is 127 or -127
        const F32 s = splat(scale);
        for (; i + 64 <= k; i += 64) {
            store_codes((__m512)(load(x + i) * s), (__m512)(load(x + i + 16) * s), (__m512)(load(x + i + 32) * s),
                        (__m512)(load(x + i + 48) * s), out + i);
        }
    }
#endif
    for (; i + kLanes <= k; i += kLanes) {
        store_vector(out + i, code_of(load(x + i) * splat(scale)));
    }
    for (; i < k; ++i) {
        out[i] = code_of(to_float(x[i]) * scale);
    }
}

// Past the caches `out` is aligned to 64 bytes in 64 elements' distance.
template <bool kPastCaches, class T>
void dequantize_row_of(const int8_t *codes, int64_t k, float stat, T *out) {
    constexpr int64_t kAheadBytes = 4096;  // what is fetched ahead by itself ends at the next page
    int64_t i = 0;
    const auto value = [&](int64_t at) {
        return __builtin_convertvector(load_signed(codes + at), F32) * splat(stat) * splat(kInt8Reciprocal);
    };
#if defined(__AVX512F__)
    if constexpr (kPastCaches) {
        for (; i < k && reinterpret_cast<uintptr_t>(out + i) % 64 != 0; ++i) {
            out[i] = from_float<T>(static_cast<float>(codes[i]) * stat * kInt8Reciprocal);
        }
        for (; i + 64 <= k; i += 64) {
            __builtin_prefetch(codes + i + kAheadBytes, 0, 2);
            alignas(64) T values[64];
            for (int64_t l = 0; l < 64; l += kLanes) {
                store(values + l, value(i + l));
            }
            for (int64_t byte = 0; byte < static_cast<int64_t>(sizeof values); byte += 64) {
                _mm512_stream_si512(reinterpret_cast<__m512i *>(reinterpret_cast<char *>(out + i) + byte),
                                    _mm512_load_si512(reinterpret_cast<const char *>(values) + byte));
            }
        }
    }
#endif
    for (; i + kLanes <= k; i += kLanes) {
        __builtin_prefetch(codes + i + kAheadBytes, 0, 2);
        store(out + i, value(i));
    }
    for (; i < k; ++i) {
        out[i] = from_float<T>(static_cast<float>(codes[i]) * stat * kInt8Reciprocal);
    }
}

float row_stat(int32_t dtype, const void *x, int64_t k, float threshold, uint8_t *outlier_cols) {
    switch (dtype) {
        case QC_F32:
            return row_stat_of(static_cast<const float *>(x), k, threshold, outlier_cols);
        case QC_F16:
            return row_stat_of(static_cast<const Half *>(x), k, threshold, outlier_cols);
        default:
            return row_stat_of(static_cast<const Bfloat *>(x), k, threshold, outlier_cols);
    }
}

void row_codes(int32_t dtype, const void *x, int64_t k, float stat, int8_t *out) {
    switch (dtype) {
        case QC_F32:
            return row_codes_of(static_cast<const float *>(x), k, stat, out);
        case QC_F16:
            return row_codes_of(static_cast<const Half *>(x), k, stat, out);
        default:
            return row_codes_of(static_cast<const Bfloat *>(x), k, stat, out);
    }
}

void clear_outliers(const uint8_t *outlier_cols, int64_t k, int8_t *out) {
    for (int64_t i = 0; i < k; ++i) {
        out[i] = static_cast<int8_t>(out[i] & (outlier_cols[i] - 1));
    }
}

template <class T>
void columns_of(const void *a, int64_t m, int64_t k, float threshold, int64_t k0, int64_t k1, int64_t start,
                int8_t *out, float *col_stats) {
    columns_of(ColumnsProblem<T>{static_cast<const T *>(a), m, k, threshold, start, out, col_stats}, k0, k1);
}

void columns(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, int64_t k0, int64_t k1, int64_t start,
             int8_t *out, float *col_stats) {
    switch (dtype) {
        case QC_F32:
            return columns_of<float>(a, m, k, threshold, k0, k1, start, out, col_stats);
        case QC_F16:
            return columns_of<Half>(a, m, k, threshold, k0, k1, start, out, col_stats);
        default:
            return columns_of<Bfloat>(a, m, k, threshold, k0, k1, start, out, col_stats);
    }
}

template <class T>
void dequantize_rows_of(const int8_t *codes, const float *stats, int64_t m, int64_t k, bool past_caches, T *out) {
    for (int64_t r = 0; r < m; ++r) {
        if (past_caches) {
            dequantize_row_of<true>(codes + r * k, k, stats[r], out + r * k);
        } else {
            dequantize_row_of<false>(codes + r * k, k, stats[r], out + r * k);
        }
    }
#if defined(__AVX512F__)
    _mm_sfence();  // stores past the caches are in no order with others: whoever is told of the end must see them
#endif
}

void dequantize_rows(int32_t dtype, const int8_t *codes, const float *stats, int64_t m, int64_t k, bool past_caches,
                     void *out) {
    switch (dtype) {
        case QC_F32:
            return dequantize_rows_of(codes, stats, m, k, past_caches, static_cast<float *>(out));
        case QC_F16:
            return dequantize_rows_of(codes, stats, m, k, past_caches, static_cast<Half *>(out));
        default:
            return dequantize_rows_of(codes, stats, m, k, past_caches, static_cast<Bfloat *>(out));
    }
}

}  // namespace

const Int8Kernels int8_kernels = {row_stat, row_codes, clear_outliers, columns, scale_row, dequantize_rows};

}  // namespace qcore::cpu::QC_ISA
