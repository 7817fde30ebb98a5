// What int8_linear is made of, besides a kernel of its own: the parts that other ops' files hold.
#ifndef QCORE_KERNELS_INT8_PARTS_H
#define QCORE_KERNELS_INT8_PARTS_H

#include "host/queue.h"

namespace qcore::gpu {

// The outlier columns of a matrix, ascending, in device memory.
struct OutlierColumns {
    int32_t count;
    int32_t column[1];  // `count` of them

    static int64_t bytes(int64_t k) { return (k + 1) * static_cast<int64_t>(sizeof(int32_t)); }
};

// What the epilogue of a product adds for outlier columns (QC-INT8-010): A in dtype T, B, and of the first `expanded`
// columns the weights as floats, a row of N each.
template <class T>
struct OutlierTerms {
    const OutlierColumns *list;  // null: there are none
    const T *a;
    const int8_t *b;
    const float *weights;
    int32_t expanded;
    int64_t k;
};

// int8_quantize.cu. QC-INT8-001 to QC-INT8-003; with `list` also what columns have outliers.
qc_status quantize_rows(Queue &queue, int32_t dtype, uintptr_t a, int64_t m, int64_t k, float threshold, int8_t *out,
                        float *row_stats, uint8_t *outlier_cols, OutlierColumns *list);

// int8_gemm.cu. `codes` and `row_stats` are those of A; `partial`: linear_product_bytes() of scratch.
struct LinearProduct {
    int32_t dtype;
    int64_t m, n, k;
    const int8_t *codes;
    const float *row_stats;
    uintptr_t a, b, col_stats;
    int32_t bias_dtype;
    uintptr_t bias, out;
    const OutlierColumns *list;
    const float *weights;
    int32_t expanded;
    int32_t *partial;
};
int64_t linear_product_bytes(int32_t device, int64_t m, int64_t n, int64_t k);
qc_status linear_product(Queue &queue, int32_t device, const LinearProduct &p);

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_INT8_PARTS_H
