// What a team of lanes does to a block of an optimizer step: reads it, steps it, encodes its states, stores it.
#ifndef QCORE_KERNELS_OPTIMIZER_STEP_CUH
#define QCORE_KERNELS_OPTIMIZER_STEP_CUH

#include "optimizer_block.cuh"

namespace qcore::gpu {

inline constexpr int kStepThreads = 256;
inline constexpr int kBlocksAtOnce = kStepThreads / kLanesOfBlock;

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
    StateValues<true> values;
    StateBook<kSignedEntries> signed_book;
    StateBook<kUnsignedEntries> unsigned_book;
    int32_t thresholds[256];
};
template <class Rule>
struct Books<Rule, false> {
    StateValues<false> values;
};

// Whether state s is in the unsigned codebook (QC-OPT-020).
template <class Rule>
QC_DEVICE bool is_unsigned(const qc_optimizer &o, int s) {
    return Rule::squares(s) && (Rule::kStates > 1 || (o.flags & QC_OPT_SIGNED_STATE) == 0);
}

template <class Rule>
QC_DEVICE void build_books(const qc_optimizer &o, Books<Rule, true> &books) {
    books.values.fill();  // the barriers of the books follow
    if (!is_unsigned<Rule>(o, 0)) {
        books.signed_book.template build<kStepThreads>(false, books.thresholds);
    }
    if (is_unsigned<Rule>(o, Rule::kStates - 1)) {
        books.unsigned_book.template build<kStepThreads>(true, books.thresholds);
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

    QC_DEVICE Stepped(const Entry<Rule, Coded> &entry, const StateValues<Coded> &values, int64_t first, int64_t count) {
        const qc_optimizer &o = entry.job.rule;
        const RawEight grad = load_raw(o.grad_dtype, entry.grad(), first, count);
        const RawEight raw = load_raw(o.param_dtype, entry.param(), first, count);
        RawEight rest = {};
        if (entry.job.compensated != 0) {
            rest = load_raw(o.param_dtype, entry.last(), first, count);
        }
        read_states(entry, values, first, count);
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
    QC_DEVICE void read_states(const Entry<Rule, Coded> &entry, const StateValues<Coded> &values, int64_t first,
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
                const float *table = is_unsigned<Rule>(entry.job.rule, s) ? values.of_unsigned : values.of_signed;
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

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_OPTIMIZER_STEP_CUH
