// The part of HIP's runtime that qcore calls, on NVIDIA's: compiles the HIP backend's host side by nvcc, so that it
// runs on hardware that is at hand. CMakeLists.txt in the folder above builds it.
#ifndef QCORE_HIP_SHIM_RUNTIME_API_H
#define QCORE_HIP_SHIM_RUNTIME_API_H

#include <cuda_runtime.h>

#include <cstdio>

using hipError_t = cudaError_t;
using hipStream_t = cudaStream_t;
inline constexpr hipError_t hipSuccess = cudaSuccess;
inline constexpr hipError_t hipErrorNoDevice = cudaErrorNoDevice;
inline constexpr hipError_t hipErrorInsufficientDriver = cudaErrorInsufficientDriver;

using hipPointerAttribute_t = cudaPointerAttributes;
inline constexpr cudaMemoryType hipMemoryTypeUnregistered = cudaMemoryTypeUnregistered;
inline constexpr cudaMemoryType hipMemoryTypeHost = cudaMemoryTypeHost;
inline constexpr cudaMemoryType hipMemoryTypeManaged = cudaMemoryTypeManaged;

struct hipDeviceProp_t : cudaDeviceProp {
    char gcnArchName[16];
};

inline hipError_t hipGetLastError() { return cudaGetLastError(); }
inline const char *hipGetErrorName(hipError_t error) { return cudaGetErrorName(error); }
inline const char *hipGetErrorString(hipError_t error) { return cudaGetErrorString(error); }
inline hipError_t hipGetDeviceCount(int *count) { return cudaGetDeviceCount(count); }
inline hipError_t hipGetDevice(int *device) { return cudaGetDevice(device); }
inline hipError_t hipSetDevice(int device) { return cudaSetDevice(device); }
inline hipError_t hipMemsetAsync(void *address, int value, size_t bytes, hipStream_t stream) {
    return cudaMemsetAsync(address, value, bytes, stream);
}

// Memory of paged state.
inline constexpr hipError_t hipErrorOutOfMemory = cudaErrorMemoryAllocation;
using hipStreamCaptureMode = cudaStreamCaptureMode;
inline constexpr hipStreamCaptureMode hipStreamCaptureModeRelaxed = cudaStreamCaptureModeRelaxed;
inline constexpr unsigned hipMemAttachGlobal = cudaMemAttachGlobal;
inline constexpr unsigned hipHostMallocMapped = cudaHostAllocMapped;
inline constexpr unsigned hipHostMallocPortable = cudaHostAllocPortable;
inline constexpr int hipCpuDeviceId = cudaCpuDeviceId;
inline hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode *mode) {
    return cudaThreadExchangeStreamCaptureMode(mode);
}
inline hipError_t hipMallocManaged(void **made, size_t bytes, unsigned flags) {
    return cudaMallocManaged(made, bytes, flags);
}
inline hipError_t hipHostMalloc(void **made, size_t bytes, unsigned flags) { return cudaHostAlloc(made, bytes, flags); }
inline hipError_t hipHostGetDevicePointer(void **seen, void *pinned, unsigned flags) {
    return cudaHostGetDevicePointer(seen, pinned, flags);
}
inline hipError_t hipFree(void *memory) { return cudaFree(memory); }
inline hipError_t hipHostFree(void *memory) { return cudaFreeHost(memory); }
inline hipError_t hipMemPrefetchAsync(const void *memory, size_t bytes, int device, hipStream_t stream) {
#if CUDART_VERSION >= 13000
    cudaMemLocation location = {};
    location.type = device == hipCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
    location.id = device == hipCpuDeviceId ? 0 : device;
    return cudaMemPrefetchAsync(memory, bytes, location, 0, stream);
#else
    return cudaMemPrefetchAsync(memory, bytes, device, stream);
#endif
}

inline hipError_t hipPointerGetAttributes(hipPointerAttribute_t *attributes, const void *address) {
    return cudaPointerGetAttributes(attributes, address);
}

inline hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device) {
    const hipError_t error = cudaGetDeviceProperties(properties, device);
    std::snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "sm_%d%d", properties->major,
                  properties->minor);
    return error;
}

// 13.0 is 13000 to CUDA and 130000000 to HIP.
inline int hip_version_of(int cuda) { return cuda / 1000 * 10000000 + cuda % 1000 / 10 * 100000; }
inline hipError_t hipDriverGetVersion(int *version) {
    const hipError_t error = cudaDriverGetVersion(version);
    *version = hip_version_of(*version);
    return error;
}
inline hipError_t hipRuntimeGetVersion(int *version) {
    const hipError_t error = cudaRuntimeGetVersion(version);
    *version = hip_version_of(*version);
    return error;
}

#endif  // QCORE_HIP_SHIM_RUNTIME_API_H
