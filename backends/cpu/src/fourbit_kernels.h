// Kernels of the 4-bit ops.
#ifndef QCORE_CPU_FOURBIT_KERNELS_H
#define QCORE_CPU_FOURBIT_KERNELS_H

#include <cstdint>

namespace qcore::cpu {

// The absmax of a block, as stored or nested (QC-NEST-003).
struct BlockScales {
    const float *absmax;  // or null, and:
    const uint8_t *codes;
    const float *nested_absmax;
    const float *nested_code;
    float nested_offset;
    int nested_shift;  // log2 of nested_blocksize
};

// Each works on the blocks from `first` to `last` - 1 of n elements; arrays start at block 0. By dtype (QC_F32 ...)
// and format (QC_NF4, QC_FP4). past_caches (pages.h) needs an `out` that is aligned to kPastCachesAlign.
struct FourbitKernels {
    void (*quantize[3][2])(const void *a, int64_t n, int64_t blocksize, int64_t first, int64_t last, float *absmax,
                           uint8_t *out);
    void (*dequantize[3][2])(const uint8_t *packed, const BlockScales &scales, int64_t n, int64_t blocksize,
                             int64_t first, int64_t last, bool past_caches, void *out);
};

namespace portable {
extern const FourbitKernels fourbit_kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const FourbitKernels fourbit_kernels;
}
namespace avx512 {
extern const FourbitKernels fourbit_kernels;
}
#endif

}  // namespace qcore::cpu

#endif  // QCORE_CPU_FOURBIT_KERNELS_H
