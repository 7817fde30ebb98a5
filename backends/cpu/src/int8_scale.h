// Sums of int8 products into outputs (QC-INT8-006): every step rounds on its own. Only kernel files include it.
#ifndef QCORE_CPU_INT8_SCALE_H
#define QCORE_CPU_INT8_SCALE_H

#include "int8_kernels.h"
#include "int8_outliers.h"
#include "lanes.h"
#include "qcore_backend.h"

namespace qcore::cpu::QC_ISA {

constexpr float kInt8Square = 0x1.040c2p-14f;  // 1 / 127^2

template <class T, class Bias>
inline void scale_row_as(const int32_t *sums, float row_stat, const float *col_stats, const Bias *bias, int64_t count,
                         T *out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        F32 t = __builtin_convertvector(load_vector<I32>(sums + i), F32);
        t = t * splat(row_stat) * load(col_stats + i) * splat(kInt8Square);
        if (bias != nullptr) {
            t = t + load(bias + i);
        }
        store(out + i, t);
    }
    for (; i < count; ++i) {
        float t = static_cast<float>(sums[i]) * row_stat * col_stats[i] * kInt8Square;
        if (bias != nullptr) {
            t = t + to_float(bias[i]);
        }
        out[i] = from_float<T>(t);
    }
}

template <class T>
inline void scale_row_of(const Int8Scaling &s, const int32_t *sums, int64_t m, int64_t n, int64_t n0, int64_t count) {
    T *out = static_cast<T *>(s.out) + m * n + n0;
    const float *col_stats = s.col_stats + n0;
    if (s.bias == nullptr || s.bias_dtype == QC_F32) {
        const auto *bias = static_cast<const float *>(s.bias);
        scale_row_as(sums, s.row_stats[m], col_stats, bias != nullptr ? bias + n0 : nullptr, count, out);
    } else {
        scale_row_as(sums, s.row_stats[m], col_stats, static_cast<const T *>(s.bias) + n0, count, out);
    }
}

inline void scale_row(const Int8Scaling &s, const int32_t *sums, int64_t m, int64_t n, int64_t n0, int64_t count) {
    switch (s.dtype) {
        case QC_F32:
            scale_row_of<float>(s, sums, m, n, n0, count);
            break;
        case QC_F16:
            scale_row_of<Half>(s, sums, m, n, n0, count);
            break;
        default:
            scale_row_of<Bfloat>(s, sums, m, n, n0, count);
    }
}

// The same for a strip of at most kColumns columns, with the products of the outlier columns (QC-INT8-010).
template <class T>
inline void scale_strip_of(const Int8Scaling &s, const int32_t *sums, int64_t m, int64_t n, int64_t n0, int64_t count) {
    float t[Int8GemmKernels::kColumns];
    const float *col_stats = s.col_stats + n0;
    if (s.bias == nullptr || s.bias_dtype == QC_F32) {
        const auto *bias = static_cast<const float *>(s.bias);
        scale_row_as(sums, s.row_stats[m], col_stats, bias != nullptr ? bias + n0 : nullptr, count, t);
    } else {
        scale_row_as(sums, s.row_stats[m], col_stats, static_cast<const T *>(s.bias) + n0, count, t);
    }
    add_outliers_of<T>(*s.outliers, col_stats, m, n0, count, t);
    T *out = static_cast<T *>(s.out) + m * n + n0;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(out + i, load(t + i));
    }
    for (; i < count; ++i) {
        out[i] = from_float<T>(t[i]);
    }
}

inline void scale_strip(const Int8Scaling &s, const int32_t *sums, int64_t m, int64_t n, int64_t n0, int64_t count) {
    switch (s.dtype) {
        case QC_F32:
            scale_strip_of<float>(s, sums, m, n, n0, count);
            break;
        case QC_F16:
            scale_strip_of<Half>(s, sums, m, n, n0, count);
            break;
        default:
            scale_strip_of<Bfloat>(s, sums, m, n, n0, count);
    }
}

// Finished sums of row m to where the call wants them.
inline void put_row(const Int8Gemm &p, const int32_t *sums, int64_t m, int64_t n0, int64_t count) {
    if (p.scaling != nullptr && p.scaling->outliers != nullptr) {
        scale_strip(*p.scaling, sums, m, p.n, n0, count);
    } else if (p.scaling != nullptr) {
        scale_row(*p.scaling, sums, m, p.n, n0, count);
    } else {
        __builtin_memcpy(p.c + m * p.n + n0, sums, static_cast<size_t>(count) * sizeof *sums);
    }
}

// K = 0 (QC-INT8-009).
inline void put_zeros(const Int8Gemm &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1) {
    constexpr int64_t kSome = 64;
    const int32_t zeros[kSome] = {};
    for (int64_t r = row0; r < row0 + rows; ++r) {
        for (int64_t n = n0; n < n1; n += kSome) {
            put_row(p, zeros, r, n, n + kSome < n1 ? kSome : n1 - n);
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_INT8_SCALE_H
