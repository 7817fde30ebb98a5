// Rows of X that bfloat16 instructions must not have, because they flush denormals: found while X is packed, computed
// again in float32 after all others. Only kernel files include it.
#ifndef QCORE_CPU_IRREGULAR_ROWS_H
#define QCORE_CPU_IRREGULAR_ROWS_H

#include "gemm_4bit_kernels.h"
#include "lanes.h"

namespace qcore::cpu::QC_ISA {

constexpr int64_t kFlagBytes = kProductRows;  // the packed X starts with a byte for each row: is it irregular?

// The flags of group `group` of the `rows` rows of `length` values from `x` on.
template <class Irregular>
inline void flag_rows(const Bfloat *x, int64_t rows, int64_t length, int64_t group, uint8_t *flags,
                      const Irregular &irregular) {
    const int64_t end = (group + 1) * kPackedRows < rows ? (group + 1) * kPackedRows : rows;
    for (int64_t r = group * kPackedRows; r < end; ++r) {
        flags[r] = irregular(x + r * length);
    }
}

// Calls again(first row, rows) for each run of rows with a flag.
template <class Again>
inline void for_irregular_rows(const uint8_t *flags, int64_t rows, const Again &again) {
    for (int64_t r = 0; r < rows;) {
        int64_t end = r;
        while (end < rows && flags[end] != 0) {
            ++end;
        }
        if (end > r) {
            again(r, end - r);
        }
        r = end + 1;
    }
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_IRREGULAR_ROWS_H
