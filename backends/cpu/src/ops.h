// The ops of the table, each in the file of its family; qcore_backend.h says what their arguments are.
#ifndef QCORE_CPU_OPS_H
#define QCORE_CPU_OPS_H

#include "qcore_backend.h"

namespace qcore::cpu {

// quantize.cpp
qc_status quantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t code, int64_t n,
                             int64_t blocksize, uintptr_t absmax, uintptr_t out);
qc_status dequantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                               uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out);

// fourbit.cpp
qc_status quantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                        int64_t blocksize, uintptr_t absmax, uintptr_t out);
qc_status dequantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w, uintptr_t out);

// absmax.cpp
qc_status quantize_absmax(int32_t device, uintptr_t stream, uintptr_t absmax, uintptr_t code, int64_t n,
                          int64_t blocksize, uintptr_t out, uintptr_t nested_absmax, uintptr_t offset);
qc_status dequantize_absmax(int32_t device, uintptr_t stream, uintptr_t a, uintptr_t nested_absmax, uintptr_t code,
                            uintptr_t offset, int64_t n, int64_t blocksize, uintptr_t out);

// gemm_4bit.cpp
qc_status gemm_4bit_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes);
qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes);

}  // namespace qcore::cpu

#endif  // QCORE_CPU_OPS_H
