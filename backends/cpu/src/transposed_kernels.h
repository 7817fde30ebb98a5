// The kernels behind gemm_4bit_transposed and int8_linear_transposed, one table per instruction set and kind of weight
// (dispatch.h).
#ifndef QCORE_CPU_TRANSPOSED_KERNELS_H
#define QCORE_CPU_TRANSPOSED_KERNELS_H

#include "gemm_4bit_kernels.h"

namespace qcore::cpu {

// int8, a scale a row (QC-INT8-011).
struct Int8Weight {
    const int8_t *codes;
    const float *stats;  // largest magnitudes of the rows
    int64_t k;           // length of a row
};

// out[m,n] = x[m,k] w[k,n], named as product.h names them: k, the rows of the weight, is what is summed over, and n,
// its columns, are the columns of the result.
struct TransposedShape {
    static constexpr int64_t kRangeColumns = kPanelColumns;  // a result depends on its place in a panel

    int32_t dtype;
    int64_t m, n, k;
    const void *x;
    void *out;
};

template <class Weight>
struct TransposedProduct : TransposedShape {
    Weight w;
};

using Gemm4Transposed = TransposedProduct<Gemm4Weight>;
using Int8Transposed = TransposedProduct<Int8Weight>;
using Gemm4TransposedKernels = ProductKernels<Gemm4Transposed>;
using Int8TransposedKernels = ProductKernels<Int8Transposed>;

#define QC_DECLARE_TRANSPOSED_KERNELS(isa)                            \
    namespace isa {                                                   \
    extern const Gemm4TransposedKernels gemm_4bit_transposed_kernels; \
    extern const Int8TransposedKernels int8_transposed_kernels;       \
    }
QC_DECLARE_TRANSPOSED_KERNELS(portable)
#ifdef __x86_64__
QC_DECLARE_TRANSPOSED_KERNELS(avx2)
QC_DECLARE_TRANSPOSED_KERNELS(avx512)
QC_DECLARE_TRANSPOSED_KERNELS(avx512_bf16)
QC_DECLARE_TRANSPOSED_KERNELS(amx)
#endif
#undef QC_DECLARE_TRANSPOSED_KERNELS

}  // namespace qcore::cpu

#endif  // QCORE_CPU_TRANSPOSED_KERNELS_H
