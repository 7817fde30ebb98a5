// Whether the build holds code for the calling thread's current device.
#include <cuda_runtime.h>

namespace qcore::gpu {
namespace {

__global__ void probe_kernel() {}

}  // namespace

bool has_code_for_current_device() {
    cudaFuncAttributes attributes = {};
    const bool there = cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess;
    cudaGetLastError();
    return there;
}

}  // namespace qcore::gpu
