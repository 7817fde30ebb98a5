// A HIP runtime for tests: says of itself what FAKE_HIP tells it, and notes what is launched.
//
//   FAKE_HIP=100                     hipGetDeviceCount answers that error
//   FAKE_HIP=gfx906:64,gfx1100:32    these devices, with these wave sizes
//   FAKE_HIP_LAUNCH=9                a launch answers that error
//   FAKE_HIP_PAGEABLE=1              devices read the host's own memory
//   FAKE_HIP_MANAGED=1               devices have managed memory that both sides may use at once
//   FAKE_HIP_ALLOCATE=2              every allocation answers that error
//   FAKE_HIP_FREE=1                  giving memory back answers that error
//   FAKE_HIP_PREFETCH=1              a prefetch answers that error
//   FAKE_HIP_SET=101                 making a device current answers that error
//   FAKE_HIP_MAPPED=64               devices see pinned memory so many bytes further on
//   FAKE_HIP_CAPTURING=1             the thread captures a graph: it may allocate and free in relaxed mode alone
//   FAKE_HIP_MEMORY=2:1              every address is memory of type 2 (hipMemoryTypeDevice) of device 1; an error
//                                    of the runtime without a colon; without it, of the current device
#include <hip/hip_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

struct Fake {
    hipError_t error = hipSuccess;
    std::vector<std::pair<std::string, int>> devices;
};

const Fake &fake() {
    static const Fake made = [] {
        Fake read;
        const char *text = std::getenv("FAKE_HIP");
        std::istringstream entries(text != nullptr ? text : "");
        for (std::string entry; std::getline(entries, entry, ',');) {
            const size_t colon = entry.find(':');
            if (colon == std::string::npos) {
                read.error = static_cast<hipError_t>(std::stoi(entry));
            } else {
                read.devices.emplace_back(entry.substr(0, colon), std::stoi(entry.substr(colon + 1)));
            }
        }
        return read;
    }();
    return made;
}

hipError_t last = hipSuccess;
hipStreamCaptureMode capture_mode = hipStreamCaptureModeGlobal;

// The error that a variable of the environment names, noted as the runtime's last one.
hipError_t told(const char *variable) {
    const char *text = std::getenv(variable);
    return text != nullptr ? last = static_cast<hipError_t>(std::atoi(text)) : hipSuccess;
}

thread_local int current = std::getenv("FAKE_HIP_CURRENT") != nullptr ? std::atoi(std::getenv("FAKE_HIP_CURRENT")) : 0;

hipError_t refused_in_capture() {
    const bool refused = std::getenv("FAKE_HIP_CAPTURING") != nullptr && capture_mode != hipStreamCaptureModeRelaxed;
    return refused ? last = hipErrorStreamCaptureUnsupported : hipSuccess;
}

hipError_t allocate(const char *kind, void **made, size_t bytes, unsigned flags) {
    hipError_t error = refused_in_capture();
    error = error == hipSuccess ? told("FAKE_HIP_ALLOCATE") : error;
    if (error == hipSuccess) {
        *made = std::malloc(bytes);
        std::printf("%s %zu flags %u\n", kind, bytes, flags);
    }
    return error;
}

hipError_t give_back(const char *kind, void *memory) {
    hipError_t error = refused_in_capture();
    error = error == hipSuccess ? told("FAKE_HIP_FREE") : error;
    if (error == hipSuccess) {
        std::free(memory);
        std::printf("free %s\n", kind);
    }
    return error;
}
std::map<const void *, std::string> kernels;
struct {
    dim3 blocks, threads;
    size_t shared;
    hipStream_t stream;
} call;

}  // namespace

extern "C" {

hipError_t hipGetDeviceCount(int *count) {
    if (fake().error != hipSuccess) {
        last = fake().error;  // and leaves the count unwritten, as the runtime does
        return last;
    }
    *count = static_cast<int>(fake().devices.size());
    return hipSuccess;
}
#if !defined(FAKE_HIP_OLD)
hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600 *properties, int device) {
    const auto &[arch, wave] = fake().devices[static_cast<size_t>(device)];
    std::memset(properties, 0, sizeof *properties);
    std::snprintf(properties->name, sizeof properties->name, "Fake %s", arch.c_str());
    std::snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "%s:sramecc+:xnack-", arch.c_str());
    properties->warpSize = wave;
    properties->multiProcessorCount = 4;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->pageableMemoryAccess = std::getenv("FAKE_HIP_PAGEABLE") != nullptr;
    properties->managedMemory = properties->concurrentManagedAccess = std::getenv("FAKE_HIP_MANAGED") != nullptr;
    return hipSuccess;
}
#endif
hipError_t hipGetDevice(int *device) {
    *device = current;
    return hipSuccess;
}
hipError_t hipSetDevice(int device) {
    const hipError_t error = told("FAKE_HIP_SET");
    if (error == hipSuccess) {
        current = device;
        std::printf("current %d\n", device);
    }
    return error;
}
hipError_t hipPointerGetAttributes(hipPointerAttribute_t *attributes, const void *address) {
    std::printf("asked %p\n", address);
    *attributes = {};
    attributes->type = hipMemoryTypeDevice;
    const char *text = std::getenv("FAKE_HIP_MEMORY");
    if (text == nullptr) {
        return hipGetDevice(&attributes->device);
    }
    const char *device = std::strchr(text, ':');
    if (device == nullptr) {
        last = static_cast<hipError_t>(std::atoi(text));
        return last;
    }
    attributes->type = static_cast<hipMemoryType>(std::atoi(text));
    attributes->device = std::atoi(device + 1);
    return hipSuccess;
}
hipError_t hipDriverGetVersion(int *version) {
    *version = 60241134;
    return hipSuccess;
}
hipError_t hipRuntimeGetVersion(int *version) { return hipDriverGetVersion(version); }
hipError_t hipGetLastError() {
    const hipError_t error = last;
    last = hipSuccess;
    return error;
}
const char *hipGetErrorName(hipError_t error) {
    switch (error) {
        case hipErrorInvalidConfiguration:
            return "hipErrorInvalidConfiguration";
        case hipErrorOutOfMemory:
            return "hipErrorOutOfMemory";
        default:
            return "hipErrorOther";
    }
}
const char *hipGetErrorString(hipError_t) { return "a fake error"; }
hipError_t hipMemsetAsync(void *, int, size_t bytes, hipStream_t) {
    std::printf("memset %zu\n", bytes);
    return hipSuccess;
}
hipError_t hipMallocManaged(void **made, size_t bytes, unsigned flags) {
    return allocate("managed", made, bytes, flags);
}
hipError_t hipHostMalloc(void **made, size_t bytes, unsigned flags) { return allocate("pinned", made, bytes, flags); }
hipError_t hipHostGetDevicePointer(void **seen, void *pinned, unsigned) {
    const char *distance = std::getenv("FAKE_HIP_MAPPED");
    *seen = static_cast<char *>(pinned) + (distance != nullptr ? std::atoi(distance) : 0);
    return hipSuccess;
}
hipError_t hipFree(void *memory) { return give_back("managed", memory); }
hipError_t hipHostFree(void *memory) { return give_back("pinned", memory); }
hipError_t hipMemPrefetchAsync(const void *, size_t bytes, int device, hipStream_t stream) {
    const hipError_t error = told("FAKE_HIP_PREFETCH");
    if (error == hipSuccess) {
        std::printf("prefetch %zu to %d stream %p\n", bytes, device, static_cast<void *>(stream));
    }
    return error;
}
hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode *mode) {
    std::swap(*mode, capture_mode);
    return hipSuccess;
}
hipError_t hipLaunchKernel(const void *kernel, dim3 blocks, dim3 threads, void **, size_t, hipStream_t stream) {
    if (const char *error = std::getenv("FAKE_HIP_LAUNCH")) {
        last = static_cast<hipError_t>(std::atoi(error));
        return last;
    }
    std::printf("launch %s %u %u stream %p\n", kernels[kernel].c_str(), blocks.x, threads.x,
                static_cast<void *>(stream));
    return hipSuccess;
}
hipError_t __hipPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared, hipStream_t stream) {
    call = {blocks, threads, shared, stream};
    return hipSuccess;
}
hipError_t __hipPopCallConfiguration(dim3 *blocks, dim3 *threads, size_t *shared, hipStream_t *stream) {
    *blocks = call.blocks;
    *threads = call.threads;
    *shared = call.shared;
    *stream = call.stream;
    return hipSuccess;
}
void **__hipRegisterFatBinary(const void *) {
    static void *handle = nullptr;
    return &handle;
}
void __hipRegisterFunction(void **, const void *host, char *, const char *name, unsigned, void *, void *, void *,
                           void *, int *) {
    kernels[host] = name;
}
void __hipUnregisterFatBinary(void **) {}
}
