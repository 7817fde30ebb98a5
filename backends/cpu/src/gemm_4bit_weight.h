// A checked qc_weight_4bit as the kernels of the products want it.
#ifndef QCORE_CPU_GEMM_4BIT_WEIGHT_H
#define QCORE_CPU_GEMM_4BIT_WEIGHT_H

#include "abi.h"
#include "gemm_4bit_kernels.h"
#include "qcore_codebooks.h"

namespace qcore::cpu {

// `k`: the length of a row.
inline Gemm4Weight gemm_4bit_weight(const qc_weight_4bit &w, int64_t k) {
    Gemm4Weight weight = {};
    weight.k = k;
    weight.packed = pointer<const uint8_t>(w.packed);
    weight.shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
    weight.table = w.format == QC_NF4 ? QC_NF4_TABLE : QC_FP4_TABLE;
    if (w.nested_absmax == 0) {
        weight.absmax = pointer<const float>(w.absmax);
        return weight;
    }
    weight.codes = pointer<const uint8_t>(w.absmax);
    weight.nested_absmax = pointer<const float>(w.nested_absmax);
    weight.nested_code = pointer<const float>(w.nested_code);
    weight.nested_offset = w.numel > 0 ? *pointer<const float>(w.nested_offset) : 0.0f;
    weight.nested_shift = __builtin_ctzll(static_cast<unsigned long long>(w.nested_blocksize));
    return weight;
}

// The checks of `w` as a weight of n rows of k, after those of its sizes.
inline qc_status check_4bit_weight(const char *op, Arguments &arguments, const qc_weight_4bit *w, int64_t n,
                                   int64_t k) {
    if (!arguments.weight("w", w).ok()) {
        return arguments.status();
    }
    if (w->numel != n * k) {
        return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", op,
                    static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
    }
    return QC_OK;
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_GEMM_4BIT_WEIGHT_H
