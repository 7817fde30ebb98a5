// What every native library checks of optimizer_step, and the arrays of a tensor, in one place (QC-OPT-001 to -023).
#ifndef QCORE_OPTIMIZER_CHECKS_H
#define QCORE_OPTIMIZER_CHECKS_H

#include <array>
#include <cmath>
#include <cstdint>

#include "qcore_backend.h"

namespace qcore {

// Sets a library's error text and returns the status.
typedef qc_status (*Fail)(qc_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

inline bool has_two_lists(const qc_optimizer &rule) {
    return rule.algorithm == QC_ADAM || rule.algorithm == QC_ADEMAMIX;
}

inline bool is_coded(const qc_optimizer &rule) { return rule.state_bits == 8; }

inline bool is_stochastic(const qc_optimizer &rule) { return (rule.flags & QC_OPT_STOCHASTIC) != 0; }

inline qc_status invalid_step(Fail fail, const char *what, const char *expected, int64_t got) {
    return fail(QC_INVALID_ARGUMENT, "optimizer_step: %s: expected %s, got %lld", what, expected,
                static_cast<long long>(got));
}

inline qc_status check_rule(const qc_optimizer &rule, Fail fail) {
    constexpr int32_t kFlags =
        QC_OPT_NESTEROV | QC_OPT_SKIP_ZEROS | QC_OPT_STOCHASTIC | QC_OPT_BNB_CODES | QC_OPT_SIGNED_STATE;
    if (rule.algorithm < QC_ADAM || rule.algorithm > QC_ADAGRAD) {
        return invalid_step(fail, "algorithm", "QC_ADAM (0) to QC_ADAGRAD (5)", rule.algorithm);
    }
    if (rule.state_bits != 8 && rule.state_bits != 32) {
        return invalid_step(fail, "state_bits", "8 or 32", rule.state_bits);
    }
    if ((rule.flags & ~kFlags) != 0) {
        return invalid_step(fail, "flags", "a sum of QC_OPT_ flags", rule.flags);
    }
    if ((rule.flags & QC_OPT_NESTEROV) != 0 && rule.algorithm != QC_MOMENTUM) {
        return invalid_step(fail, "algorithm", "QC_MOMENTUM (3), since QC_OPT_NESTEROV is set", rule.algorithm);
    }
    if ((rule.flags & QC_OPT_SIGNED_STATE) != 0 && rule.algorithm != QC_RMSPROP && rule.algorithm != QC_ADAGRAD) {
        return invalid_step(fail, "algorithm", "QC_RMSPROP (4) or QC_ADAGRAD (5), since QC_OPT_SIGNED_STATE is set",
                            rule.algorithm);
    }
    if (is_stochastic(rule) && rule.param_dtype != QC_BF16) {
        return invalid_step(fail, "param_dtype", "QC_BF16 (2), since QC_OPT_STOCHASTIC is set", rule.param_dtype);
    }
    if (!(std::isfinite(rule.max_unorm) && rule.max_unorm >= 0)) {
        return fail(QC_INVALID_ARGUMENT, "optimizer_step: max_unorm: expected a finite value of at least 0, got %g",
                    rule.max_unorm);
    }
    return QC_OK;
}

// Whether the lists that the rule needs are there.
inline qc_status check_lists(const qc_optimizer &rule, const qc_optimizer_tensors &t, Fail fail) {
    const struct {
        const char *name;
        const void *list;
        bool needed;
    } lists[] = {{"numel", t.numel, true},
                 {"params", t.params, true},
                 {"grads", t.grads, true},
                 {"state1", t.state1, true},
                 {"state2", t.state2, has_two_lists(rule)},
                 {"absmax1", t.absmax1, is_coded(rule)},
                 {"absmax2", t.absmax2, is_coded(rule) && has_two_lists(rule)},
                 {"streams", t.streams, is_stochastic(rule)}};
    for (const auto &entry : lists) {
        if (entry.needed && entry.list == nullptr) {
            return fail(QC_INVALID_ARGUMENT, "optimizer_step: %s: expected the address of %lld entries, got 0",
                        entry.name, static_cast<long long>(t.count));
        }
    }
    if (t.compensation != nullptr && (rule.param_dtype == QC_F32 || is_stochastic(rule))) {
        return fail(QC_INVALID_ARGUMENT,
                    "optimizer_step: compensation: expected 0 for float32 parameters and with QC_OPT_STOCHASTIC, got "
                    "an address");
    }
    return QC_OK;
}

// One list of addresses, null where the rule has no use for it, and what each address has to lead to.
struct OptimizerArrays {
    const char *name;
    const uintptr_t *list;
    int64_t count, size;
};

// The arrays of a tensor of n elements in this many blocks; after check_rule and check_lists.
inline std::array<OptimizerArrays, 7> optimizer_arrays(const qc_optimizer &rule, const qc_optimizer_tensors &t,
                                                       int64_t n, int64_t blocks) {
    const bool two = has_two_lists(rule), coded = is_coded(rule);
    const int64_t rows = rule.algorithm == QC_ADEMAMIX ? 2 : 1, state_size = coded ? 1 : 4;
    const int64_t param_size = rule.param_dtype == QC_F32 ? 4 : 2, grad_size = rule.grad_dtype == QC_F32 ? 4 : 2;
    return {{{"params", t.params, n, param_size},
             {"grads", t.grads, n, grad_size},
             {"state1", t.state1, rows * n, state_size},
             {"state2", two ? t.state2 : nullptr, n, state_size},
             {"absmax1", coded ? t.absmax1 : nullptr, rows * blocks, 4},
             {"absmax2", coded && two ? t.absmax2 : nullptr, blocks, 4},
             {"compensation", t.compensation, n, param_size}}};
}

}  // namespace qcore

#endif  // QCORE_OPTIMIZER_CHECKS_H
