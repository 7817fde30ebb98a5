/* qcore backend ABI, version 1.3: the whole contract of a native backend.
 *
 * A backend is one shared library that exports qcore_backend_open(). The table that it returns is append-only:
 * within a major version new entries go to the end, `size` says how much of it the library fills, and a NULL entry
 * means "unsupported". What each op computes is in docs/spec/, cited here by clause.
 *
 * Rules for every function
 *  - Addresses (uintptr_t) are device addresses, aligned to their element type; 0 where an argument is optional.
 *  - Arrays are contiguous, row-major. Counts are int64_t and not negative. Inputs and outputs do not overlap.
 *  - Arguments are checked first: on any status but QC_OK nothing has been written (asynchronous faults excepted).
 *  - It never synchronises, allocates device memory (but for the memory_ functions), or changes the current device. It
 *    is re-entrant, can be captured in a CUDA or HIP graph (but for memory_prefetch), and no exception leaves it.
 *    Scratch comes from the caller, at an address that is a multiple of 64; workspace() says how much.
 *  - `device` is the index of the device, 0 on a host; the caller of an op makes it current first, where the runtime
 *    has a current device. `stream` is the CUDA or HIP stream; on a host it is the largest number of threads that the
 *    call may use, 0 for the library's own choice.
 */
#ifndef QCORE_BACKEND_H
#define QCORE_BACKEND_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QC_ABI_MAJOR 1
#define QC_ABI_MINOR 3

typedef int32_t qc_status;
#define QC_OK 0
#define QC_INVALID_ARGUMENT 1 /* last_error() names the op, the argument, what was expected and what came */
#define QC_UNSUPPORTED 2      /* a valid call that this library does not serve */
#define QC_NO_DEVICE 3        /* no device, no driver, or one that the library was not built for */
#define QC_OUT_OF_MEMORY 4
#define QC_DEVICE_ERROR 5 /* the runtime reported an error; its text is in last_error() */
#define QC_INTERNAL 6     /* a defect of the library */

/* dtypes of activations, outputs and bias (QC-NUM-002, QC-NUM-003) */
#define QC_F32 0
#define QC_F16 1
#define QC_BF16 2

#define QC_NF4 0 /* formats of 4-bit weights (QC-NF4-001, QC-FP4-001) */
#define QC_FP4 1

/* kinds of memory for state that may be larger than the device's own */
#define QC_MEMORY_MANAGED 0 /* its pages move to whoever touches them, the host or a device */
#define QC_MEMORY_PINNED 1  /* stays with the host; kernels read and write it there */

/* ops, for workspace() */
#define QC_OP_QUANTIZE_BLOCKWISE 0
#define QC_OP_DEQUANTIZE_BLOCKWISE 1
#define QC_OP_QUANTIZE_4BIT 2
#define QC_OP_DEQUANTIZE_4BIT 3
#define QC_OP_QUANTIZE_ABSMAX 4
#define QC_OP_DEQUANTIZE_ABSMAX 5
#define QC_OP_GEMM_4BIT 6
#define QC_OP_INT8_QUANTIZE_ROWS 7
#define QC_OP_INT8_QUANTIZE_COLS 8
#define QC_OP_INT8_GEMM 9
#define QC_OP_INT8_DEQUANTIZE_GEMM 10
#define QC_OP_INT8_SCALED_GEMM 11
#define QC_OP_INT8_DEQUANTIZE_ROWS 12
#define QC_OP_OPTIMIZER_STEP 13
#define QC_OP_INT8_LINEAR 14
#define QC_OP_GEMM_INT4 15
#define QC_OP_GEMM_4BIT_TRANSPOSED 16
#define QC_OP_INT8_LINEAR_TRANSPOSED 17

/* A 4-bit tensor. With nested_absmax == 0, absmax is float[blocks]; else it is uint8_t[blocks] and the nested
 * fields decode it (QC-NEST-003). The struct lives on the host, is filled once per weight and may be kept. */
typedef struct qc_weight_4bit {
    uintptr_t packed;        /* uint8_t[(numel + 1) / 2], high nibble first (QC-4BIT-002) */
    uintptr_t absmax;        /* blocks = ceil(numel / blocksize) values */
    uintptr_t nested_absmax; /* float[ceil(blocks / nested_blocksize)], or 0 */
    uintptr_t nested_code;   /* float[256] */
    uintptr_t nested_offset; /* float[1] */
    int64_t numel;
    int64_t blocksize;
    int64_t nested_blocksize;
    int32_t format; /* QC_NF4 or QC_FP4 */
    int32_t layout; /* 0: as stored; a library refuses every other with QC_UNSUPPORTED or QC_INVALID_ARGUMENT */
} qc_weight_4bit;

/* A weight of n rows of 4-bit integers, g = ceil(k / group_size) groups a row (QC-INT4-001). Kept likewise. */
typedef struct qc_weight_int4 {
    uintptr_t packed; /* uint8_t[n][(k + 1) / 2], high nibble first */
    uintptr_t scales; /* [n][g] in scale_dtype */
    uintptr_t zeros;  /* uint8_t[n][g]; or 0: every zero point is 8 */
    uintptr_t perm;   /* int32_t[k], a permutation: column j of packed meets column perm[j] of a; or 0 */
    int64_t n, k;
    int64_t group_size; /* a multiple of 8, or k or more */
    int32_t scale_dtype;
    int32_t layout; /* as that of qc_weight_4bit */
} qc_weight_int4;

/* algorithms of optimizer_step (QC-OPT-010..015) */
#define QC_ADAM 0 /* also AdamW and LAMB */
#define QC_ADEMAMIX 1
#define QC_LION 2
#define QC_MOMENTUM 3 /* SGD and LARS */
#define QC_RMSPROP 4
#define QC_ADAGRAD 5
/* flags of optimizer_step */
#define QC_OPT_NESTEROV 1      /* QC_MOMENTUM (QC-OPT-013) */
#define QC_OPT_SKIP_ZEROS 2    /* QC-OPT-005 */
#define QC_OPT_STOCHASTIC 4    /* bfloat16 parameters without compensation (QC-OPT-007) */
#define QC_OPT_BNB_CODES 8     /* QC-OPT-023 */
#define QC_OPT_SIGNED_STATE 16 /* QC_RMSPROP, QC_ADAGRAD (QC-OPT-020) */

/* What a step does to every element; QC-OPT-002 says what the scalars are. */
typedef struct qc_optimizer {
    int32_t algorithm, state_bits, param_dtype, grad_dtype, flags; /* state_bits: 32 (float) or 8 (blocks of 256) */
    float step_size, decay, l2, eps, beta1, gain1, beta2, gain2, beta3, gain3, correction1, correction2, alpha;
    double max_unorm, unorm_factor; /* max_unorm 0: no limit (QC-OPT-008) */
    uint64_t seed;
} qc_optimizer;

/* Host arrays of `count` entries; 0 in place of an array that nobody needs. All tensors but the gradients change. */
typedef struct qc_optimizer_tensors {
    int64_t count;
    const int64_t *numel;
    const uintptr_t *params, *grads; /* in param_dtype, in grad_dtype */
    const uintptr_t *state1;         /* float[numel] or uint8_t[numel]; QC_ADEMAMIX: [2][numel], fast and slow */
    const uintptr_t *state2;         /* QC_ADAM, QC_ADEMAMIX */
    const uintptr_t *absmax1;        /* 8-bit states: float[ceil(numel / 256)]; QC_ADEMAMIX: two rows of that */
    const uintptr_t *absmax2;
    const uintptr_t *compensation; /* in param_dtype, 16 bits; optional (QC-OPT-006) */
    const float *grad_scales;      /* optional, else 1 (QC-OPT-003) */
    const uint64_t *streams;       /* QC_OPT_STOCHASTIC */
} qc_optimizer_tensors;

typedef struct qc_api {
    uint32_t size; /* sizeof(qc_api) of the library */
    uint16_t abi_major;
    uint16_t abi_minor;
    const char *name; /* "cpu", "cuda", ... */

    const char *(*last_error)(void);           /* text of the last error of this thread; "" if none */
    qc_status (*device_count)(int32_t *count); /* QC_NO_DEVICE with the reason and the fix in last_error() */
    /* JSON (UTF-8) that stays valid while the library is loaded: "name", "arch", "driver", "runtime", "torch_device"
     * ("cpu", "cuda"), and "declarations": {"gemm_4bit": {"depth": {"lanes", "extra"}, "weight_rounding"}, ...};
     * d(K) = ceil(K / lanes) + extra (QC-GEMM4-002). {op: {"deterministic": false}} admits QC-NUM-007's exception. */
    qc_status (*describe)(int32_t device, const char **json);
    /* Bytes of scratch that op needs for these sizes (GEMM: M, N, K; others: rows, columns, 0). */
    qc_status (*workspace)(int32_t op, int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           int64_t *bytes);

    /* QC-Q8-001..004: a[n] in dtype, code float[256] -> absmax float[ceil(n/blocksize)], out uint8_t[n]. */
    qc_status (*quantize_blockwise)(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t code,
                                    int64_t n, int64_t blocksize, uintptr_t absmax, uintptr_t out);
    /* QC-Q8-005: a uint8_t[n] -> out[n] in dtype. */
    qc_status (*dequantize_blockwise)(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                                      uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out);
    /* QC-4BIT-001..002: a[n] in dtype -> absmax float[ceil(n/blocksize)], out uint8_t[(n+1)/2]. */
    qc_status (*quantize_4bit)(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                               int64_t blocksize, uintptr_t absmax, uintptr_t out);
    /* QC-4BIT-003: w -> out[w->numel] in dtype. */
    qc_status (*dequantize_4bit)(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w,
                                 uintptr_t out);
    /* QC-NEST-001..002: absmax float[n] -> out uint8_t[n], nested_absmax float[ceil(n/blocksize)], offset float[1]. */
    qc_status (*quantize_absmax)(int32_t device, uintptr_t stream, uintptr_t absmax, uintptr_t code, int64_t n,
                                 int64_t blocksize, uintptr_t out, uintptr_t nested_absmax, uintptr_t offset);
    /* QC-NEST-003: a uint8_t[n] -> out float[n]. */
    qc_status (*dequantize_absmax)(int32_t device, uintptr_t stream, uintptr_t a, uintptr_t nested_absmax,
                                   uintptr_t code, uintptr_t offset, int64_t n, int64_t blocksize, uintptr_t out);
    /* QC-GEMM4-001..007: a[m,k], w (numel = n*k), bias[n] in bias_dtype or 0 -> out[m,n]; a and out in dtype. */
    qc_status (*gemm_4bit)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out,
                           uintptr_t workspace, int64_t workspace_bytes);

    /* QC-INT8-001..003: a[m,k] in dtype -> out int8_t[m,k], row_stats float[m], outlier_cols uint8_t[k] (0 allowed
     * when threshold is 0). */
    qc_status (*int8_quantize_rows)(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                                    float threshold, uintptr_t out, uintptr_t row_stats, uintptr_t outlier_cols);
    /* QC-INT8-004: a[m,k] in dtype -> out int8_t[m,k], col_stats float[k]. */
    qc_status (*int8_quantize_cols)(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                                    float threshold, uintptr_t out, uintptr_t col_stats);
    /* QC-INT8-005: a int8_t[m,k], b int8_t[n,k] -> out int32_t[m,n]. */
    qc_status (*int8_gemm)(int32_t device, uintptr_t stream, int64_t m, int64_t n, int64_t k, uintptr_t a, uintptr_t b,
                           uintptr_t out, uintptr_t workspace, int64_t workspace_bytes);
    /* QC-INT8-006: c int32_t[m,n], row_stats float[m], col_stats float[n], bias[n] or 0 -> out[m,n] in dtype. */
    qc_status (*int8_dequantize_gemm)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n,
                                      uintptr_t c, uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype,
                                      uintptr_t bias, uintptr_t out);
    /* QC-INT8-007: the two above in one. */
    qc_status (*int8_scaled_gemm)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                  uintptr_t a, uintptr_t b, uintptr_t row_stats, uintptr_t col_stats,
                                  int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                                  int64_t workspace_bytes);
    /* QC-INT8-008: a int8_t[m,k], row_stats float[m] -> out[m,k] in dtype. */
    qc_status (*int8_dequantize_rows)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t k,
                                      uintptr_t a, uintptr_t row_stats, uintptr_t out);

    /* QC-OPT-001..023: one step on many tensors, in place. The structs and arrays are read before the call returns.
     * workspace(): m = sum of ceil(numel / 256), n = count; with max_unorm 0 none is needed. */
    qc_status (*optimizer_step)(int32_t device, uintptr_t stream, const qc_optimizer *optimizer,
                                const qc_optimizer_tensors *tensors, uintptr_t workspace, int64_t workspace_bytes);
    /* QC-INT8-010: a[m,k] in dtype, b int8_t[n,k], col_stats float[n] -> out[m,n] in dtype; with threshold 0
     * outliers uint8_t[k] is not touched. */
    qc_status (*int8_linear)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                             uintptr_t a, uintptr_t b, uintptr_t col_stats, float threshold, int32_t bias_dtype,
                             uintptr_t bias, uintptr_t out, uintptr_t outliers, uintptr_t workspace,
                             int64_t workspace_bytes);
    /* QC-INT4-001..008: as gemm_4bit with a weight in groups. workspace() says what a weight without perm needs; one
     * with perm needs m * k elements of dtype more, in bytes rounded up to a multiple of 64 (QC-INT4-003). */
    qc_status (*gemm_int4)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, const qc_weight_int4 *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out,
                           uintptr_t workspace, int64_t workspace_bytes);
    /* QC-GEMM4-008..012: a[m,n], w (numel = n*k) -> out[m,k] = a w; a and out in dtype. */
    qc_status (*gemm_4bit_transposed)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                      uintptr_t a, const qc_weight_4bit *w, uintptr_t out, uintptr_t workspace,
                                      int64_t workspace_bytes);
    /* QC-INT8-011..015: a[m,n], b int8_t[n,k], col_stats float[n] -> out[m,k] = a w; a and out in dtype. */
    qc_status (*int8_linear_transposed)(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n,
                                        int64_t k, uintptr_t a, uintptr_t b, uintptr_t col_stats, uintptr_t out,
                                        uintptr_t workspace, int64_t workspace_bytes);

    /* QC-MEM-001, -005: memory for paged state, all four functions or none. The kind that suits a device. */
    qc_status (*memory_kind)(int32_t device, int32_t *kind);
    /* QC-MEM-002: bytes > 0, at a multiple of 64, with any contents. QC_UNSUPPORTED: the device does not have this
     * kind. May wait for the device. */
    qc_status (*memory_allocate)(int32_t device, int32_t kind, int64_t bytes, uintptr_t *address);
    /* QC-MEM-004: gives back what memory_allocate gave, when the device has done all that was queued before; any thread
     * may call it, whichever device is current, and while a graph is captured. Nothing happens to address 0. */
    qc_status (*memory_free)(int32_t device, int32_t kind, uintptr_t address);
    /* QC-MEM-003: begins to move a piece of such memory to the device or, if to_host is 1, to the host, in the order of
     * `stream`; pinned memory stays where it is. For speed only: contents do not change. */
    qc_status (*memory_prefetch)(int32_t device, uintptr_t stream, int32_t kind, uintptr_t address, int64_t bytes,
                                 int32_t to_host);
} qc_api;

/* The library's only export. NULL if it cannot serve this major version. */
const qc_api *qcore_backend_open(uint32_t abi_major);

#ifdef __cplusplus
}
#endif
#endif /* QCORE_BACKEND_H */
