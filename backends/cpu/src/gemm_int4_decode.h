// Decoding rows of integers in groups (QC-INT4-001, QC-INT4-002), the counterpart of gemm_4bit_decode.h
// and gemm_4bit_split.h for another kind of weight. Only kernel files include it.
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

// `some` of the scales from group `first` on as float32.
inline __m512 load_scales(const Int4Weight &w, int64_t first, __mmask16 some) {
    if (w.scale_dtype == QC_F32) {
        return _mm512_maskz_loadu_ps(some, static_cast<const float *>(w.scales) + first);
    }
    const __m256i bits = _mm256_maskz_loadu_epi16(some, static_cast<const Half *>(w.scales) + first);
    return w.scale_dtype == QC_F16 ? _mm512_cvtph_ps(bits) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// Scales of groups first ... first + count - 1 as float32.
inline void convert_scales(const Int4Weight &w, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first_lanes(count - i);
        _mm512_mask_storeu_ps(out + i, some, load_scales(w, first + i, some));
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

// What makes the values of a group: its scale, and the place of its row in the grid.
struct GroupValues {
    float scale;
    int32_t row;  // in bytes
};

// Of groups first ... first + count - 1; false if one is not regular.
inline bool load_groups(const Int4Weight &w, int64_t first, int64_t count, GroupValues *out) {
    constexpr int kRowShift = 6;  // 16 values of four bytes
    const __m512i lane = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    bool regular = true;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first_lanes(count - i);
        const __m512 scale = load_scales(w, first + i, some);
        __m512i row = _mm512_set1_epi32(8 << kRowShift);
        if (w.zeros != nullptr) {
            row = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, w.zeros + first + i)), kRowShift);
        }
        regular &= regular_blocks(scale);
        const __m512i lower = _mm512_permutex2var_epi32((__m512i)scale, lane, row);
        const __m512i upper =
            _mm512_permutex2var_epi32((__m512i)scale, _mm512_add_epi32(lane, _mm512_set1_epi32(8)), row);
        _mm512_mask_storeu_epi64(out + i, static_cast<__mmask8>(some), lower);
        _mm512_mask_storeu_epi64(out + i + 8, static_cast<__mmask8>(some >> 8), upper);
    }
    return regular;
}

// Split order for integers: a step of 128 weights has two scales, or four where groups are of 32. Two tables serve
// four groups then, words 0 ... 15 of a plane the first and 16 ... 31 the second, bit 4 of an index chooses in each:
// four permutations, two multiplications and a conversion more.
template <>
struct Split<Int4Weight> : SplitIndices {
    static constexpr int64_t kMostScales = kScaleElements / 32;

    // Unit i is of group (i + phase) >> shift.
    struct Scales {
        const GroupValues *group;
        int64_t phase;
        int32_t shift;
        bool regular;
    };
    struct Room {
        GroupValues group[kMostScales];
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
        const int64_t units = w.group_size >> unit_shift;
        if (own == 1 || (units & (units - 1)) == 0) {
            const bool regular = load_groups(w, at, own, room.group);
            const int32_t shift = own == 1 ? 62 : __builtin_ctzll(static_cast<unsigned long long>(units));
            return {room.group, own == 1 ? 0 : (k0 - first * w.group_size) >> unit_shift, shift, regular};
        }
        GroupValues group[kMostScales];
        const bool regular = load_groups(w, at, own, group);
        int64_t left = (first + 1) * w.group_size - k0;
        for (int64_t i = 0, now = 0; i < count >> unit_shift; ++i, left -= unit) {
            if (left <= 0) {
                ++now;
                left += w.group_size;
            }
            room.group[i] = group[now];
        }
        return {room.group, 0, 0, regular};
    }

    static bool regular(const Scales &scales, int64_t) { return scales.regular; }

    // Of a group of 128 as two units or, where groups of the weight are of 32, as four.
    struct Units {
        int64_t at[4];
    };
    Units units(const Scales &scales, int64_t g) const {
        const int64_t first = (fine ? 4 : 2) * g + scales.phase;
        const auto at = [&](int64_t i) { return (first + i) >> scales.shift; };
        return {{at(0), at(1), at(2), at(3)}};
    }

    __m512 values(const GroupValues &group) const {
        const auto *row = reinterpret_cast<const char *>(grid) + group.row;
        return _mm512_mul_ps(_mm512_loadu_ps(row), _mm512_set1_ps(group.scale));
    }
    __m512i table(const Scales &scales, const int64_t *at) const {
        return (__m512i)_mm512_cvtne2ps_pbh(values(scales.group[at[1]]), values(scales.group[at[0]]));
    }
    void decode(const uint8_t *bytes, const Scales &scales, const Units &units, __m512i *plane) const {
        indices(_mm512_loadu_si512(bytes), plane);
        if (fine) {
            const __m512i lower = table(scales, units.at);
            const __m512i upper_table = table(scales, units.at + 2);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const __m512i first = _mm512_permutexvar_epi16(plane[j], lower);
                plane[j] = _mm512_mask_permutexvar_epi16(first, 0xffff0000u, plane[j], upper_table);
            }
            return;
        }
        const __m512i both = table(scales, units.at);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            plane[j] = _mm512_permutexvar_epi16(plane[j], both);
        }
    }
    void decode_half(const uint8_t *bytes, const Scales &scales, const Units &units, __m512i *plane) const {
        indices(load_half_group(bytes), plane);
        const __m512i half =
            fine ? table(scales, units.at)
                 : _mm512_zextsi256_si512((__m256i)_mm512_cvtneps_pbh(values(scales.group[units.at[0]])));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            plane[j] = _mm512_maskz_permutexvar_epi16(0x0000ffffu, plane[j], half);
        }
    }
};

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_GEMM_INT4_DECODE_H
