/* A backend as somebody built it against ABI 1.0. It is compiled with the frozen header beside it, never with the
 * current one, and has to load and run for as long as the major version is 1. The macros make the wrong libraries of
 * the tests out of it. */
#include <stddef.h>

#include "qcore_backend_v1_0.h"

#ifndef TABLE_SIZE
#define TABLE_SIZE sizeof(qc_api)
#endif
#ifndef TABLE_MAJOR
#define TABLE_MAJOR 1
#endif
#ifndef TABLE_MINOR
#define TABLE_MINOR 0
#endif
#ifndef DESCRIPTION
#define DESCRIPTION "{\"name\": \"frozen\", \"arch\": \"v1.0\", \"torch_device\": \"cpu\"}"
#endif

static const char *text = "";

static const char *last_error(void) { return text; }

static qc_status device_count(int32_t *count) {
#ifdef NO_DEVICE
    *count = 0;
    text = "no frozen device in this machine";
    return QC_NO_DEVICE;
#else
    *count = 1;
    return QC_OK;
#endif
}

static qc_status describe(int32_t device, const char **json) {
    *json = DESCRIPTION;
    return device == 0 ? QC_OK : QC_NO_DEVICE;
}

static qc_status workspace(int32_t op, int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           int64_t *bytes) {
    (void)op, (void)device, (void)stream, (void)dtype, (void)m, (void)n, (void)k;
    *bytes = 0;
    return QC_OK;
}

static qc_status dequantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                                      uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out) {
    (void)device, (void)stream;
    if (dtype != QC_F32) {
        text = "dequantize_blockwise: this backend serves float32 only";
        return QC_UNSUPPORTED;
    }
    for (int64_t i = 0; i < n; ++i)
        ((float *)out)[i] = ((const float *)code)[((const uint8_t *)a)[i]] * ((const float *)absmax)[i / blocksize];
    return QC_OK;
}

/* The last entry of the table of 1.0. */
static qc_status int8_dequantize_rows(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t k,
                                      uintptr_t a, uintptr_t row_stats, uintptr_t out) {
    (void)device, (void)stream, (void)dtype;
    for (int64_t i = 0; i < m * k; ++i)
        ((float *)out)[i] = ((float)((const int8_t *)a)[i] * ((const float *)row_stats)[i / k]) * 0x1.020408p-7f;
    return QC_OK;
}

/* Behind the table lie entries of later minors, all NULL, for a TABLE_SIZE that claims them. */
static const struct {
    qc_api api;
    void (*later[16])(void);
} table = {.api = {
               .size = TABLE_SIZE,
               .abi_major = TABLE_MAJOR,
               .abi_minor = TABLE_MINOR,
               .name = "frozen",
               .last_error = last_error,
               .device_count = device_count,
               .describe = describe,
               .workspace = workspace,
               .dequantize_blockwise = dequantize_blockwise,
               .int8_dequantize_rows = int8_dequantize_rows,
           }};

#ifdef OPENS_NOTHING
const qc_api *qcore_backend_open(uint32_t abi_major) {
    (void)abi_major;
    (void)table;
    return NULL;
}
#elif defined(EXPORTS_NOTHING)
const qc_api *another_name(uint32_t abi_major) { return abi_major == 1 ? &table.api : NULL; }
#else
const qc_api *qcore_backend_open(uint32_t abi_major) { return abi_major == 1 ? &table.api : NULL; }
#endif
