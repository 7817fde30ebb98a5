// One optimizer step (docs/spec/60-optimizers.md).
//
// Memory picture, fp32 parameters: one pass over the data, block by block of 256 elements, everything between reading
// and writing in L1. Per element 8-bit Adam reads 4 (gradient) + 4 (parameter) + 2 (codes) bytes and writes 4 + 2: 16
// bytes where 32-bit Adam moves 28. The floor is that traffic. Beside it stands, for 16 elements with AVX-512, work for
// about 32 cycles of the two vector ports (benchmarks/port_counts.py): of some 62 operations 13 decode, 26 encode, 23
// are the rule's. The divider takes 22 cycles for a square root and a quotient, which overlap with the rest only in
// part (probe/step_cycles.cpp): 40 to 54 cycles in all, more than the traffic takes. IEEE results leave no room for
// approximations.
//
// A block takes two loops: the first goes from old states and gradient to new states, the second to the parameter, and
// 8-bit states are encoded beside it. The next block's first loop comes in between, so that nothing waits for a block's
// absmax. What is rare, elements that keep their values, is set right after the first loop, so that both stay free of
// masks.
#include "optimizer_kernels.h"

#include <limits>

#include "optimizer_block.h"
#include "optimizer_encoding.h"

namespace qcore::cpu::QC_ISA {
namespace {

// The values of kGroup elements' states.
template <class Rule, int s>
__attribute__((always_inline)) inline void decode(const OptimizerJob &job, const Block &b, int64_t i,
                                                  Float (&out)[Rule::kStates][kVectors]) {
    const DecoderOf<Rule, s> decoder(job.book[s].table, *job.book[s].lines);
    decoder(b.codes[s] + i, out[s]);
    if constexpr (s + 1 < Rule::kStates) {
        decode<Rule, s + 1>(job, b, i, out);
    }
}

// For a first loop that a second one follows.
struct NoSums {
    static constexpr bool kWanted = false;
};

// The first loop: states in place (decoded into b.state first), and the parts of the update. Returns the largest
// magnitude of each state, as bits. With kPlain, x is the gradient itself: no factor and no weight decay in it. Where
// sums are wanted, nothing else is kept.
template <class Rule, bool kCoded, bool kPlain, class Sums>
__attribute__((always_inline)) inline void apply(const Rule &rule, const OptimizerJob &job, const OptimizerTensor &t,
                                                 int64_t index, const Block &b, Scratch &scratch,
                                                 int32_t (&largest)[Rule::kStates], Sums &sums) {
    constexpr int kStates = Rule::kStates;
    const Float scale = broadcast(t.grad_scale);
    const Float l2 = broadcast(job.rule->l2);
    const bool coupled = job.rule->l2 != 0.0f;
    Float absmax[kStates];
    Int top[kStates];
    for (int s = 0; s < kStates; ++s) {
        absmax[s] = broadcast(kCoded ? t.absmax[s][index] : 1.0f);
        top[s] = zero();
    }
    const Ahead<kStates, kCoded> ahead(job, t, index);
    for (int64_t i = 0; i < b.size; i += kGroup) {
        if constexpr (kLateParams<kCoded> && !Sums::kWanted) {
            ahead.first_loop(i);
        } else {
            ahead.group(i);
        }
        Float old[kStates][kVectors];
        if constexpr (kCoded) {
            decode<Rule, 0>(job, b, i, old);
        }
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = i + v * kLanes;
            Float x = load(b.grad + at);
            if constexpr (!kPlain) {
                x = multiply(x, scale);
                if (coupled) {
                    x = x + load(b.param + at) * l2;
                }
            }
            Float state[kStates];
            for (int s = 0; s < kStates; ++s) {
                state[s] = kCoded ? multiply(old[s][v], absmax[s]) : load(b.state[s] + at);
            }
            const Float above = rule.begin(x, state);
            if constexpr (Sums::kWanted) {
                sums.add(rule, b.param + at, state, above);
                continue;
            }
            if constexpr (Rule::kAbove == kOther) {
                store(scratch.above + at, above);
            }
            if constexpr (Rule::kRoot && !kLateRoots<kCoded>) {  // the divider is at work in both loops
                store(scratch.root + at, square_root(state[kStates - 1]));
            }
            for (int s = 0; s < kStates; ++s) {
                store(b.state[s] + at, state[s]);
                top[s] =
                    Rule::kSquares[s] ? maximum_unsigned(top[s], bits(state[s])) : maximum(top[s], magnitude(state[s]));
            }
        }
    }
    for (int s = 0; s < kStates; ++s) {
        // Squares are not negative, so their bits are magnitudes; one that is, all the same, ends in keep() like a NaN.
        largest[s] = Rule::kSquares[s] ? static_cast<int32_t>(highest_unsigned(top[s])) : highest(top[s]);
    }
}

// The update of kLanes elements.
template <class Rule, bool kCoded>
__attribute__((always_inline)) inline Float update(const Rule &rule, const Block &b, const Scratch &scratch,
                                                   int64_t at) {
    const Float above = load((Rule::kAbove == kOther ? scratch.above : b.state[Rule::kAbove]) + at);
    if constexpr (Rule::kRoot) {
        static_assert(Rule::kSquares[Rule::kStates - 1]);
        const Float root =
            kLateRoots<kCoded> ? square_root(load(b.state[Rule::kStates - 1] + at)) : load(scratch.root + at);
        return rule.end(above, root);
    } else {
        return above;
    }
}

// The second loop (QC-OPT-004), and what is encoded beside it.
template <class Rule, bool kCoded, class Pending>
__attribute__((always_inline)) inline void move(const Rule &rule, const OptimizerJob &job, float step_size,
                                                const Block &b, const Scratch &scratch, Pending &pending) {
    const Float decay = broadcast(job.rule->decay);
    const Float size = broadcast(step_size);
    for (int64_t i = 0; i < b.size; i += kGroup) {
        pending.group(i);
        for (int64_t at = i; at < i + kGroup; at += kLanes) {
            store(b.moved + at, load(b.param + at) * decay + update<Rule, kCoded>(rule, b, scratch, at) * size);
        }
    }
}

// The states before the step, for elements that skip it.
template <int kStates>
void remember(const OptimizerJob &job, const OptimizerTensor &t, int64_t index, const Block &b, Scratch &scratch) {
    for (int s = 0; s < kStates; ++s) {
        if (job.rule->state_bits == 8) {
            decode_block(job.book[s], b, s, t.absmax[s][index], scratch.before[s]);
        } else {
            std::memcpy(scratch.before[s], b.state[s], static_cast<size_t>(b.size) * sizeof(float));
        }
    }
}

// QC-OPT-005, QC-OPT-022: marks the elements that are kept, sets their states right, finds the maxima anew.
template <class Rule>
__attribute__((noinline)) void keep(const OptimizerJob &job, Block &b, Scratch &scratch,
                                    int32_t (&largest)[Rule::kStates]) {
    constexpr int kStates = Rule::kStates;
    const bool skips = (job.rule->flags & QC_OPT_SKIP_ZEROS) != 0;
    const bool coded = job.rule->state_bits == 8;
    for (int s = 0; s < kStates; ++s) {
        largest[s] = 0;
    }
    for (int64_t i = 0; i < b.size; ++i) {
        const bool skipped = skips && b.grad[i] == 0.0f;
        bool lost = false;
        for (int s = 0; s < kStates; ++s) {
            b.state[s][i] = skipped ? scratch.before[s][i] : b.state[s][i];
            lost |= coded && (bits_of(b.state[s][i]) & kMagnitude) >= kInfinity;
        }
        for (int s = 0; s < kStates; ++s) {
            b.state[s][i] = lost ? 0.0f : b.state[s][i];
            b.odd |= Rule::kSquares[s] && bits_of(b.state[s][i]) >> 31 != 0;
            const int32_t size = static_cast<int32_t>(bits_of(b.state[s][i]) & kMagnitude);
            largest[s] = size > largest[s] ? size : largest[s];
        }
        scratch.kept[i] = skipped || lost;
        b.keeps |= scratch.kept[i];
    }
    b.moved = b.keeps ? scratch.moved : b.moved;
}

// Reads a block and takes the first loop.
template <class Rule, bool kCoded>
__attribute__((always_inline)) inline void advance(const Rule &rule, const OptimizerJob &job, const OptimizerTensor &t,
                                                   int64_t index, bool in_place, Scratch &scratch, Block &b,
                                                   int32_t (&largest)[Rule::kStates]) {
    open_block(job, t, Rule::kStates, index, in_place, scratch, b);
    const bool skips = (job.rule->flags & QC_OPT_SKIP_ZEROS) != 0;
    if (skips) {
        remember<Rule::kStates>(job, t, index, b, scratch);
    }
    NoSums none;
    if (t.grad_scale == 1.0f && job.rule->l2 == 0.0f) {
        apply<Rule, kCoded, true>(rule, job, t, index, b, scratch, largest, none);
    } else {
        apply<Rule, kCoded, false>(rule, job, t, index, b, scratch, largest, none);
    }
    bool finite = true;
    for (int s = 0; s < Rule::kStates; ++s) {
        finite &= static_cast<uint32_t>(largest[s]) < kInfinity;
    }
    if (skips || (kCoded && !finite)) {
        keep<Rule>(job, b, scratch, largest);
    }
}

// What a second loop takes along where its part of the prefetches is late (kLateParams).
template <class Rule>
struct WithPrefetches {
    __attribute__((always_inline)) void group(int64_t at) {
        ahead.second_loop(at);
        encoding.group(at);
    }
    Ahead<Rule::kStates, true> ahead;
    Encoding<Rule> &encoding;
};

// A block with 8-bit states between its loops.
template <class Rule>
struct Started {
    explicit Started(const OptimizerJob &job) : encoding(job) {}

    void start(const Rule &rule, const OptimizerJob &job, const OptimizerTensor &t, int64_t index) {
        int32_t largest[Rule::kStates];
        advance<Rule, true>(rule, job, t, index, true, scratch, block, largest);
        encoding.begin(t, index, block, largest);
    }
    void finish(const Rule &rule, const OptimizerJob &job, const OptimizerTensor &t) {
        if constexpr (kLateParams<true>) {
            const int64_t started = block.start / kOptimizerBlock + 1;  // the last one that was
            WithPrefetches<Rule> both{{job, t, started}, encoding};
            move<Rule, true>(rule, job, t.step_size, block, scratch, both);
        } else {
            move<Rule, true>(rule, job, t.step_size, block, scratch, encoding);
        }
        encoding.finish();
        if (block.moved == scratch.moved) {  // else the parameter is where it belongs
            close_block(job, t, block, scratch);
        }
    }

    Scratch scratch;
    Block block;
    Encoding<Rule> encoding;
};

template <class Rule, bool kCoded>
void step(const OptimizerJob &job, const OptimizerTensor &t, int64_t first, int64_t last) {
    const Rule rule(*job.rule);
    if constexpr (kCoded) {
        // The scales of a block are ready long before they are needed if the next one's first loop comes before. Both
        // loops are inlined here, at one place: what a block costs beside them, some hundred instructions, leaves the
        // vector units idle.
        Started<Rule> even(job), odd(job);
        for (int64_t index = first; index <= last; ++index) {
            Started<Rule> &own = (index - first) % 2 == 0 ? even : odd;
            if (index < last) {
                own.start(rule, job, t, index);
            }
            if (index > first) {
                (&own == &even ? odd : even).finish(rule, job, t);
            }
        }
    } else {
        Scratch scratch;
        NoEncoding pending;
        Block b;
        int32_t largest[Rule::kStates];
        for (int64_t index = first; index < last; ++index) {
            advance<Rule, false>(rule, job, t, index, true, scratch, b, largest);
            move<Rule, false>(rule, job, t.step_size, b, scratch, pending);
            close_block(job, t, b, scratch);
            for (int s = 0; s < Rule::kStates && b.n != b.size; ++s) {
                std::memcpy(static_cast<float *>(t.state[s]) + b.start, b.state[s],
                            static_cast<size_t>(b.n) * sizeof(float));
            }
        }
    }
}

// QC-OPT-009 of one block.
double sum_of_squares(const float *x, int64_t n) {
    constexpr int kSums = 16;
    double lane[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (int l = 0; l < kSums; ++l) {
            lane[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
        }
    }
    for (int l = 0; i + l < n; ++l) {
        lane[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) {
            lane[l] += lane[l + half];
        }
    }
    return lane[0];
}

#if defined(QC_SUMS_BESIDE_UPDATES)
// QC-OPT-009 of a whole block in its first loop.
template <class Rule>
struct Sums {
    static constexpr bool kWanted = true;

    __attribute__((always_inline)) void add(const Rule &rule, const float *param, const Float (&state)[Rule::kStates],
                                            Float above) {
        params.add(param);
        if constexpr (Rule::kRoot) {
            updates.add(rule.end(above, square_root(state[Rule::kStates - 1])));
        } else {
            updates.add(above);
        }
    }

    SquareSum updates, params;
};

// The sums of a block without a second loop. Returns whether they are right. They are if that of the update is finite:
// a state that is not makes the update NaN or infinite, or, a second moment, 0 as it has to be.
template <class Rule, bool kCoded>
__attribute__((always_inline)) inline bool squares_at_once(const Rule &rule, const OptimizerJob &job,
                                                           const OptimizerTensor &t, int64_t index, Scratch &scratch,
                                                           double *sums) {
    const bool skips = (job.rule->flags & QC_OPT_SKIP_ZEROS) != 0;
    if (Rule::kBounded || skips || t.n - index * kOptimizerBlock < kOptimizerBlock) {
        return false;
    }
    Block b;
    open_block(job, t, Rule::kStates, index, true, scratch, b);
    int32_t largest[Rule::kStates];
    Sums<Rule> both;
    if (t.grad_scale == 1.0f && job.rule->l2 == 0.0f) {
        apply<Rule, kCoded, true>(rule, job, t, index, b, scratch, largest, both);
    } else {
        apply<Rule, kCoded, false>(rule, job, t, index, b, scratch, largest, both);
    }
    sums[0] = both.updates.total();
    sums[1] = both.params.total();
    return sums[0] < std::numeric_limits<double>::infinity();
}
#endif

template <class Rule, bool kCoded>
void squares(const OptimizerJob &job, const OptimizerTensor &t, int64_t first, int64_t last, double *sums) {
    const Rule rule(*job.rule);
    Scratch scratch;
    Block b;
    int32_t largest[Rule::kStates];
    for (int64_t index = first; index < last; ++index, sums += 2) {
#if defined(QC_SUMS_BESIDE_UPDATES)
        if (squares_at_once<Rule, kCoded>(rule, job, t, index, scratch, sums)) {
            continue;
        }
#endif
        advance<Rule, kCoded>(rule, job, t, index, false, scratch, b, largest);
        for (int64_t at = 0; at < b.size; at += kLanes) {
            store(scratch.above + at, update<Rule, kCoded>(rule, b, scratch, at));
        }
        for (int64_t i = 0; b.keeps && i < b.n; ++i) {
            scratch.above[i] = scratch.kept[i] ? 0.0f : scratch.above[i];
        }
        sums[0] = sum_of_squares(scratch.above, b.n);
        sums[1] = sum_of_squares(b.param, b.n);
    }
}

}  // namespace

const OptimizerKernels optimizer_kernels = {{{step<Adam, false>, step<Adam, true>},
                                             {step<Ademamix, false>, step<Ademamix, true>},
                                             {step<Lion, false>, step<Lion, true>},
                                             {step<Momentum, false>, step<Momentum, true>},
                                             {step<Rmsprop, false>, step<Rmsprop, true>},
                                             {step<Adagrad, false>, step<Adagrad, true>}},
                                            {{squares<Adam, false>, squares<Adam, true>},
                                             {squares<Ademamix, false>, squares<Ademamix, true>},
                                             {squares<Lion, false>, squares<Lion, true>},
                                             {squares<Momentum, false>, squares<Momentum, true>},
                                             {squares<Rmsprop, false>, squares<Rmsprop, true>},
                                             {squares<Adagrad, false>, squares<Adagrad, true>}}};

}  // namespace qcore::cpu::QC_ISA
