// The library's table, what it says of itself, and its only export.
#include <cstdio>
#include <fstream>
#include <string>

#include "abi.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "qcore_backend.h"

namespace qcore::cpu {
namespace {

// `text` as a JSON string, quotes included.
std::string json_string(const std::string &text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
            out += escaped;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

// The processor's name as Linux gives it; aarch64 kernels give none.
std::string processor_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        const size_t colon = line.find(": ");
        if (line.compare(0, 10, "model name") == 0 && colon != std::string::npos) {
            return line.substr(colon + 2);
        }
    }
    return "unknown processor";
}

std::string architecture() {
#if defined(__x86_64__)
    return "x86-64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "unknown";
#endif
}

std::string description() {
    return "{\"name\": " + json_string(processor_name()) +
           ", \"arch\": " + json_string(architecture() + " " + isa_name(isa_choice().isa)) +
           ", \"driver\": \"\", \"runtime\": " + json_string(threading_description()) +
           ", \"torch_device\": \"cpu\", \"declarations\": {\"gemm_4bit\": " + gemm_4bit_declaration() +
           ", \"gemm_int4\": " + gemm_4bit_declaration() +
           ", \"gemm_4bit_transposed\": " + gemm_4bit_transposed_declaration() +
           ", \"int8_linear_transposed\": " + int8_linear_transposed_declaration() + "}}";
}

qc_status device_count(int32_t *count) {
    if (count == nullptr) {
        return fail(QC_INVALID_ARGUMENT, "device_count: count: expected an address, got 0");
    }
    *count = 0;
    const Arguments arguments("device_count", 0);
    if (arguments.ok()) {
        *count = 1;
    }
    return arguments.status();
}

qc_status describe(int32_t device, const char **json) {
    return guarded("describe", [&] {
        const Arguments arguments("describe", device);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (json == nullptr) {
            return fail(QC_INVALID_ARGUMENT, "describe: json: expected an address, got 0");
        }
        static const std::string text = description();
        *json = text.c_str();
        return QC_OK;
    });
}

qc_status workspace(int32_t op, int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                    int64_t *bytes) {
    Arguments arguments("workspace", device);
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
    *bytes = 0;
    if (op == QC_OP_GEMM_4BIT) {
        return gemm_4bit_workspace(stream, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_INT8_GEMM || op == QC_OP_INT8_SCALED_GEMM) {
        return int8_gemm_workspace(stream, m, n, k, bytes);
    }
    if (op == QC_OP_OPTIMIZER_STEP) {
        return optimizer_step_workspace(m, bytes);
    }
    if (op == QC_OP_GEMM_INT4) {
        return gemm_int4_workspace(stream, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_INT8_LINEAR) {
        return int8_linear_workspace(stream, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_GEMM_4BIT_TRANSPOSED) {
        return gemm_4bit_transposed_workspace(stream, dtype, m, n, k, bytes);
    }
    if (op == QC_OP_INT8_LINEAR_TRANSPOSED) {
        return int8_linear_transposed_workspace(stream, dtype, m, n, k, bytes);
    }
    return QC_OK;
}

constexpr qc_api kApi = {
    sizeof(qc_api),
    QC_ABI_MAJOR,
    QC_ABI_MINOR,
    "cpu",
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
    nullptr,  // memory_: paged state of the host is qcore's own map of files
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace qcore::cpu

extern "C" __attribute__((visibility("default"))) const qc_api *qcore_backend_open(uint32_t abi_major) {
    return abi_major == QC_ABI_MAJOR ? &qcore::cpu::kApi : nullptr;
}
