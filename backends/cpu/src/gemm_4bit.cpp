// gemm_4bit: its weight and its declaration. product_op.h checks the rest, gemm_4bit_kernels.cpp computes.
#include "gemm_4bit_weight.h"
#include "ops.h"
#include "product_op.h"

namespace qcore::cpu {
namespace {

const Gemm4Kernels &kernels() {
    static const Gemm4Kernels &selected = QC_SELECT_PRODUCT(gemm_4bit_kernels);
    return selected;
}

constexpr ProductOp<Gemm4> kOp("gemm_4bit", kernels, nanoseconds_of_4bits);

// d(K) = ceil(K / lanes) + 8 covers every path of a level (QC-GEMM4-002): a vector of L lanes takes K / L steps, its
// lanes and spans of K are then added; half of L leaves room for both. A tile adds 16 products in a row, then one sum
// for each 32 elements. Where there is no tile unit, lanes are rows of X in bfloat16: a chain of 128 to 512 elements,
// and those of all spans added; L = 1 covers that, and more than float32 and float16 need on that level.
int declared_lanes() {
    switch (isa_choice().isa) {
        case Isa::avx512_bf16:
            return 1;
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

std::string gemm_4bit_declaration() { return product_declaration(declared_lanes(), "compute"); }

qc_status gemm_4bit_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    return kOp.workspace(stream, dtype, m, n, k, bytes);
}

qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    const auto check = [&](Arguments &arguments) { return check_4bit_weight(kOp.name(), arguments, w, n, k); };
    return kOp.run({device, stream, dtype, m, n, k, a, out, workspace, workspace_bytes, bias_dtype, bias}, check,
                   [&](Gemm4 &p) {
                       p.w = gemm_4bit_weight(*w, k);
                       return kOp.multiply(p, stream, workspace, workspace_bytes);
                   });
}

}  // namespace qcore::cpu
