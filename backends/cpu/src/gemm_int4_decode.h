// Decoding rows of integers in groups (QC-INT4-001, QC-INT4-002), the counterpart of gemm_4bit_decode.h,
// gemm_4bit_split.h and gemm_4bit_gemv.h for another kind of weight. Only kernel files include it.
//
// A group has 16 possible values, (q - z) * s, rounded to the dtype of X: one row of the grid of all differences, which
// lies ready, times the scale. From there on it is what a block of NF4 is, so both ops run the same products.
//
// Memory picture: beside the codes, a scale (2 or 4 bytes) and a zero point a group: 35 bytes for 64 weights with
// float16 scales, where NF4 reads 36.
#ifndef QCORE_CPU_GEMM_INT4_DECODE_H
#define QCORE_CPU_GEMM_INT4_DECODE_H

#include "gemm_4bit_decode.h"
#include "gemm_4bit_split.h"
#include "qcore_backend.h"

namespace qcore::cpu::QC_ISA {

inline float group_scale(const Int4Weight &w, int64_t i) {
    switch (w.scale_dtype) {
        case QC_F32:
            return static_cast<const float *>(w.scales)[i];
        case QC_BF16:
            return to_float(static_cast<const Bfloat *>(w.scales)[i]);
        default:
            return to_float(static_cast<const Half *>(w.scales)[i]);
    }
}

// The differences of the 16 codes and the zero point of a group.
inline const float *group_grid(const Int4Weight &w, int64_t i) {
    return w.grid + 16 * (w.zeros != nullptr ? w.zeros[i] : 8);
}

#if defined(__AVX512BW__)

// Scales of groups first ... first + count - 1 as float32.
inline void convert_scales(const Int4Weight &w, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += 16) {
        const auto some = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
        __m512 value;
        if (w.scale_dtype == QC_F32) {
            value = _mm512_maskz_loadu_ps(some, static_cast<const float *>(w.scales) + first + i);
        } else {
            const __m256i bits = _mm256_maskz_loadu_epi16(some, static_cast<const Half *>(w.scales) + first + i);
            value = w.scale_dtype == QC_F16 ? _mm512_cvtph_ps(bits)
                                            : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        }
        _mm512_mask_storeu_ps(out + i, some, value);
    }
}

#endif

// Calls run(bytes, count, group) for the parts of each group of elements k0 ... k0 + count - 1 of row n; k0 is even,
// and so is the start of every group.
template <class Run>
inline void for_groups(const Int4Weight &w, int64_t n, int64_t k0, int64_t count, const Run &run) {
    const uint8_t *row = w.packed + n * w.row_bytes;
    const int64_t stop = k0 + count;
    int64_t group = k0 / w.group_size;
    int64_t end = (group + 1) * w.group_size;
    for (; k0 < stop; ++group, k0 = end, end += w.group_size) {
        run(row + (k0 >> 1), (end < stop ? end : stop) - k0, n * w.groups + group);
    }
}

// Elements k0 ... k0 + count - 1 of row n as float32, of values rounded to T.
template <class T>
inline void decode(const Int4Weight &w, int64_t n, int64_t k0, int64_t count, float *out) {
    for_groups(w, n, k0, count, [&](const uint8_t *bytes, int64_t length, int64_t group) {
        const BlockTable<T> values(group_grid(w, group), group_scale(w, group));
        decode_even_run(bytes, 0, length, values.value, out);
        out += length;
    });
}

#if defined(__AVX512BF16__)

// As decode(), into bfloat16; false if a group is not regular.
inline bool decode_bf16(const Int4Weight &w, int64_t n, int64_t k0, int64_t count, Bfloat *out) {
    bool regular = true;
    for_groups(w, n, k0, count, [&](const uint8_t *bytes, int64_t length, int64_t group) {
        const float scale = group_scale(w, group);
        regular &= regular_block(scale);
        decode_bf16_run(bytes, length, bf16_table(_mm512_loadu_ps(group_grid(w, group)), scale), out);
        out += length;
    });
    return regular;
}

// Zero points of as many groups as a call of Split::scales asks for, where the weight has none.
alignas(64) constexpr uint8_t kEights[kScaleElements / 32] = {
    8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8,
    8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8,
    8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8,
    8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8,
};

// Split order for integers: a step of 128 weights has two scales, or four where groups are of 32. Two tables serve
// four groups then, words 0 ... 15 of a plane the first and 16 ... 31 the second, bit 4 of an index chooses in each:
// four permutations, two multiplications and a conversion more.
template <>
struct Split<Int4Weight> : SplitIndices {
    static constexpr int64_t kMostScales = kScaleElements / 32;

    // The scale of unit i is scale[(i + phase) >> shift].
    struct Scales {
        const float *scale;
        const uint8_t *zero;
        int64_t phase;
        int32_t shift;
        int64_t count;  // of scales
    };
    struct Room {
        float scale[kMostScales];
        uint8_t zero[kMostScales];
    };
    const float *grid;
    bool fine;

    explicit Split(const Int4Weight &w) : SplitIndices(upper_of(is_fine(w))), grid(w.grid), fine(is_fine(w)) {}

    static bool is_fine(const Int4Weight &w) { return w.group_size == 32 && w.groups > 1; }
    static __m512i upper_of(bool of_32) {
        const __m256i bit = _mm256_set1_epi16(0x1010);
        if (of_32) {
            const __m256i half = _mm256_inserti128_si256(_mm256_setzero_si256(), _mm256_castsi256_si128(bit), 1);
            return _mm512_broadcast_i64x4(half);
        }
        return _mm512_inserti64x4(_mm512_setzero_si512(), bit, 1);
    }

    static bool serves(const Int4Weight &w, int64_t k) {
        return k % 64 == 0 && (w.group_size % 64 == 0 || w.group_size == 32 || w.groups == 1);
    }

    static Scales scales(const Int4Weight &w, int64_t n, int64_t k0, int64_t count, Room &room) {
        const int unit_shift = is_fine(w) ? 5 : 6;
        const int64_t unit = int64_t{1} << unit_shift;
        const int64_t first = k0 / w.group_size;
        const int64_t own = (k0 + count - 1) / w.group_size - first + 1;
        const int64_t at = n * w.groups + first;
        const uint8_t *zero = w.zeros != nullptr ? w.zeros + at : kEights;
        const int64_t units = w.group_size >> unit_shift;
        if (own == 1 || (units & (units - 1)) == 0) {
            convert_scales(w, at, own, room.scale);
            const int32_t shift = own == 1 ? 62 : __builtin_ctzll(static_cast<unsigned long long>(units));
            return {room.scale, zero, own == 1 ? 0 : (k0 - first * w.group_size) >> unit_shift, shift, own};
        }
        float scale[kMostScales];
        convert_scales(w, at, own, scale);
        int64_t left = (first + 1) * w.group_size - k0;
        for (int64_t i = 0, group = 0; i < count >> unit_shift; ++i, left -= unit) {
            if (left <= 0) {
                ++group;
                left += w.group_size;
            }
            room.scale[i] = scale[group];
            room.zero[i] = zero[group];
        }
        return {room.scale, room.zero, 0, 0, count >> unit_shift};
    }

    struct Rows {
        const Int4Weight &w;
        Room room;

        Rows(const Int4Weight &weight, int64_t) : w(weight) {}
        Scales at(int64_t n, int64_t k0, int64_t count) { return scales(w, n, k0, count, room); }
    };

    static bool regular(const Scales &scales, int64_t) { return regular_blocks(scales.scale, scales.count); }

    __m512 values(const Scales &scales, int64_t unit) const {
        const int64_t i = (unit + scales.phase) >> scales.shift;
        return _mm512_mul_ps(_mm512_loadu_ps(grid + 16 * scales.zero[i]), _mm512_set1_ps(scales.scale[i]));
    }
    __m512i table(const Scales &scales, int64_t i) const {
        return (__m512i)_mm512_cvtne2ps_pbh(values(scales, i + 1), values(scales, i));
    }
    void decode(const uint8_t *bytes, const Scales &scales, int64_t g, __m512i *plane) const {
        indices(_mm512_loadu_si512(bytes), plane);
        if (fine) {
            const __m512i lower = table(scales, 4 * g);
            const __m512i upper_table = table(scales, 4 * g + 2);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const __m512i first = _mm512_permutexvar_epi16(plane[j], lower);
                plane[j] = _mm512_mask_permutexvar_epi16(first, 0xffff0000u, plane[j], upper_table);
            }
            return;
        }
        const __m512i both = table(scales, 2 * g);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            plane[j] = _mm512_permutexvar_epi16(plane[j], both);
        }
    }
    void decode_half(const uint8_t *bytes, const Scales &scales, int64_t g, __m512i *plane) const {
        indices(load_half_group(bytes), plane);
        const __m512i half =
            fine ? table(scales, 4 * g) : _mm512_zextsi256_si512((__m256i)_mm512_cvtneps_pbh(values(scales, 2 * g)));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            plane[j] = _mm512_maskz_permutexvar_epi16(0x0000ffffu, plane[j], half);
        }
    }
};

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_GEMM_INT4_DECODE_H
