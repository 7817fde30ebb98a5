#include "optimizer_job.h"

#include <cstdio>
#include <cstring>

#include "arguments.h"
#include "device.h"
#include "optimizer_checks.h"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "optimizer_step";
constexpr int64_t kMaxNumel = (int64_t{1} << 39) - 1;  // block numbers are 32-bit; a terabyte of 8-bit states

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
    qc_status status = arguments.ok() ? check_rule(rule_, fail) : arguments.status();
    if (status != QC_OK || tensors_.count == 0) {
        return status;
    }
    status = check_lists(rule_, tensors_, fail);
    for (int64_t i = 0; status == QC_OK && i < tensors_.count; ++i) {
        status = check_tensor(device, i);
        blocks_ += status == QC_OK ? blocks_of(tensors_.numel[i]) : 0;
    }
    return status;
}

qc_status OptimizerList::check_tensor(int32_t device, int64_t i) const {
    const qc_optimizer_tensors &t = tensors_;
    const int64_t n = t.numel[i];
    if (n < 0 || n > kMaxNumel) {
        return invalid_step(fail, "numel", "counts from 0 to 2^39 - 1", n);
    }
    for (const auto &entry : optimizer_arrays(rule_, t, n, blocks_of(n))) {
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
    const int lists = has_two_lists(rule_) ? 2 : 1;
    job.rule = rule_;
    job.compensated = t.compensation != nullptr ? 1 : 0;
    job.words = 4 + lists * (is_coded(rule_) ? 2 : 1) + (t.compensation != nullptr || is_stochastic(rule_) ? 1 : 0);
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
        if (is_coded(rule_)) {
            *word++ = t.absmax1[i];
            if (lists == 2) {
                *word++ = t.absmax2[i];
            }
        }
        if (t.compensation != nullptr) {
            *word++ = t.compensation[i];
        } else if (is_stochastic(rule_)) {
            *word++ = t.streams[i];
        }
        job.blocks += blocks;
        ++job.count;
    }
    return i;
}

}  // namespace qcore::gpu
