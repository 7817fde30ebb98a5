// One optimizer step on many tensors: arguments, shares of the threads, norms (docs/spec/60-optimizers.md).
//
// The blocks of all tensors form one sequence, which is cut into ranges: a thousand small tensors are one piece of
// work, and a large one is shared. With a limit on the update's norm there are two passes, because the first block's
// step depends on the last block's norm.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "abi.h"
#include "dispatch.h"
#include "ieee.h"
#include "ops.h"
#include "optimizer_checks.h"
#include "optimizer_kernels.h"
#include "parallel.h"
#include "qcore_codebooks.h"

namespace qcore::cpu {
namespace {

constexpr char kOp[] = "optimizer_step";
// Blocks that a thread takes at a time: about 10 microseconds of work at least; and few enough that a thread which is
// held up holds up a small part.
constexpr int64_t kMinRange = 64;
constexpr int64_t kMaxRange = 256;
constexpr int64_t kRangesPerThread = 4;

const OptimizerKernels &optimizer_kernels() {
    static const OptimizerKernels &kernels = select<OptimizerKernels>({
        {Isa::portable, &portable::optimizer_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::optimizer_kernels},
        {Isa::avx512, &avx512::optimizer_kernels},
        {Isa::avx512_vnni, &avx512_vnni::optimizer_kernels},
        {Isa::avx512_bf16, &avx512_bf16::optimizer_kernels},
        {Isa::amx, &avx512_vnni::optimizer_kernels},  // Intel's again (optimizer_simd.h)
#endif
    });
    return kernels;
}

// QC-OPT-020.
StateBook book(bool squares, bool signed_state) {
    const bool is_unsigned = squares && !signed_state;
    const DynamicCodebook &dynamic = is_unsigned ? unsigned_dynamic_codebook() : signed_dynamic_codebook();
    return {dynamic.table, &dynamic.codes, &dynamic.lines};
}

int state_count(int32_t algorithm) { return algorithm == QC_ADEMAMIX ? 3 : algorithm == QC_ADAM ? 2 : 1; }

bool holds_squares(int32_t algorithm, int state) {
    return algorithm == QC_RMSPROP || algorithm == QC_ADAGRAD || (algorithm == QC_ADAM && state == 1) ||
           (algorithm == QC_ADEMAMIX && state == 2);
}

// One entry of a list of addresses; fills in the name of the argument only where it is wrong.
qc_status check_address(const char *name, int64_t index, uintptr_t address, int64_t count, int64_t size) {
    if (count == 0 || (address != 0 && address % static_cast<uintptr_t>(size) == 0)) {
        return QC_OK;
    }
    char argument[64];
    std::snprintf(argument, sizeof argument, "%s[%lld]", name, static_cast<long long>(index));
    return Arguments(kOp, 0).array(argument, address, count, size).status();
}

// The tensors as the kernels take them.
class Tensors {
   public:
    qc_status collect(const qc_optimizer &rule, const qc_optimizer_tensors &t) {
        tensors_.reserve(static_cast<size_t>(t.count));
        first_block_.reserve(static_cast<size_t>(t.count) + 1);
        first_block_.push_back(0);
        for (int64_t i = 0; i < t.count; ++i) {
            const qc_status status = add(rule, t, i);
            if (status != QC_OK) {
                return status;
            }
        }
        return QC_OK;
    }

    int64_t blocks() const { return first_block_.back(); }
    int64_t count() const { return static_cast<int64_t>(tensors_.size()); }
    int64_t first_block(int64_t i) const { return first_block_[static_cast<size_t>(i)]; }
    OptimizerTensor &operator[](int64_t i) { return tensors_[static_cast<size_t>(i)]; }

    // function(tensor, first, last) for each run of blocks of one tensor, on as many threads as the work is worth.
    template <class Function>
    void for_runs(uintptr_t stream, const Function &function) const {
        const int64_t total = blocks();
        const int64_t threads = total > kMinRange ? thread_limit(stream) : 1;
        const int64_t range = std::clamp(total / (kRangesPerThread * threads), kMinRange, kMaxRange);
        parallel_for(ceil_div(total, range), threads, [&](int64_t chunk) {
            int64_t first = chunk * range;
            const int64_t end = std::min(total, first + range);
            auto next = std::upper_bound(first_block_.begin(), first_block_.end(), first);
            for (size_t i = static_cast<size_t>(next - first_block_.begin()) - 1; first < end; ++i) {
                const int64_t last = std::min(end, first_block_[i + 1]);
                if (first < last) {
                    function(static_cast<int64_t>(i), first - first_block_[i], last - first_block_[i]);
                }
                first = last;
            }
        });
    }

   private:
    qc_status add(const qc_optimizer &rule, const qc_optimizer_tensors &t, int64_t i) {
        const int64_t n = t.numel[i];
        if (n < 0 || n > INT64_MAX / 16) {
            return invalid_step(fail, "numel", "counts from 0 to 2^59 - 1", n);
        }
        const bool coded = is_coded(rule);
        const int64_t blocks = ceil_div(n, kOptimizerBlock);
        const int64_t rows = rule.algorithm == QC_ADEMAMIX ? 2 : 1;
        const int64_t state_size = coded ? 1 : 4;
        for (const auto &entry : optimizer_arrays(rule, t, n, blocks)) {
            const qc_status status =
                entry.list != nullptr ? check_address(entry.name, i, entry.list[i], entry.count, entry.size) : QC_OK;
            if (status != QC_OK) {
                return status;
            }
        }
        OptimizerTensor tensor{};
        tensor.n = n;
        tensor.param = pointer<void>(t.params[i]);
        tensor.grad = pointer<const void>(t.grads[i]);
        tensor.compensation = t.compensation != nullptr ? pointer<void>(t.compensation[i]) : nullptr;
        for (int64_t s = 0; s < state_count(rule.algorithm); ++s) {
            const uintptr_t state = s < rows ? t.state1[i] : t.state2[i];
            const int64_t row = s < rows ? s : 0;
            tensor.state[s] = pointer<void>(state + static_cast<uintptr_t>(row * n * state_size));
            if (coded) {
                const uintptr_t absmax = s < rows ? t.absmax1[i] : t.absmax2[i];
                tensor.absmax[s] = pointer<float>(absmax) + row * blocks;
            }
        }
        tensor.grad_scale = t.grad_scales != nullptr ? t.grad_scales[i] : 1.0f;
        tensor.step_size = rule.step_size;
        tensor.stream = (rule.flags & QC_OPT_STOCHASTIC) != 0 ? t.streams[i] : 0;
        tensors_.push_back(tensor);
        first_block_.push_back(first_block_.back() + blocks);
        return QC_OK;
    }

    std::vector<OptimizerTensor> tensors_;
    std::vector<int64_t> first_block_;
};

// Asks for one line of each page of a run's arrays. Pages have mostly 4 KiB, and a walk to a new one that misses the
// caches itself, of a virtual machine's tables most of all, holds up all that follows: the prefetches of later blocks
// come upon one at a time, these upon many, which overlap. AdamW8bit takes a tenth less time on a Zen 4.
void touch_pages(const OptimizerJob &job, const OptimizerTensor &t, int64_t first, int64_t last) {
    constexpr int64_t kPage = 4096;
    const auto touch = [&](const void *array, int64_t size) {
        const char *start = static_cast<const char *>(array);
        const int64_t end = std::min(last * kOptimizerBlock, t.n) * size;
        for (int64_t at = first * kOptimizerBlock * size; at < end; at += kPage) {
            __builtin_prefetch(start + at, 0, 2);
        }
    };
    touch(t.grad, dtype_size(job.rule->grad_dtype));
    touch(t.param, dtype_size(job.rule->param_dtype));
    if (t.compensation != nullptr) {
        touch(t.compensation, dtype_size(job.rule->param_dtype));
    }
    for (int s = 0; s < state_count(job.rule->algorithm); ++s) {
        touch(t.state[s], is_coded(*job.rule) ? 1 : 4);
    }
}

// QC-OPT-009 over the blocks of one tensor, whose sums stand two apart.
double total(const double *sums, int64_t blocks) {
    constexpr int64_t kSums = 256;
    double lane[kSums] = {};
    for (int64_t block = 0; block < blocks; ++block) {
        lane[block % kSums] += sums[2 * block];
    }
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) {
            lane[l] += lane[l + half];
        }
    }
    return lane[0];
}

// QC-OPT-008.
float limited_step(const qc_optimizer &rule, const double *sums, int64_t blocks) {
    const double squares = total(sums + 1, blocks);
    const double limit = rule.max_unorm * std::sqrt(squares);
    const double norm = std::sqrt(total(sums, blocks)) * rule.unorm_factor;
    if (squares == 0 || !(norm > limit)) {
        return rule.step_size;
    }
    return rule.step_size * static_cast<float>(limit / norm);
}

}  // namespace

qc_status optimizer_step_workspace(int64_t blocks, int64_t *bytes) {
    constexpr int64_t kMost = INT64_MAX / (2 * static_cast<int64_t>(sizeof(double)));
    if (blocks > kMost) {
        return fail(QC_INVALID_ARGUMENT, "workspace: m: expected at most %lld, got %lld", static_cast<long long>(kMost),
                    static_cast<long long>(blocks));
    }
    *bytes = 2 * static_cast<int64_t>(sizeof(double)) * blocks;
    return QC_OK;
}

qc_status optimizer_step(int32_t device, uintptr_t stream, const qc_optimizer *optimizer,
                         const qc_optimizer_tensors *list, uintptr_t workspace, int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        if (arguments.ok() && (optimizer == nullptr || list == nullptr)) {
            return fail(QC_INVALID_ARGUMENT, "%s: %s: expected an address, got 0", kOp,
                        optimizer == nullptr ? "optimizer" : "tensors");
        }
        if (!arguments.ok()) {
            return arguments.status();
        }
        const qc_optimizer &rule = *optimizer;
        arguments.dtype("param_dtype", rule.param_dtype).dtype("grad_dtype", rule.grad_dtype);
        arguments.count("count", list->count);
        qc_status status = arguments.ok() ? check_rule(rule, fail) : arguments.status();
        if (status != QC_OK || list->count == 0) {
            return status;
        }
        Tensors tensors;
        status = check_lists(rule, *list, fail);
        status = status == QC_OK ? tensors.collect(rule, *list) : status;
        if (status != QC_OK) {
            return status;
        }
        OptimizerJob job{&rule, {}};
        job.into_l2 = prefetches_into_l2();
        for (int s = 0; s < state_count(rule.algorithm); ++s) {
            job.book[s] = book(holds_squares(rule.algorithm, s), (rule.flags & QC_OPT_SIGNED_STATE) != 0);
        }
        const int coded = rule.state_bits == 8 ? 1 : 0;
        const OptimizerKernels &kernels = optimizer_kernels();
        const auto begin_run = [&](int64_t i, int64_t first, int64_t last) {
            if (job.into_l2) {
                touch_pages(job, tensors[i], first, last);
            }
        };
        if (rule.max_unorm > 0) {
            int64_t needed = 0;
            optimizer_step_workspace(tensors.blocks(), &needed);
            if (workspace_bytes < needed) {
                return invalid_step(fail, "workspace_bytes", "what workspace() says", workspace_bytes);
            }
            if (!arguments.array("workspace", workspace, needed, 64).ok()) {
                return arguments.status();
            }
            double *sums = pointer<double>(workspace);
            const auto squares = kernels.squares[rule.algorithm][coded];
            tensors.for_runs(stream, [&](int64_t i, int64_t first, int64_t last) {
                begin_run(i, first, last);
                squares(job, tensors[i], first, last, sums + 2 * (tensors.first_block(i) + first));
            });
            parallel_for(1, 1, [&](int64_t) {  // behind a call, for its IEEE arithmetic
                for (int64_t i = 0; i < tensors.count(); ++i) {
                    const int64_t first = tensors.first_block(i);
                    tensors[i].step_size = limited_step(rule, sums + 2 * first, tensors.first_block(i + 1) - first);
                }
            });
        }
        const auto step = kernels.step[rule.algorithm][coded];
        tensors.for_runs(stream, [&](int64_t i, int64_t first, int64_t last) {
            begin_run(i, first, last);
            step(job, tensors[i], first, last);
        });
        return qc_status{QC_OK};
    });
}

}  // namespace qcore::cpu
