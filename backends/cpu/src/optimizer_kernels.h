// Kernels of optimizer_step (docs/spec/60-optimizers.md).
#ifndef QCORE_CPU_OPTIMIZER_KERNELS_H
#define QCORE_CPU_OPTIMIZER_KERNELS_H

#include <cstdint>

#include "codebook.h"
#include "qcore_backend.h"
#include "state_codes.h"

namespace qcore::cpu {

inline constexpr int64_t kOptimizerBlock = 256;  // QC-OPT-020
inline constexpr int kAlgorithms = 6;            // QC_ADAM ... QC_ADAGRAD
inline constexpr int kMaxStates = 3;             // values an element: AdEMAMix has three

// A codebook of QC-OPT-020, ready for both directions.
struct StateBook {
    const float *table;
    const Codebook *codes;
    const StateLines *lines;
};

// The rule of one call and the codebooks of its states; `book[s]` of value s (AdEMAMix: fast, slow, square).
struct OptimizerJob {
    const qc_optimizer *rule;
    StateBook book[kMaxStates];
    bool into_l2 = false;  // where prefetches go: best into L2 on this processor
};

// One tensor, its states by value: AdEMAMix's rows of state1 are two of them.
struct OptimizerTensor {
    int64_t n;
    void *param;
    const void *grad;
    void *compensation;         // or null
    void *state[kMaxStates];    // float or uint8_t
    float *absmax[kMaxStates];  // 8-bit states
    float grad_scale;
    float step_size;  // the rule's, scaled by QC-OPT-008
    uint64_t stream;
};

struct OptimizerKernels {
    // A step on the blocks `first` to `last` - 1 of a tensor; [algorithm][8-bit states].
    void (*step[kAlgorithms][2])(const OptimizerJob &job, const OptimizerTensor &tensor, int64_t first, int64_t last);
    // QC-OPT-009 of each of these blocks: sums[0] of the update, sums[1] of the parameter, and so on. Changes nothing.
    void (*squares[kAlgorithms][2])(const OptimizerJob &job, const OptimizerTensor &tensor, int64_t first, int64_t last,
                                    double *sums);
};

namespace portable {
extern const OptimizerKernels optimizer_kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const OptimizerKernels optimizer_kernels;
}
namespace avx512 {
extern const OptimizerKernels optimizer_kernels;
}
namespace avx512_vnni {
extern const OptimizerKernels optimizer_kernels;
}
namespace avx512_bf16 {
extern const OptimizerKernels optimizer_kernels;
}
#endif

}  // namespace qcore::cpu

#endif  // QCORE_CPU_OPTIMIZER_KERNELS_H
