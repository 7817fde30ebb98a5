#include "optimizer_job.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "arguments.h"
#include "device.h"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "optimizer_step";
constexpr int64_t kMaxNumel = (int64_t{1} << 39) - 1;  // block numbers are 32-bit; a terabyte of 8-bit states

qc_status invalid(const char *what, const char *expected, int64_t got) {
    return fail(QC_INVALID_ARGUMENT, "%s: %s: expected %s, got %lld", kOp, what, expected, static_cast<long long>(got));
}

int64_t blocks_of(int64_t numel) { return ceil_div(numel, kOptimizerBlock); }

uint64_t bits_of(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace

qc_status OptimizerList::check(int32_t device) {
    Arguments arguments(kOp, device);
    arguments.dtype("param_dtype", rule_.param_dtype).dtype("grad_dtype", rule_.grad_dtype);
    arguments.count("count", tensors_.count);
    qc_status status = arguments.ok() ? check_rule() : arguments.status();
    if (status != QC_OK || tensors_.count == 0) {
        return status;
    }
    status = check_lists();
    for (int64_t i = 0; status == QC_OK && i < tensors_.count; ++i) {
        status = check_tensor(device, i);
        blocks_ += status == QC_OK ? blocks_of(tensors_.numel[i]) : 0;
    }
    return status;
}

qc_status OptimizerList::check_rule() const {
    constexpr int32_t kFlags =
        QC_OPT_NESTEROV | QC_OPT_SKIP_ZEROS | QC_OPT_STOCHASTIC | QC_OPT_BNB_CODES | QC_OPT_SIGNED_STATE;
    if (rule_.algorithm < QC_ADAM || rule_.algorithm > QC_ADAGRAD) {
        return invalid("algorithm", "QC_ADAM (0) to QC_ADAGRAD (5)", rule_.algorithm);
    }
    if (rule_.state_bits != 8 && rule_.state_bits != 32) {
        return invalid("state_bits", "8 or 32", rule_.state_bits);
    }
    if ((rule_.flags & ~kFlags) != 0) {
        return invalid("flags", "a sum of QC_OPT_ flags", rule_.flags);
    }
    if ((rule_.flags & QC_OPT_NESTEROV) != 0 && rule_.algorithm != QC_MOMENTUM) {
        return invalid("algorithm", "QC_MOMENTUM (3), since QC_OPT_NESTEROV is set", rule_.algorithm);
    }
    if ((rule_.flags & QC_OPT_SIGNED_STATE) != 0 && rule_.algorithm != QC_RMSPROP && rule_.algorithm != QC_ADAGRAD) {
        return invalid("algorithm", "QC_RMSPROP (4) or QC_ADAGRAD (5), since QC_OPT_SIGNED_STATE is set",
                       rule_.algorithm);
    }
    if (stochastic() && rule_.param_dtype != QC_BF16) {
        return invalid("param_dtype", "QC_BF16 (2), since QC_OPT_STOCHASTIC is set", rule_.param_dtype);
    }
    if (!(std::isfinite(rule_.max_unorm) && rule_.max_unorm >= 0)) {
        return fail(QC_INVALID_ARGUMENT, "%s: max_unorm: expected a finite value of at least 0, got %g", kOp,
                    rule_.max_unorm);
    }
    return QC_OK;
}

// Whether the lists that the rule needs are there.
qc_status OptimizerList::check_lists() const {
    const qc_optimizer_tensors &t = tensors_;
    const struct {
        const char *name;
        const void *list;
        bool needed;
    } lists[] = {{"numel", t.numel, true},
                 {"params", t.params, true},
                 {"grads", t.grads, true},
                 {"state1", t.state1, true},
                 {"state2", t.state2, two_lists()},
                 {"absmax1", t.absmax1, coded()},
                 {"absmax2", t.absmax2, coded() && two_lists()},
                 {"streams", t.streams, stochastic()}};
    for (const auto &entry : lists) {
        if (entry.needed && entry.list == nullptr) {
            return fail(QC_INVALID_ARGUMENT, "%s: %s: expected the address of %lld entries, got 0", kOp, entry.name,
                        static_cast<long long>(t.count));
        }
    }
    if (t.compensation != nullptr && (rule_.param_dtype == QC_F32 || stochastic())) {
        return fail(QC_INVALID_ARGUMENT,
                    "%s: compensation: expected 0 for float32 parameters and with QC_OPT_STOCHASTIC, got an address",
                    kOp);
    }
    return QC_OK;
}

qc_status OptimizerList::check_tensor(int32_t device, int64_t i) const {
    const qc_optimizer_tensors &t = tensors_;
    const int64_t n = t.numel[i];
    if (n < 0 || n > kMaxNumel) {
        return invalid("numel", "counts from 0 to 2^39 - 1", n);
    }
    const int64_t rows = rule_.algorithm == QC_ADEMAMIX ? 2 : 1, state_size = coded() ? 1 : 4;
    const int64_t param_size = dtype_size(rule_.param_dtype);
    const struct {
        const char *name;
        const uintptr_t *list;
        int64_t count, size;
    } lists[] = {{"params", t.params, n, param_size},
                 {"grads", t.grads, n, dtype_size(rule_.grad_dtype)},
                 {"state1", t.state1, rows * n, state_size},
                 {"state2", two_lists() ? t.state2 : nullptr, n, state_size},
                 {"absmax1", coded() ? t.absmax1 : nullptr, rows * blocks_of(n), 4},
                 {"absmax2", coded() && two_lists() ? t.absmax2 : nullptr, blocks_of(n), 4},
                 {"compensation", t.compensation, n, param_size}};
    for (const auto &entry : lists) {
        if (entry.list == nullptr || entry.count == 0) {
            continue;
        }
        const uintptr_t address = entry.list[i];
        // The name of an argument is only made up where it is wrong.
        qc_status status = QC_INVALID_ARGUMENT;
        if (address != 0 && address % static_cast<uintptr_t>(entry.size) == 0) {
            status = check_memory(kOp, entry.name, device, address);
        }
        if (status != QC_OK) {
            char argument[64];
            std::snprintf(argument, sizeof argument, "%s[%lld]", entry.name, static_cast<long long>(i));
            return Arguments(kOp, device).array(argument, address, entry.count, entry.size).status();
        }
    }
    return QC_OK;
}

int64_t OptimizerList::fill(OptimizerJob &job, int64_t first) const {
    const qc_optimizer_tensors &t = tensors_;
    const int lists = two_lists() ? 2 : 1;
    job.rule = rule_;
    job.compensated = t.compensation != nullptr ? 1 : 0;
    job.words = 4 + lists * (coded() ? 2 : 1) + (t.compensation != nullptr || stochastic() ? 1 : 0);
    job.count = 0;
    job.blocks = 0;
    int64_t i = first;
    uint64_t *word = job.word;
    for (; i < t.count && word + job.words <= job.word + OptimizerJob::kCapacity; ++i) {
        const int64_t blocks = blocks_of(t.numel[i]);
        if (blocks == 0) {
            continue;
        }
        if (job.blocks + blocks > UINT32_MAX) {
            break;
        }
        const float scale = t.grad_scales != nullptr ? t.grad_scales[i] : 1.0f;
        *word++ = static_cast<uint64_t>(job.blocks) | bits_of(scale) << 32;
        *word++ = static_cast<uint64_t>(t.numel[i]);
        *word++ = t.params[i];
        *word++ = t.grads[i];
        *word++ = t.state1[i];
        if (lists == 2) {
            *word++ = t.state2[i];
        }
        if (coded()) {
            *word++ = t.absmax1[i];
            if (lists == 2) {
                *word++ = t.absmax2[i];
            }
        }
        if (t.compensation != nullptr) {
            *word++ = t.compensation[i];
        } else if (stochastic()) {
            *word++ = t.streams[i];
        }
        job.blocks += blocks;
        ++job.count;
    }
    return i;
}

}  // namespace qcore::gpu
