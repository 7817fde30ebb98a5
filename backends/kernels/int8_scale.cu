// int8 results back to floats (docs/spec/50-int8.md, QC-INT8-006 and QC-INT8-008).
//
// Memory picture. dequantize_gemm: 4 bytes of sum read and 2 or 4 written an element; row_stats, col_stats and bias are
// read again for each row and column but stay in L1 and L2. dequantize_rows: 1 byte read, 2 or 4 written. The floor of
// both is those bytes at copy bandwidth. A row is cut into pieces of 2048, eight elements a thread.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "scale.cuh"

namespace qcore::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8 * kThreads;

struct EightSums {
    int32_t value[8];
};

// The sums c[0] to c[count - 1], zeros after them.
QC_DEVICE EightSums load_eight_sums(const int32_t *c, int64_t count, bool aligned) {
    EightSums out;
    if (aligned && count >= 8) {
        const Vector16 a = load16_once(c), b = load16_once(c + 4);
        const uint32_t word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out.value[i] = static_cast<int32_t>(word[i]);
        }
        return out;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out.value[i] = i < count ? c[i] : 0;
    }
    return out;
}

template <class T>
QC_KERNEL(kThreads)
dequantize_gemm_kernel(const int32_t *c, int64_t m, int64_t n, const float *row_stats, const float *col_stats,
                       Bias<T> bias, T *out, bool c_aligned, bool out_aligned) {
    const int64_t pieces = (n + kPiece - 1) / kPiece;
    for (int64_t i = block_index_x(); i < m * pieces; i += block_count_x()) {
        const int64_t row = i / pieces, column = i % pieces * kPiece + 8 * thread_index(), count = n - column;
        if (count <= 0) {
            continue;
        }
        const float row_stat = row_stats[row];
        const EightSums sums = load_eight_sums(c + row * n + column, count, c_aligned);
        Eight values;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            values.value[j] =
                j < count ? scaled_sum<T>(sums.value[j], row_stat, col_stats[column + j], bias, column + j) : 0.0f;
        }
        store_eight<T>(out + row * n + column, values, count, out_aligned);
    }
}

template <class T>
QC_KERNEL(kThreads)
dequantize_rows_kernel(const int8_t *a, int64_t m, int64_t k, const float *row_stats, T *out, bool a_aligned,
                       bool out_aligned) {
    const int64_t pieces = (k + kPiece - 1) / kPiece;
    for (int64_t i = block_index_x(); i < m * pieces; i += block_count_x()) {
        const int64_t row = i / pieces, column = i % pieces * kPiece + 8 * thread_index(), count = k - column;
        if (count <= 0) {
            continue;
        }
        const EightBytes codes =
            load_eight_bytes(reinterpret_cast<const uint8_t *>(a) + row * k + column, count, a_aligned);
        const float row_stat = row_stats[row];
        Eight values;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float code = static_cast<float>(static_cast<int8_t>(codes.byte(j)));
            values.value[j] = code * row_stat * 0x1.020408p-7f;
        }
        store_eight<T>(out + row * k + column, values, count, out_aligned);
    }
}

}  // namespace

qc_status int8_dequantize_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, uintptr_t c,
                               uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype, uintptr_t bias,
                               uintptr_t out) {
    constexpr char kOp[] = "int8_dequantize_gemm";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).extent("m, n", m, n);
        arguments.array("c", c, elements(m, n), sizeof(int32_t)).array("row_stats", row_stats, m, sizeof(float));
        arguments.array("col_stats", col_stats, n, sizeof(float)).bias(bias_dtype, bias, dtype, n);
        arguments.array("out", out, elements(m, n), dtype_size(dtype));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            return queue.launch(dequantize_gemm_kernel<T>, {queue.resident_blocks(m * ceil_div(n, kPiece), 1)},
                                kThreads, pointer<const int32_t>(c), m, n, pointer<const float>(row_stats),
                                pointer<const float>(col_stats), bias_view<T>(bias_dtype, bias), pointer<T>(out),
                                n % 8 == 0 && aligned(c, 16), n % 8 == 0 && aligned(out, 16));
        });
    });
}

qc_status int8_dequantize_rows(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t k, uintptr_t a,
                               uintptr_t row_stats, uintptr_t out) {
    constexpr char kOp[] = "int8_dequantize_rows";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("k", k).extent("m, k", m, k);
        arguments.array("a", a, elements(m, k), 1).array("row_stats", row_stats, m, sizeof(float));
        arguments.array("out", out, elements(m, k), dtype_size(dtype));
        if (!arguments.ok() || m == 0 || k == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            return queue.launch(dequantize_rows_kernel<T>, {queue.resident_blocks(m * ceil_div(k, kPiece), 1)},
                                kThreads, pointer<const int8_t>(a), m, k, pointer<const float>(row_stats),
                                pointer<T>(out), k % 8 == 0 && aligned(a, 8), k % 8 == 0 && aligned(out, 16));
        });
    });
}

}  // namespace qcore::gpu
