// What every op of a GPU library does at the ABI: the error text, the checks of its arguments, the wall against
// exceptions.
#ifndef QCORE_GPU_ARGUMENTS_H
#define QCORE_GPU_ARGUMENTS_H

#include <cstdint>
#include <exception>
#include <new>

#include "qcore_backend.h"

namespace qcore::gpu {

// Text of this thread's last error; "" if there was none.
const char *last_error();

// Set the text and return `status`.
__attribute__((format(printf, 2, 3))) qc_status fail(qc_status status, const char *format, ...);

// 2 or 4; 0 for a dtype that the ABI does not know.
int64_t dtype_size(int32_t dtype);

// The checks of one call. The first that fails decides status() and last_error(); the rest are skipped, so a check may
// rely on the ones before it. Messages read "<op>: <argument>: expected ..., got ...".
class Arguments {
   public:
    // Also refuses a device that is not there or, for an op that starts kernels, not the calling thread's current one.
    enum class Starts { kernels, nothing };
    Arguments(const char *op, int32_t device, Starts starts = Starts::kernels);

    Arguments &dtype(const char *name, int32_t value);
    Arguments &format(int32_t value);
    Arguments &count(const char *name, int64_t value);
    Arguments &at_most(const char *name, int64_t value, int64_t limit);
    // The number of elements of a matrix fits an int64_t, in elements and in bytes of at most 8 per element.
    Arguments &extent(const char *names, int64_t rows, int64_t columns);
    Arguments &blocksize(const char *name, int64_t value);
    // An array of `count` elements of `size` bytes each: not null unless it is empty, aligned to `size`, in memory that
    // the device's kernels may use.
    Arguments &array(const char *name, uintptr_t address, int64_t count, int64_t size);
    // The same, or 0.
    Arguments &optional_array(const char *name, uintptr_t address, int64_t count, int64_t size);
    // The bias of a product, or 0: `count` elements in float32 or in `dtype` (QC-GEMM4-003, QC-INT8-006).
    Arguments &bias(int32_t bias_dtype, uintptr_t address, int32_t dtype, int64_t count);
    // A finite, non-negative float (QC-INT8-001).
    Arguments &threshold(const char *name, float value);
    // A codebook to quantize with, 256 finite values in ascending order, or to dequantize with, 256 finite values
    // (QC-Q8-001). The values are checked where the host can read them; on a GPU the frontend has checked them.
    Arguments &codebook(const char *name, uintptr_t address);
    Arguments &finite_table(const char *name, uintptr_t address);
    // A 4-bit tensor and all that belongs to it.
    Arguments &weight(const char *name, const qc_weight_4bit *weight);

    // Scratch of at least `needed` bytes, at a multiple of 64.
    Arguments &workspace(uintptr_t address, int64_t bytes, int64_t needed);

    bool ok() const { return status_ == QC_OK; }
    qc_status status() const { return status_; }

   private:
    const char *op_;
    int32_t device_;
    qc_status status_ = QC_OK;
};

// Runs the body of an op; an exception becomes a status.
template <class Body>
qc_status guarded(const char *op, const Body &body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return fail(QC_OUT_OF_MEMORY, "%s: out of memory", op);
    } catch (const std::exception &error) {
        return fail(QC_INTERNAL, "%s: %s", op, error.what());
    } catch (...) {
        return fail(QC_INTERNAL, "%s: unknown exception", op);
    }
}

template <class T>
T *pointer(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

inline bool aligned(uintptr_t address, uintptr_t bytes) { return address % bytes == 0; }

// rows * columns of a matrix whose extent has been checked, or is about to be refused: then the value means nothing,
// but to compute it is no overflow.
inline int64_t elements(int64_t rows, int64_t columns) {
    return static_cast<int64_t>(static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Of a power of two.
inline int log2_of(int64_t value) { return __builtin_ctzll(static_cast<unsigned long long>(value)); }

}  // namespace qcore::gpu

#endif  // QCORE_GPU_ARGUMENTS_H
