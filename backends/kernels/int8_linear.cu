// LLM.int8() in one call (QC-INT8-010): A in floats times the rows of B in int8, outlier columns in floats.
//
// Memory picture. A is read as in int8_quantize.cu and its codes, a byte an element, go to scratch; the product then is
// int8_gemm.cu's, whose floor is N * K bytes of B for few rows of A and the matrix units' rate for many. Its epilogue
// adds the outlier columns to sums that are still on the chip: an element of A and a weight for each column and output.
// With few rows of A a weight comes from the row of B that the product has just read; with many, a kernel before it
// writes the weights of the first columns as floats, N neighbours each, so that the epilogue reads whole cache lines.
// The kernel that clears the codes of outlier columns also lists them.
#include "host/arguments.h"
#include "host/ops.h"
#include "int8_parts.h"
#include "scale.cuh"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "int8_linear";
constexpr int kThreads = 256;
constexpr int64_t kMaxK = 131071;      // QC-INT8-005
constexpr int64_t kFewRows = 4;        // of A: then weights are not written out
constexpr int32_t kMostExpanded = 64;  // columns
constexpr int64_t kColumnsAtOnce = 8;

QC_KERNEL(kThreads)
expand_kernel(const OutlierColumns *list, const int8_t *b, const float *col_stats, int64_t n, int64_t k,
              float *weights) {
    const int64_t row = block_index_x() * kThreads + thread_index();
    const int32_t count = list->count < kMostExpanded ? list->count : kMostExpanded;
    if (row >= n) {
        return;
    }
    for (int64_t j = block_index_y(); j < count; j += block_count_y()) {
        weights[j * n + row] = int8_weight(b[row * k + list->column[j]], col_stats[row]);
    }
}

// Where the parts of the scratch begin, in bytes.
struct Layout {
    int64_t row_stats, list, weights, partial, bytes;

    Layout(int32_t device, int64_t m, int64_t n, int64_t k)
        : row_stats(up(m * k)),
          list(up(row_stats + m * static_cast<int64_t>(sizeof(float)))),
          weights(up(list + OutlierColumns::bytes(k))),
          partial(up(weights + (expands(m) ? kMostExpanded * n * static_cast<int64_t>(sizeof(float)) : 0))),
          bytes(partial + linear_product_bytes(device, m, n, k)) {}

    static bool expands(int64_t m) { return m > kFewRows; }
    static int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

Arguments check_sizes(const char *op, int32_t device, Arguments::Starts starts, int32_t dtype, int64_t m, int64_t n,
                      int64_t k) {
    Arguments arguments(op, device, starts);
    arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k).at_most("k", k, kMaxK);
    arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
    return arguments;
}

int64_t workspace_bytes_of(int32_t device, int64_t m, int64_t n, int64_t k) {
    return m == 0 ? 0 : Layout(device, m, n, k).bytes;
}

}  // namespace

qc_status int8_linear_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    const Arguments arguments = check_sizes("workspace", device, Arguments::Starts::nothing, dtype, m, n, k);
    if (arguments.ok()) {
        *bytes = workspace_bytes_of(device, m, n, k);
    }
    return arguments.status();
}

qc_status int8_linear(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                      uintptr_t b, uintptr_t col_stats, float threshold, int32_t bias_dtype, uintptr_t bias,
                      uintptr_t out, uintptr_t outliers, uintptr_t workspace, int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, Arguments::Starts::kernels, dtype, m, n, k);
        arguments.array("a", a, elements(m, k), dtype_size(dtype)).array("b", b, elements(n, k), 1);
        arguments.array("col_stats", col_stats, n, sizeof(float)).threshold("threshold", threshold);
        arguments.bias(bias_dtype, bias, dtype, n).array("out", out, elements(m, n), dtype_size(dtype));
        const bool outlying = threshold > 0.0f;
        if (outlying) {
            arguments.array("outliers", outliers, k, 1);
        }
        if (!arguments.ok()) {
            return arguments.status();
        }
        const int64_t needed = workspace_bytes_of(device, m, n, k);
        if (!arguments.workspace(workspace, workspace_bytes, needed).ok()) {
            return arguments.status();
        }
        const Layout layout(device, m, n, k);
        auto *codes = pointer<int8_t>(workspace);
        auto *row_stats = pointer<float>(workspace + static_cast<uintptr_t>(layout.row_stats));
        auto *list =
            outlying && k > 0 ? pointer<OutlierColumns>(workspace + static_cast<uintptr_t>(layout.list)) : nullptr;
        auto *weights = pointer<float>(workspace + static_cast<uintptr_t>(layout.weights));
        Queue queue(kOp, device, stream);
        qc_status status = quantize_rows(queue, dtype, a, m, k, threshold, codes, row_stats,
                                         outlying ? pointer<uint8_t>(outliers) : nullptr, list);
        if (status != QC_OK || m == 0 || n == 0) {
            return status;
        }
        const bool expands = list != nullptr && Layout::expands(m);
        if (expands) {
            status = queue.launch(expand_kernel, {ceil_div(n, kThreads), kColumnsAtOnce}, kThreads, list,
                                  pointer<const int8_t>(b), pointer<const float>(col_stats), n, k, weights);
        }
        if (status != QC_OK) {
            return status;
        }
        auto *partial = pointer<int32_t>(workspace + static_cast<uintptr_t>(layout.partial));
        return linear_product(queue, device,
                              {dtype, m, n, k, codes, row_stats, a, b, col_stats, bias_dtype, bias, out, list, weights,
                               expands ? kMostExpanded : 0, partial});
    });
}

}  // namespace qcore::gpu
