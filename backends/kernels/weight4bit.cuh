// How kernels see a 4-bit weight: its scales, plain or nested, and its codes.
#ifndef QCORE_KERNELS_WEIGHT4BIT_CUH
#define QCORE_KERNELS_WEIGHT4BIT_CUH

// The tables as constants that kernels may index.
#define QC_CODEBOOK QC_CONSTANT
#include "numbers.cuh"
#include "qcore_backend.h"
#include "qcore_codebooks.h"

namespace qcore::gpu {

struct Absmax {
    const float *values;   // plain, or null
    const uint8_t *codes;  // nested: QC-NEST-003
    const float *nested;
    const float *table;
    const float *offset;
    int nested_shift;  // log2 of the nested blocksize

    QC_DEVICE float at(int64_t block) const {
        if (values != nullptr) {
            return values[block];
        }
        return table[codes[block]] * nested[block >> nested_shift] + *offset;
    }
};

struct Weight4 {
    const uint8_t *packed;
    Absmax absmax;
    int64_t numel;
    int shift;  // log2 of the blocksize
    int format;

    QC_DEVICE int code(int64_t i) const { return packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15; }
};

QC_DEVICE float table_value(int format, int code) { return format == QC_NF4 ? QC_NF4_TABLE[code] : QC_FP4_TABLE[code]; }

// The sixteen values in shared memory: each in a bank of its own, so any lookup of a wave takes one cycle.
struct Table16 {
    float value[16];

    // Every thread of the block comes here; a barrier follows.
    QC_DEVICE void fill(int format) {
        if (thread_index() < 16) {
            value[thread_index()] = table_value(format, thread_index());
        }
    }
    QC_DEVICE float at(int code) const { return value[code]; }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_WEIGHT4BIT_CUH
