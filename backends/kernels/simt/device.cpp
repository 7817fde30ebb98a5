// The emulated GPU as the library's host side sees it: one device, in the host's memory, with matrix units.
#include "../host/device.h"

#include <cstdlib>
#include <cstring>

#include "../host/arguments.h"
#include "device.h"

namespace qcore::gpu {

const char *const kBackendName = QC_WAVE_SIZE == 64 ? "simt64" : "simt32";

qc_status device_count(int32_t *count) {
    if (count == nullptr) {
        return fail(QC_INVALID_ARGUMENT, "device_count: count: expected an address, got 0");
    }
    *count = 1;
    return QC_OK;
}

qc_status check_device(const char *op, int32_t device) {
    if (device != 0) {
        return fail(QC_NO_DEVICE, "%s: device: expected 0, the only one of the emulation, got %d", op, device);
    }
    return QC_OK;
}

qc_status check_current_device(const char *op, int32_t device) { return check_device(op, device); }

// The emulated device's memory is the host's.
qc_status check_memory(const char *, const char *, int32_t, uintptr_t) { return QC_OK; }

std::string device_fields(int32_t) {
    const char *schedule = std::getenv("QCORE_SIMT_SCHEDULE");
    return std::string("\"name\": \"SIMT emulation, waves of ") + std::to_string(kWave) + "\", \"arch\": \"simt" +
           std::to_string(kWave) + "\", \"driver\": \"\", \"runtime\": \"schedule " +
           (schedule != nullptr ? schedule : "forward") + "\", \"torch_device\": \"cpu\"";
}

// Few, so that kernels go round their loops over tiles even for small inputs.
int blocks_at_once(int32_t) { return 2; }

bool has_matrix_unit(int32_t, int32_t) { return true; }

bool pages_move(int32_t) {
    const char *memory = std::getenv("QCORE_SIMT_MEMORY");
    return memory == nullptr || std::strcmp(memory, "pinned") != 0;
}

// The host's memory stands in for both kinds. It is filled, so that nobody takes it for zeroed.
qc_status allocate_memory(const char *op, int32_t, size_t bytes, uintptr_t *address) {
    void *const made = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (made == nullptr) {
        return fail(QC_OUT_OF_MEMORY, "%s: %zu bytes cannot be had", op, bytes);
    }
    std::memset(made, 0xFB, bytes);
    *address = reinterpret_cast<uintptr_t>(made);
    return QC_OK;
}

qc_status free_memory(const char *, int32_t, int32_t, uintptr_t address) {
    std::free(reinterpret_cast<void *>(address));
    return QC_OK;
}

qc_status move_memory(const char *, int32_t, uintptr_t, uintptr_t, size_t, bool) { return QC_OK; }

}  // namespace qcore::gpu
