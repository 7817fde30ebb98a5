// int8 quantization by rows and columns, and back. A row is read once for its statistics and, still in L1, once for its
// codes: 2 to 4 bytes read and one written an element. Columns are taken in strips that fit L1; the matrix is read
// twice.
#include "int8_kernels.h"

#include "int8_scale.h"

namespace qcore::cpu::QC_ISA {
namespace {

constexpr int64_t kChunk = 256;  // elements after which a row is looked through for outliers
// Statistics and scales of a strip stay in L1; a row of it is long enough to be fetched ahead by the processor itself.
constexpr int64_t kStripColumns = 2048;
constexpr float kRound = 0x1.8p23f;  // adding and taking it away rounds to an integer, ties to even, up to 2^22

I32 magnitude_bits(F32 x) { return (I32)x & 0x7fffffff; }
F32 magnitude(F32 x) { return (F32)magnitude_bits(x); }
float magnitude(float x) { return __builtin_fabsf(x); }

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

// QC-INT8-001: what a statistic leaves out. NaN fails every comparison.
bool inside(float x, float threshold) {
    return threshold > 0.0f ? magnitude(x) < threshold : magnitude(x) <= __builtin_inff();
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
// Whole vectors of a row with a threshold: the largest magnitude inside it, and the columns of what lies outside.
// Returns the number of elements that it took.
template <class T>
int64_t row_stat_with_outliers(const T *x, int64_t k, float threshold, uint8_t *outlier_cols, float &most) {
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
#endif

template <class T>
float row_stat_of(const T *x, int64_t k, float threshold, uint8_t *outlier_cols) {
    const F32 limit = splat(threshold > 0.0f ? threshold : __builtin_inff());
    F32 most = {};
    float rest = 0.0f;
    int64_t done = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (threshold > 0.0f) {
        done = row_stat_with_outliers(x, k, threshold, outlier_cols, rest);
    }
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

// QC-INT8-003 for an element times its scale.
I8 code_of(F32 q) {
    q = q == q ? q : F32{};
    q = q > 127.0f ? splat(127.0f) : q;
    q = q < -127.0f ? splat(-127.0f) : q;
    return __builtin_convertvector(__builtin_convertvector(q + kRound - kRound, I32), I8);
}

int8_t code_of(float q) {
    q = q == q ? q : 0.0f;
    q = q > 127.0f ? 127.0f : q;
    q = q < -127.0f ? -127.0f : q;
    return static_cast<int8_t>(q + kRound - kRound);
}

#if defined(__AVX512BW__)
// 64 codes of values whose magnitude is below 127.5 or that the caller replaces (outliers become -128 or 127): no
// clamp.
void store_codes(__m512 a, __m512 b, __m512 c, __m512 d, int8_t *out) {
    const auto rounded = [](__m512 q) {
        return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(q, q, _CMP_ORD_Q), q);  // NaN becomes 0
    };
    const __m512i words = _mm512_packs_epi32(rounded(a), rounded(b));
    const __m512i bytes = _mm512_packs_epi16(words, _mm512_packs_epi32(rounded(c), rounded(d)));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, bytes));
}
#endif

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

template <class T>
void columns_of(const T *a, int64_t m, int64_t k, float threshold, int64_t k0, int64_t k1, int8_t *out,
                float *col_stats) {
    const float limit = threshold > 0.0f ? threshold : 0.0f;
    for (int64_t strip = k0; strip < k1; strip += kStripColumns) {
        const int64_t width = strip + kStripColumns < k1 ? kStripColumns : k1 - strip;
        float *stats = col_stats + strip;
        __builtin_memset(stats, 0, static_cast<size_t>(width) * sizeof *stats);
        for (int64_t r = 0; r < m; ++r) {
            const T *x = a + r * k + strip;
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
                if (inside(v, threshold) && v > stats[i]) {
                    stats[i] = v;
                }
            }
        }
        float scale[kStripColumns];
        bool finite = true;
        for (int64_t i = 0; i < width; ++i) {
            scale[i] = stats[i] == 0.0f ? 0.0f : 127.0f / stats[i];
            finite &= scale[i] <= 0x1.fffffep+127f;
        }
        (void)finite;
        const auto scaled = [&](const T *x, int64_t i) {
            F32 v = load(x + i);
            if (limit > 0.0f) {
                v = (F32)((I32)v & (magnitude(v) < limit));
            }
            return v * load(scale + i);
        };
        for (int64_t r = 0; r < m; ++r) {
            const T *x = a + r * k + strip;
            int8_t *codes = out + r * k + strip;
            int64_t i = 0;
#if defined(__AVX512BW__)
            for (; finite && i + 64 <= width; i += 64) {
                store_codes((__m512)scaled(x, i), (__m512)scaled(x, i + 16), (__m512)scaled(x, i + 32),
                            (__m512)scaled(x, i + 48), codes + i);
            }
#endif
            for (; i + kLanes <= width; i += kLanes) {
                store_vector(codes + i, code_of(scaled(x, i)));
            }
            for (; i < width; ++i) {
                const float v = to_float(x[i]);
                codes[i] = inside(v, threshold) ? code_of(v * scale[i]) : int8_t{0};
            }
        }
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

void columns(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, int64_t k0, int64_t k1, int8_t *out,
             float *col_stats) {
    switch (dtype) {
        case QC_F32:
            return columns_of(static_cast<const float *>(a), m, k, threshold, k0, k1, out, col_stats);
        case QC_F16:
            return columns_of(static_cast<const Half *>(a), m, k, threshold, k0, k1, out, col_stats);
        default:
            return columns_of(static_cast<const Bfloat *>(a), m, k, threshold, k0, k1, out, col_stats);
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
