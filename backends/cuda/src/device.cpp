// NVIDIA devices as the library's host side sees them (backends/kernels/host/device.h).
#include "host/device.h"

#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "architectures.h"
#include "driver.h"
#include "host/arguments.h"
#include "host/capabilities.h"
#include "host/memory.h"
#include "host/runtime_memory.h"

#ifndef QC_CUDA_ARCHITECTURES
#error "QC_CUDA_ARCHITECTURES: the compute capabilities of this build as text, such as \"75 80 90a\""
#endif

namespace qcore::gpu {

const char *const kBackendName = "cuda";

namespace {

struct Device {
    std::string name;
    int capability = 0;     // 90 for 9.0
    int threads = 0;        // that run at once
    bool pageable = false;  // reads the host's own memory
    bool pages = false;     // of managed memory move to it while it runs
    std::string refusal;    // why this build does not run there, or ""
};

struct Machine {
    qc_status status = QC_OK;
    std::string refusal;
    int driver = 0, runtime = 0;
    std::vector<Device> devices;
};

std::string refusal_of(const cudaDeviceProp &properties) {
    return "built for compute capability " QC_CUDA_ARCHITECTURES "; this " + std::string(properties.name) + " is " +
           std::to_string(properties.major) + std::to_string(properties.minor) +
           "; build qcore-cuda with -DCMAKE_CUDA_ARCHITECTURES=" + std::to_string(properties.major) +
           std::to_string(properties.minor);
}

Machine look() {
    Machine machine;
    int count = 0;  // left unwritten where there is no driver
    const cudaError_t error = cudaGetDeviceCount(&count);
    cudaGetLastError();  // leave no error behind for the caller's own use of the runtime
    cudaDriverGetVersion(&machine.driver);
    cudaRuntimeGetVersion(&machine.runtime);
    machine.refusal = machine_refusal({static_cast<int>(error), count, machine.driver, machine.runtime,
                                       cudaGetErrorName(error), cudaGetErrorString(error)});
    machine.status = machine.refusal.empty() ? QC_OK : QC_NO_DEVICE;
    if (machine.status != QC_OK) {
        return machine;
    }
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp properties = {};
        Device device;
        if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) {
            cudaGetLastError();
            device.refusal = "the runtime does not describe device " + std::to_string(i);
        } else {
            device.name = properties.name;
            device.capability = 10 * properties.major + properties.minor;
            device.threads = properties.multiProcessorCount * properties.maxThreadsPerMultiProcessor;
            device.pageable = properties.pageableMemoryAccess != 0;
            device.pages = properties.managedMemory != 0 && properties.concurrentManagedAccess != 0;
            if (!runs_on(QC_CUDA_ARCHITECTURES, device.capability)) {
                device.refusal = refusal_of(properties);
            }
        }
        machine.devices.push_back(device);
    }
    return machine;
}

// What was found at the first call; a device does not come or go while a process runs.
const Machine &machine() {
    static const Machine found = look();
    return found;
}

Memory look_at(uintptr_t address) {
    cudaPointerAttributes attributes = {};
    if (cudaPointerGetAttributes(&attributes, reinterpret_cast<const void *>(address)) != cudaSuccess) {
        cudaGetLastError();  // an address that the runtime does not know is no error of the caller's context
        return {Memory::Kind::unknown, -1};
    }
    switch (attributes.type) {
        case cudaMemoryTypeDevice:
            return {Memory::Kind::device, attributes.device};
        case cudaMemoryTypeManaged:
            return {Memory::Kind::managed, attributes.device};
        case cudaMemoryTypeHost:
            return {attributes.devicePointer != nullptr ? Memory::Kind::pinned : Memory::Kind::unknown, -1};
        default:
            return {Memory::Kind::unknown, -1};
    }
}

}  // namespace

qc_status device_count(int32_t *count) {
    if (count == nullptr) {
        return fail(QC_INVALID_ARGUMENT, "device_count: count: expected an address, got 0");
    }
    *count = 0;
    const Machine &found = machine();
    if (found.status != QC_OK) {
        return fail(found.status, "%s", found.refusal.c_str());
    }
    bool any = false;
    for (const Device &device : found.devices) {
        any = any || device.refusal.empty();
    }
    if (!any) {
        return fail(QC_NO_DEVICE, "no device: %s", found.devices.front().refusal.c_str());
    }
    *count = static_cast<int32_t>(found.devices.size());
    return QC_OK;
}

qc_status check_device(const char *op, int32_t device) {
    const Machine &found = machine();
    if (found.status != QC_OK) {
        return fail(found.status, "%s: %s", op, found.refusal.c_str());
    }
    if (device < 0 || device >= static_cast<int32_t>(found.devices.size())) {
        return fail(QC_NO_DEVICE, "%s: device: expected 0 to %d, got %d", op,
                    static_cast<int>(found.devices.size()) - 1, device);
    }
    const Device &described = found.devices[static_cast<size_t>(device)];
    if (!described.refusal.empty()) {
        return fail(QC_NO_DEVICE, "%s: device: %s", op, described.refusal.c_str());
    }
    return QC_OK;
}

qc_status check_current_device(const char *op, int32_t device) {
    const qc_status status = check_device(op, device);
    if (status != QC_OK) {
        return status;
    }
    int current = -1;
    const cudaError_t error = cudaGetDevice(&current);
    if (error != cudaSuccess) {
        return fail(QC_DEVICE_ERROR, "%s: %s: %s", op, cudaGetErrorName(error), cudaGetErrorString(error));
    }
    if (current != device) {
        return fail(QC_INVALID_ARGUMENT, "%s: device: expected the calling thread's current device, %d, got %d", op,
                    current, device);
    }
    return QC_OK;
}

qc_status check_memory(const char *op, const char *argument, int32_t device, uintptr_t address) {
    static KnownPages<21> known;
    const bool pageable = machine().devices[static_cast<size_t>(device)].pageable;
    const std::string refusal = address_refusal(known, address, device, pageable, look_at);
    return refusal.empty() ? QC_OK
                           : fail(QC_INVALID_ARGUMENT, "%s: %s: expected memory of device %d, got 0x%llx, %s", op,
                                  argument, device, static_cast<unsigned long long>(address), refusal.c_str());
}

std::string device_fields(int32_t device) {
    const Machine &found = machine();
    const Device &described = found.devices[static_cast<size_t>(device)];
    return "\"name\": \"" + described.name + "\", \"arch\": \"sm_" + std::to_string(described.capability) +
           "\", \"driver\": \"CUDA " + version_text(found.driver) + "\", \"runtime\": \"CUDA " +
           version_text(found.runtime) + ", built for " QC_CUDA_ARCHITECTURES "\", \"torch_device\": \"cuda\"";
}

int blocks_at_once(int32_t device) {
    constexpr int kThreadsOfBlock = 256;
    return machine().devices[static_cast<size_t>(device)].threads / kThreadsOfBlock;
}

bool has_matrix_unit(int32_t device, int32_t dtype) {
    return takes(nvidia_capability(machine().devices[static_cast<size_t>(device)].capability), dtype);
}

bool pages_move(int32_t device) { return machine().devices[static_cast<size_t>(device)].pages; }

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
