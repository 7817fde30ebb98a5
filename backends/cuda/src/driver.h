// Why no device of a machine can be used, from what the CUDA runtime answers: one sentence with the way out.
#ifndef QCORE_CUDA_DRIVER_H
#define QCORE_CUDA_DRIVER_H

#include <algorithm>
#include <string>

namespace qcore::gpu {

// What cudaGetDeviceCount and its neighbours said. Versions are CUDA's: 12080 is 12.8, and a driver of 0 is none.
struct Answer {
    int error, count;
    int driver, runtime;
    const char *name, *text;  // of the error
};

inline std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The oldest driver that serves a library with this runtime. A driver serves all runtimes of its major version; kernels
// with more than 4 KB of parameters (host/parameters.h) start from 12.1 on, and with an older driver fail when they do.
inline int oldest_driver(int runtime) {
    constexpr int kLargeParameters = 12010;
    return std::max(runtime / 1000 * 1000, kLargeParameters);
}

// The driver's own number for a version of CUDA, as nvidia-smi and package managers call it; "" if not known here.
inline std::string driver_release(int version) {
    return version == 12010 ? " (530 or newer)" : version == 13000 ? " (580 or newer)" : "";
}

inline std::string machine_refusal(const Answer &said) {
    constexpr int kSuccess = 0, kInsufficientDriver = 35, kNoDevice = 100;  // cudaError_t: part of its ABI
    const int oldest = oldest_driver(said.runtime);
    if (said.error == kInsufficientDriver && said.driver == 0) {
        return "no device: this machine has no NVIDIA driver; install one for CUDA " + version_text(oldest) +
               " or newer" + driver_release(oldest) + ", or use the cpu backend";
    }
    if (said.error == kInsufficientDriver || (said.error == kSuccess && said.count > 0 && said.driver < oldest)) {
        return "no device: the NVIDIA driver is too old: it serves CUDA " + version_text(said.driver) +
               ", and this library needs " + version_text(oldest) + "; update the driver" + driver_release(oldest) +
               ", or use the cpu backend";
    }
    if (said.error == kNoDevice || (said.error == kSuccess && said.count == 0)) {
        return "no device: the NVIDIA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES";
    }
    if (said.error != kSuccess) {
        return std::string("no device: the CUDA runtime answers ") + said.name + ": " + said.text +
               "; check that nvidia-smi works";
    }
    return "";
}

}  // namespace qcore::gpu

#endif  // QCORE_CUDA_DRIVER_H
