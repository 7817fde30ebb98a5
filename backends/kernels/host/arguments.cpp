#include "arguments.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "device.h"

namespace qcore::gpu {
namespace {

// The library's only mutable global.
thread_local char error_text[1024] = "";

constexpr int64_t kMaxElements = INT64_MAX / 8;
constexpr int64_t kMaxBlocksize = 4096;  // QC-NUM-005

long long wide(int64_t value) { return static_cast<long long>(value); }

}  // namespace

const char *last_error() { return error_text; }

qc_status fail(qc_status status, const char *format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

int64_t dtype_size(int32_t dtype) {
    switch (dtype) {
        case QC_F32:
            return 4;
        case QC_F16:
        case QC_BF16:
            return 2;
        default:
            return 0;
    }
}

Arguments::Arguments(const char *op, int32_t device, Starts starts)
    : op_(op),
      device_(device),
      status_(starts == Starts::kernels ? check_current_device(op, device) : check_device(op, device)) {}

Arguments &Arguments::dtype(const char *name, int32_t value) {
    if (ok() && dtype_size(value) == 0) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected QC_F32 (0), QC_F16 (1) or QC_BF16 (2), got %d", op_, name,
                       value);
    }
    return *this;
}

Arguments &Arguments::format(int32_t value) {
    if (ok() && value != QC_NF4 && value != QC_FP4) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: format: expected QC_NF4 (0) or QC_FP4 (1), got %d", op_, value);
    }
    return *this;
}

Arguments &Arguments::count(const char *name, int64_t value) {
    if (ok() && (value < 0 || value > kMaxElements)) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected a count from 0 to %lld, got %lld", op_, name,
                       wide(kMaxElements), wide(value));
    }
    return *this;
}

Arguments &Arguments::at_most(const char *name, int64_t value, int64_t limit) {
    if (ok() && value > limit) {
        status_ =
            fail(QC_INVALID_ARGUMENT, "%s: %s: expected at most %lld, got %lld", op_, name, wide(limit), wide(value));
    }
    return *this;
}

Arguments &Arguments::extent(const char *names, int64_t rows, int64_t columns) {
    if (ok() && rows > 0 && columns > kMaxElements / rows) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected a product of at most %lld, got %lld * %lld", op_, names,
                       wide(kMaxElements), wide(rows), wide(columns));
    }
    return *this;
}

Arguments &Arguments::blocksize(const char *name, int64_t value) {
    if (ok() && (value < 32 || value > kMaxBlocksize || (value & (value - 1)) != 0)) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected a power of two from 32 to 4096, got %lld", op_, name,
                       wide(value));
    }
    return *this;
}

Arguments &Arguments::array(const char *name, uintptr_t address, int64_t count, int64_t size) {
    if (ok() && count > 0 && address == 0) {
        status_ =
            fail(QC_INVALID_ARGUMENT, "%s: %s: expected the address of %lld elements, got 0", op_, name, wide(count));
    }
    return optional_array(name, address, count, size);
}

Arguments &Arguments::optional_array(const char *name, uintptr_t address, int64_t count, int64_t size) {
    if (ok() && count > 0 && address % static_cast<uintptr_t>(size) != 0) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected an address aligned to %lld bytes, got 0x%llx", op_, name,
                       wide(size), static_cast<unsigned long long>(address));
    }
    if (ok() && count > 0 && address != 0) {
        status_ = check_memory(op_, name, device_, address);
    }
    return *this;
}

Arguments &Arguments::bias(int32_t bias_dtype, uintptr_t address, int32_t dtype, int64_t count) {
    if (ok() && address != 0 && bias_dtype != QC_F32 && bias_dtype != dtype) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: bias_dtype: expected QC_F32 (0) or the dtype of out (%d), got %d", op_,
                       dtype, bias_dtype);
    }
    return address != 0 ? optional_array("bias", address, count, dtype_size(bias_dtype)) : *this;
}

Arguments &Arguments::threshold(const char *name, float value) {
    if (ok() && !(std::isfinite(value) && value >= 0.0f)) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected a finite value of at least 0, got %g", op_, name,
                       static_cast<double>(value));
    }
    return *this;
}

Arguments &Arguments::finite_table(const char *name, uintptr_t address) {
    array(name, address, 256, sizeof(float));
    for (int i = 0; kHostReadsMemory && ok() && i < 256; ++i) {
        const float value = pointer<const float>(address)[i];
        if (!std::isfinite(value)) {
            status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected 256 finite values, got %g at %d", op_, name,
                           static_cast<double>(value), i);
        }
    }
    return *this;
}

Arguments &Arguments::codebook(const char *name, uintptr_t address) {
    finite_table(name, address);
    for (int i = 1; kHostReadsMemory && ok() && i < 256; ++i) {
        const float *code = pointer<const float>(address);
        if (code[i] < code[i - 1]) {
            status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected ascending values, got %g at %d after %g", op_, name,
                           static_cast<double>(code[i]), i, static_cast<double>(code[i - 1]));
        }
    }
    return *this;
}

Arguments &Arguments::workspace(uintptr_t address, int64_t bytes, int64_t needed) {
    if (ok() && bytes < needed) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: workspace_bytes: expected at least %lld, got %lld", op_, wide(needed),
                       wide(bytes));
    }
    return array("workspace", address, needed, 64);
}

Arguments &Arguments::weight(const char *name, const qc_weight_4bit *w) {
    if (ok() && w == nullptr) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s: expected the address of a qc_weight_4bit, got 0", op_, name);
    }
    if (!ok()) {
        return *this;
    }
    if (w->layout != 0) {
        status_ = fail(QC_INVALID_ARGUMENT, "%s: %s.layout: expected 0, got %d", op_, name, w->layout);
        return *this;
    }
    format(w->format).count("numel", w->numel).blocksize("blocksize", w->blocksize);
    if (!ok()) {
        return *this;
    }
    const int64_t blocks = ceil_div(w->numel, w->blocksize);
    array("packed", w->packed, ceil_div(w->numel, 2), 1);
    if (w->nested_absmax == 0) {
        return array("absmax", w->absmax, blocks, sizeof(float));
    }
    blocksize("nested_blocksize", w->nested_blocksize);
    if (ok()) {
        array("absmax", w->absmax, blocks, 1)
            .array("nested_absmax", w->nested_absmax, ceil_div(blocks, w->nested_blocksize), sizeof(float))
            .finite_table("nested_code", w->nested_code)
            .array("nested_offset", w->nested_offset, 1, sizeof(float));
    }
    return *this;
}

}  // namespace qcore::gpu
