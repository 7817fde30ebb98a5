// The algorithms: from x and the old states to the new states and the update (QC-OPT-010 to QC-OPT-015). Each operation
// is one rounding. kStates values an element; squares(s) says which of them are second moments.
#ifndef QCORE_KERNELS_OPTIMIZER_RULES_CUH
#define QCORE_KERNELS_OPTIMIZER_RULES_CUH

#include "numbers.cuh"
#include "qcore_backend.h"

namespace qcore::gpu {

QC_DEVICE float average(float state, float beta, float x, float gain) { return state * beta + x * gain; }

struct Adam {
    static constexpr int kStates = 2;
    static constexpr int kLists = 2;  // state1, state2
    QC_DEVICE static constexpr bool squares(int s) { return s == 1; }
    QC_DEVICE static float update(const qc_optimizer &o, float x, float (&s)[kStates]) {
        s[0] = average(s[0], o.beta1, x, o.gain1);
        s[1] = average(s[1], o.beta2, x * x, o.gain2);
        return s[0] / (square_root(s[1]) + o.eps);
    }
};

struct Ademamix {
    static constexpr int kStates = 3;
    static constexpr int kLists = 2;  // the fast and the slow average are rows of state1
    QC_DEVICE static constexpr bool squares(int s) { return s == 2; }
    QC_DEVICE static float update(const qc_optimizer &o, float x, float (&s)[kStates]) {
        s[0] = average(s[0], o.beta1, x, o.gain1);
        s[1] = average(s[1], o.beta3, x, o.gain3);
        s[2] = average(s[2], o.beta2, x * x, o.gain2);
        return (s[0] * o.correction1 + s[1] * o.alpha) / (square_root(s[2]) * o.correction2 + o.eps);
    }
};

struct Lion {
    static constexpr int kStates = 1;
    static constexpr int kLists = 1;
    QC_DEVICE static constexpr bool squares(int) { return false; }
    QC_DEVICE static float update(const qc_optimizer &o, float x, float (&s)[kStates]) {
        const float direction = average(s[0], o.beta1, x, o.gain1);
        s[0] = average(s[0], o.beta2, x, o.gain2);
        return direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
    }
};

struct Momentum {
    static constexpr int kStates = 1;
    static constexpr int kLists = 1;
    QC_DEVICE static constexpr bool squares(int) { return false; }
    QC_DEVICE static float update(const qc_optimizer &o, float x, float (&s)[kStates]) {
        s[0] = average(s[0], o.beta1, x, o.gain1);
        return (o.flags & QC_OPT_NESTEROV) != 0 ? x + s[0] * o.beta1 : s[0];
    }
};

struct Rmsprop {
    static constexpr int kStates = 1;
    static constexpr int kLists = 1;
    QC_DEVICE static constexpr bool squares(int) { return true; }
    QC_DEVICE static float update(const qc_optimizer &o, float x, float (&s)[kStates]) {
        s[0] = average(s[0], o.beta1, x * x, o.gain1);
        return x / (square_root(s[0]) + o.eps);
    }
};

struct Adagrad {
    static constexpr int kStates = 1;
    static constexpr int kLists = 1;
    QC_DEVICE static constexpr bool squares(int) { return true; }
    QC_DEVICE static float update(const qc_optimizer &o, float x, float (&s)[kStates]) {
        s[0] = s[0] + x * x;
        return x / (square_root(s[0]) + o.eps);
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_OPTIMIZER_RULES_CUH
