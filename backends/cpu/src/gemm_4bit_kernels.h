// The kernels behind gemm_4bit and gemm_int4, one table per instruction set and kind of weight (dispatch.h).
#ifndef QCORE_CPU_GEMM_4BIT_KERNELS_H
#define QCORE_CPU_GEMM_4BIT_KERNELS_H

#include <cstdint>

namespace qcore::cpu {

// NF4 and FP4: blocks run across rows.
struct Gemm4Weight {
    const uint8_t *packed;
    const float *absmax;  // one a block, or null: then codes, decoded by QC-NEST-003
    const uint8_t *codes;
    const float *nested_absmax;
    const float *nested_code;
    float nested_offset;
    int32_t shift;  // log2 of the block size
    int32_t nested_shift;
    const float *table;  // 16 values, by code
    int64_t k;           // length of a row
};

// Integers: every row starts with a byte and a group of its own (QC-INT4-001).
struct Int4Weight {
    const uint8_t *packed;
    const void *scales;    // [n][groups] in scale_dtype
    const uint8_t *zeros;  // [n][groups], or null: 8
    int32_t scale_dtype;
    int64_t group_size;
    int64_t groups;
    int64_t row_bytes;
    const float *grid;  // grid[16 * z + q] = q - z
};

struct ProductOf4Bits {
    // Ranges of columns are multiples of it: of 576 columns in ranges of 64, one of two threads would get five ninths.
    static constexpr int64_t kRangeColumns = 32;

    int32_t dtype;
    int32_t bias_dtype;
    int64_t m, n, k;
    const void *x;
    const void *bias;  // or null
    void *out;
};

template <class Weight>
struct WeightProduct : ProductOf4Bits {
    Weight w;
};

using Gemm4 = WeightProduct<Gemm4Weight>;
using GemmInt4 = WeightProduct<Int4Weight>;

constexpr int64_t kProductRows = 512;  // of X at a time, at most
constexpr int64_t kPackedRows = 16;    // of X that are packed together
constexpr int64_t kPanelColumns = 64;

// product.h says how these are called.
template <class Problem>
struct ProductKernels {
    static constexpr int64_t kRows = kProductRows;
    static constexpr int64_t kGroup = kPackedRows;
    static constexpr int64_t kColumns = Problem::kRangeColumns;

    // Bytes for the packed X of `rows` rows; 0 where X is read as it is.
    int64_t (*packed_bytes)(const Problem &p, int64_t rows);
    // Bytes that one range of `columns` columns needs to itself, for `rows` rows.
    int64_t (*scratch_bytes)(const Problem &p, int64_t rows, int64_t columns);
    // Packs group `group` of the rows row0 ... row0 + rows - 1.
    void (*pack)(const Problem &p, int64_t row0, int64_t rows, int64_t group, void *packed);
    // Writes columns n0 ... n1 - 1 of the rows row0 ... row0 + rows - 1.
    void (*multiply)(const Problem &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
                     void *scratch);
};

using Gemm4Kernels = ProductKernels<Gemm4>;
using GemmInt4Kernels = ProductKernels<GemmInt4>;

#define QC_DECLARE_4BIT_KERNELS(isa)                \
    namespace isa {                                 \
    extern const Gemm4Kernels gemm_4bit_kernels;    \
    extern const GemmInt4Kernels gemm_int4_kernels; \
    }
QC_DECLARE_4BIT_KERNELS(portable)
#ifdef __x86_64__
QC_DECLARE_4BIT_KERNELS(avx2)
QC_DECLARE_4BIT_KERNELS(avx512)
QC_DECLARE_4BIT_KERNELS(avx512_bf16)
QC_DECLARE_4BIT_KERNELS(amx)
#endif
#undef QC_DECLARE_4BIT_KERNELS

}  // namespace qcore::cpu

#endif  // QCORE_CPU_GEMM_4BIT_KERNELS_H
