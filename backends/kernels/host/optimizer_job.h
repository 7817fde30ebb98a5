// The tensors of an optimizer step as a kernel takes them: in its parameters, so that nothing is allocated or copied
// on the device and a step can be captured in a graph. A list that does not fit takes several launches.
#ifndef QCORE_GPU_OPTIMIZER_JOB_H
#define QCORE_GPU_OPTIMIZER_JOB_H

#include <cstdint>
#include <vector>

#include "parameters.h"
#include "qcore_backend.h"

namespace qcore::gpu {

inline constexpr int64_t kOptimizerBlock = 256;  // QC-OPT-020

// The words of a tensor, in this order; those that a rule does not need are not there.
//   first block of this launch (low half) and factor of the gradient (float, high half); numel; param; grad; state1;
//   state2; absmax1; absmax2; compensation or stream
struct OptimizerJob {
    qc_optimizer rule;
    double *sums;  // with a limit on the update's norm: two a block, of u and of w (QC-OPT-009)
    float *sizes;  // and then the step size of each tensor (QC-OPT-008)
    int64_t blocks;
    int32_t count, words;  // tensors, and words of each
    int32_t run;           // neighbouring blocks that a block of threads takes at a time
    int32_t compensated;

    static constexpr int kHead = 256;  // bytes of what stands before `word`, and room for a kernel's other parameters
    static constexpr int kCapacity = (kParameterBytes - kHead) / 8;
    uint64_t word[kCapacity];
};
static_assert(sizeof(OptimizerJob) <= kParameterBytes, "a kernel's parameters");

// A rule and its tensors, checked, and cut into launches.
class OptimizerList {
   public:
    OptimizerList(const qc_optimizer &rule, const qc_optimizer_tensors &tensors) : rule_(rule), tensors_(tensors) {}

    // QC_OK, or what is wrong with them.
    qc_status check(int32_t device);

    int64_t blocks() const { return blocks_; }

    // use(job) for one launch after another, until one fails; sums and sizes are pieces of the workspace's.
    template <class Use>
    qc_status for_launches(double *sums, float *sizes, const Use &use) const {
        OptimizerJob job;
        for (int64_t next = 0; next < tensors_.count;) {
            const int64_t first = next;
            next = fill(job, first);
            job.sums = sums;
            job.sizes = sizes;
            const qc_status status = job.count > 0 ? use(job) : QC_OK;
            if (status != QC_OK) {
                return status;
            }
            sums += sums != nullptr ? 2 * job.blocks : 0;
            sizes += sizes != nullptr ? job.count : 0;
        }
        return QC_OK;
    }

   private:
    qc_status check_tensor(int32_t device, int64_t i) const;
    // The tensors from `first` on, as many as fit; returns the number of the next.
    int64_t fill(OptimizerJob &job, int64_t first) const;

    const qc_optimizer &rule_;
    const qc_optimizer_tensors &tensors_;
    int64_t blocks_ = 0;
};

}  // namespace qcore::gpu

#endif  // QCORE_GPU_OPTIMIZER_JOB_H
