// One optimizer step (docs/spec/60-optimizers.md).
//
// Memory picture, fp32 parameters: one pass over the data, block by block of 256 elements, everything between reading
// and writing in L1. Per element 8-bit Adam reads 4 (gradient) + 4 (parameter) + 2 (codes) bytes and writes 4 + 2: 16
// bytes where 32-bit Adam moves 28. The floor is that traffic. Beside it stands, for 16 elements with AVX-512, work for
// about 33 cycles of the two vector ports: of some 66 operations 13 decode, 29 encode, 24 are the rule's. The divider
// takes 22 of these cycles for a square root and a quotient; IEEE results leave no room for approximations.
//
// A block takes two loops: the rule (old states and gradient to new states and update) and the parameter; 8-bit states
// are encoded beside the next block's first loop (optimizer_encoding.h). What is rare, elements that keep their values,
// is set right between the loops, so that they stay free of masks.
#include "optimizer_kernels.h"

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

// The first loop: states in place (decoded into b.state first), update to `update`; beside it `pending` goes on.
// Returns the largest magnitude of each state, as bits. With kPlain, x is the gradient itself: no factor and no weight
// decay in it.
template <class Rule, bool kCoded, bool kPlain, class Pending>
void apply(const Rule &rule, const OptimizerJob &job, const OptimizerTensor &t, int64_t index, const Block &b,
           Pending &pending, float *update, int32_t (&largest)[Rule::kStates]) {
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
        ahead.group(i);
        Float old[kStates][kVectors];
        if constexpr (kCoded) {
            decode<Rule, 0>(job, b, i, old);
        }
        Part part[kVectors];
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
            part[v] = rule.begin(x, state);
            for (int s = 0; s < kStates; ++s) {
                store(b.state[s] + at, state[s]);
                top[s] =
                    Rule::kSquares[s] ? maximum_unsigned(top[s], bits(state[s])) : maximum(top[s], magnitude(state[s]));
            }
        }
        pending.group();
        for (int v = 0; v < kVectors; ++v) {
            store(update + i + v * kLanes, rule.end(part[v]));
        }
    }
    for (int s = 0; s < kStates; ++s) {
        // Squares are not negative, so their bits are magnitudes; one that is, all the same, ends in keep() like a NaN.
        largest[s] = Rule::kSquares[s] ? static_cast<int32_t>(highest_unsigned(top[s])) : highest(top[s]);
    }
}

// The second loop (QC-OPT-004).
void move(const qc_optimizer &rule, float step_size, const Block &b, const float *update) {
    const Float decay = broadcast(rule.decay);
    const Float size = broadcast(step_size);
    for (int64_t i = 0; i < b.size; i += kLanes) {
        store(b.moved + i, load(b.param + i) * decay + load(update + i) * size);
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

// QC-OPT-005, QC-OPT-022: marks the elements that are kept, sets their states and updates right, finds the maxima anew.
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
        scratch.update[i] = skipped || lost ? 0.0f : scratch.update[i];
        b.keeps |= scratch.kept[i];
    }
    b.moved = b.keeps ? scratch.moved : b.moved;
}

// Reads a block and takes the first loop.
template <class Rule, bool kCoded, class Pending>
Block advance(const Rule &rule, const OptimizerJob &job, const OptimizerTensor &t, int64_t index, bool in_place,
              Pending &pending, Scratch &scratch, int32_t (&largest)[Rule::kStates]) {
    Block b = open_block(job, t, Rule::kStates, index, in_place, scratch);
    const bool skips = (job.rule->flags & QC_OPT_SKIP_ZEROS) != 0;
    if (skips) {
        remember<Rule::kStates>(job, t, index, b, scratch);
    }
    if (t.grad_scale == 1.0f && job.rule->l2 == 0.0f) {
        apply<Rule, kCoded, true>(rule, job, t, index, b, pending, scratch.update, largest);
    } else {
        apply<Rule, kCoded, false>(rule, job, t, index, b, pending, scratch.update, largest);
    }
    bool finite = true;
    for (int s = 0; s < Rule::kStates; ++s) {
        finite &= static_cast<uint32_t>(largest[s]) < kInfinity;
    }
    if (skips || (kCoded && !finite)) {
        keep<Rule>(job, b, scratch, largest);
    }
    return b;
}

template <class Rule, bool kCoded>
void step(const OptimizerJob &job, const OptimizerTensor &t, int64_t first, int64_t last) {
    const Rule rule(*job.rule);
    Scratch scratch[2];  // of this block, and of the one before, whose states are still being encoded
    int32_t largest[Rule::kStates];
    if constexpr (kCoded) {
        Encoding<Rule> pending(job);
        for (int64_t index = first; index < last; ++index) {
            Scratch &own = scratch[index % 2];
            const Block b = advance<Rule, true>(rule, job, t, index, true, pending, own, largest);
            move(*job.rule, t.step_size, b, own.update);
            close_block(job, t, b, own);
            pending.finish();
            pending.begin(t, index, b, largest);
        }
        pending.finish();
    } else {
        NoEncoding pending;
        for (int64_t index = first; index < last; ++index) {
            const Block b = advance<Rule, false>(rule, job, t, index, true, pending, scratch[0], largest);
            move(*job.rule, t.step_size, b, scratch[0].update);
            close_block(job, t, b, scratch[0]);
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

template <class Rule, bool kCoded>
void squares(const OptimizerJob &job, const OptimizerTensor &t, int64_t first, int64_t last, double *sums) {
    const Rule rule(*job.rule);
    Scratch scratch;
    NoEncoding pending;
    int32_t largest[Rule::kStates];
    for (int64_t index = first; index < last; ++index, sums += 2) {
        const Block b = advance<Rule, kCoded>(rule, job, t, index, false, pending, scratch, largest);
        sums[0] = sum_of_squares(scratch.update, b.n);
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
