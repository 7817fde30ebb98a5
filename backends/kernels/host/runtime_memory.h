// The memory of paged state by a GPU's runtime, under runtime.h's names: what CUDA's and HIP's device.cpp share.
#ifndef QCORE_GPU_RUNTIME_MEMORY_H
#define QCORE_GPU_RUNTIME_MEMORY_H

#include <cstddef>
#include <cstdint>

#include "arguments.h"
#include "runtime.h"

namespace qcore::gpu::runtime {

// While a thread captures a graph the runtime refuses it allocations, and gives up the capture; they are not part of
// it, and memory may be given back at any time, whoever drops the last reference to a tensor.
class OutsideCapture {
   public:
    OutsideCapture() { exchange_capture_mode(&mode_); }
    ~OutsideCapture() { exchange_capture_mode(&mode_); }
    OutsideCapture(const OutsideCapture &) = delete;
    OutsideCapture &operator=(const OutsideCapture &) = delete;

   private:
    CaptureMode mode_ = kRelaxedCapture;
};

// Makes a device current and afterwards the one before it again: memory is given back by whoever drops the last
// reference to a tensor, on any thread. No call where the device is current already: making one current may set it up.
class Current {
   public:
    explicit Current(int device) {
        error_ = current_device(&before_);
        if (error_ == kSuccess && before_ != device) {
            error_ = make_current(device);
            changed_ = error_ == kSuccess;
        }
    }
    ~Current() {
        if (changed_ && make_current(before_) != kSuccess) {
            static_cast<void>(last_error());
        }
    }
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;
    Error error() const { return error_; }

   private:
    int before_ = 0;
    bool changed_ = false;
    Error error_;
};

inline const char *kind_name(int32_t kind) { return kind == QC_MEMORY_MANAGED ? "managed" : "pinned"; }

// QC_OK, or the status and text of an error; `what` says what was tried.
inline qc_status memory_status(const char *op, Error error, const char *what, size_t bytes, int32_t kind) {
    if (error == kSuccess) {
        return QC_OK;
    }
    static_cast<void>(last_error());  // it would wait there for the caller's own next check
    return fail(error == kOutOfMemory ? QC_OUT_OF_MEMORY : QC_DEVICE_ERROR, "%s: %s %zu bytes of %s memory: %s: %s", op,
                what, bytes, kind_name(kind), name(error), text(error));
}

inline qc_status allocate_memory(const char *op, int32_t kind, size_t bytes, uintptr_t *address) {
    const OutsideCapture outside;
    void *made = nullptr;
    const Error error = kind == QC_MEMORY_MANAGED ? allocate_managed(&made, bytes) : allocate_pinned(&made, bytes);
    if (error != kSuccess) {
        return memory_status(op, error, "allocating", bytes, kind);
    }
    void *seen = made;
    if (kind == QC_MEMORY_PINNED) {
        const Error mapped = device_address(&seen, made);
        if (mapped != kSuccess || seen != made) {
            static_cast<void>(free_pinned(made));
            return mapped != kSuccess ? memory_status(op, mapped, "mapping", bytes, kind)
                                      : fail(QC_UNSUPPORTED,
                                             "%s: the device sees pinned memory at another address than the host, so "
                                             "that no tensor can have both",
                                             op);
        }
    }
    *address = reinterpret_cast<uintptr_t>(made);
    return QC_OK;
}

// Both runtimes are documented to wait for the work that is queued before they take memory back: that of the current
// device, which therefore has to be the memory's.
inline qc_status free_memory(const char *op, int32_t device, int32_t kind, uintptr_t address) {
    const OutsideCapture outside;
    const Current current(device);
    void *const memory = reinterpret_cast<void *>(address);
    const Error error = current.error() != kSuccess ? current.error()
                        : kind == QC_MEMORY_MANAGED ? free_managed(memory)
                                                    : free_pinned(memory);
    if (error == kSuccess) {
        return QC_OK;
    }
    static_cast<void>(last_error());
    return fail(QC_DEVICE_ERROR, "%s: %s memory at 0x%llx: %s: %s", op, kind_name(kind),
                static_cast<unsigned long long>(address), name(error), text(error));
}

inline qc_status move_memory(const char *op, int32_t device, uintptr_t stream, uintptr_t address, size_t bytes,
                             bool to_host) {
    const Error error =
        prefetch(reinterpret_cast<void *>(address), bytes, device, to_host, reinterpret_cast<Stream>(stream));
    return memory_status(op, error, to_host ? "moving to the host" : "moving to the device", bytes, QC_MEMORY_MANAGED);
}

}  // namespace qcore::gpu::runtime

#endif  // QCORE_GPU_RUNTIME_MEMORY_H
