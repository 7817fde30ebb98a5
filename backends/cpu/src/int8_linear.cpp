// int8_linear: LLM.int8() in one call (QC-INT8-010).
//
// Memory picture: A is read once and its codes, a byte an element, are written to scratch; then the int8 product reads
// them and B, as in int8_gemm_kernels.cpp. Its epilogue adds the outlier columns to the scaled sums while they are
// still in registers or L1. For a few rows of A the weights of those columns are read from the rows of B that the
// product has just read; for many they are written out as floats first, a row of N for each of the first columns. Floor
// at few rows: N * K bytes of B; at many: the matrix unit.
#include "abi.h"
#include "dispatch.h"
#include "int8_kernels.h"
#include "int8_product.h"
#include "ops.h"

namespace qcore::cpu {
namespace {

constexpr char kOp[] = "int8_linear";
constexpr int64_t kFewRows = 4;              // of A: then the weights of outlier columns are read from B
constexpr int64_t kExpandedBytes = 4 << 20;  // at most, for the weights of outlier columns
constexpr double kExpandNanoseconds = 1.0;   // an element

// Where the parts of the scratch begin.
struct Layout {
    ProductPlan plan;
    int64_t most_expanded;
    int64_t codes, row_stats, columns, weights, bytes;

    Layout(const Int8Gemm &p, int64_t threads) : plan(plan_int8_product(p, threads)) {
        // p.n is at least 1 here: without outputs nothing is laid out.
        const int64_t fit = kExpandedBytes / (p.n * static_cast<int64_t>(sizeof(float)));
        const int64_t most = p.k < Int8Outliers::kMostExpanded ? p.k : Int8Outliers::kMostExpanded;
        most_expanded = p.m <= kFewRows ? 0 : fit < most ? fit : most;
        codes = round_up(plan.bytes(), kScratchAlign);
        row_stats = round_up(codes + p.m * p.k, kScratchAlign);
        columns = round_up(row_stats + p.m * static_cast<int64_t>(sizeof(float)), kScratchAlign);
        weights = round_up(columns + p.k * static_cast<int64_t>(sizeof(int32_t)), kScratchAlign);
        bytes = weights + most_expanded * p.n * static_cast<int64_t>(sizeof(float));
    }

    int64_t workspace_bytes() const { return bytes <= kScratchOnStack ? 0 : bytes + kScratchAlign; }
};

Arguments check_sizes(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k) {
    Arguments arguments(kOp, device);
    arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k).at_most("k", k, kMaxInt8K);
    arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
    return arguments;
}

Int8Gemm problem(int64_t m, int64_t n, int64_t k, uintptr_t b) {
    Int8Gemm p = {};
    p.m = m;
    p.n = n;
    p.k = k;
    p.b = pointer<const int8_t>(b);
    return p;
}

// The weights of the first outlier columns as float32 (QC-INT8-008), one row of N each.
void expand(const Int8Outliers &o, const float *col_stats, int64_t threads, float *weights) {
    const double work = kExpandNanoseconds * static_cast<double>(o.expanded);
    parallel_ranges(o.n, 16, work, threads, [&](int64_t first, int64_t end) {
        for (int64_t r = first; r < end; ++r) {
            const int8_t *b = o.b + r * o.k;
            for (int64_t j = 0; j < o.expanded; ++j) {
                weights[j * o.n + r] = static_cast<float>(b[o.columns[j]]) * col_stats[r] * kInt8Reciprocal;
            }
        }
    });
}

int64_t list_columns(const uint8_t *outliers, int64_t k, int32_t *columns) {
    int64_t count = 0;
    for (int64_t i = 0; i < k; ++i) {
        columns[count] = static_cast<int32_t>(i);
        count += outliers[i];
    }
    return count;
}

void run(Int8Gemm p, Int8Scaling scaling, const void *a, float threshold, uint8_t *found, int64_t threads,
         const Layout &layout, char *scratch) {
    auto *codes = reinterpret_cast<int8_t *>(scratch + layout.codes);
    auto *row_stats = reinterpret_cast<float *>(scratch + layout.row_stats);
    auto *columns = reinterpret_cast<int32_t *>(scratch + layout.columns);
    auto *weights = reinterpret_cast<float *>(scratch + layout.weights);
    const bool any = quantize_int8_rows(scaling.dtype, a, p.m, p.k, threshold, threads, codes, row_stats, found);
    Int8Outliers outliers = {};
    if (any) {
        outliers.count = list_columns(found, p.k, columns);
        outliers.columns = columns;
        outliers.expanded = outliers.count < layout.most_expanded ? outliers.count : layout.most_expanded;
        outliers.weights = weights;
        outliers.a = a;
        outliers.b = p.b;
        outliers.n = p.n;
        outliers.k = p.k;
        if (outliers.expanded > 0) {
            expand(outliers, scaling.col_stats, threads, weights);
        }
        scaling.outliers = &outliers;
    }
    scaling.row_stats = row_stats;
    p.a = codes;
    p.scaling = &scaling;
    run_int8_product(p, layout.plan, threads, scratch);
}

}  // namespace

qc_status int8_linear_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    const Arguments arguments = check_sizes(0, dtype, m, n, k);
    if (!arguments.ok()) {
        return arguments.status();
    }
    *bytes = m == 0 || n == 0 ? 0 : Layout(problem(m, n, k, 0), thread_limit(stream)).workspace_bytes();
    return QC_OK;
}

qc_status int8_linear(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                      uintptr_t b, uintptr_t col_stats, float threshold, int32_t bias_dtype, uintptr_t bias,
                      uintptr_t out, uintptr_t outliers, uintptr_t workspace, int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(device, dtype, m, n, k);
        arguments.matrix("a", a, m, k, dtype_size(dtype)).matrix("b", b, n, k, 1);
        arguments.array("col_stats", col_stats, n, sizeof(float)).threshold("threshold", threshold);
        arguments.bias(bias_dtype, bias, dtype, n).matrix("out", out, m, n, dtype_size(dtype));
        if (threshold > 0.0f) {
            arguments.array("outliers", outliers, k, 1);
        }
        if (!arguments.ok()) {
            return arguments.status();
        }
        auto *found = pointer<uint8_t>(outliers);
        if (m == 0 || n == 0) {  // no product, but A may still have outliers
            find_int8_outliers(dtype, pointer<const void>(a), m, k, threshold, found);
            return QC_OK;
        }
        const int64_t threads = thread_limit(stream);
        const Int8Gemm p = problem(m, n, k, b);
        const Int8Scaling scaling = {
            dtype, bias_dtype, nullptr, pointer<const float>(col_stats), pointer<const void>(bias), pointer<void>(out)};
        const Layout layout(p, threads);
        const int64_t needed = layout.workspace_bytes();
        if (needed == 0) {
            alignas(kScratchAlign) char scratch[kScratchOnStack];
            run(p, scaling, pointer<const void>(a), threshold, found, threads, layout, scratch);
            return QC_OK;
        }
        if (workspace == 0 || workspace_bytes < needed) {
            return fail(QC_INVALID_ARGUMENT, "%s: workspace: expected %lld bytes, got %lld at 0x%llx", kOp,
                        static_cast<long long>(needed), static_cast<long long>(workspace_bytes),
                        static_cast<unsigned long long>(workspace));
        }
        const uintptr_t aligned = (workspace + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
        run(p, scaling, pointer<const void>(a), threshold, found, threads, layout, pointer<char>(aligned));
        return QC_OK;
    });
}

}  // namespace qcore::cpu
