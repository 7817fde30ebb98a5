// The HIP runtime, opened when it is there.
//
// The library does not link with libamdhip64: it loads on every machine and says what is missing. So it brings the few
// functions of the runtime that compiled kernels and host code call, and each hands its call on. Two runtimes in one
// process do not know each other's memory: the one that the process has already, PyTorch's own or the one that
// qcore_hip opened for all to see, comes first.
//
// Kernels register themselves when the library is loaded; without a runtime that does nothing.
#include "runtime.h"

#include <hip/hip_runtime.h>

#include <array>
#include <type_traits>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace qcore_hip {
namespace {

using Address = void (*)();

#if defined(_WIN32)
constexpr std::array<const char *, 3> kNames = {"amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll"};
using Library = HMODULE;
Library loaded(const char *name) { return GetModuleHandleA(name); }
Library open(const char *name) { return LoadLibraryA(name); }
Address find(Library library, const char *symbol) { return reinterpret_cast<Address>(GetProcAddress(library, symbol)); }
Library everybodys() { return nullptr; }
#else
constexpr std::array<const char *, 4> kNames = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so",
                                                "/opt/rocm/lib/libamdhip64.so"};
using Library = void *;
Library loaded(const char *name) { return dlopen(name, RTLD_NOW | RTLD_NOLOAD); }
Library open(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
Address find(Library library, const char *symbol) { return reinterpret_cast<Address>(dlsym(library, symbol)); }
// What libraries show to everybody. This one's own functions are not among it: they leave no symbol.
Library everybodys() {
    return dlsym(RTLD_DEFAULT, "hipGetDeviceCount") != nullptr ? dlopen(nullptr, RTLD_NOW) : nullptr;
}
#endif

Library look() {
    if (Library library = everybodys()) {
        return library;
    }
    for (const char *name : kNames) {
        if (Library library = loaded(name)) {
            return library;
        }
    }
    for (const char *name : kNames) {
        if (Library library = open(name)) {
            return library;
        }
    }
    return nullptr;
}

Library runtime() {
    static const Library library = look();
    return library;
}

template <class Function>
Function *entry(const char *symbol) {
    return runtime() != nullptr ? reinterpret_cast<Function *>(find(runtime(), symbol)) : nullptr;
}

// Calls the runtime's function of that name and of Function's type, found once; `missing` where there is none.
template <auto Function, class Result, class... Arguments>
Result hand_on(const char *symbol, Result missing, Arguments... arguments) {
    using Type = std::remove_pointer_t<decltype(Function)>;
    static Type *const found = entry<Type>(symbol);
    if constexpr (std::is_void_v<decltype(found(arguments...))>) {
        if (found != nullptr) {
            found(arguments...);
        }
        return missing;
    } else {
        return found != nullptr ? found(arguments...) : missing;
    }
}

}  // namespace

std::string runtime_problem() {
    if (runtime() == nullptr) {
        return "no device: no HIP runtime (libamdhip64) was found; install a ROCm build of PyTorch or ROCm 6 or newer "
               "(on Windows AMD's HIP SDK), or use the cpu backend";
    }
    for (const char *symbol : {"hipGetDeviceCount", "hipGetDevicePropertiesR0600", "hipLaunchKernel"}) {
        if (find(runtime(), symbol) == nullptr) {
            return std::string("no device: the HIP runtime is too old (it has no ") + symbol +
                   "); this library needs ROCm 6 or newer";
        }
    }
    return "";
}

}  // namespace qcore_hip

using qcore_hip::hand_on;

extern "C" {

hipError_t hipGetDeviceCount(int *count) {
    return hand_on<hipGetDeviceCount>("hipGetDeviceCount", hipErrorNotInitialized, count);
}
hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600 *properties, int device) {
    return hand_on<hipGetDevicePropertiesR0600>("hipGetDevicePropertiesR0600", hipErrorNotInitialized, properties,
                                                device);
}
hipError_t hipGetDevice(int *device) { return hand_on<hipGetDevice>("hipGetDevice", hipErrorNotInitialized, device); }
hipError_t hipSetDevice(int device) { return hand_on<hipSetDevice>("hipSetDevice", hipErrorNotInitialized, device); }
hipError_t hipPointerGetAttributes(hipPointerAttribute_t *attributes, const void *address) {
    return hand_on<hipPointerGetAttributes>("hipPointerGetAttributes", hipErrorNotInitialized, attributes, address);
}
hipError_t hipDriverGetVersion(int *version) {
    return hand_on<hipDriverGetVersion>("hipDriverGetVersion", hipErrorNotInitialized, version);
}
hipError_t hipRuntimeGetVersion(int *version) {
    return hand_on<hipRuntimeGetVersion>("hipRuntimeGetVersion", hipErrorNotInitialized, version);
}
hipError_t hipGetLastError() { return hand_on<hipGetLastError>("hipGetLastError", hipErrorNotInitialized); }
const char *hipGetErrorName(hipError_t error) {
    return hand_on<hipGetErrorName>("hipGetErrorName", static_cast<const char *>("no HIP runtime"), error);
}
const char *hipGetErrorString(hipError_t error) {
    return hand_on<hipGetErrorString>("hipGetErrorString", static_cast<const char *>("no HIP runtime"), error);
}
hipError_t hipMemsetAsync(void *address, int value, size_t bytes, hipStream_t stream) {
    return hand_on<hipMemsetAsync>("hipMemsetAsync", hipErrorNotInitialized, address, value, bytes, stream);
}
hipError_t hipLaunchKernel(const void *kernel, dim3 blocks, dim3 threads, void **arguments, size_t shared,
                           hipStream_t stream) {
    return hand_on<hipLaunchKernel>("hipLaunchKernel", hipErrorNotInitialized, kernel, blocks, threads, arguments,
                                    shared, stream);
}

// Of paged state. HIP's headers have templates under the names of the first two.
hipError_t hipMallocManaged(void **made, size_t bytes, unsigned flags) {
    constexpr hipError_t (*function)(void **, size_t, unsigned) = hipMallocManaged;
    return hand_on<function>("hipMallocManaged", hipErrorNotInitialized, made, bytes, flags);
}
hipError_t hipHostMalloc(void **made, size_t bytes, unsigned flags) {
    constexpr hipError_t (*function)(void **, size_t, unsigned) = hipHostMalloc;
    return hand_on<function>("hipHostMalloc", hipErrorNotInitialized, made, bytes, flags);
}
hipError_t hipHostGetDevicePointer(void **seen, void *pinned, unsigned flags) {
    return hand_on<hipHostGetDevicePointer>("hipHostGetDevicePointer", hipErrorNotInitialized, seen, pinned, flags);
}
hipError_t hipFree(void *memory) { return hand_on<hipFree>("hipFree", hipErrorNotInitialized, memory); }
hipError_t hipHostFree(void *memory) { return hand_on<hipHostFree>("hipHostFree", hipErrorNotInitialized, memory); }
hipError_t hipMemPrefetchAsync(const void *memory, size_t bytes, int device, hipStream_t stream) {
    return hand_on<hipMemPrefetchAsync>("hipMemPrefetchAsync", hipErrorNotInitialized, memory, bytes, device, stream);
}
hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode *mode) {
    return hand_on<hipThreadExchangeStreamCaptureMode>("hipThreadExchangeStreamCaptureMode", hipErrorNotInitialized,
                                                       mode);
}

// What clang's compiled code calls: no header declares them.
hipError_t __hipPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared, hipStream_t stream) {
    return hand_on<__hipPushCallConfiguration>("__hipPushCallConfiguration", hipErrorNotInitialized, blocks, threads,
                                               shared, stream);
}
hipError_t __hipPopCallConfiguration(dim3 *blocks, dim3 *threads, size_t *shared, hipStream_t *stream) {
    return hand_on<__hipPopCallConfiguration>("__hipPopCallConfiguration", hipErrorNotInitialized, blocks, threads,
                                              shared, stream);
}
void **__hipRegisterFatBinary(const void *data) {
    return hand_on<__hipRegisterFatBinary>("__hipRegisterFatBinary", static_cast<void **>(nullptr), data);
}
void __hipRegisterFunction(void **modules, const void *host, char *device, const char *name, unsigned threads,
                           uint3 *thread, uint3 *block, dim3 *block_size, dim3 *grid_size, int *wave) {
    hand_on<__hipRegisterFunction>("__hipRegisterFunction", 0, modules, host, device, name, threads, thread, block,
                                   block_size, grid_size, wave);
}
void __hipUnregisterFatBinary(void **modules) {
    hand_on<__hipUnregisterFatBinary>("__hipUnregisterFatBinary", 0, modules);
}
}
