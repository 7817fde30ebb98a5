// The kernels behind gemm_4bit_transposed, one table per instruction set (dispatch.h).
#ifndef QCORE_CPU_GEMM_4BIT_TRANSPOSED_KERNELS_H
#define QCORE_CPU_GEMM_4BIT_TRANSPOSED_KERNELS_H

#include "gemm_4bit_kernels.h"

namespace qcore::cpu {

// out[m,n] = x[m,k] w[k,n], named as product.h names them: k, the rows of the weight, is what is summed over, and n,
// its columns, are the columns of the result.
struct Gemm4Transposed {
    int32_t dtype;
    int64_t m, n, k;
    const void *x;
    void *out;
    Gemm4Weight w;
};

// product.h says how these are called.
struct Gemm4TransposedKernels {
    static constexpr int64_t kRows = 512;
    static constexpr int64_t kGroup = 16;
    static constexpr int64_t kColumns = 64;

    // As in Gemm4Kernels.
    int64_t (*packed_bytes)(const Gemm4Transposed &p, int64_t rows);
    int64_t (*scratch_bytes)(const Gemm4Transposed &p, int64_t rows, int64_t columns);
    void (*pack)(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t group, void *packed);
    void (*multiply)(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
                     void *scratch);
};

namespace portable {
extern const Gemm4TransposedKernels gemm_4bit_transposed_kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Gemm4TransposedKernels gemm_4bit_transposed_kernels;
}
namespace avx512 {
extern const Gemm4TransposedKernels gemm_4bit_transposed_kernels;
}
namespace avx512_bf16 {
extern const Gemm4TransposedKernels gemm_4bit_transposed_kernels;
}
namespace amx {
extern const Gemm4TransposedKernels gemm_4bit_transposed_kernels;
}
#endif

}  // namespace qcore::cpu

#endif  // QCORE_CPU_GEMM_4BIT_TRANSPOSED_KERNELS_H
