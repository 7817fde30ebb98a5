// How many bytes of parameters a kernel may have. The host's compiler and the kernels' have to agree, for a struct's
// size follows from it; so the target says it, as the build names it, and not the compiler.
#ifndef QCORE_GPU_PARAMETERS_H
#define QCORE_GPU_PARAMETERS_H

namespace qcore::gpu {

#if defined(QC_TARGET_SIMT)
inline constexpr int kParameterBytes = 1280;  // less than any GPU's, so that lists of tensors take several launches
#elif defined(QC_TARGET_HIP)
inline constexpr int kParameterBytes = 4096;
#else
inline constexpr int kParameterBytes = 32764;  // CUDA's since 12.1, from compute capability 7.0
#endif

}  // namespace qcore::gpu

#endif  // QCORE_GPU_PARAMETERS_H
