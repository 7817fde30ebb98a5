// What a target tells the library's host side. Each target defines these in its own device.cpp or device.cu:
// backends/cuda/src, backends/kernels/simt.
#ifndef QCORE_GPU_DEVICE_H
#define QCORE_GPU_DEVICE_H

#include <cstddef>
#include <cstdint>
#include <string>

#include "qcore_backend.h"

namespace qcore::gpu {

#if defined(QC_TARGET_SIMT)
inline constexpr bool kHostReadsMemory = true;
#else
inline constexpr bool kHostReadsMemory = false;
#endif

extern const char *const kBackendName;

// The table's device_count.
qc_status device_count(int32_t *count);

// QC_OK if the device is there and the library was built for it.
qc_status check_device(const char *op, int32_t device);

// QC_OK if it is also the calling thread's current one: kernels can be started there.
qc_status check_current_device(const char *op, int32_t device);

// QC_OK if kernels of a device that is there may use the memory at `address`; else the text names the argument. Leaves
// no error behind in the runtime.
qc_status check_memory(const char *op, const char *argument, int32_t device, uintptr_t address);

// The parts of describe() that differ: {"name": ..., "arch": ..., "driver": ..., "runtime": ..., "torch_device": ...},
// without the braces. Called with a device that is there.
std::string device_fields(int32_t device);

// How many blocks keep a device busy, for kernels that take tile after tile.
int blocks_at_once(int32_t device);

// Whether the matrix units of a device take this dtype: which of two kernels a product runs (gemm_4bit.cu).
bool has_matrix_unit(int32_t device, int32_t dtype);

// Whether managed memory's pages move to a device when its kernels touch them, while the host may use others. Called
// with a device that is there.
bool pages_move(int32_t device);

// What the memory_ functions of the table leave to the target, with arguments that have been checked
// (paged_memory.cpp). They leave no error behind in the runtime.
qc_status allocate_memory(const char *op, int32_t kind, size_t bytes, uintptr_t *address);
// Whichever device is current, which it leaves so.
qc_status free_memory(const char *op, int32_t device, int32_t kind, uintptr_t address);
qc_status move_memory(const char *op, int32_t device, uintptr_t stream, uintptr_t address, size_t bytes, bool to_host);

}  // namespace qcore::gpu

#endif  // QCORE_GPU_DEVICE_H
