// The kernels behind gemm_4bit, one table per instruction set (dispatch.h).
#ifndef QCORE_CPU_GEMM_4BIT_KERNELS_H
#define QCORE_CPU_GEMM_4BIT_KERNELS_H

#include <cstdint>

namespace qcore::cpu {

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
};

struct Gemm4 {
    int32_t dtype;
    int32_t bias_dtype;
    int64_t m, n, k;
    const void *x;
    const void *bias;  // or null
    void *out;
    Gemm4Weight w;
};

// product.h says how these are called.
struct Gemm4Kernels {
    static constexpr int64_t kRows = 512;
    static constexpr int64_t kGroup = 16;
    static constexpr int64_t kColumns = 64;

    // Bytes for the packed X of `rows` rows; 0 where X is read as it is.
    int64_t (*packed_bytes)(const Gemm4 &p, int64_t rows);
    // Bytes that one range of `columns` columns needs to itself, for `rows` rows.
    int64_t (*scratch_bytes)(const Gemm4 &p, int64_t rows, int64_t columns);
    // Packs group `group` of the rows row0 ... row0 + rows - 1.
    void (*pack)(const Gemm4 &p, int64_t row0, int64_t rows, int64_t group, void *packed);
    // Writes columns n0 ... n1 - 1 of the rows row0 ... row0 + rows - 1.
    void (*multiply)(const Gemm4 &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
                     void *scratch);
};

namespace portable {
extern const Gemm4Kernels gemm_4bit_kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Gemm4Kernels gemm_4bit_kernels;
}
namespace avx512 {
extern const Gemm4Kernels gemm_4bit_kernels;
}
namespace avx512_bf16 {
extern const Gemm4Kernels gemm_4bit_kernels;
}
namespace amx {
extern const Gemm4Kernels gemm_4bit_kernels;
}
#endif

}  // namespace qcore::cpu

#endif  // QCORE_CPU_GEMM_4BIT_KERNELS_H
