// The calls that the host side makes to the GPU's runtime, under one name for CUDA and HIP.
#ifndef QCORE_GPU_RUNTIME_H
#define QCORE_GPU_RUNTIME_H

#if defined(QC_TARGET_HIP)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>

namespace qcore::gpu::runtime {

#if defined(QC_TARGET_HIP)

using Stream = hipStream_t;
using Error = hipError_t;
inline constexpr Error kSuccess = hipSuccess;
// Also forgets it: no error stays behind for the caller's own use of the runtime.
inline Error last_error() { return hipGetLastError(); }
inline const char *name(Error error) { return hipGetErrorName(error); }
inline const char *text(Error error) { return hipGetErrorString(error); }
inline Error zero(void *address, size_t bytes, Stream stream) { return hipMemsetAsync(address, 0, bytes, stream); }
inline Error current_device(int *device) { return hipGetDevice(device); }

#else

using Stream = cudaStream_t;
using Error = cudaError_t;
inline constexpr Error kSuccess = cudaSuccess;
inline Error last_error() { return cudaGetLastError(); }
inline const char *name(Error error) { return cudaGetErrorName(error); }
inline const char *text(Error error) { return cudaGetErrorString(error); }
inline Error zero(void *address, size_t bytes, Stream stream) { return cudaMemsetAsync(address, 0, bytes, stream); }
inline Error current_device(int *device) { return cudaGetDevice(device); }

#endif

}  // namespace qcore::gpu::runtime

#endif  // QCORE_GPU_RUNTIME_H
