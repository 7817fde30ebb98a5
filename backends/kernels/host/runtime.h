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
inline Error make_current(int device) { return hipSetDevice(device); }

// Memory of paged state (runtime_memory.h).
inline constexpr Error kOutOfMemory = hipErrorOutOfMemory;
using CaptureMode = hipStreamCaptureMode;
inline constexpr CaptureMode kRelaxedCapture = hipStreamCaptureModeRelaxed;
inline void exchange_capture_mode(CaptureMode *mode) { static_cast<void>(hipThreadExchangeStreamCaptureMode(mode)); }
inline Error allocate_managed(void **made, size_t bytes) { return hipMallocManaged(made, bytes, hipMemAttachGlobal); }
inline Error allocate_pinned(void **made, size_t bytes) {
    return hipHostMalloc(made, bytes, hipHostMallocMapped | hipHostMallocPortable);
}
inline Error device_address(void **seen, void *pinned) { return hipHostGetDevicePointer(seen, pinned, 0); }
inline Error free_managed(void *memory) { return hipFree(memory); }
inline Error free_pinned(void *memory) { return hipHostFree(memory); }
inline Error prefetch(void *memory, size_t bytes, int device, bool to_host, Stream stream) {
    return hipMemPrefetchAsync(memory, bytes, to_host ? hipCpuDeviceId : device, stream);
}

#else

using Stream = cudaStream_t;
using Error = cudaError_t;
inline constexpr Error kSuccess = cudaSuccess;
inline Error last_error() { return cudaGetLastError(); }
inline const char *name(Error error) { return cudaGetErrorName(error); }
inline const char *text(Error error) { return cudaGetErrorString(error); }
inline Error zero(void *address, size_t bytes, Stream stream) { return cudaMemsetAsync(address, 0, bytes, stream); }
inline Error current_device(int *device) { return cudaGetDevice(device); }
inline Error make_current(int device) { return cudaSetDevice(device); }

// Memory of paged state (runtime_memory.h).
inline constexpr Error kOutOfMemory = cudaErrorMemoryAllocation;
using CaptureMode = cudaStreamCaptureMode;
inline constexpr CaptureMode kRelaxedCapture = cudaStreamCaptureModeRelaxed;
inline void exchange_capture_mode(CaptureMode *mode) { static_cast<void>(cudaThreadExchangeStreamCaptureMode(mode)); }
inline Error allocate_managed(void **made, size_t bytes) { return cudaMallocManaged(made, bytes, cudaMemAttachGlobal); }
inline Error allocate_pinned(void **made, size_t bytes) {
    return cudaHostAlloc(made, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
}
inline Error device_address(void **seen, void *pinned) { return cudaHostGetDevicePointer(seen, pinned, 0); }
inline Error free_managed(void *memory) { return cudaFree(memory); }
inline Error free_pinned(void *memory) { return cudaFreeHost(memory); }
inline Error prefetch(void *memory, size_t bytes, int device, bool to_host, Stream stream) {
#if CUDART_VERSION >= 13000
    cudaMemLocation location = {};
    location.type = to_host ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
    location.id = to_host ? 0 : device;
    return cudaMemPrefetchAsync(memory, bytes, location, 0, stream);
#else
    return cudaMemPrefetchAsync(memory, bytes, to_host ? cudaCpuDeviceId : device, stream);
#endif
}

#endif

}  // namespace qcore::gpu::runtime

#endif  // QCORE_GPU_RUNTIME_H
