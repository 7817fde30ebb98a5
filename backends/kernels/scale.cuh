// From an int32 sum to an output (QC-INT8-006): the epilogue of the int8 products.
#ifndef QCORE_KERNELS_SCALE_CUH
#define QCORE_KERNELS_SCALE_CUH

#include "numbers.cuh"
#include "qcore_backend.h"

namespace qcore::gpu {

// A bias in float32 or in the output's type, or none.
template <class T>
struct Bias {
    const float *wide;
    const T *narrow;
    QC_DEVICE bool any() const { return wide != nullptr || narrow != nullptr; }
    QC_DEVICE float at(int64_t n) const { return wide != nullptr ? wide[n] : to_float(narrow[n]); }
};

template <class T>
Bias<T> bias_view(int32_t bias_dtype, uintptr_t bias) {
    if (bias_dtype == QC_F32) {
        return {reinterpret_cast<const float *>(bias), nullptr};
    }
    return {nullptr, reinterpret_cast<const T *>(bias)};
}

// Each operation one rounding, in the order of the clause.
template <class T>
QC_DEVICE float scaled_sum(int32_t sum, float row_stat, float col_stat, const Bias<T> &bias, int64_t n) {
    float t = static_cast<float>(sum);
    t = t * row_stat;
    t = t * col_stat;
    t = t * 0x1.040c2p-14f;
    return bias.any() ? t + bias.at(n) : t;
}

// The weight that a code stands for (QC-INT8-008).
QC_DEVICE float int8_weight(int8_t code, float stat) { return static_cast<float>(code) * stat * 0x1.020408p-7f; }

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_SCALE_CUH
