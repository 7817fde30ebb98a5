// The product with an NF4 or FP4 weight (docs/spec/40-gemm-4bit.md); fourbit_product.cuh has the kernels.
//
// Floor: N * K / 2 bytes of codes and 4 (1 with nested absmax) a block, at read bandwidth.
#include "fourbit_product.cuh"
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "weight4bit.cuh"

namespace qcore::gpu {

const char *fourbit_declaration() {
    return "{\"depth\": {\"lanes\": 1, \"extra\": 8}, \"weight_rounding\": \"compute\"}";
}

qc_status fourbit_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    Arguments arguments("workspace", device, Arguments::Starts::nothing);
    arguments.dtype("dtype", dtype).extent("m, n", m, n);
    if (arguments.ok()) {
        *bytes = m == 0 || n == 0 ? 0 : partial_bytes(m, n, splits_of(device, dtype, m, n, k));
    }
    return arguments.status();
}

qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    constexpr char kOp[] = "gemm_4bit";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n).weight("w", w);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (w->numel != elements(n, k)) {
            return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", kOp,
                        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
        }
        arguments.array("a", a, elements(m, k), dtype_size(dtype)).array("out", out, elements(m, n), dtype_size(dtype));
        arguments.bias(bias_dtype, bias, dtype, n);
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        const int splits = splits_of(device, dtype, m, n, k);
        if (!arguments.workspace(workspace, workspace_bytes, partial_bytes(m, n, splits)).ok()) {
            return arguments.status();
        }
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            FourbitProduct<CodebookWeight, T> product = {{weight_view(*w), k},
                                                         {pointer<const T>(a), m, k, k % 8 == 0 && aligned(a, 16)},
                                                         {pointer<T>(out), n, bias_view<T>(bias_dtype, bias)},
                                                         aligned(w->packed, 16),
                                                         Queue(kOp, device, stream),
                                                         pointer<float>(workspace),
                                                         splits};
            return product.run(takes_matrix(device, dtype, k));
        });
    });
}

}  // namespace qcore::gpu
