// The int8 ops but for the products: checks and how rows and columns are shared out. int8_kernels.cpp computes.
#include <cstring>
#include <initializer_list>

#include "abi.h"
#include "chunks.h"
#include "dispatch.h"
#include "int8_kernels.h"
#include "int8_product.h"
#include "ops.h"
#include "pages.h"

namespace qcore::cpu {
namespace {

// Rough costs of an element in nanoseconds on one thread.
constexpr double kQuantize = 0.2;
constexpr double kDequantize = 0.15;

const Int8Kernels &kernels() {
    static const Int8Kernels &selected = select<Int8Kernels>({
        {Isa::portable, &portable::int8_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::int8_kernels},
        {Isa::avx512, &avx512::int8_kernels},
#endif
    });
    return selected;
}

}  // namespace

void find_int8_outliers(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, uint8_t *outliers) {
    if (threshold == 0.0f || k == 0) {
        return;
    }
    std::memset(outliers, 0, static_cast<size_t>(k));
    for (int64_t r = 0; r < m; ++r) {
        kernels().row_stat(dtype, static_cast<const char *>(a) + r * k * dtype_size(dtype), k, threshold, outliers);
    }
}

bool quantize_int8_rows(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, int64_t threads,
                        int8_t *codes, float *row_stats, uint8_t *outliers) {
    const bool looks = threshold > 0.0f && k > 0;
    if (looks) {
        std::memset(outliers, 0, static_cast<size_t>(k));
    }
    const int64_t row_bytes = k * dtype_size(dtype);
    const double work = kQuantize * static_cast<double>(k);
    parallel_ranges(m, 1, work, threads, [&](int64_t first, int64_t end) {
        for (int64_t r = first; r < end; ++r) {
            const void *x = static_cast<const char *>(a) + r * row_bytes;
            row_stats[r] = kernels().row_stat(dtype, x, k, threshold, outliers);
            kernels().row_codes(dtype, x, k, row_stats[r], codes + r * k);
        }
    });
    // Only now is every outlier column known (QC-INT8-003).
    if (!looks) {
        return false;
    }
    constexpr int64_t kFew = 64;  // columns that are cleared one by one: activations have some, or none
    int64_t columns[kFew];
    int64_t found = 0;
    for (int64_t i = 0; found <= kFew; ++i, ++found) {
        const void *next = i < k ? std::memchr(outliers + i, 1, static_cast<size_t>(k - i)) : nullptr;
        if (next == nullptr) {
            break;
        }
        i = static_cast<const uint8_t *>(next) - outliers;
        if (found < kFew) {
            columns[found] = i;
        }
    }
    if (found <= kFew) {
        for (int64_t r = 0; found > 0 && r < m; ++r) {
            for (int64_t j = 0; j < found; ++j) {
                codes[r * k + columns[j]] = 0;
            }
        }
        return found > 0;
    }
    parallel_ranges(m, 1, work / 8, threads, [&](int64_t first, int64_t end) {
        for (int64_t r = first; r < end; ++r) {
            kernels().clear_outliers(outliers, k, codes + r * k);
        }
    });
    return true;
}

qc_status int8_quantize_rows(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                             float threshold, uintptr_t out, uintptr_t row_stats, uintptr_t outlier_cols) {
    constexpr char kOp[] = "int8_quantize_rows";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("k", k).extent("m, k", m, k);
        arguments.threshold("threshold", threshold).matrix("a", a, m, k, dtype_size(dtype));
        arguments.matrix("out", out, m, k, 1).array("row_stats", row_stats, m, sizeof(float));
        if (threshold > 0.0f) {
            arguments.array("outlier_cols", outlier_cols, k, 1);
        }
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (threshold == 0.0f && outlier_cols != 0 && k > 0) {
            std::memset(pointer<uint8_t>(outlier_cols), 0, static_cast<size_t>(k));
        }
        prefer_huge_pages(out, m * k);
        quantize_int8_rows(dtype, pointer<const void>(a), m, k, threshold, thread_limit(stream), pointer<int8_t>(out),
                           pointer<float>(row_stats), pointer<uint8_t>(outlier_cols));
        return QC_OK;
    });
}

qc_status int8_quantize_cols(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                             float threshold, uintptr_t out, uintptr_t col_stats) {
    constexpr char kOp[] = "int8_quantize_cols";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("k", k).extent("m, k", m, k);
        arguments.threshold("threshold", threshold).matrix("a", a, m, k, dtype_size(dtype));
        arguments.matrix("out", out, m, k, 1).array("col_stats", col_stats, k, sizeof(float));
        if (!arguments.ok()) {
            return arguments.status();
        }
        const double work = kQuantize * static_cast<double>(m + 1);
        prefer_huge_pages(out, m * k);
        // Each thread takes as many neighbours as it can: a row of its columns is what it reads in one go.
        const int64_t threads = thread_limit(stream);
        const int64_t unit = ceil_div(ceil_div(k, threads), 64) * 64;
        parallel_ranges(k, k < 64 * threads ? 64 : unit, work, threads, [&](int64_t first, int64_t end) {
            // Each starts with another row, or all would meet in each new huge page of a fresh output (parallel.h).
            const int64_t start = first / unit * (m / ceil_div(k, unit));
            kernels().columns(dtype, pointer<const void>(a), m, k, threshold, first, end, start, pointer<int8_t>(out),
                              pointer<float>(col_stats));
        });
        return QC_OK;
    });
}

qc_status int8_dequantize_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, uintptr_t c,
                               uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype, uintptr_t bias,
                               uintptr_t out) {
    constexpr char kOp[] = "int8_dequantize_gemm";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).extent("m, n", m, n);
        arguments.matrix("c", c, m, n, sizeof(int32_t)).array("row_stats", row_stats, m, sizeof(float));
        arguments.array("col_stats", col_stats, n, sizeof(float)).bias(bias_dtype, bias, dtype, n);
        arguments.matrix("out", out, m, n, dtype_size(dtype));
        if (!arguments.ok() || n == 0) {
            return arguments.status();
        }
        const Int8Scaling scaling = {dtype,
                                     bias_dtype,
                                     pointer<const float>(row_stats),
                                     pointer<const float>(col_stats),
                                     pointer<const void>(bias),
                                     pointer<void>(out)};
        const double work = kDequantize * static_cast<double>(n);
        prefer_huge_pages(out, m * n * dtype_size(dtype));
        parallel_ranges(m, 1, work, thread_limit(stream), [&](int64_t first, int64_t end) {
            for (int64_t r = first; r < end; ++r) {
                kernels().scale_row(scaling, pointer<const int32_t>(c) + r * n, r, n, 0, n);
            }
        });
        return QC_OK;
    });
}

qc_status int8_dequantize_rows(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t k, uintptr_t a,
                               uintptr_t row_stats, uintptr_t out) {
    constexpr char kOp[] = "int8_dequantize_rows";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("k", k).extent("m, k", m, k);
        arguments.matrix("a", a, m, k, 1).array("row_stats", row_stats, m, sizeof(float));
        arguments.matrix("out", out, m, k, dtype_size(dtype));
        if (!arguments.ok()) {
            return arguments.status();
        }
        const double work = kDequantize * static_cast<double>(k);
        const bool past_caches = writes_past_caches(out, m * k * dtype_size(dtype));
        prefer_huge_pages(out, m * k * dtype_size(dtype));
        parallel_ranges(m, 1, work, thread_limit(stream), [&](int64_t first, int64_t end) {
            kernels().dequantize_rows(dtype, pointer<const int8_t>(a) + first * k,
                                      pointer<const float>(row_stats) + first, end - first, k, past_caches,
                                      pointer<char>(out) + first * k * dtype_size(dtype));
        });
        return QC_OK;
    });
}

}  // namespace qcore::cpu
