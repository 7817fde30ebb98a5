// The algorithms: from x and the old states to the new states and the update (QC-OPT-010 to QC-OPT-015). For kernel
// files. kStates values an element; kSquares says which of them are second moments. begin() makes the new states and
// returns what stands above the fraction bar of the update, end() divides by the root of the second moment. kAbove is
// the state that stands there itself, or kOther; without kRoot nothing is divided. kBounded is an update that is finite
// whatever the states are.
#ifndef QCORE_CPU_OPTIMIZER_RULES_H
#define QCORE_CPU_OPTIMIZER_RULES_H

#include "optimizer_simd.h"
#include "qcore_backend.h"

namespace qcore::cpu::QC_ISA {

// s * beta + x * gain, three roundings.
struct Average {
    Average(float beta_of, float gain_of) : beta(broadcast(beta_of)), gain(broadcast(gain_of)) {}
    Float operator()(Float s, Float x) const { return s * beta + x * gain; }

    Float beta, gain;
};

inline constexpr int kOther = -1;

struct Adam {
    static constexpr int kStates = 2;
    static constexpr bool kRoot = true;
    static constexpr int kAbove = 0;
    static constexpr bool kBounded = false;
    static constexpr bool kSquares[] = {false, true};

    explicit Adam(const qc_optimizer &o) : first(o.beta1, o.gain1), second(o.beta2, o.gain2), eps(broadcast(o.eps)) {}
    Float begin(Float x, Float (&s)[kStates]) const {
        s[0] = first(s[0], x);
        s[1] = second(s[1], x * x);
        return s[0];
    }
    Float end(Float above, Float root) const { return above / (root + eps); }

    Average first, second;
    Float eps;
};

struct Ademamix {
    static constexpr int kStates = 3;
    static constexpr bool kRoot = true;
    static constexpr int kAbove = kOther;
    static constexpr bool kBounded = false;
    static constexpr bool kSquares[] = {false, false, true};

    explicit Ademamix(const qc_optimizer &o)
        : fast(o.beta1, o.gain1),
          slow(o.beta3, o.gain3),
          second(o.beta2, o.gain2),
          correction1(broadcast(o.correction1)),
          correction2(broadcast(o.correction2)),
          alpha(broadcast(o.alpha)),
          eps(broadcast(o.eps)) {}
    Float begin(Float x, Float (&s)[kStates]) const {
        s[0] = fast(s[0], x);
        s[1] = slow(s[1], x);
        s[2] = second(s[2], x * x);
        return s[0] * correction1 + s[1] * alpha;
    }
    Float end(Float above, Float root) const { return above / (root * correction2 + eps); }

    Average fast, slow, second;
    Float correction1, correction2, alpha, eps;
};

struct Lion {
    static constexpr int kStates = 1;
    static constexpr bool kRoot = false;
    static constexpr int kAbove = kOther;
    static constexpr bool kBounded = true;
    static constexpr bool kSquares[] = {false};

    explicit Lion(const qc_optimizer &o) : direction(o.beta1, o.gain1), momentum(o.beta2, o.gain2) {}
    Float begin(Float x, Float (&s)[kStates]) const {
        const Float d = direction(s[0], x);
        s[0] = momentum(s[0], x);
        return sign(d);
    }

    Average direction, momentum;
};

struct Momentum {
    static constexpr int kStates = 1;
    static constexpr bool kRoot = false;
    static constexpr int kAbove = kOther;
    static constexpr bool kBounded = false;
    static constexpr bool kSquares[] = {false};

    explicit Momentum(const qc_optimizer &o) : momentum(o.beta1, o.gain1), nesterov((o.flags & QC_OPT_NESTEROV) != 0) {}
    Float begin(Float x, Float (&s)[kStates]) const {
        s[0] = momentum(s[0], x);
        return nesterov ? x + s[0] * momentum.beta : s[0];
    }

    Average momentum;
    bool nesterov;
};

struct Rmsprop {
    static constexpr int kStates = 1;
    static constexpr bool kRoot = true;
    static constexpr int kAbove = kOther;
    static constexpr bool kBounded = false;
    static constexpr bool kSquares[] = {true};

    explicit Rmsprop(const qc_optimizer &o) : second(o.beta1, o.gain1), eps(broadcast(o.eps)) {}
    Float begin(Float x, Float (&s)[kStates]) const {
        s[0] = second(s[0], x * x);
        return x;
    }
    Float end(Float above, Float root) const { return above / (root + eps); }

    Average second;
    Float eps;
};

struct Adagrad {
    static constexpr int kStates = 1;
    static constexpr bool kRoot = true;
    static constexpr int kAbove = kOther;
    static constexpr bool kBounded = false;
    static constexpr bool kSquares[] = {true};

    explicit Adagrad(const qc_optimizer &o) : eps(broadcast(o.eps)) {}
    Float begin(Float x, Float (&s)[kStates]) const {
        s[0] = s[0] + x * x;
        return x;
    }
    Float end(Float above, Float root) const { return above / (root + eps); }

    Float eps;
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_OPTIMIZER_RULES_H
