// The ops of the table, each in the kernel file of its family; qcore_backend.h says what their arguments are.
#ifndef QCORE_GPU_OPS_H
#define QCORE_GPU_OPS_H

#include "qcore_backend.h"

namespace qcore::gpu {

// blockwise.cu
qc_status quantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t code, int64_t n,
                             int64_t blocksize, uintptr_t absmax, uintptr_t out);
qc_status dequantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                               uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out);

// fourbit.cu
qc_status quantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                        int64_t blocksize, uintptr_t absmax, uintptr_t out);
qc_status dequantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w, uintptr_t out);

// absmax.cu
qc_status quantize_absmax(int32_t device, uintptr_t stream, uintptr_t absmax, uintptr_t code, int64_t n,
                          int64_t blocksize, uintptr_t out, uintptr_t nested_absmax, uintptr_t offset);
qc_status dequantize_absmax(int32_t device, uintptr_t stream, uintptr_t a, uintptr_t nested_absmax, uintptr_t code,
                            uintptr_t offset, int64_t n, int64_t blocksize, uintptr_t out);

// gemm_4bit.cu
// {"depth": ..., "weight_rounding": ...} of all products with floats, for describe(), JSON.
const char *fourbit_declaration();
// Scratch of gemm_4bit, and of gemm_int4 with a weight without perm.
qc_status fourbit_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes);
qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes);

// gemm_int4.cu
qc_status gemm_int4(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_int4 *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes);

// gemm_4bit_transposed.cu
qc_status gemm_4bit_transposed_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                         int64_t *bytes);
qc_status gemm_4bit_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                               uintptr_t a, const qc_weight_4bit *w, uintptr_t out, uintptr_t workspace,
                               int64_t workspace_bytes);

// int8_quantize.cu
qc_status int8_quantize_rows(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                             float threshold, uintptr_t out, uintptr_t row_stats, uintptr_t outlier_cols);
qc_status int8_quantize_cols(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                             float threshold, uintptr_t out, uintptr_t col_stats);

// int8_scale.cu
qc_status int8_dequantize_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, uintptr_t c,
                               uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype, uintptr_t bias,
                               uintptr_t out);
qc_status int8_dequantize_rows(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t k, uintptr_t a,
                               uintptr_t row_stats, uintptr_t out);

// int8_gemm.cu
qc_status int8_gemm(int32_t device, uintptr_t stream, int64_t m, int64_t n, int64_t k, uintptr_t a, uintptr_t b,
                    uintptr_t out, uintptr_t workspace, int64_t workspace_bytes);
qc_status int8_scaled_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, uintptr_t b, uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype,
                           uintptr_t bias, uintptr_t out, uintptr_t workspace, int64_t workspace_bytes);

// int8_linear.cu
qc_status int8_gemm_workspace(int32_t device, int64_t m, int64_t n, int64_t k, int64_t *bytes);
qc_status int8_linear_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes);
qc_status int8_linear(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                      uintptr_t b, uintptr_t col_stats, float threshold, int32_t bias_dtype, uintptr_t bias,
                      uintptr_t out, uintptr_t outliers, uintptr_t workspace, int64_t workspace_bytes);

// int8_transposed.cu
qc_status int8_linear_transposed_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                           int64_t *bytes);
qc_status int8_linear_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                 uintptr_t a, uintptr_t b, uintptr_t col_stats, uintptr_t out, uintptr_t workspace,
                                 int64_t workspace_bytes);

// optimizer.cu
// Scratch of a step with a limit on the update's norm, for so many blocks and tensors.
qc_status optimizer_step_workspace(int64_t blocks, int64_t tensors, int64_t *bytes);
qc_status optimizer_step(int32_t device, uintptr_t stream, const qc_optimizer *optimizer,
                         const qc_optimizer_tensors *tensors, uintptr_t workspace, int64_t workspace_bytes);

}  // namespace qcore::gpu

#endif  // QCORE_GPU_OPS_H
