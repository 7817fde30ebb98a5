// One block of a tensor in L1: what is read, what is written back, and the passes over it. For kernel files.
//
// Everything is float there. A full block whose gradient, parameter or states are float32 already is worked on where it
// lies; whatever else is converted, or filled up with zeros to whole vectors, in Scratch.
#ifndef QCORE_CPU_OPTIMIZER_BLOCK_H
#define QCORE_CPU_OPTIMIZER_BLOCK_H

#include "block_quantizer.h"
#include "optimizer_kernels.h"
#include "optimizer_rules.h"
#include "philox.h"

namespace qcore::cpu::QC_ISA {

struct Scratch {
    alignas(64) float grad[kOptimizerBlock];
    alignas(64) float param[kOptimizerBlock];
    alignas(64) float moved[kOptimizerBlock];
    alignas(64) float above[kOptimizerBlock];  // the parts of the update (optimizer_rules.h)
    alignas(64) float root[kOptimizerBlock];
    alignas(64) float state[kMaxStates][kOptimizerBlock];
    alignas(64) float before[kMaxStates][kOptimizerBlock];  // the states before the step, with skip_zeros
    alignas(64) uint8_t codes[kMaxStates][kOptimizerBlock];
    bool kept[kOptimizerBlock];  // elements that a step passes over (QC-OPT-005, QC-OPT-022)
};

struct Block {
    int64_t start;
    int64_t n;     // elements
    int64_t size;  // rounded up to whole groups
    const float *grad;
    const float *param;        // with its compensation (QC-OPT-006)
    float *moved;              // takes the parameter after the step: its own memory, or scratch
    float *state[kMaxStates];  // values
    uint8_t *codes[kMaxStates];
    bool keeps;  // whether any element is kept
    bool odd;    // whether a square has its sign bit set, as no step makes it
};

template <class T>
inline void widen(const T *from, int64_t n, int64_t size, float *to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        store(to + i, load(from + i));
    }
    for (; i < n; ++i) {
        to[i] = to_float(from[i]);
    }
    for (; i < size; ++i) {
        to[i] = 0.0f;
    }
}

inline void widen(int32_t dtype, const void *from, int64_t start, int64_t n, int64_t size, float *to) {
    if (dtype == QC_F32) {
        widen(static_cast<const float *>(from) + start, n, size, to);
    } else if (dtype == QC_F16) {
        widen(static_cast<const Half *>(from) + start, n, size, to);
    } else {
        widen(static_cast<const Bfloat *>(from) + start, n, size, to);
    }
}

inline void copy_bytes(const uint8_t *from, int64_t n, int64_t size, uint8_t fill, uint8_t *to) {
    std::memcpy(to, from, static_cast<size_t>(n));
    std::memset(to + n, fill, static_cast<size_t>(size - n));
}

// Asks for what lies four blocks ahead, a group at a time: the loops over one block are too long for the hardware to
// look past them, and all lines of a block at once would wait for each other. On a Zen 4 into L2: against prefetches
// into L1 (the same kernels with another constant, in turns), AdamW takes a tenth less time with 8-bit states and a
// third less with float32 ones, and without prefetches a tenth more and a fifth less. Always inlined: GCC takes a
// function that only prefetches for one without effects, and drops its calls.
template <int kStates, bool kCoded>
class Ahead {
    static constexpr int64_t kBlocks = 4;

   public:
    Ahead(const OptimizerJob &job, const OptimizerTensor &t, int64_t index) {
        const int64_t start = (index + kBlocks) * kOptimizerBlock;
        if (kLanes < 16 || start + kOptimizerBlock > t.n) {  // narrower vectors are slower than the memory
            return;
        }
        some_ = true;
        into_l2_ = job.into_l2;
        grad_ = Stream(t.grad, start, job.rule->grad_dtype == QC_F32 ? 4 : 2);
        param_ = Stream(t.param, start, job.rule->param_dtype == QC_F32 ? 4 : 2);
        for (int s = 0; s < kStates; ++s) {
            state_[s] = Stream(t.state[s], start, kCoded ? 1 : 4);
        }
    }
    __attribute__((always_inline)) void group(int64_t at) const {
        if (some_ && into_l2_) {
            all<2>(at);
        } else if (some_) {
            all<3>(at);
        }
    }

    // The parts of a first and of a second loop, for kLateParams: where computing takes as long as the traffic, the
    // traffic must not rest during either. 8-bit steps on a Zen 4 take 1 to 4% less time than with all of it in the
    // first.
    __attribute__((always_inline)) void first_loop(int64_t at) const {
        if (some_) {
            grad_.template group<2>(at);
            for (int s = 0; s < kStates; ++s) {
                state_[s].template group<2>(at);
            }
        }
    }
    __attribute__((always_inline)) void second_loop(int64_t at) const {
        if (some_) {
            param_.template group<2>(at);
        }
    }

   private:
    // kLocality: 3 for all caches, 2 for all but L1.
    template <int kLocality>
    __attribute__((always_inline)) void all(int64_t at) const {
        grad_.template group<kLocality>(at);
        param_.template group<kLocality>(at);
        for (int s = 0; s < kStates; ++s) {
            state_[s].template group<kLocality>(at);
        }
    }

    struct Stream {
        Stream() = default;
        Stream(const void *array, int64_t start, int64_t size_of)
            : from(static_cast<const char *>(array) + start * size_of), size(size_of) {}
        template <int kLocality>
        __attribute__((always_inline)) void group(int64_t at) const {  // 64 elements
            const char *line = from + at * size;
            __builtin_prefetch(line, 0, kLocality);
            if (size > 1) {
                __builtin_prefetch(line + 64, 0, kLocality);
            }
            if (size > 2) {
                __builtin_prefetch(line + 128, 0, kLocality);
                __builtin_prefetch(line + 192, 0, kLocality);
            }
        }
        const char *from = nullptr;
        int64_t size = 0;
    };

    bool some_ = false, into_l2_ = false;
    Stream grad_, param_, state_[kStates];
};

// `in_place`: float32 states may be worked on where they lie.
inline void open_block(const OptimizerJob &job, const OptimizerTensor &t, int states, int64_t index, bool in_place,
                       Scratch &scratch, Block &b) {
    const qc_optimizer &rule = *job.rule;
    b.keeps = b.odd = false;
    b.start = index * kOptimizerBlock;
    // Nearly every block of a float32 model: no more instructions than it needs, because the vector units wait for
    // them.
    if (rule.state_bits == 8 && rule.grad_dtype == QC_F32 && rule.param_dtype == QC_F32 &&
        t.n - b.start >= kOptimizerBlock) {
        b.n = b.size = kOptimizerBlock;
        b.grad = static_cast<const float *>(t.grad) + b.start;
        b.param = b.moved = static_cast<float *>(t.param) + b.start;
        for (int s = 0; s < states; ++s) {
            b.codes[s] = static_cast<uint8_t *>(t.state[s]) + b.start;
            b.state[s] = scratch.state[s];
        }
        return;
    }
    b.n = t.n - b.start < kOptimizerBlock ? t.n - b.start : kOptimizerBlock;
    b.size = (b.n + kGroup - 1) / kGroup * kGroup;
    const bool whole = b.n == b.size;
    b.grad = static_cast<const float *>(t.grad) + b.start;
    if (!whole || rule.grad_dtype != QC_F32) {
        widen(rule.grad_dtype, t.grad, b.start, b.n, b.size, scratch.grad);
        b.grad = scratch.grad;
    }
    b.moved = static_cast<float *>(t.param) + b.start;
    b.param = b.moved;
    if (!whole || rule.param_dtype != QC_F32) {
        widen(rule.param_dtype, t.param, b.start, b.n, b.size, scratch.param);
        b.param = scratch.param;
        b.moved = scratch.moved;
    }
    if (t.compensation != nullptr) {
        widen(rule.param_dtype, t.compensation, b.start, b.n, b.size, scratch.moved);
        for (int64_t i = 0; i < b.size; ++i) {
            scratch.param[i] += scratch.moved[i];
        }
    }
    for (int s = 0; s < states; ++s) {
        if (rule.state_bits == 8) {
            b.codes[s] = static_cast<uint8_t *>(t.state[s]) + b.start;
            b.state[s] = scratch.state[s];
            if (!whole) {
                const uint8_t zero = static_cast<uint8_t>(job.book[s].codes->zero_code);
                copy_bytes(b.codes[s], b.n, b.size, zero, scratch.codes[s]);
                b.codes[s] = scratch.codes[s];
            }
        } else {
            b.state[s] = static_cast<float *>(t.state[s]) + b.start;
            if (!whole || !in_place) {
                widen(b.state[s], b.n, b.size, scratch.state[s]);
                b.state[s] = scratch.state[s];
            }
        }
    }
}

// The values of 8-bit states before the step.
inline void decode_block(const StateBook &book, const Block &b, int s, float absmax, float *out) {
    for (int64_t i = 0; i < b.size; ++i) {
        out[i] = book.table[b.codes[s][i]] * absmax;
    }
}

inline float compensation_of(float value, float rounded) {
    const bool finite = (bits_of(rounded) & kMagnitude) < kInfinity;
    return finite ? value - rounded : 0.0f;
}

// Writes b.moved back to parameter and compensation, except to kept elements (QC-OPT-004, -006).
template <class T>
inline void close_param(const Block &b, const Scratch &scratch, T *param, T *compensation) {
    for (int64_t i = 0; i < b.n; ++i) {
        if (scratch.kept[i]) {
            continue;
        }
        param[i] = from_float<T>(b.moved[i]);
        if (compensation != nullptr) {
            compensation[i] = from_float<T>(compensation_of(b.moved[i], to_float(param[i])));
        }
    }
}

// The same for a block without kept elements and compensation.
template <class T>
inline void narrow(const float *from, int64_t n, T *to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        store(to + i, load(from + i));
    }
    for (; i < n; ++i) {
        to[i] = from_float<T>(from[i]);
    }
}

// The same with a compensation: what is not finite has none.
template <class T>
inline void narrow(const float *from, int64_t n, T *to, T *compensation) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Float value = load(from + i);
        store(to + i, value);
        store(compensation + i, finite_or_zero(value - load(to + i)));
    }
    for (; i < n; ++i) {
        to[i] = from_float<T>(from[i]);
        compensation[i] = from_float<T>(compensation_of(from[i], to_float(to[i])));
    }
}

template <class T>
inline void close_param_of(const Block &b, const Scratch &scratch, const OptimizerTensor &t) {
    T *param = static_cast<T *>(t.param) + b.start;
    T *compensation = t.compensation == nullptr ? nullptr : static_cast<T *>(t.compensation) + b.start;
    if (b.keeps) {
        close_param(b, scratch, param, compensation);
    } else if (compensation != nullptr) {
        narrow(b.moved, b.n, param, compensation);
    } else {
        narrow(b.moved, b.n, param);
    }
}

// QC-OPT-007. The numbers of a whole block cost the same as those of a tail.
inline void close_stochastic(const Block &b, const Scratch &scratch, const OptimizerTensor &t, uint64_t seed) {
    static_assert(8 * kPhilox == kOptimizerBlock);
    uint16_t random[kOptimizerBlock];
    random_16_bits(seed, t.stream, static_cast<uint64_t>(b.start) / 8, random);
    uint16_t raised[kOptimizerBlock];
    for (int64_t i = 0; i < b.n; ++i) {
        const uint32_t bits = bits_of(b.moved[i]);
        const bool nan = (bits & kMagnitude) > kInfinity;
        raised[i] = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + random[i]) >> 16);
    }
    Bfloat *param = static_cast<Bfloat *>(t.param) + b.start;
    for (int64_t i = 0; i < b.n; ++i) {
        param[i].bits = b.keeps && scratch.kept[i] ? param[i].bits : raised[i];
    }
}

inline void close_block(const OptimizerJob &job, const OptimizerTensor &t, const Block &b, const Scratch &scratch) {
    const qc_optimizer &rule = *job.rule;
    if ((rule.flags & QC_OPT_STOCHASTIC) != 0) {
        close_stochastic(b, scratch, t, rule.seed);
    } else if (rule.param_dtype == QC_F16) {
        close_param_of<Half>(b, scratch, t);
    } else if (rule.param_dtype == QC_BF16) {
        close_param_of<Bfloat>(b, scratch, t);
    } else if (b.moved == scratch.moved) {
        close_param_of<float>(b, scratch, t);
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_OPTIMIZER_BLOCK_H
