// The library's table: each call goes to the part that was compiled for its device's wave size.
//
// The kernels take the wave size as a constant of their compilation: 64 for CDNA, 32 for RDNA. So the library holds the
// whole of backends/kernels once for each size that it is built for, in namespaces of their own (CMakeLists.txt), with
// their own tables behind qcore_wave32_open and qcore_wave64_open.
#include <cstddef>

#include "devices.h"
#include "qcore_backend.h"

extern "C" {
#if defined(QC_HIP_WAVE32)
const qc_api *qcore_wave32_open(uint32_t abi_major);
#endif
#if defined(QC_HIP_WAVE64)
const qc_api *qcore_wave64_open(uint32_t abi_major);
#endif
}

namespace qcore_hip {
namespace {

const qc_api *part_of(int wave) {
#if defined(QC_HIP_WAVE64)
    if (wave == 64) {
        return qcore_wave64_open(QC_ABI_MAJOR);
    }
#endif
#if defined(QC_HIP_WAVE32)
    if (wave == 32) {
        return qcore_wave32_open(QC_ABI_MAJOR);
    }
#endif
    return nullptr;
}

// The part that says what concerns no device: any.
const qc_api *first_part() { return part_of(64) != nullptr ? part_of(64) : part_of(32); }

// A device that is not there, or that the library was not built for, is refused by whichever part is asked.
const qc_api *part_for(int32_t device) {
    const auto &devices = machine().devices;
    const bool there = device >= 0 && static_cast<size_t>(device) < devices.size();
    const qc_api *part = there ? part_of(devices[static_cast<size_t>(device)].wave) : nullptr;
    return part != nullptr ? part : first_part();
}

// The part whose last_error() is this thread's.
thread_local const qc_api *asked = nullptr;

const char *last_error() { return asked != nullptr ? asked->last_error() : ""; }

qc_status device_count(int32_t *count) {
    asked = first_part();
    return asked->device_count(count);
}

qc_status workspace(int32_t op, int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                    int64_t *bytes) {
    asked = part_for(device);
    return asked->workspace(op, device, stream, dtype, m, n, k, bytes);
}

// An entry of the table that begins with a device: the same entry of the device's part.
template <auto Entry>
struct Forward;
template <class... Arguments, qc_status (*qc_api::*Entry)(int32_t, Arguments...)>
struct Forward<Entry> {
    static qc_status call(int32_t device, Arguments... arguments) {
        asked = part_for(device);
        return (asked->*Entry)(device, arguments...);
    }
};

// NULL where the parts leave an op out.
template <auto Entry>
auto forward() -> decltype(&Forward<Entry>::call) {
    return first_part()->*Entry != nullptr ? &Forward<Entry>::call : nullptr;
}

qc_api make_table() {
    qc_api table = {};
    table.size = sizeof(qc_api);
    table.abi_major = QC_ABI_MAJOR;
    table.abi_minor = QC_ABI_MINOR;
    table.name = "hip";
    table.last_error = last_error;
    table.device_count = device_count;
    table.describe = forward<&qc_api::describe>();
    table.workspace = workspace;
    table.quantize_blockwise = forward<&qc_api::quantize_blockwise>();
    table.dequantize_blockwise = forward<&qc_api::dequantize_blockwise>();
    table.quantize_4bit = forward<&qc_api::quantize_4bit>();
    table.dequantize_4bit = forward<&qc_api::dequantize_4bit>();
    table.quantize_absmax = forward<&qc_api::quantize_absmax>();
    table.dequantize_absmax = forward<&qc_api::dequantize_absmax>();
    table.gemm_4bit = forward<&qc_api::gemm_4bit>();
    table.int8_quantize_rows = forward<&qc_api::int8_quantize_rows>();
    table.int8_quantize_cols = forward<&qc_api::int8_quantize_cols>();
    table.int8_gemm = forward<&qc_api::int8_gemm>();
    table.int8_dequantize_gemm = forward<&qc_api::int8_dequantize_gemm>();
    table.int8_scaled_gemm = forward<&qc_api::int8_scaled_gemm>();
    table.int8_dequantize_rows = forward<&qc_api::int8_dequantize_rows>();
    table.optimizer_step = forward<&qc_api::optimizer_step>();
    table.int8_linear = forward<&qc_api::int8_linear>();
    table.gemm_int4 = forward<&qc_api::gemm_int4>();
    table.gemm_4bit_transposed = forward<&qc_api::gemm_4bit_transposed>();
    table.int8_linear_transposed = forward<&qc_api::int8_linear_transposed>();
    table.memory_kind = forward<&qc_api::memory_kind>();
    table.memory_allocate = forward<&qc_api::memory_allocate>();
    table.memory_free = forward<&qc_api::memory_free>();
    table.memory_prefetch = forward<&qc_api::memory_prefetch>();
    static_assert(sizeof(qc_api) == offsetof(qc_api, memory_prefetch) + sizeof table.memory_prefetch,
                  "an entry that is not forwarded would be an op that the library leaves out");
    return table;
}

}  // namespace
}  // namespace qcore_hip

extern "C" __attribute__((visibility("default"))) const qc_api *qcore_backend_open(uint32_t abi_major) {
    static const qc_api table = qcore_hip::make_table();
    return abi_major == QC_ABI_MAJOR ? &table : nullptr;
}
