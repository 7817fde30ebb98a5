/* The memory_ functions over the host's own memory, for a library that has none, each mutant with one mistake in them
 * (QC-MEM-001 to QC-MEM-005). With MUTANT_MEMORY_RIGHT there is none. Included by abi_mutants.c.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* The text of a refusal here is this thread's last error until the right library sets one of its own. That one notices
 * nothing of a refusal here, so it is made to refuse something, each time something else: `marker` is what it says then.
 */
static _Thread_local char said[128], marker[256];
static const char *memory_text(void) {
    const char *theirs = real->last_error();
    return said[0] && strcmp(theirs, marker) == 0 ? said : theirs;
}
static qc_status refuse(qc_status status, const char *text) {
#if !defined(MUTANT_MEMORY_MESSAGE_MISSING)
    static _Thread_local int32_t op = INT32_MIN;
    (void)real->workspace(op++, 0, 0, QC_F32, 1, 1, 1, NULL);
    snprintf(marker, sizeof marker, "%s", real->last_error());
    snprintf(said, sizeof said, "%s", text);
#endif
    return status;
}

static int known_device(int32_t device) {
#if defined(MUTANT_MEMORY_DEVICE_IGNORED)
    return (void)device, 1;
#else
    return device == 0;
#endif
}
static int known_kind(int32_t kind) {
#if defined(MUTANT_MEMORY_KIND_UNCHECKED)
    return (void)kind, 1;
#else
    return kind == QC_MEMORY_MANAGED || kind == QC_MEMORY_PINNED;
#endif
}

static qc_status memory_kind(int32_t device, int32_t *kind) {
    if (!known_device(device)) return refuse(QC_INVALID_ARGUMENT, "memory_kind: device: expected 0");
    if (!kind) return refuse(QC_INVALID_ARGUMENT, "memory_kind: kind: expected an address, got 0");
#if defined(MUTANT_MEMORY_KIND_UNKNOWN)
    *kind = 2;
#else
    *kind = QC_MEMORY_MANAGED;
#endif
    return QC_OK;
}

#if defined(MUTANT_MEMORY_OP_DIFFERS)
static uintptr_t largest; /* the largest piece so far */
static int64_t largest_bytes;
#endif
static qc_status memory_allocate(int32_t device, int32_t kind, int64_t bytes, uintptr_t *address) {
    if (!known_device(device)) return refuse(QC_INVALID_ARGUMENT, "memory_allocate: device: expected 0");
    if (!known_kind(kind)) return refuse(QC_INVALID_ARGUMENT, "memory_allocate: kind: expected 0 or 1");
#if defined(MUTANT_MEMORY_BYTES_UNSIGNED)
    if (bytes < 0) return refuse(QC_OUT_OF_MEMORY, "memory_allocate: bytes: too many");
#endif
    if (bytes < 1) return refuse(QC_INVALID_ARGUMENT, "memory_allocate: bytes: expected at least 1");
    if (!address) return refuse(QC_INVALID_ARGUMENT, "memory_allocate: address: expected an address, got 0");
#if defined(MUTANT_MEMORY_KIND_NOT_SERVED)
    if (kind == QC_MEMORY_MANAGED) return refuse(QC_UNSUPPORTED, "memory_allocate: kind: not served");
#endif
#if defined(MUTANT_MEMORY_FULL_WRITES)
    *address = 0;
#endif
    size_t size = ((size_t)bytes + 63) / 64 * 64;
    void *made = bytes < (int64_t)1 << 40 ? aligned_alloc(64, size + 64) : NULL;
#if defined(MUTANT_MEMORY_FULL_UNTYPED)
    if (!made) return refuse(QC_INTERNAL, "memory_allocate: failed");
#endif
    if (!made) return refuse(QC_OUT_OF_MEMORY, "memory_allocate: cannot be had");
    *address = (uintptr_t)made;
#if defined(MUTANT_MEMORY_MISALIGNED)
    *address += 16;
#elif defined(MUTANT_MEMORY_HANDED_OUT_TWICE)
    static uintptr_t last; /* a piece that would fit into the one before lies in it */
    static int64_t left;
    if (bytes < left) *address = last + 64;
    last = *address, left = bytes - 64;
#elif defined(MUTANT_MEMORY_OP_DIFFERS)
    if (bytes > largest_bytes) largest = *address, largest_bytes = bytes;
#endif
    return QC_OK;
}

#if defined(MUTANT_MEMORY_OP_DIFFERS)
static qc_status dequantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                                      uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out) {
    qc_status status = real->dequantize_blockwise(device, stream, dtype, a, absmax, code, n, blocksize, out);
    int there = out >= largest && out < largest + (uintptr_t)largest_bytes;
    if (status == QC_OK && n > 0 && there) *(unsigned char *)out ^= 1; /* a last bit */
    return status;
}
#endif

static qc_status memory_free(int32_t device, int32_t kind, uintptr_t address) {
    if (!known_device(device)) return refuse(QC_INVALID_ARGUMENT, "memory_free: device: expected 0");
    if (!known_kind(kind)) return refuse(QC_INVALID_ARGUMENT, "memory_free: kind: expected 0 or 1");
#if defined(MUTANT_MEMORY_FREE_READS_ZERO)
    (void)*(volatile char *)address;
#elif defined(MUTANT_MEMORY_FREE_BY_OWNER)
    static _Thread_local int known;
    static int first = 1;
    if (first) first = 0, known = 1; /* the thread that frees first */
    if (!known) return refuse(QC_DEVICE_ERROR, "memory_free: another thread's");
#endif
#if !defined(MUTANT_MEMORY_MISALIGNED) && !defined(MUTANT_MEMORY_HANDED_OUT_TWICE)
    free((void *)address);
#endif
    return QC_OK;
}

static qc_status memory_prefetch(int32_t device, uintptr_t stream, int32_t kind, uintptr_t address, int64_t bytes,
                                 int32_t to_host) {
    (void)stream;
    if (!known_device(device)) return refuse(QC_INVALID_ARGUMENT, "memory_prefetch: device: expected 0");
    if (!known_kind(kind)) return refuse(QC_INVALID_ARGUMENT, "memory_prefetch: kind: expected 0 or 1");
#if defined(MUTANT_MEMORY_NOTHING_REFUSED)
    if (bytes == 0) return refuse(QC_INVALID_ARGUMENT, "memory_prefetch: bytes: expected at least 1");
#endif
    if (bytes < 0) return refuse(QC_INVALID_ARGUMENT, "memory_prefetch: bytes: expected a count");
#if !defined(MUTANT_MEMORY_TO_HOST_UNCHECKED)
    if (to_host != 0 && to_host != 1) return refuse(QC_INVALID_ARGUMENT, "memory_prefetch: to_host: expected 0 or 1");
#endif
#if !defined(MUTANT_MEMORY_ADDRESS_UNCHECKED)
    if (bytes && !address) return refuse(QC_INVALID_ARGUMENT, "memory_prefetch: address: expected one, got 0");
#endif
#if defined(MUTANT_MEMORY_PREFETCH_DROPS)
    if (to_host == 0 && bytes) ((char *)address)[bytes - 1] = 0; /* the last byte does not come along */
#endif
    return QC_OK;
}
