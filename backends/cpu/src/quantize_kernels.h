// Kernels of the 8-bit blockwise ops.
#ifndef QCORE_CPU_QUANTIZE_KERNELS_H
#define QCORE_CPU_QUANTIZE_KERNELS_H

#include <cstdint>

#include "codebook.h"
#include "state_codes.h"

namespace qcore::cpu {

// Each works on the blocks from `first` to `last` - 1 of n elements; arrays start at block 0. By dtype (QC_F32 ...).
struct QuantizeKernels {
    // `lines` belong to the codebook, or are null.
    void (*quantize[3])(const void *a, const Codebook &codebook, const StateLines *lines, int64_t n, int64_t blocksize,
                        int64_t first, int64_t last, float *absmax, uint8_t *out);
    void (*dequantize[3])(const uint8_t *a, const float *absmax, const float *code, const StateLines *lines, int64_t n,
                          int64_t blocksize, int64_t first, int64_t last, bool past_caches, void *out);
};

namespace portable {
extern const QuantizeKernels quantize_kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const QuantizeKernels quantize_kernels;
}
namespace avx512 {
extern const QuantizeKernels quantize_kernels;
}
namespace avx512_vnni {
extern const QuantizeKernels quantize_kernels;
}
namespace avx512_bf16 {
extern const QuantizeKernels quantize_kernels;
}
#endif

// The best for this process.
const QuantizeKernels &quantize_kernels();

}  // namespace qcore::cpu

#endif  // QCORE_CPU_QUANTIZE_KERNELS_H
