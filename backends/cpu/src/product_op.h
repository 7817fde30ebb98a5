// The host side of every product of floats with a quantized weight: its checks, its scratch, and how it starts. What an
// op adds is how its weight is checked and handed to the kernels.
#ifndef QCORE_CPU_PRODUCT_OP_H
#define QCORE_CPU_PRODUCT_OP_H

#include <initializer_list>
#include <string>
#include <type_traits>

#include "abi.h"
#include "dispatch.h"
#include "gemm_4bit_kernels.h"
#include "product.h"
#include "transposed_kernels.h"

namespace qcore::cpu {

// The arguments that these ops share, as the ABI has them. m, n and k are those of the op: the weight has n rows of k.
struct ProductCall {
    int32_t device;
    uintptr_t stream;
    int32_t dtype;
    int64_t m, n, k;
    uintptr_t a, out, workspace;
    int64_t workspace_bytes;
    int32_t bias_dtype = 0;  // X W^T only
    uintptr_t bias = 0;
};

// The table of kernels called `table` of the best level that has one.
#ifdef __x86_64__
#define QC_SELECT_PRODUCT(table)                             \
    select<std::remove_const_t<decltype(portable::table)>>({ \
        {Isa::portable, &portable::table},                   \
        {Isa::avx2, &avx2::table},                           \
        {Isa::avx512, &avx512::table},                       \
        {Isa::avx512_bf16, &avx512_bf16::table},             \
        {Isa::amx, &amx::table},                             \
    })
#else
#define QC_SELECT_PRODUCT(table) \
    select<std::remove_const_t<decltype(portable::table)>>({{Isa::portable, &portable::table}})
#endif

template <class Problem>
class ProductOp {
   public:
    using Kernels = ProductKernels<Problem>;

    // `nanoseconds`: as ProductPlan takes it.
    constexpr ProductOp(const char *name, const Kernels &(*kernels)(), double (*nanoseconds)(int64_t rows))
        : name_(name), kernels_(kernels), nanoseconds_(nanoseconds) {}

    const char *name() const { return name_; }

    qc_status workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) const {
        const Arguments arguments =
            Arguments(name_, 0).dtype("dtype", dtype).extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
        if (!arguments.ok()) {
            return arguments.status();
        }
        const Problem p = problem(dtype, m, n, k);
        *bytes = p.m == 0 || p.n == 0 ? 0 : needed(p, thread_limit(stream));
        return QC_OK;
    }

    // Checks the call, then has it multiplied. The op's functions:
    //   check_weight(arguments)   its checks of the weight, in their order after the sizes
    //   start(p)                  gives p its weight and calls multiply(); only where there is an output
    template <class CheckWeight, class Start>
    qc_status run(const ProductCall &call, const CheckWeight &check_weight, const Start &start) const {
        return guarded(name_, [&] {
            const int64_t size = dtype_size(call.dtype);
            Arguments arguments(name_, call.device);
            arguments.dtype("dtype", call.dtype).count("m", call.m).count("n", call.n).count("k", call.k);
            arguments.extent("m, k", call.m, call.k).extent("n, k", call.n, call.k).extent("m, n", call.m, call.n);
            if (!arguments.ok()) {
                return arguments.status();
            }
            if (const qc_status status = check_weight(arguments); status != QC_OK) {
                return status;
            }
            Problem p = problem(call.dtype, call.m, call.n, call.k);
            arguments.matrix("a", call.a, p.m, p.k, size).matrix("out", call.out, p.m, p.n, size);
            if constexpr (!kTransposed) {
                arguments.bias(call.bias_dtype, call.bias, call.dtype, p.n);
                p.bias_dtype = call.bias_dtype;
                p.bias = pointer<const void>(call.bias);
            }
            if (!arguments.ok() || p.m == 0 || p.n == 0) {
                return arguments.status();
            }
            p.x = pointer<const void>(call.a);
            p.out = pointer<void>(call.out);
            return start(p);
        });
    }

    // Bytes that multiply() needs from the caller.
    int64_t needed(const Problem &p, int64_t threads) const {
        return ProductPlan(p, kernels_(), nanoseconds_, threads).workspace_bytes();
    }

    qc_status multiply(const Problem &p, uintptr_t stream, uintptr_t workspace, int64_t workspace_bytes) const {
        const int64_t threads = thread_limit(stream);
        const ProductPlan plan(p, kernels_(), nanoseconds_, threads);
        return run_product(name_, p, kernels_(), plan, threads, workspace, workspace_bytes);
    }

   private:
    // X W, not X W^T: the sum runs over the n rows of the weight (transposed_kernels.h).
    static constexpr bool kTransposed = std::is_base_of_v<TransposedShape, Problem>;

    static Problem problem(int32_t dtype, int64_t m, int64_t n, int64_t k) {
        Problem p = {};
        p.dtype = dtype;
        p.m = m;
        p.n = kTransposed ? k : n;
        p.k = kTransposed ? n : k;
        return p;
    }

    const char *name_;
    const Kernels &(*kernels_)();
    double (*nanoseconds_)(int64_t rows);
};

// {"depth": {"lanes", "extra"}, "weight_rounding"} for describe(), JSON.
inline std::string product_declaration(int lanes, const char *weight_rounding) {
    return "{\"depth\": {\"lanes\": " + std::to_string(lanes) + ", \"extra\": 8}, \"weight_rounding\": \"" +
           weight_rounding + "\"}";
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_PRODUCT_OP_H
