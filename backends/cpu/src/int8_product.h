// Parts of the int8 ops that int8_linear is made of; their arguments were checked.
#ifndef QCORE_CPU_INT8_PRODUCT_H
#define QCORE_CPU_INT8_PRODUCT_H

#include <cstdint>

#include "int8_kernels.h"
#include "product.h"

namespace qcore::cpu {

inline constexpr int64_t kMaxInt8K = 131071;  // QC-INT8-005

// int8.cpp: QC-INT8-001 to QC-INT8-003. Returns whether there is an outlier column. `outliers` is not touched if
// threshold is 0.
bool quantize_int8_rows(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, int64_t threads,
                        int8_t *codes, float *row_stats, uint8_t *outliers);

// int8.cpp: the outlier columns alone; nothing if threshold is 0.
void find_int8_outliers(int32_t dtype, const void *a, int64_t m, int64_t k, float threshold, uint8_t *outliers);

// int8_gemm.cpp
ProductPlan plan_int8_product(const Int8Gemm &p, int64_t threads);
// `scratch`: plan.bytes(), aligned to kScratchAlign.
void run_int8_product(const Int8Gemm &p, const ProductPlan &plan, int64_t threads, char *scratch);

}  // namespace qcore::cpu

#endif  // QCORE_CPU_INT8_PRODUCT_H
