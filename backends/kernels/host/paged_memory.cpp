// Managed memory moves by pages: a step's kernels work on pages that are near, the others wait with the host, and
// memory_prefetch brings the next window while a kernel is busy with this one. Pinned memory is for devices without
// such pages (Windows, WSL, AMD's with XNACK off): a kernel of a step reads and writes each byte of state once, so that
// it crosses the bus once each way, as often as a copy to the device and back would take it there.
#include "paged_memory.h"

#include "arguments.h"
#include "device.h"

namespace qcore::gpu {
namespace {

qc_status check_kind(const char *op, int32_t kind) {
    return kind == QC_MEMORY_MANAGED || kind == QC_MEMORY_PINNED
               ? QC_OK
               : fail(QC_INVALID_ARGUMENT, "%s: kind: expected QC_MEMORY_MANAGED (0) or QC_MEMORY_PINNED (1), got %d",
                      op, kind);
}

// Of memory_allocate and memory_prefetch, on the current device.
qc_status check_piece(const char *op, int32_t device, int32_t kind, int64_t bytes) {
    const qc_status status = Arguments(op, device).count("bytes", bytes).status();
    return status == QC_OK ? check_kind(op, kind) : status;
}

}  // namespace

qc_status memory_kind(int32_t device, int32_t *kind) {
    constexpr char kOp[] = "memory_kind";
    return guarded(kOp, [&] {
        const qc_status status = check_device(kOp, device);
        if (status != QC_OK) {
            return status;
        }
        if (kind == nullptr) {
            return fail(QC_INVALID_ARGUMENT, "%s: kind: expected an address, got 0", kOp);
        }
        *kind = pages_move(device) ? QC_MEMORY_MANAGED : QC_MEMORY_PINNED;
        return QC_OK;
    });
}

qc_status memory_allocate(int32_t device, int32_t kind, int64_t bytes, uintptr_t *address) {
    constexpr char kOp[] = "memory_allocate";
    return guarded(kOp, [&] {
        const qc_status status = check_piece(kOp, device, kind, bytes);
        if (status != QC_OK) {
            return status;
        }
        if (bytes == 0) {
            return fail(QC_INVALID_ARGUMENT, "%s: bytes: expected at least 1, got 0", kOp);
        }
        if (address == nullptr) {
            return fail(QC_INVALID_ARGUMENT, "%s: address: expected an address, got 0", kOp);
        }
        if (kind == QC_MEMORY_MANAGED && !pages_move(device)) {
            return fail(QC_UNSUPPORTED,
                        "%s: kind: pages of managed memory do not move to device %d while it runs; take "
                        "QC_MEMORY_PINNED (1)",
                        kOp, device);
        }
        return allocate_memory(kOp, kind, static_cast<size_t>(bytes), address);
    });
}

qc_status memory_free(int32_t device, int32_t kind, uintptr_t address) {
    constexpr char kOp[] = "memory_free";
    return guarded(kOp, [&] {
        qc_status status = check_device(kOp, device);
        if (status == QC_OK) {
            status = check_kind(kOp, kind);
        }
        return status == QC_OK && address != 0 ? free_memory(kOp, device, kind, address) : status;
    });
}

qc_status memory_prefetch(int32_t device, uintptr_t stream, int32_t kind, uintptr_t address, int64_t bytes,
                          int32_t to_host) {
    constexpr char kOp[] = "memory_prefetch";
    return guarded(kOp, [&] {
        const qc_status status = check_piece(kOp, device, kind, bytes);
        if (status != QC_OK) {
            return status;
        }
        if (to_host != 0 && to_host != 1) {
            return fail(QC_INVALID_ARGUMENT, "%s: to_host: expected 0 or 1, got %d", kOp, to_host);
        }
        if (bytes > 0 && address == 0) {
            return fail(QC_INVALID_ARGUMENT, "%s: address: expected that of %lld bytes, got 0", kOp,
                        static_cast<long long>(bytes));
        }
        if (kind == QC_MEMORY_PINNED || bytes == 0) {
            return QC_OK;
        }
        return move_memory(kOp, device, stream, address, static_cast<size_t>(bytes), to_host == 1);
    });
}

}  // namespace qcore::gpu
