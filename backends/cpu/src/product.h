// How a matrix product X W^T is cut into chunks, and where its scratch comes from; the same for gemm_4bit and int8.
//
// Rows of X are taken kRows at a time. For each such part, X may first be packed, in groups of kGroup rows; then ranges
// of columns are computed. Groups and ranges are independent of each other, and no result depends on the cuts
// (QC-NUM-007).
#ifndef QCORE_CPU_PRODUCT_H
#define QCORE_CPU_PRODUCT_H

#include <cstdint>

#include "abi.h"
#include "chunks.h"
#include "parallel.h"

namespace qcore::cpu {

constexpr int64_t kScratchAlign = 64;
constexpr int64_t kApart = 2048;  // between what two threads write: a processor fetches the next lines too
// A call that needs no more than this takes it from its stack: a 4-bit product of 64 columns, K = 384 and eight rows
// does. To bring a workspace costs a caller in Python as much time as such a product itself takes.
constexpr int64_t kScratchOnStack = 128 << 10;

inline int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

// Of a 4-bit weight: to decode it, and to multiply it by each row.
inline double nanoseconds_of_4bits(int64_t rows) { return 0.1 + 0.02 * static_cast<double>(rows); }

// Scratch: the packed X, then a part for each thread, which computes one range of columns after the other in it.
struct ProductPlan {
    int64_t rows;     // of X at a time
    int64_t columns;  // of a range
    int64_t ranges;
    int64_t parts;  // ranges that are computed at a time, at most
    int64_t packed_bytes;
    int64_t range_bytes;

    // `nanoseconds`: of an element of W, for `rows` rows of X, on one thread.
    template <class Problem, class Kernels>
    ProductPlan(const Problem &p, const Kernels &kernels, double (*nanoseconds)(int64_t rows), int64_t threads)
        : rows(p.m < Kernels::kRows ? p.m : Kernels::kRows) {
        const double work = static_cast<double>(p.k + 1) * nanoseconds(rows);
        columns = range_length(p.n, Kernels::kColumns, work, threads);
        ranges = ceil_div(p.n, columns);
        parts = ranges < threads ? ranges : threads;
        packed_bytes = round_up(kernels.packed_bytes(p, rows), kScratchAlign);
        range_bytes = round_up(kernels.scratch_bytes(p, rows, columns), kScratchAlign) + kApart;
    }

    int64_t bytes() const { return packed_bytes + parts * range_bytes; }
    // What the caller has to bring.
    int64_t workspace_bytes() const { return bytes() <= kScratchOnStack ? 0 : bytes() + kScratchAlign; }
};

template <class Problem, class Kernels>
void run_product(const Problem &p, const Kernels &kernels, const ProductPlan &plan, int64_t threads, char *scratch) {
    constexpr double kPackNanoseconds = 0.1;
    char *parts = scratch + plan.packed_bytes;
    for (int64_t row0 = 0; row0 < p.m; row0 += plan.rows) {
        const int64_t rows = row0 + plan.rows < p.m ? plan.rows : p.m - row0;
        if (plan.packed_bytes > 0) {
            const double work = kPackNanoseconds * static_cast<double>(Kernels::kGroup * p.k);
            parallel_ranges(ceil_div(rows, Kernels::kGroup), 1, work, threads, [&](int64_t first, int64_t end) {
                for (int64_t group = first; group < end; ++group) {
                    kernels.pack(p, row0, rows, group, scratch);
                }
            });
        }
        parallel_for_members(plan.ranges, threads, [&](int64_t range, int64_t member) {
            const int64_t n0 = range * plan.columns;
            const int64_t n1 = n0 + plan.columns < p.n ? n0 + plan.columns : p.n;
            kernels.multiply(p, row0, rows, n0, n1, scratch, parts + member * plan.range_bytes);
        });
    }
}

// The same with scratch from the stack or, if that is too small, from the caller, whose workspace is checked.
template <class Problem, class Kernels>
qc_status run_product(const char *op, const Problem &p, const Kernels &kernels, const ProductPlan &plan,
                      int64_t threads, uintptr_t workspace, int64_t workspace_bytes) {
    const int64_t needed = plan.workspace_bytes();
    if (needed == 0) {
        alignas(kScratchAlign) char scratch[kScratchOnStack];
        run_product(p, kernels, plan, threads, scratch);
        return QC_OK;
    }
    if (workspace == 0 || workspace_bytes < needed) {
        return fail(QC_INVALID_ARGUMENT, "%s: workspace: expected %lld bytes, got %lld at 0x%llx", op,
                    static_cast<long long>(needed), static_cast<long long>(workspace_bytes),
                    static_cast<unsigned long long>(workspace));
    }
    const uintptr_t aligned = (workspace + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
    run_product(p, kernels, plan, threads, pointer<char>(aligned));
    return QC_OK;
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_PRODUCT_H
