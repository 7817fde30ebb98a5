// simd.h for AVX-512 F, BW, DQ, VL: 16 lanes.
#ifndef QCORE_CPU_SIMD_AVX512_H
#define QCORE_CPU_SIMD_AVX512_H

#include <immintrin.h>

#include "codebook.h"
#include "qcore_codebooks.h"
#include "scalar.h"

namespace qcore::cpu::QC_ISA {

inline constexpr int kLanes = 16;
using Float = __m512;
using Int = __m512i;

inline Float load(const float *p) { return _mm512_loadu_ps(p); }
inline Float load(const Half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Float load(const Bfloat *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i to_half(Float x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// vcvtneps2bf16 would flush denormals (QC-NUM-003).
inline __m256i to_bfloat(Float x) {
    const Int bits = _mm512_castps_si512(x);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Int rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const Int result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}
inline void store(float *p, Float x) { _mm512_storeu_ps(p, x); }
inline void store(Half *p, Float x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), to_half(x)); }
inline void store(Bfloat *p, Float x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), to_bfloat(x)); }

inline Float broadcast(float x) { return _mm512_set1_ps(x); }
inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }

inline Int zero() { return _mm512_setzero_si512(); }
inline Int magnitude(Float x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)); }
inline Int maximum(Int a, Int b) { return _mm512_max_epi32(a, b); }
inline int32_t highest(Int a) { return _mm512_reduce_max_epi32(a); }

inline Int load_codes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline Float gather(const float *table, Int index) { return _mm512_i32gather_ps(index, table, 4); }

// 64 bytes in order. The packs work within 128-bit lanes, so that dword j of lane i holds 4 codes of vector j.
inline __m512i packed(Int a, Int b, Int c, Int d) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
}
inline __m256i nibbles(__m512i bytes) {
    return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110)));  // even * 16 + odd * 1
}

template <int G>
inline void pack_bytes(const Int (&c)[G], uint8_t *out) {
    static_assert(G == 2 || G == 4);
    if constexpr (G == 4) {
        _mm512_storeu_si512(out, packed(c[0], c[1], c[2], c[3]));
    } else {
        const __m512i bytes = packed(c[0], c[1], zero(), zero());
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm512_castsi512_si256(bytes));
    }
}

template <int G>
inline void pack_nibbles(const Int (&c)[G], uint8_t *out) {
    static_assert(G == 2 || G == 4);
    if constexpr (G == 4) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), nibbles(packed(c[0], c[1], c[2], c[3])));
    } else {
        const __m256i bytes = nibbles(packed(c[0], c[1], zero(), zero()));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(bytes));
    }
}

// round(y * 15) sorts [-1, 1] into 31 buckets, none of which holds more than one threshold. Any two values that land
// in different buckets compare like the buckets do, because multiplying and rounding keep the order. So the code is the
// number of thresholds in lower buckets, plus one compare.
inline constexpr float kBuckets = 15.0f;

class Nf4Codes {
   public:
    Nf4Codes() {
        float threshold[32];
        int32_t below[32];
        int j = 0;
        for (int bucket = -16; bucket < 16; ++bucket) {
            below[bucket & 31] = j;
            threshold[bucket & 31] = float_of(kInfinity);
            const float middle = j < 15 ? (QC_NF4_TABLE[j] + QC_NF4_TABLE[j + 1]) * 0.5f : 2.0f;
            if (_mm_cvtss_si32(_mm_set_ss(middle * kBuckets)) == bucket) {
                threshold[bucket & 31] = middle;
                ++j;
            }
        }
        for (int half = 0; half < 2; ++half) {
            threshold_[half] = _mm512_loadu_ps(threshold + 16 * half);
            below_[half] = _mm512_loadu_si512(below + 16 * half);
        }
    }
    Int operator()(Float y) const {
        const Int bucket = _mm512_cvtps_epi32(_mm512_mul_ps(y, _mm512_set1_ps(kBuckets)));
        const Float threshold = _mm512_permutex2var_ps(threshold_[0], bucket, threshold_[1]);
        const Int below = _mm512_permutex2var_epi32(below_[0], bucket, below_[1]);
        const __mmask16 above = _mm512_cmp_ps_mask(y, threshold, _CMP_GT_OQ);
        return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
    }

   private:
    Float threshold_[2];
    Int below_[2];
};

class Fp4Codes {
   public:
    Fp4Codes() {
        float threshold[16];
        int32_t low[16];
        int32_t high[16];
        int j = 0;
        for (int bucket = 0; bucket < 16; ++bucket) {
            low[bucket] = high[bucket] = QC_FP4_ORDER[j];
            threshold[bucket] = float_of(kInfinity);
            const float middle = j < 7 ? QC_FP4_THRESHOLDS[j] : 2.0f;
            if (_mm_cvtss_si32(_mm_set_ss(middle * kBuckets)) == bucket) {
                threshold[bucket] = middle;
                high[bucket] = QC_FP4_ORDER[++j];
            }
        }
        threshold_ = _mm512_loadu_ps(threshold);
        low_ = _mm512_loadu_si512(low);
        high_ = _mm512_loadu_si512(high);
    }
    Int operator()(Float y) const {
        const Float a = _mm512_abs_ps(y);
        const Int bucket = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(kBuckets)));
        const __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(bucket, threshold_), _CMP_GT_OQ);
        const __mmask16 negative = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
        const Int low = _mm512_permutexvar_epi32(bucket, low_);
        const Int code = _mm512_mask_permutexvar_epi32(low, above, bucket, high_);
        return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
    }

   private:
    Float threshold_;
    Int low_;
    Int high_;
};

// codebook.h says how the table works.
class CodebookCodes {
   public:
    explicit CodebookCodes(const Codebook &book) : book_(book) {}
    Int operator()(Float y) const { return book_.indexed ? look_up(y) : search(y); }

   private:
    Int look_up(Float y) const {
        const Int size = magnitude(y);
        const Int sign = _mm512_srai_epi32(_mm512_castps_si512(y), 31);
        const Int low = _mm512_set1_epi32(book_.low);
        const Int high = _mm512_set1_epi32(book_.high);
        const Int position = _mm512_sub_epi32(_mm512_min_epi32(_mm512_max_epi32(size, low), high), low);
        const __m128i shift = _mm_cvtsi32_si128(book_.shift);
        const Int half = _mm512_and_si512(sign, _mm512_set1_epi32(book_.half));
        const Int index = _mm512_add_epi32(_mm512_srl_epi32(position, shift), half);
        const Int entry = _mm512_i32gather_epi32(index, book_.entry, 4);
        const Int inside = _mm512_and_si512(position, _mm512_set1_epi32((1 << book_.shift) - 1));
        const Int code = _mm512_xor_si512(_mm512_srl_epi32(_mm512_add_epi32(entry, inside), shift),
                                          _mm512_and_si512(sign, _mm512_set1_epi32(255)));
        return _mm512_mask_mov_epi32(code, _mm512_testn_epi32_mask(size, size), _mm512_set1_epi32(book_.zero_code));
    }
    Int search(Float y) const {
        const Int size = magnitude(y);
        const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(y));
        const Int key = _mm512_mask_sub_epi32(size, negative, zero(), size);
        Int code = zero();
        for (int step = 128; step > 0; step /= 2) {
            const Int threshold =
                _mm512_i32gather_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(step - 1)), book_.threshold, 4);
            code = _mm512_mask_add_epi32(code, _mm512_cmpgt_epi32_mask(key, threshold), code, _mm512_set1_epi32(step));
        }
        return code;
    }

    const Codebook &book_;
};

// A vector to memory; past the caches `out` is aligned to it.
template <bool kPastCaches>
inline void put(void *out, Int v) {
    if constexpr (kPastCaches) {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(out), v);
    } else {
        _mm512_storeu_si512(out, v);
    }
}

// One vector of floats, or two rounded to one vector of T.
inline Int joined(const Float *x, float) { return _mm512_castps_si512(x[0]); }
inline Int joined(const Float *x, Half) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_half(x[0])), to_half(x[1]), 1);
}
inline Int joined(const Float *x, Bfloat) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_bfloat(x[0])), to_bfloat(x[1]), 1);
}

// The table is scaled and rounded once a block; each element is then one permute.
template <class T>
class NibbleTable {
   public:
    NibbleTable(const float *table, float scale) {
        const Float scaled = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
        if constexpr (sizeof(T) == 4) {
            table_ = _mm512_castps_si512(scaled);
        } else {
            table_ = _mm512_broadcast_i64x4(std_half(scaled));
        }
    }
    template <bool kPastCaches>
    void decode(const uint8_t *codes, T *out) const {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
        if constexpr (sizeof(T) == 4) {
            // 64-bit lanes: the high nibble to the lower float, the low nibble to the upper; vpermd reads 4 bits.
            for (int i = 0; i < 2; ++i) {
                const Int wide = _mm512_cvtepu8_epi64(i == 0 ? bytes : _mm_srli_si128(bytes, 8));
                const Int index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
                put<kPastCaches>(out + 16 * i, _mm512_permutexvar_epi32(index, table_));
            }
        } else {
            // 32-bit lanes, the same way; vpermw reads 5 bits, and the two halves of its table are equal.
            const Int wide = _mm512_cvtepu8_epi32(bytes);
            const Int index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
            put<kPastCaches>(out, _mm512_permutexvar_epi16(index, table_));
        }
    }

   private:
    static __m256i std_half(Float x) {
        if constexpr (sizeof(T) == 4) {
            return _mm256_setzero_si256();
        } else {
            return rounded(x, T{});
        }
    }
    static __m256i rounded(Float x, Half) { return to_half(x); }
    static __m256i rounded(Float x, Bfloat) { return to_bfloat(x); }

    Int table_;
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_SIMD_AVX512_H
