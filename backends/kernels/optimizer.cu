// One optimizer step on many tensors (docs/spec/60-optimizers.md).
//
// Memory picture. Each element of gradient, parameter and states is read once and, but for the gradient, written once:
// Adam with bfloat16 parameters and gradients moves 10 bytes an element at 8 bits (and 16/256 of absmax), 22 at 32
// bits. The floor is those bytes at copy bandwidth. A block of 256 elements, the unit of 8-bit states, is eight
// elements for each of 32 lanes: 16-byte reads of gradient and parameter, 8-byte reads of codes, a whole block an
// access, and its absmax comes from shuffles alone, with waves of 64 as two blocks. The blocks of all tensors form one
// sequence of which a block of threads takes runs, so a thousand small tensors are as good as a large one. With a limit
// on the update's norm the step runs twice, the first time to write two sums a block (16 bytes for 256 elements), and
// the states are read again.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "optimizer_rules.cuh"
#include "optimizer_step.cuh"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "optimizer_step";
constexpr int kThreads = kStepThreads;
constexpr int kMostBlocksOfRun = 64;

template <class Rule, bool Coded, int W>
QC_KERNEL(kThreads)
step_kernel(QC_PARAMETER(OptimizerJob) given) {
    const OptimizerJob &job = only_parameter(given);
    using Shared = Books<Rule, Coded>;
    QC_SHARED(Shared, books);
    build_books<Rule>(job.rule, books);
    for_blocks<Rule, Coded>(job, [&](const Entry<Rule, Coded> &entry, int64_t, int64_t first, int64_t count) {
        const Stepped<Rule, Coded> stepped(entry, books.values, first, count);
        if constexpr (Coded) {
            encode_states<Rule, W>(entry, books, stepped.state, first, count);
        } else if (count > 0) {
#pragma unroll
            for (int s = 0; s < Rule::kStates; ++s) {
                store_moved<float>(reinterpret_cast<float *>(entry.state(s)) + first, stepped.state[s], count, 0);
            }
        }
        if (count > 0) {
            store_param(entry, stepped, job.sizes != nullptr ? job.sizes[entry.at] : job.rule.step_size, first, count);
        }
    });
}

// QC-OPT-009, the sums of blocks: of u, then of w.
template <class Rule, bool Coded, int W>
QC_KERNEL(kThreads)
squares_kernel(QC_PARAMETER(OptimizerJob) given) {
    const OptimizerJob &job = only_parameter(given);
    constexpr int kBlock = static_cast<int>(kOptimizerBlock);
    struct Shared {
        StateValues<Coded> values;
        alignas(16) float value[kBlocksAtOnce][2][kBlock];
        double lane[kBlocksAtOnce][2][16];
    };
    QC_SHARED(Shared, shared);
    shared.values.fill();
    block_barrier();
    const int team = thread_index() / kLanesOfBlock, mine = thread_index() % kLanesOfBlock;
    for_blocks<Rule, Coded>(job, [&](const Entry<Rule, Coded> &entry, int64_t block, int64_t first, int64_t count) {
        const Stepped<Rule, Coded> stepped(entry, shared.values, first, count);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            shared.value[team][0][8 * mine + i] = stepped.update.value[i];
            shared.value[team][1][8 * mine + i] = stepped.param.value[i];
        }
        block_barrier();
        const int which = mine / 16, l = mine % 16;
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const double x = static_cast<double>(shared.value[team][which][16 * i + l]);
            sum += x * x;
        }
        shared.lane[team][which][l] = sum;
        block_barrier();
        if (l == 0 && block >= 0) {
            double fold[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                fold[i] = shared.lane[team][which][i];
            }
#pragma unroll
            for (int half = 8; half > 0; half /= 2) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    fold[i] += i < half ? fold[i + half] : 0.0;
                }
            }
            job.sums[2 * block + which] = fold[0];
        }
    });
}

// QC-OPT-009 and QC-OPT-008 for one tensor: its step size.
QC_KERNEL(kThreads)
norm_kernel(QC_PARAMETER(OptimizerJob) given) {
    const OptimizerJob &job = only_parameter(given);
    static_assert(kThreads == 256, "the lanes of the clause");
    struct Shared {
        double lane[2][kThreads];
    };
    QC_SHARED(Shared, shared);
    const int64_t tensor = block_index_x(), numel = static_cast<int64_t>(job.word[tensor * job.words + 1]);
    const int64_t blocks = (numel + kOptimizerBlock - 1) / kOptimizerBlock;
    const double *sums = job.sums + 2 * static_cast<int64_t>(job.word[tensor * job.words] & 0xFFFFFFFF);
    double of_update = 0.0, of_param = 0.0;
#pragma unroll 8
    for (int64_t block = thread_index(); block < blocks; block += kThreads) {
        of_update += sums[2 * block];
        of_param += sums[2 * block + 1];
    }
    shared.lane[0][thread_index()] = of_update;
    shared.lane[1][thread_index()] = of_param;
    block_barrier();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (thread_index() < half) {
            shared.lane[0][thread_index()] += shared.lane[0][thread_index() + half];
            shared.lane[1][thread_index()] += shared.lane[1][thread_index() + half];
        }
        block_barrier();
    }
    if (thread_index() == 0) {
        const double squares = shared.lane[1][0], limit = job.rule.max_unorm * square_root(squares);
        const double norm = square_root(shared.lane[0][0]) * job.rule.unorm_factor;
        const bool limited = squares != 0.0 && norm > limit;
        job.sizes[tensor] = limited ? job.rule.step_size * static_cast<float>(limit / norm) : job.rule.step_size;
    }
}

using JobKernel = void (*)(OptimizerJob);

struct Kernels {
    JobKernel step, squares;
};

template <class Rule>
Kernels kernels_of(bool coded) {
    return coded ? Kernels{step_kernel<Rule, true, kWave>, squares_kernel<Rule, true, kWave>}
                 : Kernels{step_kernel<Rule, false, kWave>, squares_kernel<Rule, false, kWave>};
}

Kernels kernels_of(const qc_optimizer &rule) {
    const bool coded = rule.state_bits == 8;
    switch (rule.algorithm) {
        case QC_ADAM:
            return kernels_of<Adam>(coded);
        case QC_ADEMAMIX:
            return kernels_of<Ademamix>(coded);
        case QC_LION:
            return kernels_of<Lion>(coded);
        case QC_MOMENTUM:
            return kernels_of<Momentum>(coded);
        case QC_RMSPROP:
            return kernels_of<Rmsprop>(coded);
        default:
            return kernels_of<Adagrad>(coded);
    }
}

int64_t workspace_bytes_of(int64_t blocks, int64_t tensors) {
    return 2 * static_cast<int64_t>(sizeof(double)) * blocks + static_cast<int64_t>(sizeof(float)) * tensors;
}

}  // namespace

qc_status optimizer_step_workspace(int64_t blocks, int64_t tensors, int64_t *bytes) {
    constexpr int64_t kMost = INT64_MAX / 64;
    if (blocks > kMost || tensors > kMost) {
        return fail(QC_INVALID_ARGUMENT, "workspace: m, n: expected at most %lld, got %lld, %lld",
                    static_cast<long long>(kMost), static_cast<long long>(blocks), static_cast<long long>(tensors));
    }
    *bytes = workspace_bytes_of(blocks, tensors);
    return QC_OK;
}

qc_status optimizer_step(int32_t device, uintptr_t stream, const qc_optimizer *optimizer,
                         const qc_optimizer_tensors *tensors, uintptr_t workspace, int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        if (arguments.ok() && (optimizer == nullptr || tensors == nullptr)) {
            return fail(QC_INVALID_ARGUMENT, "%s: %s: expected an address, got 0", kOp,
                        optimizer == nullptr ? "optimizer" : "tensors");
        }
        if (!arguments.ok()) {
            return arguments.status();
        }
        OptimizerList list(*optimizer, *tensors);
        qc_status status = list.check(device);
        if (status != QC_OK || list.blocks() == 0) {
            return status;
        }
        const bool limited = optimizer->max_unorm > 0;
        const int64_t needed = limited ? workspace_bytes_of(list.blocks(), tensors->count) : 0;
        if (!arguments.workspace(workspace, workspace_bytes, needed).ok()) {
            return arguments.status();
        }
        double *sums = limited ? pointer<double>(workspace) : nullptr;
        float *sizes = limited ? reinterpret_cast<float *>(sums + 2 * list.blocks()) : nullptr;
        const Kernels kernels = kernels_of(*optimizer);
        Queue queue(kOp, device, stream);
        return list.for_launches(sums, sizes, [&](OptimizerJob &job) {
            // Runs as long as they may be without leaving a part of the device idle.
            const int64_t resident = queue.resident_blocks(job.blocks, kBlocksAtOnce);
            const int64_t fair = ceil_div(ceil_div(job.blocks, resident), kBlocksAtOnce) * kBlocksAtOnce;
            job.run = static_cast<int32_t>(std::min<int64_t>(fair, kMostBlocksOfRun));
            const Grid grid = {std::min(resident, ceil_div(job.blocks, job.run))};
            if (limited) {
                qc_status done = queue.launch(kernels.squares, grid, kThreads, job);
                done = done == QC_OK ? queue.launch(norm_kernel, {job.count}, kThreads, job) : done;
                if (done != QC_OK) {
                    return done;
                }
            }
            return queue.launch(kernels.step, grid, kThreads, job);
        });
    });
}

}  // namespace qcore::gpu
