// Memory for state that may be larger than a device's own: the memory_ functions of the table.
#ifndef QCORE_GPU_PAGED_MEMORY_H
#define QCORE_GPU_PAGED_MEMORY_H

#include "qcore_backend.h"

namespace qcore::gpu {

qc_status memory_kind(int32_t device, int32_t *kind);
qc_status memory_allocate(int32_t device, int32_t kind, int64_t bytes, uintptr_t *address);
qc_status memory_free(int32_t device, int32_t kind, uintptr_t address);
qc_status memory_prefetch(int32_t device, uintptr_t stream, int32_t kind, uintptr_t address, int64_t bytes,
                          int32_t to_host);

}  // namespace qcore::gpu

#endif  // QCORE_GPU_PAGED_MEMORY_H
