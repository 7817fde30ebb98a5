// Decoding rows of 4-bit weights into scratch, from any element to any other. Rows of NF4 and FP4 may start inside a
// byte and inside a block (QC-GEMM4-001); gemm_int4_decode.h has the same for integers. Only kernel files include it.
//
// A block has 16 possible values: table[code] * absmax, rounded to the dtype of X (QC-4BIT-003, weight_rounding
// "compute"). They are made once a block and looked up by nibble.
#ifndef QCORE_CPU_GEMM_4BIT_DECODE_H
#define QCORE_CPU_GEMM_4BIT_DECODE_H

#include "gemm_4bit_kernels.h"
#include "lanes.h"

namespace qcore::cpu::QC_ISA {

inline float block_absmax(const Gemm4Weight &w, int64_t block) {
    if (w.absmax != nullptr) {
        return w.absmax[block];
    }
    return w.nested_code[w.codes[block]] * w.nested_absmax[block >> w.nested_shift] + w.nested_offset;
}

// Whether every non-zero weight of the block is at least 2^-36, and so exact in arithmetic that flushes denormals, with
// an X of at least 2^-76: all products are then multiples of 2^-126 (8 bits of significand each). The smallest
// non-zero code is 1/192.
inline bool regular_block(float absmax) { return !(__builtin_fabsf(absmax) < 0x1p-28f) || absmax == 0.0f; }

inline int nibble(const uint8_t *packed, int64_t i) { return (i & 1) != 0 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4; }

template <class T>
struct BlockTable {
    alignas(64) float value[16];

    BlockTable(const float *table, float absmax) {
        for (int i = 0; i < 16; i += kLanes) {
            store(value + i, rounded_to<T>(load(table + i) * splat(absmax)));
        }
    }
};

// Elements first ... first + count - 1, all of one block, where `first` is even.
inline void decode_even_run(const uint8_t *packed, int64_t first, int64_t count, const float *value, float *out) {
    const uint8_t *bytes = packed + (first >> 1);
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 table = _mm512_load_ps(value);
    // Byte e/2 into the dword of element e; its high nibble comes first. vpermps looks at 4 bits only.
    const __m512i spread =
        _mm512_set_epi32(-256 + 7, -256 + 7, -256 + 6, -256 + 6, -256 + 5, -256 + 5, -256 + 4, -256 + 4, -256 + 3,
                         -256 + 3, -256 + 2, -256 + 2, -256 + 1, -256 + 1, -256 + 0, -256 + 0);
    const __m512i shift = _mm512_set1_epi64(4);
    for (; i + 16 <= count; i += 16) {
        uint64_t eight;
        __builtin_memcpy(&eight, bytes + (i >> 1), 8);
        const __m512i code = _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64((long long)eight), spread), shift);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(code, table));
    }
#elif defined(__AVX2__)
    const __m256 low = _mm256_load_ps(value);
    const __m256 high = _mm256_load_ps(value + 8);
    const __m256i shift = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
    for (; i + 8 <= count; i += 8) {
        int32_t four;
        __builtin_memcpy(&four, bytes + (i >> 1), 4);
        const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(four), shift);
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                                   _mm256_permutevar8x32_ps(high, code), is_high));
    }
#endif
    for (; i + 2 <= count; i += 2) {
        out[i] = value[bytes[i >> 1] >> 4];
        out[i + 1] = value[bytes[i >> 1] & 15];
    }
    if (i < count) {
        out[i] = value[bytes[i >> 1] >> 4];
    }
}

// Elements k0 ... k0 + count - 1 of row n as float32, of values rounded to T.
template <class T>
inline void decode(const Gemm4Weight &w, int64_t n, int64_t k0, int64_t count, float *out) {
    int64_t first = n * w.k + k0;
    const int64_t stop = first + count;
    while (first < stop) {
        const int64_t block = first >> w.shift;
        const int64_t block_end = (block + 1) << w.shift;
        const int64_t end = block_end < stop ? block_end : stop;
        const BlockTable<T> values(w.table, block_absmax(w, block));
        if ((first & 1) != 0) {
            *out++ = values.value[nibble(w.packed, first++)];
        }
        decode_even_run(w.packed, first, end - first, values.value, out);
        out += end - first;
        first = end;
    }
}

#if defined(__AVX512BW__)

constexpr int64_t kAbsmaxRun = 64;   // absmax values decoded at a time, at most
constexpr int64_t kPrefetch = 2048;  // bytes that a row of W is fetched ahead

// The first `count` of sixteen lanes, or all of them.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }

// absmax of `count` blocks from `block` on, as float32: where they lie, or decoded into `out` (QC-NEST-003).
inline const float *absmax_run(const Gemm4Weight &w, int64_t block, int64_t count, float *out) {
    if (w.absmax != nullptr) {
        return w.absmax + block;
    }
    const int64_t group = block >> w.nested_shift;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i start = _mm512_add_epi32(lane, _mm512_set1_epi32((int)(block - (group << w.nested_shift))));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first_lanes(count - i);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, w.codes + block + i));
        const __m512i owner = _mm512_srli_epi32(_mm512_add_epi32(start, _mm512_set1_epi32((int)i)), w.nested_shift);
        const __m512 zero = _mm512_setzero_ps();
        const __m512 value = _mm512_mask_i32gather_ps(zero, some, code, w.nested_code, 4);
        const __m512 scale = _mm512_mask_i32gather_ps(zero, some, owner, w.nested_absmax + group, 4);
        const __m512 scaled = _mm512_mul_ps(value, scale);
        _mm512_mask_storeu_ps(out + i, some, _mm512_add_ps(scaled, _mm512_set1_ps(w.nested_offset)));
    }
    return out;
}

// The absmax of each 2^unit elements, a block or a part of one, from number `first` on: where they lie, or made in
// `out`. `count` is at most kAbsmaxRun.
inline const float *scale_run(const Gemm4Weight &w, int32_t unit, int64_t first, int64_t count, float *out) {
    if (unit == w.shift) {
        return absmax_run(w, first, count, out);
    }
    const int32_t parts = w.shift - unit;
    const int64_t block = first >> parts;
    float decoded[kAbsmaxRun];
    const float *absmax = absmax_run(w, block, ((first + count - 1) >> parts) - block + 1, decoded);
    for (int64_t i = 0; i < count; ++i) {
        out[i] = absmax[((first + i) >> parts) - block];
    }
    return out;
}

#endif

#if defined(__AVX512BF16__)

// 16 values of a block as bfloat16. Right for regular blocks only, since the conversion flushes denormals.
inline __m256i bf16_values(__m512 table, float absmax) {
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(absmax)));
}

// The same twice: an index with a stray fifth bit finds the same value.
inline __m512i bf16_table(__m512 table, float absmax) {
    const __m256i values = bf16_values(table, absmax);
    return _mm512_inserti64x4(_mm512_castsi256_si512(values), values, 1);
}

// Whether a row of X holds a non-zero value below 2^-76 (regular_block).
inline bool irregular_row(const Bfloat *x, int64_t k) {
    constexpr int kExponent = (127 - 76) << 7;
    const __m512i least = _mm512_set1_epi16(kExponent - 1);
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    const __m512i one = _mm512_set1_epi16(1);
    __mmask32 found = 0;
    for (int64_t i = 0; i < k; i += 32) {
        const auto valid = static_cast<__mmask32>(k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1);
        const __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi16(valid, x + i), magnitude);
        found |= _mm512_cmplt_epu16_mask(_mm512_sub_epi16(bits, one), least);  // zero wraps round to the top
    }
    return found != 0;
}

inline bool regular_blocks(__m512 absmax) {
    const __mmask16 nonzero = _mm512_cmp_ps_mask(absmax, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return _mm512_mask_cmp_ps_mask(nonzero, _mm512_abs_ps(absmax), _mm512_set1_ps(0x1p-28f), _CMP_LT_OQ) == 0;
}

inline bool regular_blocks(const float *absmax, int64_t count) {
    bool regular = true;
    for (int64_t i = 0; i < count; i += 16) {
        regular &= regular_blocks(_mm512_maskz_loadu_ps(first_lanes(count - i), absmax + i));
    }
    return regular;
}

// 32 values of a block by the nibbles of 16 bytes: each byte is put into two words, the high nibble brought down in
// the first.
inline __m512i decode_32(__m128i bytes, __m512i table) {
    const __m512i spread =
        _mm512_set_epi8(-1, 15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12, -1, 11, -1, 11, -1, 10, -1, 10,
                        -1, 9, -1, 9, -1, 8, -1, 8, -1, 7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4, -1, 3, -1,
                        3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0);
    const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), spread);
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, _mm512_set1_epi32(4)), table);
}

// decode_bf16 for whole groups of 64 that lie in one block each, at most kAbsmaxRun of them.
inline bool decode_bf16_groups(const Gemm4Weight &w, int64_t first, int64_t count, Bfloat *out) {
    const __m512 codes = _mm512_loadu_ps(w.table);
    const int64_t block0 = first >> w.shift;
    float decoded[kAbsmaxRun];
    const int64_t blocks = ((first + count - 1) >> w.shift) - block0 + 1;
    const float *absmax = absmax_run(w, block0, blocks, decoded);
    const uint8_t *bytes = w.packed + (first >> 1);
    const int64_t group_shift = w.shift - 6;
    const int64_t phase = (first >> 6) - (block0 << group_shift);
    __m512i table = bf16_table(codes, absmax[0]);
    int64_t block = 0;
    for (int64_t g = 0; g < count >> 6; ++g) {
        if (const int64_t own = (g + phase) >> group_shift; own != block) {
            block = own;
            table = bf16_table(codes, absmax[block]);
        }
        _mm_prefetch(bytes + kPrefetch / 8, _MM_HINT_T0);
        const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
        _mm512_storeu_si512(out, decode_32(_mm256_castsi256_si128(pair), table));
        _mm512_storeu_si512(out + 32, decode_32(_mm256_extracti128_si256(pair, 1), table));
        bytes += 32;
        out += 64;
    }
    return regular_blocks(absmax, blocks);
}

// Elements of one block by its table, the first in a high nibble.
inline void decode_bf16_run(const uint8_t *bytes, int64_t count, __m512i table, Bfloat *out) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + (i >> 1)));
        _mm512_storeu_si512(out + i, decode_32(sixteen, table));
    }
    if (i < count) {
        const __mmask16 some = (__mmask16)((1u << ((count - i + 1) >> 1)) - 1);
        const __m512i values = decode_32(_mm_maskz_loadu_epi8(some, bytes + (i >> 1)), table);
        _mm512_mask_storeu_epi16(out + i, (__mmask32)((1u << (count - i)) - 1), values);
    }
}

// As decode(), into bfloat16; false if a block is not regular.
inline bool decode_bf16(const Gemm4Weight &w, int64_t n, int64_t k0, int64_t count, Bfloat *out) {
    int64_t first = n * w.k + k0;
    if (w.shift >= 6 && ((first | count) & 63) == 0 && count <= 64 * kAbsmaxRun) {
        return count == 0 || decode_bf16_groups(w, first, count, out);
    }
    const __m512 codes = _mm512_loadu_ps(w.table);
    const int64_t stop = first + count;
    bool regular = true;
    while (first < stop) {
        const int64_t block = first >> w.shift;
        const int64_t block_end = (block + 1) << w.shift;
        const int64_t end = block_end < stop ? block_end : stop;
        const float absmax = block_absmax(w, block);
        regular &= regular_block(absmax);
        const __m512i table = bf16_table(codes, absmax);
        if ((first & 1) != 0) {
            const __m512i value = _mm512_permutexvar_epi16(_mm512_set1_epi16((short)nibble(w.packed, first)), table);
            (out++)->bits = (uint16_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(value));
            ++first;
        }
        decode_bf16_run(w.packed + (first >> 1), end - first, table, out);
        out += end - first;
        first = end;
    }
    return regular;
}

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_GEMM_4BIT_DECODE_H
