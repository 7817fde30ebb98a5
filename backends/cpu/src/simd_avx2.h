// simd.h for AVX2 and F16C: 8 lanes.
#ifndef QCORE_CPU_SIMD_AVX2_H
#define QCORE_CPU_SIMD_AVX2_H

#include <immintrin.h>

#include "codebook.h"
#include "qcore_codebooks.h"
#include "scalar.h"

namespace qcore::cpu::QC_ISA {

inline constexpr int kLanes = 8;
using Float = __m256;
using Int = __m256i;

inline Float load(const float *p) { return _mm256_loadu_ps(p); }
inline Float load(const Half *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Float load(const Bfloat *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// 8 dwords below 2^16 to 8 words.
inline __m128i low_words(Int a) {
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(a, a), 0x08));
}
inline __m128i to_half(Float x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m128i to_bfloat(Float x) {
    const Int bits = _mm256_castps_si256(x);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Int rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const Int quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const Int nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return low_words(_mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16));
}
inline void store(float *p, Float x) { _mm256_storeu_ps(p, x); }
inline void store(Half *p, Float x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), to_half(x)); }
inline void store(Bfloat *p, Float x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), to_bfloat(x)); }

inline Float broadcast(float x) { return _mm256_set1_ps(x); }
inline Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }

inline Int zero() { return _mm256_setzero_si256(); }
inline Int magnitude(Float x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF)); }
inline Int maximum(Int a, Int b) { return _mm256_max_epi32(a, b); }
inline int32_t highest(Int a) {
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1));
    return _mm_cvtsi128_si32(x);
}

inline Int load_codes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
}
inline Float gather(const float *table, Int index) { return _mm256_i32gather_ps(table, index, 4); }

// 32 bytes in order. The packs work within 128-bit lanes, so that dword j of lane i holds 4 codes of vector j.
inline __m256i packed(const Int (&c)[4]) {
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline void pack_bytes(const Int (&c)[4], uint8_t *out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), packed(c));
}
inline void pack_nibbles(const Int (&c)[4], uint8_t *out) {
    const __m256i words = _mm256_maddubs_epi16(packed(c), _mm256_set1_epi16(0x0110));  // even * 16 + odd * 1
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(bytes));
}

// One step down a search tree held in registers: go right where y is above the node.
inline Int descend(Int node, Float y, Float threshold) {
    const Int above = _mm256_castps_si256(_mm256_cmp_ps(y, threshold, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
}

class Nf4Codes {
   public:
    Nf4Codes() {
        const auto middle = [](int j) { return (QC_NF4_TABLE[j] + QC_NF4_TABLE[j + 1]) * 0.5f; };
        root_ = _mm256_set1_ps(middle(7));
        second_ = _mm256_setr_ps(middle(3), middle(11), 0, 0, 0, 0, 0, 0);
        third_ = _mm256_setr_ps(middle(1), middle(5), middle(9), middle(13), 0, 0, 0, 0);
        fourth_ =
            _mm256_setr_ps(middle(0), middle(2), middle(4), middle(6), middle(8), middle(10), middle(12), middle(14));
    }
    Int operator()(Float y) const {
        Int node = descend(zero(), y, root_);
        node = descend(node, y, _mm256_permutevar8x32_ps(second_, node));
        node = descend(node, y, _mm256_permutevar8x32_ps(third_, node));
        return descend(node, y, _mm256_permutevar8x32_ps(fourth_, node));
    }

   private:
    Float root_, second_, third_, fourth_;
};

class Fp4Codes {
   public:
    Fp4Codes() {
        const float *t = QC_FP4_THRESHOLDS;
        root_ = _mm256_set1_ps(t[3]);
        second_ = _mm256_setr_ps(t[1], t[5], 0, 0, 0, 0, 0, 0);
        third_ = _mm256_setr_ps(t[0], t[2], t[4], t[6], 0, 0, 0, 0);
        order_ = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(QC_FP4_ORDER)));
    }
    Int operator()(Float y) const {
        const Float a = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), y);
        Int node = descend(zero(), a, root_);
        node = descend(node, a, _mm256_permutevar8x32_ps(second_, node));
        node = descend(node, a, _mm256_permutevar8x32_ps(third_, node));
        const Int negative = _mm256_castps_si256(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_LT_OQ));
        return _mm256_or_si256(_mm256_permutevar8x32_epi32(order_, node),
                               _mm256_and_si256(negative, _mm256_set1_epi32(8)));
    }

   private:
    Float root_, second_, third_;
    Int order_;
};

// codebook.h says how the table works.
class CodebookCodes {
   public:
    explicit CodebookCodes(const Codebook &book) : book_(book) {}
    Int operator()(Float y) const { return book_.indexed ? look_up(y) : search(y); }

   private:
    Int look_up(Float y) const {
        const Int size = magnitude(y);
        const Int sign = _mm256_srai_epi32(_mm256_castps_si256(y), 31);
        const Int low = _mm256_set1_epi32(book_.low);
        const Int high = _mm256_set1_epi32(book_.high);
        const Int position = _mm256_sub_epi32(_mm256_min_epi32(_mm256_max_epi32(size, low), high), low);
        const __m128i shift = _mm_cvtsi32_si128(book_.shift);
        const Int half = _mm256_and_si256(sign, _mm256_set1_epi32(book_.half));
        const Int index = _mm256_add_epi32(_mm256_srl_epi32(position, shift), half);
        const Int entry = _mm256_i32gather_epi32(reinterpret_cast<const int *>(book_.entry), index, 4);
        const Int inside = _mm256_and_si256(position, _mm256_set1_epi32((1 << book_.shift) - 1));
        const Int code = _mm256_xor_si256(_mm256_srl_epi32(_mm256_add_epi32(entry, inside), shift),
                                          _mm256_and_si256(sign, _mm256_set1_epi32(255)));
        return _mm256_blendv_epi8(code, _mm256_set1_epi32(book_.zero_code), _mm256_cmpeq_epi32(size, zero()));
    }
    Int search(Float y) const {
        const Int sign = _mm256_srai_epi32(_mm256_castps_si256(y), 31);
        const Int key = _mm256_sub_epi32(_mm256_xor_si256(magnitude(y), sign), sign);
        Int code = zero();
        for (int step = 128; step > 0; step /= 2) {
            const Int threshold =
                _mm256_i32gather_epi32(book_.threshold, _mm256_add_epi32(code, _mm256_set1_epi32(step - 1)), 4);
            const Int above = _mm256_cmpgt_epi32(key, threshold);
            code = _mm256_add_epi32(code, _mm256_and_si256(above, _mm256_set1_epi32(step)));
        }
        return code;
    }

    const Codebook &book_;
};

// A vector to memory; past the caches `out` is aligned to it.
template <bool kPastCaches>
inline void put(void *out, Int v) {
    if constexpr (kPastCaches) {
        _mm256_stream_si256(reinterpret_cast<__m256i *>(out), v);
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), v);
    }
}

// The table is scaled and rounded once a block; each element is then looked up in registers.
template <class T>
class NibbleTable {
   public:
    NibbleTable(const float *table, float scale) {
        const Float low = _mm256_mul_ps(_mm256_loadu_ps(table), _mm256_set1_ps(scale));
        const Float high = _mm256_mul_ps(_mm256_loadu_ps(table + 8), _mm256_set1_ps(scale));
        if constexpr (sizeof(T) == 4) {
            first_ = _mm256_castps_si256(low);
            second_ = _mm256_castps_si256(high);
        } else {
            // The low bytes and the high bytes of the 16 words, each a table for vpshufb.
            const __m128i a = rounded(low, T{});
            const __m128i b = rounded(high, T{});
            const __m128i byte = _mm_set1_epi16(0xFF);
            first_ = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
            second_ = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
        }
    }
    template <bool kPastCaches>
    void decode(const uint8_t *codes, T *out) const {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
        const __m128i low_nibble = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_nibble);
        const __m128i odd = _mm_and_si128(bytes, low_nibble);
        const __m128i index[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};  // 16 codes each
        if constexpr (sizeof(T) == 4) {
            for (int i = 0; i < 4; ++i) {
                const __m128i eight = i % 2 == 0 ? index[i / 2] : _mm_srli_si128(index[i / 2], 8);
                const Int code = _mm256_cvtepu8_epi32(eight);
                const Float low = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(first_), code);
                const Float high = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(second_), code);
                const Float upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // sign bit: code >= 8
                put<kPastCaches>(out + 8 * i, _mm256_castps_si256(_mm256_blendv_ps(low, high, upper)));
            }
        } else {
            // unpack works within 128-bit lanes: 0..7 and 16..23 below, 8..15 and 24..31 above.
            const Int code = _mm256_set_m128i(index[1], index[0]);
            const Int low = _mm256_shuffle_epi8(first_, code);
            const Int high = _mm256_shuffle_epi8(second_, code);
            const Int a = _mm256_unpacklo_epi8(low, high);
            const Int b = _mm256_unpackhi_epi8(low, high);
            put<kPastCaches>(out, _mm256_permute2x128_si256(a, b, 0x20));
            put<kPastCaches>(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
        }
    }

   private:
    static __m128i rounded(Float x, Half) { return to_half(x); }
    static __m128i rounded(Float x, Bfloat) { return to_bfloat(x); }

    Int first_, second_;
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_SIMD_AVX2_H
