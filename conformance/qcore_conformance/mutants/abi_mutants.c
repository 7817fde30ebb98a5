/* Mutants of the C ABI: a library that hands out the table of a right one, with one function that is careless.
 *
 * Compiled once per mutant with -DREAL="path of the right library" and -DMUTANT_<NAME>; see native.py. What a native
 * backend has to refuse is in the "Rules for every function" of qcore_backend.h (QC-NUM-006). With -DMEMORY the table
 * gets memory_ functions, which the host's library leaves out.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

#include "qcore_backend.h"

static const qc_api *real;
static qc_api table;

#if defined(MEMORY)
#include "memory_mutants.h"
#elif defined(MUTANT_MESSAGE_MISSING)
static const char *no_message(void) { return ""; }
#elif defined(MUTANT_DEVICE_IGNORED)
static qc_status dequantize_absmax(int32_t device, uintptr_t stream, uintptr_t a, uintptr_t nested, uintptr_t code,
                                   uintptr_t offset, int64_t n, int64_t blocksize, uintptr_t out) {
    (void)device;
    return real->dequantize_absmax(0, stream, a, nested, code, offset, n, blocksize, out);
}
#elif defined(MUTANT_LAYOUT_IGNORED) || defined(MUTANT_NESTING_UNCHECKED)
static qc_status dequantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w,
                                 uintptr_t out) {
    if (!w) return real->dequantize_4bit(device, stream, dtype, w, out);
    qc_weight_4bit copy = *w;
#if defined(MUTANT_LAYOUT_IGNORED)
    copy.layout = 0;
#else
    if (copy.nested_absmax) (void)*(volatile const float *)copy.nested_code; /* NULL is read before it is checked */
#endif
    return real->dequantize_4bit(device, stream, dtype, &copy, out);
}
#elif defined(MUTANT_THRESHOLD_UNCHECKED)
static qc_status int8_quantize_rows(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                                    float threshold, uintptr_t out, uintptr_t row_stats, uintptr_t outlier_cols) {
    if (!(threshold >= 0)) threshold = 0;
    return real->int8_quantize_rows(device, stream, dtype, a, m, k, threshold, out, row_stats, outlier_cols);
}
#elif defined(MUTANT_BIAS_DTYPE_UNCHECKED)
static qc_status int8_dequantize_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n,
                                      uintptr_t c, uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype,
                                      uintptr_t bias, uintptr_t out) {
    if (bias_dtype != dtype) bias_dtype = QC_F32;
    return real->int8_dequantize_gemm(device, stream, dtype, m, n, c, row_stats, col_stats, bias_dtype, bias, out);
}
#else
static qc_status quantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                               int64_t blocksize, uintptr_t absmax, uintptr_t out) {
#if defined(MUTANT_BLOCKSIZE_UNCHECKED)
    if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1))) blocksize = 4096;
#elif defined(MUTANT_COUNT_UNSIGNED)
    if (n < 0) return QC_OK;
#elif defined(MUTANT_NULL_ACCEPTED)
    if (!a || !absmax || !out) return QC_OK;
#elif defined(MUTANT_DTYPE_DEFAULTED)
    if (dtype < QC_F32 || dtype > QC_BF16) dtype = QC_F32;
#elif defined(MUTANT_FORMAT_DEFAULTED)
    if (format != QC_FP4) format = QC_NF4;
#elif defined(MUTANT_ALIGNMENT_ROUNDED)
    absmax &= ~(uintptr_t)3;
#elif defined(MUTANT_WRITES_FIRST)
    if (out) *(unsigned char *)out ^= 1;
#endif
    qc_status status = real->quantize_4bit(device, stream, dtype, format, a, n, blocksize, absmax, out);
#if defined(MUTANT_STATUS_INTERNAL)
    if (status) status = QC_INTERNAL;
#elif defined(MUTANT_ABORTS)
    if (status) abort();
#endif
    return status;
}
#endif

const qc_api *qcore_backend_open(uint32_t abi_major) {
    void *library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
    if (!library) return NULL;
    const qc_api *(*open)(uint32_t) = (const qc_api *(*)(uint32_t))dlsym(library, "qcore_backend_open");
    if (!open || !(real = open(abi_major))) return NULL;
    table = *real;
#if defined(MEMORY)
    table.last_error = memory_text;
    table.memory_kind = memory_kind;
    table.memory_allocate = memory_allocate;
    table.memory_free = memory_free;
#if !defined(MUTANT_MEMORY_HALF_THERE)
    table.memory_prefetch = memory_prefetch;
#else
    (void)memory_prefetch;
#endif
#if defined(MUTANT_MEMORY_OP_DIFFERS)
    table.dequantize_blockwise = dequantize_blockwise;
#endif
#elif defined(MUTANT_MESSAGE_MISSING)
    table.last_error = no_message;
#elif defined(MUTANT_DEVICE_IGNORED)
    table.dequantize_absmax = dequantize_absmax;
#elif defined(MUTANT_LAYOUT_IGNORED) || defined(MUTANT_NESTING_UNCHECKED)
    table.dequantize_4bit = dequantize_4bit;
#elif defined(MUTANT_THRESHOLD_UNCHECKED)
    table.int8_quantize_rows = int8_quantize_rows;
#elif defined(MUTANT_BIAS_DTYPE_UNCHECKED)
    table.int8_dequantize_gemm = int8_dequantize_gemm;
#else
    table.quantize_4bit = quantize_4bit;
#endif
    return &table;
}
