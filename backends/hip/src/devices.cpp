#include "devices.h"

#include <hip/hip_runtime_api.h>

#include <sstream>

#include "runtime.h"

#ifndef QC_HIP_ARCHITECTURES
#error "QC_HIP_ARCHITECTURES: the targets of this build as text, such as \"gfx90a gfx1100\""
#endif

namespace qcore_hip {
namespace {

bool is_built_for(const std::string &arch) {
    std::istringstream built(QC_HIP_ARCHITECTURES);
    for (std::string target; built >> target;) {
        if (target == arch) {
            return true;
        }
    }
    return false;
}

std::string no_device(hipError_t error, int count, int driver) {
    if (error == hipErrorInsufficientDriver) {
        return "no device: the AMD GPU driver is too old for the HIP runtime (driver " + version_text(driver) +
               "); update the driver (amdgpu-dkms, or the kernel)";
    }
    if (error == hipErrorNoDevice || (error == hipSuccess && count == 0)) {
        return "no device: the HIP runtime sees no GPU; check rocminfo, that you may open /dev/kfd (groups render and "
               "video; on WSL /dev/dxg), and HIP_VISIBLE_DEVICES";
    }
    return std::string("no device: the HIP runtime answers ") + hipGetErrorName(error) + ": " +
           hipGetErrorString(error);
}

Device look_at(int index) {
    Device device;
    hipDeviceProp_t properties = {};
    if (hipGetDeviceProperties(&properties, index) != hipSuccess) {
        static_cast<void>(hipGetLastError());
        device.refusal = "the runtime does not describe device " + std::to_string(index);
        return device;
    }
    device.name = properties.name;
    device.arch = properties.gcnArchName;
    device.arch = device.arch.substr(0, device.arch.find(':'));
    device.wave = properties.warpSize;
    device.threads = properties.multiProcessorCount * properties.maxThreadsPerMultiProcessor;
    device.pageable = properties.pageableMemoryAccess != 0;
    // Without XNACK a kernel cannot wait for a page, so that no page may leave the device; only with it is the host's
    // own memory, too, the device's to read.
    device.pages = properties.managedMemory != 0 && properties.concurrentManagedAccess != 0 && device.pageable;
    if (!is_built_for(device.arch)) {
        device.refusal = "built for " QC_HIP_ARCHITECTURES "; this " + device.name + " is " + device.arch +
                         "; build qcore-hip with -DQCORE_HIP_ARCHITECTURES=" + device.arch;
    }
    return device;
}

Machine look() {
    Machine machine;
    machine.refusal = runtime_problem();
    if (!machine.refusal.empty()) {
        machine.status = QC_NO_DEVICE;
        return machine;
    }
    int count = 0;  // left unwritten where there is no driver
    const hipError_t error = hipGetDeviceCount(&count);
    static_cast<void>(hipGetLastError());  // leave no error behind for the caller's own use of the runtime
    static_cast<void>(hipDriverGetVersion(&machine.driver));
    static_cast<void>(hipRuntimeGetVersion(&machine.runtime));
    if (error != hipSuccess || count == 0) {
        machine.status = QC_NO_DEVICE;
        machine.refusal = no_device(error, count, machine.driver);
        return machine;
    }
    for (int i = 0; i < count; ++i) {
        machine.devices.push_back(look_at(i));
    }
    return machine;
}

}  // namespace

const Machine &machine() {
    static const Machine found = look();
    return found;
}

std::string version_text(int version) {
    return std::to_string(version / 10000000) + "." + std::to_string(version / 100000 % 100);
}

}  // namespace qcore_hip
