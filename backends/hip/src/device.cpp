// AMD devices as one part of the library sees them (backends/kernels/host/device.h); devices.h found them.
#include "host/device.h"

#include "devices.h"
#include "host/arguments.h"
#include "host/capabilities.h"
#include "host/memory.h"
#include "host/runtime.h"
#include "host/runtime_memory.h"

namespace qcore::gpu {

const char *const kBackendName = "hip";

namespace {

const qcore_hip::Device &at(int32_t device) { return qcore_hip::machine().devices[static_cast<size_t>(device)]; }

Memory look_at(uintptr_t address) {
    hipPointerAttribute_t attributes = {};
    if (hipPointerGetAttributes(&attributes, reinterpret_cast<const void *>(address)) != hipSuccess) {
        static_cast<void>(hipGetLastError());  // memory that the runtime does not know is an error to it
        return {Memory::Kind::unknown, -1};
    }
    switch (attributes.type) {
        case hipMemoryTypeHost:
            return {Memory::Kind::pinned, attributes.device};
        case hipMemoryTypeManaged:
            return {Memory::Kind::managed, attributes.device};
        case hipMemoryTypeUnregistered:
            return {Memory::Kind::unknown, -1};
        default:
            return {Memory::Kind::device, attributes.device};
    }
}

}  // namespace

qc_status device_count(int32_t *count) {
    if (count == nullptr) {
        return fail(QC_INVALID_ARGUMENT, "device_count: count: expected an address, got 0");
    }
    *count = 0;
    const qcore_hip::Machine &found = qcore_hip::machine();
    if (found.status != QC_OK) {
        return fail(found.status, "%s", found.refusal.c_str());
    }
    bool any = false;
    for (const qcore_hip::Device &device : found.devices) {
        any = any || device.refusal.empty();
    }
    if (!any) {
        return fail(QC_NO_DEVICE, "no device: %s", found.devices.front().refusal.c_str());
    }
    *count = static_cast<int32_t>(found.devices.size());
    return QC_OK;
}

qc_status check_device(const char *op, int32_t device) {
    const qcore_hip::Machine &found = qcore_hip::machine();
    if (found.status != QC_OK) {
        return fail(found.status, "%s: %s", op, found.refusal.c_str());
    }
    if (device < 0 || device >= static_cast<int32_t>(found.devices.size())) {
        return fail(QC_NO_DEVICE, "%s: device: expected 0 to %d, got %d", op,
                    static_cast<int>(found.devices.size()) - 1, device);
    }
    if (!at(device).refusal.empty()) {
        return fail(QC_NO_DEVICE, "%s: device: %s", op, at(device).refusal.c_str());
    }
    return QC_OK;
}

qc_status check_current_device(const char *op, int32_t device) {
    const qc_status status = check_device(op, device);
    if (status != QC_OK) {
        return status;
    }
    int current = -1;
    const runtime::Error error = runtime::current_device(&current);
    if (error != runtime::kSuccess) {
        return fail(QC_DEVICE_ERROR, "%s: %s: %s", op, runtime::name(error), runtime::text(error));
    }
    if (current != device) {
        return fail(QC_INVALID_ARGUMENT, "%s: device: expected the calling thread's current device, %d, got %d", op,
                    current, device);
    }
    return QC_OK;
}

qc_status check_memory(const char *op, const char *argument, int32_t device, uintptr_t address) {
    static KnownPages<12> known;  // small allocations are given out in pages of 4 KiB
    const std::string refusal = address_refusal(known, address, device, at(device).pageable, look_at);
    return refusal.empty() ? QC_OK
                           : fail(QC_INVALID_ARGUMENT, "%s: %s: expected memory of device %d, got 0x%llx, %s", op,
                                  argument, device, static_cast<unsigned long long>(address), refusal.c_str());
}

std::string device_fields(int32_t device) {
    const qcore_hip::Machine &found = qcore_hip::machine();
    return "\"name\": \"" + at(device).name + "\", \"arch\": \"" + at(device).arch + "\", \"driver\": \"HIP " +
           qcore_hip::version_text(found.driver) + "\", \"runtime\": \"HIP " + qcore_hip::version_text(found.runtime) +
           ", built for " QC_HIP_ARCHITECTURES "\", \"torch_device\": \"cuda\"";
}

int blocks_at_once(int32_t device) {
    constexpr int kThreadsOfBlock = 256;
    return at(device).threads / kThreadsOfBlock;
}

bool has_matrix_unit(int32_t device, int32_t dtype) { return takes(capability_of(at(device).arch.c_str()), dtype); }

bool pages_move(int32_t device) { return at(device).pages; }

qc_status allocate_memory(const char *op, int32_t kind, size_t bytes, uintptr_t *address) {
    return runtime::allocate_memory(op, kind, bytes, address);
}

qc_status free_memory(const char *op, int32_t device, int32_t kind, uintptr_t address) {
    return runtime::free_memory(op, device, kind, address);
}

qc_status move_memory(const char *op, int32_t device, uintptr_t stream, uintptr_t address, size_t bytes, bool to_host) {
    return runtime::move_memory(op, device, stream, address, bytes, to_host);
}

}  // namespace qcore::gpu
