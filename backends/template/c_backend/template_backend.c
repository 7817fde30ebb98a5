/* A backend as one C file: copy it, put your kernels behind the table, leave NULL what you do not serve.
 *
 * It serves the three ops of a 4-bit linear layer on the host, one thread, no cleverness. A GPU library has the same
 * shape: the addresses are device addresses then, and each function launches on `stream` and returns. Build and check:
 *
 *   make && qcore-conformance run --backend ./build/libqcore_template.so
 */
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "qcore_backend.h"
#include "qcore_codebooks.h"

static _Thread_local char error_text[256];

static qc_status fail(qc_status status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error_text, sizeof error_text, format, values);
    va_end(values);
    return status;
}

static const char *last_error(void) { return error_text; }

/* Values: float32 <-> float16 and bfloat16 (QC-NUM-002, QC-NUM-003) */

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return float_of(sign | bits_of((float)mantissa * 0x1p-24f));
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

static uint16_t to_f16(float value) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    /* 65520 is halfway between the largest float16 and 2^16. */
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    /* Below 2^-14 a float16 is a multiple of 2^-24. */
    if (magnitude < 0x38800000) return (uint16_t)(sign | (uint32_t)rintf(float_of(magnitude) * 0x1p24f));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

static uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float load(uintptr_t array, int32_t dtype, int64_t i) {
    if (dtype == QC_F32) return ((const float *)array)[i];
    uint16_t bits = ((const uint16_t *)array)[i];
    return dtype == QC_F16 ? from_f16(bits) : float_of((uint32_t)bits << 16);
}

static void store(uintptr_t array, int32_t dtype, int64_t i, float value) {
    if (dtype == QC_F32)
        ((float *)array)[i] = value;
    else
        ((uint16_t *)array)[i] = dtype == QC_F16 ? to_f16(value) : to_bf16(value);
}

/* Checks, before anything is written (QC-NUM-006) */

static qc_status check_device(const char *op, int32_t device) {
    if (device == 0) return QC_OK;
    return fail(QC_NO_DEVICE, "%s: device %d; this host backend has device 0 only", op, device);
}

static qc_status check_dtype(const char *op, const char *argument, int32_t dtype) {
    if (dtype == QC_F32 || dtype == QC_F16 || dtype == QC_BF16) return QC_OK;
    return fail(QC_INVALID_ARGUMENT, "%s: %s is %d; expected QC_F32, QC_F16 or QC_BF16", op, argument, dtype);
}

static qc_status check_array(const char *op, const char *argument, uintptr_t address, int64_t count, size_t align) {
    if (count < 0) return fail(QC_INVALID_ARGUMENT, "%s: %s has %lld elements", op, argument, (long long)count);
    if (count > 0 && address == 0) return fail(QC_INVALID_ARGUMENT, "%s: %s is NULL", op, argument);
    if (address % align == 0) return QC_OK;
    return fail(QC_INVALID_ARGUMENT, "%s: %s is not aligned to its element of %zu bytes", op, argument, align);
}

static qc_status check_blocksize(const char *op, const char *argument, int64_t blocksize) {
    if (blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0) return QC_OK;
    return fail(QC_INVALID_ARGUMENT, "%s: %s is %lld; expected a power of two from 32 to 4096 (QC-NUM-005)", op,
                argument, (long long)blocksize);
}

static qc_status check_count(const char *op, const char *argument, int64_t count) {
    if (count >= 0) return QC_OK;
    return fail(QC_INVALID_ARGUMENT, "%s: %s is %lld; expected 0 or more", op, argument, (long long)count);
}

static qc_status check_format(const char *op, int32_t format) {
    if (format == QC_NF4 || format == QC_FP4) return QC_OK;
    return fail(QC_INVALID_ARGUMENT, "%s: format is %d; expected QC_NF4 or QC_FP4", op, format);
}

static size_t size_of(int32_t dtype) { return dtype == QC_F32 ? 4 : 2; }

#define CHECK(call)                         \
    do {                                    \
        qc_status status = (call);          \
        if (status != QC_OK) return status; \
    } while (0)

static qc_status check_weight(const char *op, const qc_weight_4bit *w) {
    if (w == NULL) return fail(QC_INVALID_ARGUMENT, "%s: weight is NULL", op);
    if (w->layout != 0)
        return fail(QC_UNSUPPORTED, "%s: layout is %d; this backend serves 0, as stored", op, w->layout);
    CHECK(check_format(op, w->format));
    CHECK(check_count(op, "numel", w->numel));
    CHECK(check_blocksize(op, "blocksize", w->blocksize));
    CHECK(check_array(op, "packed", w->packed, w->numel, 1));
    if (w->nested_absmax == 0) return check_array(op, "absmax", w->absmax, w->numel, 4);
    CHECK(check_blocksize(op, "nested_blocksize", w->nested_blocksize));
    CHECK(check_array(op, "absmax", w->absmax, w->numel, 1));
    CHECK(check_array(op, "nested_absmax", w->nested_absmax, w->numel, 4));
    CHECK(check_array(op, "nested_code", w->nested_code, w->numel, 4));
    return check_array(op, "nested_offset", w->nested_offset, w->numel, 4);
}

/* The ops */

/* QC-NF4-002, QC-FP4-002: the number of thresholds below y, as a code. */
static uint8_t code_of(float y, int32_t format) {
    int position = 0;
    if (format == QC_NF4) {
        for (int j = 0; j < 15; ++j) position += y > (QC_NF4_TABLE[j] + QC_NF4_TABLE[j + 1]) * 0.5f;
        return (uint8_t)position;
    }
    for (int j = 0; j < 7; ++j) position += fabsf(y) > QC_FP4_THRESHOLDS[j];
    return (uint8_t)(QC_FP4_ORDER[position] + (y < 0 ? 8 : 0));
}

static qc_status quantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                               int64_t blocksize, uintptr_t absmax, uintptr_t out) {
    static const char op[] = "quantize_4bit";
    (void)stream;
    CHECK(check_device(op, device));
    CHECK(check_dtype(op, "dtype", dtype));
    CHECK(check_format(op, format));
    CHECK(check_blocksize(op, "blocksize", blocksize));
    CHECK(check_count(op, "n", n));
    CHECK(check_array(op, "a", a, n, size_of(dtype)));
    CHECK(check_array(op, "absmax", absmax, n, sizeof(float)));
    CHECK(check_array(op, "out", out, n, 1));

    uint8_t *packed = (uint8_t *)out;
    for (int64_t start = 0; start < n; start += blocksize) {
        int64_t end = n - start < blocksize ? n : start + blocksize;
        float largest = 0;
        for (int64_t i = start; i < end; ++i) {
            float magnitude = fabsf(load(a, dtype, i));
            if (magnitude > largest) largest = magnitude; /* false for NaN (QC-Q8-002) */
        }
        ((float *)absmax)[start / blocksize] = largest;
        float scale = 1 / largest;
        for (int64_t i = start; i < end; ++i) {
            float y = load(a, dtype, i) * scale;
            uint8_t code = code_of(y != y ? 0 : y, format); /* NaN, 0 * infinity included: 0 (QC-Q8-003) */
            /* Blocks are even, so that a byte never belongs to two. QC-4BIT-002: a nibble past the end is code 0's. */
            if (i % 2 == 0)
                packed[i / 2] = (uint8_t)(code << 4 | code_of(0, format));
            else
                packed[i / 2] = (uint8_t)((packed[i / 2] & 0xf0) | code);
        }
    }
    return QC_OK;
}

/* QC-NEST-003: the absmax of block b. */
static float absmax_of(const qc_weight_4bit *w, int64_t b) {
    if (w->nested_absmax == 0) return ((const float *)w->absmax)[b];
    float code = ((const float *)w->nested_code)[((const uint8_t *)w->absmax)[b]];
    float scaled = code * ((const float *)w->nested_absmax)[b / w->nested_blocksize];
    return scaled + ((const float *)w->nested_offset)[0];
}

/* QC-4BIT-003: element i. */
static float element_of(const qc_weight_4bit *w, int64_t i) {
    uint8_t byte = ((const uint8_t *)w->packed)[i / 2];
    const float *table = w->format == QC_NF4 ? QC_NF4_TABLE : QC_FP4_TABLE;
    return table[i % 2 ? byte & 15 : byte >> 4] * absmax_of(w, i / w->blocksize);
}

static qc_status dequantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w,
                                 uintptr_t out) {
    static const char op[] = "dequantize_4bit";
    (void)stream;
    CHECK(check_device(op, device));
    CHECK(check_dtype(op, "dtype", dtype));
    CHECK(check_weight(op, w));
    CHECK(check_array(op, "out", out, w->numel, size_of(dtype)));
    for (int64_t i = 0; i < w->numel; ++i) store(out, dtype, i, element_of(w, i));
    return QC_OK;
}

/* Scratch of a GEMM: one row of decoded weights, in whole lines of 256 bytes. */
static int64_t gemm_scratch(int64_t k) { return (k * 4 + 255) / 256 * 256; }

static qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out,
                           uintptr_t workspace, int64_t workspace_bytes) {
    static const char op[] = "gemm_4bit";
    (void)stream;
    CHECK(check_device(op, device));
    CHECK(check_dtype(op, "dtype", dtype));
    CHECK(check_count(op, "m", m));
    CHECK(check_count(op, "n", n));
    CHECK(check_count(op, "k", k));
    CHECK(check_weight(op, w));
    if (k != 0 ? w->numel % k != 0 || w->numel / k != n : w->numel != 0)
        return fail(QC_INVALID_ARGUMENT, "%s: numel of the weight is %lld, shape (%lld, %lld) needs their product", op,
                    (long long)w->numel, (long long)n, (long long)k);
    CHECK(check_array(op, "a", a, m != 0 ? k : 0, size_of(dtype)));
    CHECK(check_array(op, "out", out, m != 0 ? n : 0, size_of(dtype)));
    if (bias != 0) {
        CHECK(check_dtype(op, "bias_dtype", bias_dtype));
        if (bias_dtype != dtype && bias_dtype != QC_F32)
            return fail(QC_INVALID_ARGUMENT, "%s: bias_dtype is %d; expected QC_F32 or the dtype of a, %d", op,
                        bias_dtype, dtype);
        CHECK(check_array(op, "bias", bias, n, size_of(bias_dtype)));
    }
    if (m == 0 || n == 0) return QC_OK;
    if (workspace_bytes < gemm_scratch(k))
        return fail(QC_INVALID_ARGUMENT, "%s: workspace_bytes is %lld; workspace() says %lld", op,
                    (long long)workspace_bytes, (long long)gemm_scratch(k));
    CHECK(check_array(op, "workspace", workspace, k, sizeof(float)));

    float *row = (float *)workspace;
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < k; ++i) row[i] = element_of(w, j * k + i);
        for (int64_t l = 0; l < m; ++l) {
            float sum = 0; /* one chain of K products and sums: d(K) = K + 2 with the bias (QC-GEMM4-002) */
            for (int64_t i = 0; i < k; ++i) sum += load(a, dtype, l * k + i) * row[i];
            if (bias != 0) sum += load(bias, bias_dtype, j);
            store(out, dtype, l * n + j, sum);
        }
    }
    return QC_OK;
}

/* What the library says of itself */

static qc_status device_count(int32_t *count) {
    *count = 1; /* a GPU library: QC_NO_DEVICE with the reason and the fix, where there is none */
    return QC_OK;
}

static qc_status describe(int32_t device, const char **json) {
    CHECK(check_device("describe", device));
    *json =
        "{\"name\": \"host\", \"arch\": \"portable\", \"driver\": \"\", \"runtime\": \"C11\", \"torch_device\": "
        "\"cpu\","
        " \"declarations\": {\"gemm_4bit\": {\"depth\": {\"lanes\": 1, \"extra\": 2}, \"weight_rounding\": "
        "\"float32\"}}}";
    return QC_OK;
}

static qc_status workspace(int32_t op, int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           int64_t *bytes) {
    (void)stream;
    CHECK(check_device("workspace", device));
    CHECK(check_dtype("workspace", "dtype", dtype));
    if (op < QC_OP_QUANTIZE_BLOCKWISE || op > QC_OP_INT8_LINEAR_TRANSPOSED)
        return fail(QC_INVALID_ARGUMENT, "workspace: op is %d; expected one of QC_OP_*", op);
    CHECK(check_count("workspace", "m", m));
    CHECK(check_count("workspace", "n", n));
    if (k < 0 || k > INT64_MAX / 8) return fail(QC_INVALID_ARGUMENT, "workspace: k is %lld", (long long)k);
    *bytes = op == QC_OP_GEMM_4BIT ? gemm_scratch(k) : 0;
    return QC_OK;
}

static const qc_api api = {
    .size = sizeof(qc_api),
    .abi_major = QC_ABI_MAJOR,
    .abi_minor = QC_ABI_MINOR,
    .name = "template",
    .last_error = last_error,
    .device_count = device_count,
    .describe = describe,
    .workspace = workspace,
    .quantize_4bit = quantize_4bit,
    .dequantize_4bit = dequantize_4bit,
    .gemm_4bit = gemm_4bit,
    /* The rest is NULL: unsupported, and reported as such. */
};

const qc_api *qcore_backend_open(uint32_t abi_major) { return abi_major == QC_ABI_MAJOR ? &api : NULL; }
