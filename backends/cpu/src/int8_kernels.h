// The kernels behind the int8_* ops, one table per instruction set (dispatch.h).
#ifndef QCORE_CPU_INT8_KERNELS_H
#define QCORE_CPU_INT8_KERNELS_H

#include <cstdint>

namespace qcore::cpu {

constexpr float kInt8Reciprocal = 0x1.020408p-7f;  // 1 / 127 (QC-INT8-008)

// The outlier columns of int8_linear (QC-INT8-010), for int8_outliers.h. The weights of the first `expanded` of them
// stand ready, a row of N each; those of the rest are read from B where they are used.
struct Int8Outliers {
    static constexpr int64_t kMostExpanded = 256;

    int64_t count;
    const int32_t *columns;
    int64_t expanded;
    const float *weights;  // [expanded, n]
    const void *a;         // [m, k], in the dtype of the output
    const int8_t *b;       // [n, k]
    int64_t n, k;
};

// What turns the sums of one row into a row of the output (QC-INT8-006).
struct Int8Scaling {
    int32_t dtype;
    int32_t bias_dtype;
    const float *row_stats;
    const float *col_stats;
    const void *bias;  // or null
    void *out;         // [m, n]
    const Int8Outliers *outliers = nullptr;
};

struct Int8Kernels {
    // Statistics of one row (QC-INT8-002); with a threshold, sets outlier_cols[k] to 1 where it holds an outlier.
    float (*row_stat)(int32_t dtype, const void *x, int64_t k, float threshold, uint8_t *outlier_cols);
    // Codes of one row (QC-INT8-003).
    void (*row_codes)(int32_t dtype, const void *x, int64_t k, float stat, int8_t *out);
    // out[i] = 0 where outlier_cols[i] is set.
    void (*clear_outliers)(const uint8_t *outlier_cols, int64_t k, int8_t *out);
    // Statistics and codes of the columns k0 ... k1 - 1 (QC-INT8-004), the rows from number `start` on and then round.
    void (*columns)(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, int64_t k0, int64_t k1,
                    int64_t start, int8_t *out, float *col_stats);
    // Row m of the output from the sums of its columns n0 ... n0 + count - 1.
    void (*scale_row)(const Int8Scaling &s, const int32_t *sums, int64_t m, int64_t n, int64_t n0, int64_t count);
    // m rows (QC-INT8-008).
    void (*dequantize_rows)(int32_t dtype, const int8_t *codes, const float *stats, int64_t m, int64_t k,
                            bool past_caches, void *out);
};

// C = A B^T in int32, or scaled at once where `scaling` is set.
struct Int8Gemm {
    int64_t m, n, k;
    const int8_t *a, *b;
    int32_t *c;
    const Int8Scaling *scaling;  // or null
};

// product.h says how these are called.
struct Int8GemmKernels {
    static constexpr int64_t kRows = 512;
    static constexpr int64_t kGroup = 16;
    static constexpr int64_t kColumns = 64;

    int64_t (*packed_bytes)(const Int8Gemm &p, int64_t rows);
    int64_t (*scratch_bytes)(const Int8Gemm &p, int64_t rows, int64_t columns);
    void (*pack)(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t group, void *packed);
    void (*multiply)(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
                     void *scratch);
};

namespace portable {
extern const Int8Kernels int8_kernels;
extern const Int8GemmKernels int8_gemm_kernels;
}  // namespace portable
#ifdef __x86_64__
namespace avx2 {
extern const Int8Kernels int8_kernels;
extern const Int8GemmKernels int8_gemm_kernels;
}  // namespace avx2
namespace avx_vnni {
extern const Int8GemmKernels int8_gemm_kernels;
}
namespace avx512 {
extern const Int8Kernels int8_kernels;
extern const Int8GemmKernels int8_gemm_kernels;
}  // namespace avx512
namespace avx512_vnni {
extern const Int8GemmKernels int8_gemm_kernels;
}
namespace amx {
extern const Int8GemmKernels int8_gemm_kernels;
}
#endif

}  // namespace qcore::cpu

#endif  // QCORE_CPU_INT8_KERNELS_H
