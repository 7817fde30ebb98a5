// The library's table, what it says of itself, and its only export.
#include <map>
#include <mutex>
#include <string>

#include "arguments.h"
#include "device.h"
#include "ops.h"
#include "paged_memory.h"
#include "qcore_backend.h"

namespace qcore::gpu {
namespace {

qc_status describe(int32_t device, const char **json) {
    constexpr char kOp[] = "describe";
    return guarded(kOp, [&] {
        if (json == nullptr) {
            return fail(QC_INVALID_ARGUMENT, "%s: json: expected an address, got 0", kOp);
        }
        int32_t count = 0;
        const qc_status status = device_count(&count);
        if (status != QC_OK) {
            return status;
        }
        if (device < 0 || device >= count) {
            return fail(QC_NO_DEVICE, "%s: device: expected 0 to %d, got %d", kOp, count - 1, device);
        }
        // Said once for each device, and kept: the text has to stay where it is.
        static std::mutex mutex;
        static std::map<int32_t, std::string> texts;
        const std::lock_guard<std::mutex> lock(mutex);
        std::string &text = texts[device];
        if (text.empty()) {
            const std::string product = fourbit_declaration();
            text = "{" + device_fields(device) + ", \"declarations\": {\"gemm_4bit\": " + product +
                   ", \"gemm_int4\": " + product + ", \"gemm_4bit_transposed\": " + product +
                   ", \"int8_linear_transposed\": " + product + "}}";
        }
        *json = text.c_str();
        return QC_OK;
    });
}

qc_status workspace(int32_t op, int32_t device, uintptr_t, int32_t dtype, int64_t m, int64_t n, int64_t k,
                    int64_t *bytes) {
    Arguments arguments("workspace", device, Arguments::Starts::nothing);
    arguments.count("m", m).count("n", n).count("k", k);
    if (!arguments.ok()) {
        return arguments.status();
    }
    if (op < QC_OP_QUANTIZE_BLOCKWISE || op > QC_OP_INT8_LINEAR_TRANSPOSED) {
        return fail(QC_INVALID_ARGUMENT, "workspace: op: expected 0 to %d, got %d", QC_OP_INT8_LINEAR_TRANSPOSED, op);
    }
    if (bytes == nullptr) {
        return fail(QC_INVALID_ARGUMENT, "workspace: bytes: expected an address, got 0");
    }
    if (op == QC_OP_OPTIMIZER_STEP) {
        return optimizer_step_workspace(m, n, bytes);
    }
    if (op == QC_OP_GEMM_4BIT || op == QC_OP_GEMM_INT4) {
        return fourbit_workspace(device, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_GEMM_4BIT_TRANSPOSED) {
        return gemm_4bit_transposed_workspace(device, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_INT8_GEMM || op == QC_OP_INT8_SCALED_GEMM) {
        return int8_gemm_workspace(device, m, n, k, bytes);
    }
    if (op == QC_OP_INT8_LINEAR) {
        return int8_linear_workspace(device, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_INT8_LINEAR_TRANSPOSED) {
        return int8_linear_transposed_workspace(device, dtype, m, n, k, bytes);
    }
    *bytes = 0;
    return QC_OK;
}

const qc_api kApi = {
    sizeof(qc_api),
    QC_ABI_MAJOR,
    QC_ABI_MINOR,
    kBackendName,
    last_error,
    device_count,
    describe,
    workspace,
    quantize_blockwise,
    dequantize_blockwise,
    quantize_4bit,
    dequantize_4bit,
    quantize_absmax,
    dequantize_absmax,
    gemm_4bit,
    int8_quantize_rows,
    int8_quantize_cols,
    int8_gemm,
    int8_dequantize_gemm,
    int8_scaled_gemm,
    int8_dequantize_rows,
    optimizer_step,
    int8_linear,
    gemm_int4,
    gemm_4bit_transposed,
    int8_linear_transposed,
    memory_kind,
    memory_allocate,
    memory_free,
    memory_prefetch,
};

}  // namespace
}  // namespace qcore::gpu

extern "C" __attribute__((visibility("default"))) const qc_api *qcore_backend_open(uint32_t abi_major) {
    return abi_major == QC_ABI_MAJOR ? &qcore::gpu::kApi : nullptr;
}
