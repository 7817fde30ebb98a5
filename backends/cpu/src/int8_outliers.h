// Outlier columns in the epilogue of int8_linear (QC-INT8-010): their products are added to the scaled sums of a strip
// of a row, in float32 and in the order of the columns, before the one rounding to the output. Only kernel files
// include it.
#ifndef QCORE_CPU_INT8_OUTLIERS_H
#define QCORE_CPU_INT8_OUTLIERS_H

#include "int8_kernels.h"
#include "lanes.h"

namespace qcore::cpu::QC_ISA {

// w[i] = the weight of column n0 + i in `column` of A (QC-INT8-008). One byte of each row of B is read: the rows that
// the product has just read.
inline void outlier_weights(const Int8Outliers &o, const float *col_stats, int64_t column, int64_t n0, int64_t count,
                            float *w) {
    const int8_t *b = o.b + n0 * o.k + column;
    for (int64_t i = 0; i < count; ++i) {
        w[i] = static_cast<float>(b[i * o.k]) * col_stats[i] * kInt8Reciprocal;
    }
}

// t[i] += A[m, column] * w[i] for every outlier column.
template <class T>
inline void add_outliers_of(const Int8Outliers &o, const float *col_stats, int64_t m, int64_t n0, int64_t count,
                            float *t) {
    const T *a = static_cast<const T *>(o.a) + m * o.k;
    float x[Int8Outliers::kMostExpanded];
    for (int64_t j = 0; j < o.expanded; ++j) {
        x[j] = to_float(a[o.columns[j]]);
    }
    const float *w = o.weights + n0;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        F32 sum = load(t + i);
        for (int64_t j = 0; j < o.expanded; ++j) {
            sum = sum + splat(x[j]) * load(w + j * o.n + i);
        }
        store(t + i, sum);
    }
    for (; i < count; ++i) {
        for (int64_t j = 0; j < o.expanded; ++j) {
            t[i] = t[i] + x[j] * w[j * o.n + i];
        }
    }
    for (int64_t j = o.expanded; j < o.count; ++j) {
        const float y = to_float(a[o.columns[j]]);
        float strip[Int8GemmKernels::kColumns];
        outlier_weights(o, col_stats, o.columns[j], n0, count, strip);
        for (int64_t l = 0; l < count; ++l) {
            t[l] = t[l] + y * strip[l];
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_INT8_OUTLIERS_H
