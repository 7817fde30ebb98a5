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
#include "optimizer_block.cuh"
#include "optimizer_rules.cuh"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "optimizer_step";
constexpr int kThreads = 256;
constexpr int kBlocksAtOnce = kThreads / kLanesOfBlock;
constexpr int kMostBlocksOfRun = 64;

// One tensor of a job.
template <class Rule, bool Coded>
struct Entry {
    const OptimizerJob &job;
    int at;

    QC_DEVICE uint64_t word(int i) const { return job.word[static_cast<int64_t>(at) * job.words + i]; }
    QC_DEVICE int64_t first_block() const { return static_cast<int64_t>(word(0) & 0xFFFFFFFF); }
    QC_DEVICE float scale() const { return bits_to_float(static_cast<uint32_t>(word(0) >> 32)); }
    QC_DEVICE int64_t numel() const { return static_cast<int64_t>(word(1)); }
    QC_DEVICE uint64_t param() const { return word(2); }
    QC_DEVICE uint64_t grad() const { return word(3); }
    // The slow average of AdEMAMix follows the fast one.
    QC_DEVICE uint64_t state(int s) const {
        const uint64_t row = static_cast<uint64_t>(numel()) * (Coded ? 1 : 4);
        return s < kRows ? word(4) + static_cast<uint64_t>(s) * row : word(5);
    }
    QC_DEVICE float *absmax(int s) const {
        const uint64_t list = s < kRows ? word(4 + Rule::kLists) : word(5 + Rule::kLists);
        const int64_t blocks = (numel() + kOptimizerBlock - 1) / kOptimizerBlock;
        return reinterpret_cast<float *>(list) + (s < kRows ? s * blocks : 0);
    }
    QC_DEVICE uint64_t last() const { return word(4 + Rule::kLists * (Coded ? 2 : 1)); }

   private:
    static constexpr int kRows = Rule::kStates - Rule::kLists + 1;
};

template <class Rule, bool Coded>
struct Books {
    StateBook<kSignedEntries> signed_book;
    StateBook<kUnsignedEntries> unsigned_book;
    int32_t thresholds[256];
};
template <class Rule>
struct Books<Rule, false> {
    float none;
};

// Whether state s is in the unsigned codebook (QC-OPT-020).
template <class Rule>
QC_DEVICE bool is_unsigned(const qc_optimizer &o, int s) {
    return Rule::squares(s) && (Rule::kStates > 1 || (o.flags & QC_OPT_SIGNED_STATE) == 0);
}

template <class Rule>
QC_DEVICE void build_books(const qc_optimizer &o, Books<Rule, true> &books) {
    if (!is_unsigned<Rule>(o, 0)) {
        books.signed_book.template build<kThreads>(false, books.thresholds);
    }
    if (is_unsigned<Rule>(o, Rule::kStates - 1)) {
        books.unsigned_book.template build<kThreads>(true, books.thresholds);
    }
}
template <class Rule>
QC_DEVICE void build_books(const qc_optimizer &, Books<Rule, false> &) {}

// Eight elements of a block, stepped: QC-OPT-003 to QC-OPT-005, QC-OPT-010 to QC-OPT-015, QC-OPT-022.
template <class Rule, bool Coded>
struct Stepped {
    Eight param;   // before the step
    Eight update;  // 0 where kept
    Eight state[Rule::kStates];
    uint32_t kept;  // bit i: the parameter of element i keeps its bits

    QC_DEVICE Stepped(const Entry<Rule, Coded> &entry, const Books<Rule, Coded> &books, int64_t first, int64_t count) {
        const qc_optimizer &o = entry.job.rule;
        const RawEight grad = load_raw(o.grad_dtype, entry.grad(), first, count);
        const RawEight raw = load_raw(o.param_dtype, entry.param(), first, count);
        RawEight rest = {};
        if (entry.job.compensated != 0) {
            rest = load_raw(o.param_dtype, entry.last(), first, count);
        }
        read_states(entry, books, first, count);
        param = convert(o.param_dtype, raw);
        if (entry.job.compensated != 0) {
            const Eight c = convert(o.param_dtype, rest);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                param.value[i] = param.value[i] + c.value[i];
            }
        }
        const Eight g = convert(o.grad_dtype, grad);
        const float scale = entry.scale();
        kept = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            step(o, i, g.value[i], scale);
        }
        if (count < 8) {
            clear_from(count);
        }
    }

   private:
    QC_DEVICE void read_states(const Entry<Rule, Coded> &entry, const Books<Rule, Coded> &books, int64_t first,
                               int64_t count) {
        if constexpr (Coded) {
            EightBytes codes[Rule::kStates];
            float absmax[Rule::kStates];
#pragma unroll
            for (int s = 0; s < Rule::kStates; ++s) {
                const uint8_t *from = reinterpret_cast<const uint8_t *>(entry.state(s)) + first;
                codes[s] = load_eight_bytes(from, count, is_aligned(from, 8));
                absmax[s] = count > 0 ? entry.absmax(s)[first / kOptimizerBlock] : 0.0f;
            }
#pragma unroll
            for (int s = 0; s < Rule::kStates; ++s) {
                const float *table =
                    is_unsigned<Rule>(entry.job.rule, s) ? books.unsigned_book.value : books.signed_book.value;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    state[s].value[i] = table[codes[s].byte(i)] * absmax[s];
                }
            }
        } else {
#pragma unroll
            for (int s = 0; s < Rule::kStates; ++s) {
                state[s] = convert(QC_F32, load_raw(QC_F32, entry.state(s), first, count));
            }
        }
    }

    QC_DEVICE void step(const qc_optimizer &o, int i, float g, float scale) {
        float x = g * scale;
        if (o.l2 != 0.0f) {
            x = x + param.value[i] * o.l2;
        }
        float values[Rule::kStates];
#pragma unroll
        for (int s = 0; s < Rule::kStates; ++s) {
            values[s] = state[s].value[i];
        }
        update.value[i] = Rule::update(o, x, values);
        const bool skipped = (o.flags & QC_OPT_SKIP_ZEROS) != 0 && g == 0.0f;
        bool lost = false;
#pragma unroll
        for (int s = 0; s < Rule::kStates; ++s) {
            state[s].value[i] = skipped ? state[s].value[i] : values[s];
            lost = lost || (Coded && !is_finite(state[s].value[i]));
        }
        if (lost) {
#pragma unroll
            for (int s = 0; s < Rule::kStates; ++s) {
                state[s].value[i] = 0.0f;
            }
        }
        if (skipped || lost) {
            update.value[i] = 0.0f;
            kept |= 1U << i;
        }
    }

    // Elements past the end of the tensor count as 0.
    QC_DEVICE void clear_from(int64_t count) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i >= count) {
                param.value[i] = 0.0f;
                update.value[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < Rule::kStates; ++s) {
                    state[s].value[i] = 0.0f;
                }
            }
        }
    }
};

// QC-OPT-021, QC-OPT-023. Every lane comes here.
template <class Rule, int W>
QC_DEVICE void encode_states(const Entry<Rule, true> &entry, const Books<Rule, true> &books, const Eight *state,
                             int64_t first, int64_t count) {
    const qc_optimizer &o = entry.job.rule;
    const bool as_bnb = (o.flags & QC_OPT_BNB_CODES) != 0;
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
        float largest = largest_magnitude(state[s]);
#pragma unroll
        for (int mask = 1; mask < kLanesOfBlock; mask *= 2) {
            const float other = wave_xor<W>(largest, mask);
            largest = other > largest ? other : largest;
        }
        const bool of_unsigned = is_unsigned<Rule>(o, s);
        const StateScale scale = state_scale(of_unsigned);
        const float r = 1.0f / largest;
        int codes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = state[s].value[i], scaled_value = value * r;
            const float y = is_nan(scaled_value) ? 0.0f : scaled_value;  // QC-Q8-003: the values are no NaN
            int code = of_unsigned ? books.unsigned_book.code(scale, y) : books.signed_book.code(scale, y);
            if (Rule::squares(s)) {
                code += !as_bnb && value > 0.0f && code == scale.zero ? 1 : 0;
            } else {
                code -= as_bnb && float_to_bits(value) >> 31 != 0 && code == scale.zero ? 1 : 0;
            }
            codes[i] = code;
        }
        if (count > 0) {
            uint8_t *to = reinterpret_cast<uint8_t *>(entry.state(s)) + first;
            store_eight_bytes(to, pack_bytes(codes), count, is_aligned(to, 8));
            if (first % kOptimizerBlock == 0) {
                entry.absmax(s)[first / kOptimizerBlock] = largest;
            }
        }
    }
}

// QC-OPT-004, QC-OPT-006, QC-OPT-007.
template <class Rule, bool Coded>
QC_DEVICE void store_param(const Entry<Rule, Coded> &entry, const Stepped<Rule, Coded> &stepped, float size,
                           int64_t first, int64_t count) {
    const qc_optimizer &o = entry.job.rule;
    Eight moved;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        moved.value[i] = stepped.param.value[i] * o.decay + stepped.update.value[i] * size;
    }
    const auto store = [&](auto *param, auto *compensation) {
        using T = std::remove_pointer_t<decltype(param)>;
        if (entry.job.compensated != 0) {
            store_compensated<T>(param + first, compensation + first, moved, count, stepped.kept);
        } else {
            store_moved<T>(param + first, moved, count, stepped.kept);
        }
    };
    const uint64_t param = entry.param();
    if (o.param_dtype == QC_F32) {
        store_moved<float>(reinterpret_cast<float *>(param) + first, moved, count, stepped.kept);
    } else if (o.param_dtype == QC_F16) {
        store(reinterpret_cast<Half *>(param), reinterpret_cast<Half *>(entry.last()));
    } else if ((o.flags & QC_OPT_STOCHASTIC) != 0) {
        const Vector16 random = philox(o.seed, entry.last(), static_cast<uint64_t>(first / 8));
        store_stochastic(reinterpret_cast<BFloat16 *>(param) + first, moved, random, count, stepped.kept);
    } else {
        store(reinterpret_cast<BFloat16 *>(param), reinterpret_cast<BFloat16 *>(entry.last()));
    }
}

// Calls use(entry, block, first, count) for the lane's part of each block of the job: every thread as often, so that it
// may meet the others. `count` is not positive where there is nothing for the lane to do, `block` negative where there
// is nothing for any lane of the block.
template <class Rule, bool Coded, class Use>
QC_DEVICE void for_blocks(const OptimizerJob &job, const Use &use) {
    const int team = thread_index() / kLanesOfBlock, lane = thread_index() % kLanesOfBlock;
    for (int64_t run = block_index_x() * job.run; run < job.blocks; run += block_count_x() * job.run) {
        const int64_t end = run + job.run < job.blocks ? run + job.run : job.blocks;
        Entry<Rule, Coded> entry = {job, 0};
        for (int after = job.count; after - entry.at > 1;) {
            const Entry<Rule, Coded> middle = {job, (entry.at + after) / 2};
            if (middle.first_block() <= run) {
                entry.at = middle.at;
            } else {
                after = middle.at;
            }
        }
        for (int64_t base = run; base < end; base += kBlocksAtOnce) {
            const int64_t block = base + team;
            while (block < end && entry.at + 1 < job.count &&
                   Entry<Rule, Coded>{job, entry.at + 1}.first_block() <= block) {
                ++entry.at;
            }
            const int64_t first = (block - entry.first_block()) * kOptimizerBlock + 8 * lane;
            use(entry, block < end ? block : -1, first, block < end ? entry.numel() - first : 0);
        }
    }
}

template <class Rule, bool Coded, int W>
QC_KERNEL(kThreads)
step_kernel(QC_PARAMETER(OptimizerJob) job) {
    using Shared = Books<Rule, Coded>;
    QC_SHARED(Shared, books);
    build_books<Rule>(job.rule, books);
    for_blocks<Rule, Coded>(job, [&](const Entry<Rule, Coded> &entry, int64_t, int64_t first, int64_t count) {
        const Stepped<Rule, Coded> stepped(entry, books, first, count);
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
squares_kernel(QC_PARAMETER(OptimizerJob) job) {
    constexpr int kBlock = static_cast<int>(kOptimizerBlock);
    struct Shared {
        Books<Rule, Coded> books;
        float value[kBlocksAtOnce][2][kBlock];
        double lane[kBlocksAtOnce][2][16];
    };
    QC_SHARED(Shared, shared);
    build_books<Rule>(job.rule, shared.books);
    const int team = thread_index() / kLanesOfBlock, mine = thread_index() % kLanesOfBlock;
    for_blocks<Rule, Coded>(job, [&](const Entry<Rule, Coded> &entry, int64_t block, int64_t first, int64_t count) {
        const Stepped<Rule, Coded> stepped(entry, shared.books, first, count);
        store_aligned<float>(&shared.value[team][0][8 * mine], stepped.update);
        store_aligned<float>(&shared.value[team][1][8 * mine], stepped.param);
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
norm_kernel(QC_PARAMETER(OptimizerJob) job) {
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
