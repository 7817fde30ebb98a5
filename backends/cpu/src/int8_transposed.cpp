// int8_linear_transposed: its weight and its declaration. product_op.h checks the rest, int8_transposed_kernels.cpp
// computes.
#include "ops.h"
#include "product_op.h"

namespace qcore::cpu {
namespace {

const Int8TransposedKernels &kernels() {
    static const Int8TransposedKernels &selected = QC_SELECT_PRODUCT(int8_transposed_kernels);
    return selected;
}

// To convert a weight, and to multiply it by each row.
double nanoseconds(int64_t rows) { return 0.06 + 0.02 * static_cast<double>(rows); }

constexpr ProductOp<Int8Transposed> kOp("int8_linear_transposed", kernels, nanoseconds);

}  // namespace

// d(N) = N + 8 (QC-INT8-012), as gemm_4bit_transposed.
std::string int8_linear_transposed_declaration() { return product_declaration(1, "scaled"); }

qc_status int8_linear_transposed_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                           int64_t *bytes) {
    return kOp.workspace(stream, dtype, m, n, k, bytes);
}

qc_status int8_linear_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                 uintptr_t a, uintptr_t b, uintptr_t col_stats, uintptr_t out, uintptr_t workspace,
                                 int64_t workspace_bytes) {
    const auto check = [&](Arguments &arguments) {
        return arguments.matrix("b", b, n, k, 1).array("col_stats", col_stats, n, sizeof(float)).status();
    };
    return kOp.run({device, stream, dtype, m, n, k, a, out, workspace, workspace_bytes}, check, [&](Int8Transposed &p) {
        p.w = {pointer<const int8_t>(b), pointer<const float>(col_stats), k};
        return kOp.multiply(p, stream, workspace, workspace_bytes);
    });
}

}  // namespace qcore::cpu
