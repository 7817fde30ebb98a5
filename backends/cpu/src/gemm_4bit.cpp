// gemm_4bit: checks, and how a product is cut into chunks. gemm_4bit_kernels.cpp computes.
#include <initializer_list>
#include <string>

#include "abi.h"
#include "dispatch.h"
#include "gemm_4bit_kernels.h"
#include "gemm_4bit_weight.h"
#include "ops.h"
#include "product.h"

namespace qcore::cpu {
namespace {

constexpr char kOp[] = "gemm_4bit";
const Gemm4Kernels &kernels() {
    static const Gemm4Kernels &selected = select<Gemm4Kernels>({
        {Isa::portable, &portable::gemm_4bit_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::gemm_4bit_kernels},
        {Isa::avx512, &avx512::gemm_4bit_kernels},
        {Isa::avx512_bf16, &avx512_bf16::gemm_4bit_kernels},
        {Isa::amx, &amx::gemm_4bit_kernels},
#endif
    });
    return selected;
}

// d(K) = ceil(K / lanes) + 8 covers every path of a level (QC-GEMM4-002): a vector of L lanes takes K / L steps, its
// lanes and spans of K are then added; half of L leaves room for both. A tile adds 16 products in a row, then one sum
// for each 32 elements.
int declared_lanes() {
    switch (isa_choice().isa) {
        case Isa::portable:
            return 2;
        case Isa::avx2:
        case Isa::avx_vnni:
        case Isa::amx:
            return 4;
        default:
            return 8;
    }
}

}  // namespace

std::string gemm_4bit_declaration() {
    return "{\"depth\": {\"lanes\": " + std::to_string(declared_lanes()) +
           ", \"extra\": 8}, \"weight_rounding\": \"compute\"}";
}

qc_status gemm_4bit_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    const Arguments arguments =
        Arguments(kOp, 0).dtype("dtype", dtype).extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
    if (!arguments.ok()) {
        return arguments.status();
    }
    Gemm4 p = {};
    p.dtype = dtype;
    p.m = m;
    p.n = n;
    p.k = k;
    *bytes =
        m == 0 || n == 0 ? 0 : ProductPlan(p, kernels(), nanoseconds_of_4bits, thread_limit(stream)).workspace_bytes();
    return QC_OK;
}

qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n).weight("w", w);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (w->numel != n * k) {
            return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", kOp,
                        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
        }
        arguments.array("a", a, m * k, dtype_size(dtype)).array("out", out, m * n, dtype_size(dtype));
        arguments.bias(bias_dtype, bias, dtype, n);
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        Gemm4 p = {};
        p.dtype = dtype;
        p.bias_dtype = bias_dtype;
        p.m = m;
        p.n = n;
        p.k = k;
        p.x = pointer<const void>(a);
        p.bias = pointer<const void>(bias);
        p.out = pointer<void>(out);
        p.w = gemm_4bit_weight(*w, k);
        const int64_t threads = thread_limit(stream);
        const ProductPlan plan(p, kernels(), nanoseconds_of_4bits, threads);
        return run_product(kOp, p, kernels(), plan, threads, workspace, workspace_bytes);
    });
}

}  // namespace qcore::cpu
