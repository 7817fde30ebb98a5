// int8_gemm and int8_scaled_gemm: checks. int8_gemm_kernels.cpp computes.
#include <initializer_list>

#include "abi.h"
#include "dispatch.h"
#include "int8_kernels.h"
#include "int8_product.h"
#include "ops.h"
#include "product.h"

namespace qcore::cpu {
namespace {

const Int8GemmKernels &kernels() {
    static const Int8GemmKernels &selected = select<Int8GemmKernels>({
        {Isa::portable, &portable::int8_gemm_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::int8_gemm_kernels},
        {Isa::avx_vnni, &avx_vnni::int8_gemm_kernels},
        {Isa::avx512, &avx512::int8_gemm_kernels},
        {Isa::avx512_vnni, &avx512_vnni::int8_gemm_kernels},
        {Isa::amx, &amx::int8_gemm_kernels},
#endif
    });
    return selected;
}

double nanoseconds(int64_t rows) { return 0.06 + 0.01 * static_cast<double>(rows); }

Arguments check_sizes(const char *op, int32_t device, int64_t m, int64_t n, int64_t k) {
    Arguments arguments(op, device);
    arguments.count("m", m).count("n", n).count("k", k).at_most("k", k, kMaxInt8K);
    arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
    return arguments;
}

Int8Gemm problem(int64_t m, int64_t n, int64_t k, uintptr_t a, uintptr_t b) {
    Int8Gemm p = {};
    p.m = m;
    p.n = n;
    p.k = k;
    p.a = pointer<const int8_t>(a);
    p.b = pointer<const int8_t>(b);
    return p;
}

qc_status run(const char *op, const Int8Gemm &p, uintptr_t stream, uintptr_t workspace, int64_t workspace_bytes) {
    const int64_t threads = thread_limit(stream);
    const ProductPlan plan = plan_int8_product(p, threads);
    return run_product(op, p, kernels(), plan, threads, workspace, workspace_bytes);
}

}  // namespace

ProductPlan plan_int8_product(const Int8Gemm &p, int64_t threads) {
    return ProductPlan(p, kernels(), nanoseconds, threads);
}

void run_int8_product(const Int8Gemm &p, const ProductPlan &plan, int64_t threads, char *scratch) {
    run_product(p, kernels(), plan, threads, scratch);
}

qc_status int8_gemm_workspace(uintptr_t stream, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    const Arguments arguments = check_sizes("int8_gemm", 0, m, n, k);
    if (!arguments.ok()) {
        return arguments.status();
    }
    *bytes = m == 0 || n == 0 ? 0 : plan_int8_product(problem(m, n, k, 0, 0), thread_limit(stream)).workspace_bytes();
    return QC_OK;
}

qc_status int8_gemm(int32_t device, uintptr_t stream, int64_t m, int64_t n, int64_t k, uintptr_t a, uintptr_t b,
                    uintptr_t out, uintptr_t workspace, int64_t workspace_bytes) {
    constexpr char kOp[] = "int8_gemm";
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, m, n, k);
        arguments.matrix("a", a, m, k, 1).matrix("b", b, n, k, 1).matrix("out", out, m, n, sizeof(int32_t));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        Int8Gemm p = problem(m, n, k, a, b);
        p.c = pointer<int32_t>(out);
        return run(kOp, p, stream, workspace, workspace_bytes);
    });
}

qc_status int8_scaled_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, uintptr_t b, uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype,
                           uintptr_t bias, uintptr_t out, uintptr_t workspace, int64_t workspace_bytes) {
    constexpr char kOp[] = "int8_scaled_gemm";
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, m, n, k);
        arguments.dtype("dtype", dtype).matrix("a", a, m, k, 1).matrix("b", b, n, k, 1);
        arguments.array("row_stats", row_stats, m, sizeof(float)).array("col_stats", col_stats, n, sizeof(float));
        arguments.bias(bias_dtype, bias, dtype, n).matrix("out", out, m, n, dtype_size(dtype));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        const Int8Scaling scaling = {dtype,
                                     bias_dtype,
                                     pointer<const float>(row_stats),
                                     pointer<const float>(col_stats),
                                     pointer<const void>(bias),
                                     pointer<void>(out)};
        Int8Gemm p = problem(m, n, k, a, b);
        p.scaling = &scaling;
        return run(kOp, p, stream, workspace, workspace_bytes);
    });
}

}  // namespace qcore::cpu
