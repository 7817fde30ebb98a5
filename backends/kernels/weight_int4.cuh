// How kernels see a weight of 4-bit integers in groups (QC-INT4-001, QC-INT4-002).
//
// A code's difference from its zero point is exact in one subtraction of floats: 2^23 + q has the code as its last
// bits, and 2^23 + z is made once a group. So a weight is a mask, a subtraction and a product: no table, no conversion.
#ifndef QCORE_KERNELS_WEIGHT_INT4_CUH
#define QCORE_KERNELS_WEIGHT_INT4_CUH

#include "numbers.cuh"
#include "qcore_backend.h"
#include "weight4bit.cuh"

namespace qcore::gpu {

struct NoTable {
    char none;
};

// fourbit_product.cuh says what each member is for.
struct Int4Weight {
    using Table = NoTable;
    // As they came from memory: to convert a scale where it is loaded would be to wait for it there.
    struct Scale {
        uint32_t bits, zero;
        int32_t dtype;
    };
    struct Ready {
        float scale, zero;  // 2^23 + the zero point
    };
    static constexpr uint32_t kBitsOfTwo23 = 0x4B000000;

    const uint8_t *packed;
    const void *scales;
    const uint8_t *zeros;  // or null: 8
    int64_t row_bytes, groups, group_size;
    int32_t scale_dtype;
    int32_t shift;  // log2 of the group size; negative where it is no power of two

    QC_DEVICE static void fill(Table &) {}
    QC_DEVICE const uint8_t *bytes(int64_t row, int64_t at) const { return packed + row * row_bytes + at / 2; }
    QC_DEVICE Scale scale_of_group(int64_t row, int64_t group) const {
        const int64_t i = row * groups + group;
        const uint32_t bits = scale_dtype == QC_F32 ? static_cast<const uint32_t *>(scales)[i]
                                                    : uint32_t{static_cast<const uint16_t *>(scales)[i]};
        return {bits, zeros != nullptr ? uint32_t{zeros[i]} : 8U, scale_dtype};
    }
    // Of a power of two.
    QC_DEVICE Scale scale(int64_t row, int64_t at) const { return scale_of_group(row, at >> shift); }
    QC_DEVICE static Ready ready(const Scale &s) {
        const uint16_t narrow = static_cast<uint16_t>(s.bits);
        const float scale = s.dtype == QC_F32   ? bits_to_float(s.bits)
                            : s.dtype == QC_F16 ? half_bits_to_float(narrow)
                                                : bfloat16_bits_to_float(narrow);
        return {scale, bits_to_float(kBitsOfTwo23 + s.zero)};
    }
    QC_DEVICE static float value(const Table &, uint32_t code, const Ready &ready) {
        return (bits_to_float(kBitsOfTwo23 | code) - ready.zero) * ready.scale;
    }

    // Eight columns from a multiple of eight are of one group.
    template <class T>
    QC_DEVICE Eight eight(int64_t row, int64_t at, int64_t count, bool one_word, const Table &table) const {
        const uint8_t *from = bytes(row, at);
        uint32_t word = 0;
        if (one_word) {
            word = load4_once(from);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                word |= 2 * i < count ? uint32_t{from[i]} << 8 * i : 0U;
            }
        }
        Eight out =
            eight_of_word<T, Int4Weight>(word, table, scale_of_group(row, shift >= 0 ? at >> shift : at / group_size));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out.value[i] = i < count ? out.value[i] : 0.0f;
        }
        return out;
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_WEIGHT_INT4_CUH
