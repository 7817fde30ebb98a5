// One row of X times an int8 weight: any instruction set, any dtype. Only kernel files include it.
//
// Memory picture: kStreamRows rows of W are read side by side, kStreamColumns columns of each, and leave the chip's
// caches for good; sums of those columns lie in L1, read and written once for so many rows, and the elements of X stay
// in registers. A weight costs a conversion and a product: 24 operations of the two vector ports for 128 bytes, so one
// core keeps pace with what it draws from the L3 cache. Floor: N * K bytes of W.
//
// Rounding: one chain along the rows of W.
#ifndef QCORE_CPU_INT8_STREAM_H
#define QCORE_CPU_INT8_STREAM_H

#include <type_traits>

#include "int8_kernels.h"
#include "lanes.h"
#include "transposed_kernels.h"

namespace qcore::cpu::QC_ISA {

constexpr int64_t kStreamRows = 8;
constexpr int64_t kStreamColumns = 1024;
constexpr int64_t kStreamLine = 64;  // bytes of a row at a time

// QC-INT8-011, `scaled`.
template <class T>
inline float scaled_int8(const Int8Weight &w, T element, int64_t k) {
    const float p = to_float(element) * (w.stats[k] * kInt8Reciprocal);
    if constexpr (std::is_same_v<T, Bfloat>) {
        return to_float(from_float<Bfloat>(p));
    } else {
        return p;
    }
}

template <class T>
inline F32 scaled_int8_lanes(const Int8Weight &w, const T *from, int64_t k) {
    const F32 p = load(from) * (load(w.stats + k) * splat(kInt8Reciprocal));
    if constexpr (std::is_same_v<T, Bfloat>) {
        return rounded_to<Bfloat>(p);
    } else {
        return p;
    }
}

// Scratch: the scaled X, then sums.
inline int64_t int8_stream_bytes(const Int8Transposed &p) {
    return (p.k + kStreamRows + kStreamColumns) * static_cast<int64_t>(sizeof(float));
}

// sums[0 ... columns - 1] += the products of kRows elements of X with as many rows of W, `stride` bytes apart.
template <int kRows>
inline void add_int8_rows(const float *x, const int8_t *w, int64_t stride, int64_t columns, float *sums) {
    constexpr int kVectors = kStreamLine / kLanes;
    F32 factor[kRows];
    for (int r = 0; r < kRows; ++r) {
        factor[r] = splat(x[r]);
    }
    int64_t c = 0;
    for (; c + kStreamLine <= columns; c += kStreamLine) {
        F32 sum[kVectors];
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            sum[j] = load(sums + c + j * kLanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const int8_t *line = w + r * stride + c;
            __builtin_prefetch(line + kRows * stride, 0, 3);
#pragma GCC unroll 16
            for (int j = 0; j < kVectors; ++j) {
                const F32 v = __builtin_convertvector(load_signed(line + j * kLanes), F32);
                sum[j] = multiply_add(factor[r], v, sum[j]);
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            store(sums + c + j * kLanes, sum[j]);
        }
    }
    for (; c < columns; ++c) {
        for (int r = 0; r < kRows; ++r) {
            sums[c] += x[r] * static_cast<float>(w[r * stride + c]);
        }
    }
}

// Columns n0 ... n1 - 1.
template <class T>
inline void stream_int8_rows(const Int8Transposed &p, int64_t n0, int64_t n1, void *scratch) {
    auto *x = static_cast<float *>(scratch);
    float *sums = x + p.k + kStreamRows;
    const T *from = static_cast<const T *>(p.x);
    int64_t k = 0;
    for (; k + kLanes <= p.k; k += kLanes) {
        store(x + k, scaled_int8_lanes(p.w, from + k, k));
    }
    for (; k < p.k; ++k) {
        x[k] = scaled_int8(p.w, from[k], k);
    }
    T *y = static_cast<T *>(p.out);
    for (int64_t n = n0; n < n1; n += kStreamColumns) {
        const int64_t columns = n + kStreamColumns < n1 ? kStreamColumns : n1 - n;
        __builtin_memset(sums, 0, static_cast<size_t>(columns) * sizeof *sums);
        const int8_t *w = p.w.codes + n;
        for (k = 0; k + kStreamRows <= p.k; k += kStreamRows) {
            add_int8_rows<kStreamRows>(x + k, w + k * p.n, p.n, columns, sums);
        }
        for (; k < p.k; ++k) {
            add_int8_rows<1>(x + k, w + k * p.n, p.n, columns, sums);
        }
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) {
            store(y + n + c, load(sums + c));
        }
        for (; c < columns; ++c) {
            y[n + c] = from_float<T>(sums[c]);
        }
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_INT8_STREAM_H
