// gemm_int4: checks, the order of the columns, and the product, which is cut as gemm_4bit's is.
#include <initializer_list>

#include "abi.h"
#include "chunks.h"
#include "dispatch.h"
#include "gemm_4bit_kernels.h"
#include "int4_checks.h"
#include "ops.h"
#include "product.h"

namespace qcore::cpu {
namespace {

constexpr char kOp[] = "gemm_int4";
const GemmInt4Kernels &kernels() {
    static const GemmInt4Kernels &selected = select<GemmInt4Kernels>({
        {Isa::portable, &portable::gemm_int4_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::gemm_int4_kernels},
        {Isa::avx512, &avx512::gemm_int4_kernels},
        {Isa::avx512_bf16, &avx512_bf16::gemm_int4_kernels},
        {Isa::amx, &amx::gemm_int4_kernels},
#endif
    });
    return selected;
}

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

}  // namespace

qc_status gemm_int4_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    const Arguments arguments =
        Arguments(kOp, 0).dtype("dtype", dtype).extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
    if (!arguments.ok()) {
        return arguments.status();
    }
    GemmInt4 p = {};
    p.dtype = dtype;
    p.m = m;
    p.n = n;
    p.k = k;
    *bytes =
        m == 0 || n == 0 ? 0 : ProductPlan(p, kernels(), nanoseconds_of_4bits, thread_limit(stream)).workspace_bytes();
    return QC_OK;
}

qc_status gemm_int4(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_int4 *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
        if (const qc_status status = check_int4_weight(arguments, w, n, k, true, fail); status != QC_OK) {
            return status;
        }
        arguments.array("a", a, m * k, dtype_size(dtype)).array("out", out, m * n, dtype_size(dtype));
        arguments.bias(bias_dtype, bias, dtype, n);
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        GemmInt4 p = {};
        p.dtype = dtype;
        p.bias_dtype = bias_dtype;
        p.m = m;
        p.n = n;
        p.k = k;
        p.x = pointer<const void>(a);
        p.bias = pointer<const void>(bias);
        p.out = pointer<void>(out);
        p.w = weight_of(*w);
        const int64_t threads = thread_limit(stream);
        const ProductPlan plan(p, kernels(), nanoseconds_of_4bits, threads);
        if (w->perm == 0) {
            return run_product(kOp, p, kernels(), plan, threads, workspace, workspace_bytes);
        }
        const int64_t gathered = round_up(m * k * dtype_size(dtype), kScratchAlign);
        const int64_t needed = plan.workspace_bytes() + gathered;
        if (k > 0 && (workspace == 0 || workspace_bytes < needed)) {
            return fail(QC_INVALID_ARGUMENT, "%s: workspace: expected %lld bytes for a weight with perm, got %lld", kOp,
                        static_cast<long long>(needed), static_cast<long long>(workspace == 0 ? 0 : workspace_bytes));
        }
        const auto *perm = pointer<const int32_t>(w->perm);
        if (dtype == QC_F32) {
            gather(p, perm, threads, pointer<uint32_t>(workspace));
        } else {
            gather(p, perm, threads, pointer<uint16_t>(workspace));
        }
        p.x = pointer<const void>(workspace);
        const uintptr_t rest = workspace_bytes > gathered ? workspace + static_cast<uintptr_t>(gathered) : 0;
        return run_product(kOp, p, kernels(), plan, threads, rest, workspace_bytes - gathered);
    });
}

}  // namespace qcore::cpu
