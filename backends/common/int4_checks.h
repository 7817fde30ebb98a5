// What every native library checks of a weight of integers in groups, in one place (QC-INT4-001, QC-INT4-003).
#ifndef QCORE_INT4_CHECKS_H
#define QCORE_INT4_CHECKS_H

#include <cstdint>

#include "qcore_backend.h"

namespace qcore {

// The weight of a call with these extents, after they have been checked; `Arguments` and `fail` are the library's own.
// `reads`: the host can read the array behind `perm`.
template <class Arguments, class Fail>
qc_status check_int4_weight(Arguments &arguments, const qc_weight_int4 *w, int64_t n, int64_t k, bool reads,
                            Fail fail) {
    constexpr char kOp[] = "gemm_int4";
    const auto refuse = [&](const char *field, const char *expected, int64_t got) {
        return fail(QC_INVALID_ARGUMENT, "%s: w.%s: expected %s, got %lld", kOp, field, expected,
                    static_cast<long long>(got));
    };
    if (!arguments.ok()) {
        return arguments.status();
    }
    if (w == nullptr) {
        return fail(QC_INVALID_ARGUMENT, "%s: w: expected the address of a qc_weight_int4, got 0", kOp);
    }
    if (w->layout != 0) {
        return refuse("layout", "0", w->layout);
    }
    if (w->n != n) {
        return refuse("n", "that of the call", w->n);
    }
    if (w->k != k) {
        return refuse("k", "that of the call", w->k);
    }
    if (w->group_size < 1 || (w->group_size % 8 != 0 && w->group_size < k)) {
        return refuse("group_size", "a multiple of 8, or k or more", w->group_size);
    }
    const int64_t groups = n * (k / w->group_size + (k % w->group_size != 0));
    arguments.dtype("scale_dtype", w->scale_dtype).array("packed", w->packed, n * (k / 2 + k % 2), 1);
    if (arguments.ok()) {
        arguments.array("scales", w->scales, groups, w->scale_dtype == QC_F32 ? 4 : 2);
    }
    arguments.optional_array("zeros", w->zeros, groups, 1).optional_array("perm", w->perm, k, sizeof(int32_t));
    const auto *perm = reinterpret_cast<const int32_t *>(w->perm);
    for (int64_t j = 0; reads && arguments.ok() && perm != nullptr && j < k; ++j) {
        if (perm[j] < 0 || perm[j] >= k) {
            return refuse("perm", "columns from 0 to k - 1", perm[j]);
        }
    }
    return arguments.status();
}

}  // namespace qcore

#endif  // QCORE_INT4_CHECKS_H
