// gemm_4bit_transposed: its weight and its declaration. product_op.h checks the rest, gemm_4bit_transposed_kernels.cpp
// computes.
#include "gemm_4bit_weight.h"
#include "ops.h"
#include "product_op.h"

namespace qcore::cpu {
namespace {

const Gemm4TransposedKernels &kernels() {
    static const Gemm4TransposedKernels &selected = QC_SELECT_PRODUCT(gemm_4bit_transposed_kernels);
    return selected;
}

constexpr ProductOp<Gemm4Transposed> kOp("gemm_4bit_transposed", kernels, nanoseconds_of_4bits);

}  // namespace

// d(N) = N + 8 (QC-GEMM4-009): a product is added to a chain along the rows of the weight, chains of spans are then
// added; a tile adds 16 products in a row, then one sum for each 32 rows.
std::string gemm_4bit_transposed_declaration() { return product_declaration(1, "compute"); }

qc_status gemm_4bit_transposed_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                         int64_t *bytes) {
    return kOp.workspace(stream, dtype, m, n, k, bytes);
}

qc_status gemm_4bit_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                               uintptr_t a, const qc_weight_4bit *w, uintptr_t out, uintptr_t workspace,
                               int64_t workspace_bytes) {
    const auto check = [&](Arguments &arguments) { return check_4bit_weight(kOp.name(), arguments, w, n, k); };
    return kOp.run({device, stream, dtype, m, n, k, a, out, workspace, workspace_bytes}, check,
                   [&](Gemm4Transposed &p) {
                       p.w = gemm_4bit_weight(*w, k);
                       return kOp.multiply(p, stream, workspace, workspace_bytes);
                   });
}

}  // namespace qcore::cpu
