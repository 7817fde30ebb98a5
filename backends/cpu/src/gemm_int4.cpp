// gemm_int4: its weight and the order of the columns. product_op.h checks the rest, gemm_int4_kernels.cpp computes.
#include "chunks.h"
#include "int4_checks.h"
#include "ops.h"
#include "product_op.h"

namespace qcore::cpu {
namespace {

const GemmInt4Kernels &kernels() {
    static const GemmInt4Kernels &selected = QC_SELECT_PRODUCT(gemm_int4_kernels);
    return selected;
}

constexpr ProductOp<GemmInt4> kOp("gemm_int4", kernels, nanoseconds_of_4bits);

// Every difference of a code and a zero point: q - z at [16 * z + q].
const float *grid() {
    struct Grid {
        alignas(64) float value[256 * 16];
        Grid() {
            for (int i = 0; i < 256 * 16; ++i) {
                value[i] = static_cast<float>(i % 16 - i / 16);
            }
        }
    };
    static const Grid grid;
    return grid.value;
}

Int4Weight weight_of(const qc_weight_int4 &w) {
    Int4Weight weight = {};
    weight.packed = pointer<const uint8_t>(w.packed);
    weight.scales = pointer<const void>(w.scales);
    weight.zeros = pointer<const uint8_t>(w.zeros);
    weight.scale_dtype = w.scale_dtype;
    weight.groups = ceil_div(w.k, w.group_size);
    weight.group_size = weight.groups == 1 ? w.k : w.group_size;
    weight.row_bytes = ceil_div(w.k, 2);
    weight.grid = grid();
    return weight;
}

// Columns of X in the order of the packed weight (QC-INT4-003).
template <class Element>
void gather(const ProductOf4Bits &p, const int32_t *perm, int64_t threads, Element *out) {
    const auto *x = static_cast<const Element *>(p.x);
    parallel_ranges(p.m, 1, static_cast<double>(p.k), threads, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) {
            for (int64_t j = 0; j < p.k; ++j) {
                out[row * p.k + j] = x[row * p.k + perm[j]];
            }
        }
    });
}

// The product of X with its columns in the order of the weight, which takes the first part of the workspace.
qc_status multiply_gathered(GemmInt4 p, uintptr_t perm, uintptr_t stream, uintptr_t workspace,
                            int64_t workspace_bytes) {
    const int64_t threads = thread_limit(stream);
    const int64_t gathered = round_up(p.m * p.k * dtype_size(p.dtype), kScratchAlign);
    const int64_t needed = kOp.needed(p, threads) + gathered;
    if (p.k > 0 && (workspace == 0 || workspace_bytes < needed)) {
        return fail(QC_INVALID_ARGUMENT, "%s: workspace: expected %lld bytes for a weight with perm, got %lld",
                    kOp.name(), static_cast<long long>(needed),
                    static_cast<long long>(workspace == 0 ? 0 : workspace_bytes));
    }
    if (p.dtype == QC_F32) {
        gather(p, pointer<const int32_t>(perm), threads, pointer<uint32_t>(workspace));
    } else {
        gather(p, pointer<const int32_t>(perm), threads, pointer<uint16_t>(workspace));
    }
    p.x = pointer<const void>(workspace);
    const uintptr_t rest = workspace_bytes > gathered ? workspace + static_cast<uintptr_t>(gathered) : 0;
    return kOp.multiply(p, stream, rest, workspace_bytes - gathered);
}

}  // namespace

qc_status gemm_int4_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    return kOp.workspace(stream, dtype, m, n, k, bytes);
}

qc_status gemm_int4(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_int4 *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    const auto check = [&](Arguments &arguments) { return check_int4_weight(arguments, w, n, k, true, fail); };
    return kOp.run({device, stream, dtype, m, n, k, a, out, workspace, workspace_bytes, bias_dtype, bias}, check,
                   [&](GemmInt4 &p) {
                       p.w = weight_of(*w);
                       return w->perm == 0 ? kOp.multiply(p, stream, workspace, workspace_bytes)
                                           : multiply_gathered(p, w->perm, stream, workspace, workspace_bytes);
                   });
}

}  // namespace qcore::cpu
