// gemm_4bit_transposed: checks, and how a product is cut into chunks. gemm_4bit_transposed_kernels.cpp computes.
#include <initializer_list>
#include <string>

#include "abi.h"
#include "dispatch.h"
#include "gemm_4bit_transposed_kernels.h"
#include "gemm_4bit_weight.h"
#include "ops.h"
#include "product.h"

namespace qcore::cpu {
namespace {

constexpr char kOp[] = "gemm_4bit_transposed";

const Gemm4TransposedKernels &kernels() {
    static const Gemm4TransposedKernels &selected = select<Gemm4TransposedKernels>({
        {Isa::portable, &portable::gemm_4bit_transposed_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::gemm_4bit_transposed_kernels},
        {Isa::avx512, &avx512::gemm_4bit_transposed_kernels},
        {Isa::avx512_bf16, &avx512_bf16::gemm_4bit_transposed_kernels},
        {Isa::amx, &amx::gemm_4bit_transposed_kernels},
#endif
    });
    return selected;
}

// The sum runs over the n rows of the weight; its k columns are those of the result (gemm_4bit_transposed_kernels.h).
Gemm4Transposed problem(int32_t dtype, int64_t m, int64_t n, int64_t k) {
    Gemm4Transposed p = {};
    p.dtype = dtype;
    p.m = m;
    p.n = k;
    p.k = n;
    return p;
}

}  // namespace

// d(N) = N + 8 (QC-GEMM4-009): a product is added to a chain along the rows of the weight, chains of spans are then
// added; a tile adds 16 products in a row, then one sum for each 32 rows.
std::string gemm_4bit_transposed_declaration() {
    return "{\"depth\": {\"lanes\": 1, \"extra\": 8}, \"weight_rounding\": \"compute\"}";
}

qc_status gemm_4bit_transposed_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                         int64_t *bytes) {
    const Arguments arguments =
        Arguments(kOp, 0).dtype("dtype", dtype).extent("m, n", m, n).extent("n, k", n, k).extent("m, k", m, k);
    if (!arguments.ok()) {
        return arguments.status();
    }
    const Gemm4Transposed p = problem(dtype, m, n, k);
    *bytes =
        m == 0 || k == 0 ? 0 : ProductPlan(p, kernels(), nanoseconds_of_4bits, thread_limit(stream)).workspace_bytes();
    return QC_OK;
}

qc_status gemm_4bit_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                               uintptr_t a, const qc_weight_4bit *w, uintptr_t out, uintptr_t workspace,
                               int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, n", m, n).extent("n, k", n, k).extent("m, k", m, k).weight("w", w);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (w->numel != n * k) {
            return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", kOp,
                        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
        }
        arguments.array("a", a, m * n, dtype_size(dtype)).array("out", out, m * k, dtype_size(dtype));
        if (!arguments.ok() || m == 0 || k == 0) {
            return arguments.status();
        }
        Gemm4Transposed p = problem(dtype, m, n, k);
        p.x = pointer<const void>(a);
        p.out = pointer<void>(out);
        p.w = gemm_4bit_weight(*w, k);
        const int64_t threads = thread_limit(stream);
        const ProductPlan plan(p, kernels(), nanoseconds_of_4bits, threads);
        return run_product(kOp, p, kernels(), plan, threads, workspace, workspace_bytes);
    });
}

}  // namespace qcore::cpu
