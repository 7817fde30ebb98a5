// X W: which of the ways to compute it this instruction set takes for a shape. Only the kernel files of its ops include
// it, after the header of their weight.
//  - transposed_rows.h: sums of rows in float32; every instruction set, every dtype, every value.
//  - the same with bfloat16 products, transposed_few.h (in registers) and transposed_amx.h (tiles): bfloat16 only, and
//    only where no denormal can arise. Rows and columns where one can are computed again in float32.
//  - one row of X, where the weight has a way of its own for it: in float32 for every dtype.
#ifndef QCORE_CPU_TRANSPOSED_PRODUCT_H
#define QCORE_CPU_TRANSPOSED_PRODUCT_H

#include "irregular_rows.h"
#include "qcore_backend.h"
#include "transposed_amx.h"
#include "transposed_few.h"
#include "transposed_rows.h"

namespace qcore::cpu::QC_ISA {

template <class Weight>
inline bool streams(const TransposedProduct<Weight> &p) {
    return TransposedWeight<Weight>::kStreams && p.m == 1;
}

template <class T, class Weight>
void multiply_in_float(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                       void *scratch) {
    if constexpr (TransposedWeight<Weight>::kStreams) {
        if (streams(p)) {
            TransposedWeight<Weight>::template stream<T>(p, n0, n1, scratch);
            return;
        }
    }
    multiply_by_rows(RowsInFloat<Weight, T>(p, row0), p, row0, rows, n0, n1, scratch, [](int64_t, int64_t) {});
}

template <class Weight>
int64_t float_scratch_bytes(const TransposedProduct<Weight> &p, int64_t rows) {
    if constexpr (TransposedWeight<Weight>::kStreams) {
        if (streams(p)) {
            return TransposedWeight<Weight>::stream_bytes(p);
        }
    }
    return RowScratch::bytes(rows);
}

#if defined(__AVX512BF16__)

template <class Weight>
inline bool has_few_rows(const TransposedProduct<Weight> &p) {
    return p.m <= kFewRows;
}

template <class Weight>
int64_t packed_bytes(const TransposedProduct<Weight> &p, int64_t rows) {
    if (p.dtype != QC_BF16 || streams(p)) {
        return 0;
    }
#if defined(__AMX_BF16__)
    if (!has_few_rows(p)) {
        return kFlagBytes + transposed_tile_bytes(rows, p.k);
    }
#endif
    return kFlagBytes + rows * pair_row_bytes(p.k);
}

template <class Weight>
void pack(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t group, void *packed) {
    const Bfloat *x = static_cast<const Bfloat *>(p.x) + row0 * p.k;
    auto *flags = static_cast<uint8_t *>(packed);
    flag_rows(x, rows, p.k, group, flags,
              [&](const Bfloat *row) { return TransposedWeight<Weight>::irregular_row(p.w, row, p.k); });
#if defined(__AMX_BF16__)
    if (!has_few_rows(p)) {
        pack_transposed_x(p, x, rows, group, flags + kFlagBytes);
        return;
    }
#endif
    const int64_t end = (group + 1) * kPackedRows < rows ? (group + 1) * kPackedRows : rows;
    pack_pairs(p.w, x, group * kPackedRows, end, p.k, flags + kFlagBytes);
}

template <class Weight>
int64_t scratch_bytes(const TransposedProduct<Weight> &p, int64_t rows, int64_t columns) {
    const int64_t exact = float_scratch_bytes(p, rows);
    if (p.dtype != QC_BF16 || streams(p)) {
        return exact;
    }
    int64_t paired = 0;
    if (has_few_rows(p)) {
        paired = few_scratch_bytes<Weight>(rows);
    } else {
#if defined(__AMX_BF16__)
        paired = transposed_scratch_bytes(p, rows, columns);
#endif
    }
    (void)columns;
    return paired > exact ? paired : exact;
}

template <class Weight>
void multiply_bf16(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                   const void *packed, void *scratch) {
    if (streams(p)) {
        multiply_in_float<Bfloat>(p, row0, rows, n0, n1, scratch);
        return;
    }
    const auto *flags = static_cast<const uint8_t *>(packed);
    const auto odd_panel = [&](int64_t first, int64_t end) {
        multiply_in_float<Bfloat>(p, row0, rows, first, end, scratch);
    };
    if (has_few_rows(p)) {
        multiply_few_rows(p, row0, rows, n0, n1, flags + kFlagBytes, scratch, odd_panel);
    } else
#if defined(__AMX_BF16__)
        if (p.k > 0) {
        TransposedTiles<Weight>(p, row0, rows, n0, n1, flags + kFlagBytes, scratch).run(odd_panel);
    } else
#endif
        multiply_by_rows(RowsInBf16<Weight>(p, flags + kFlagBytes), p, row0, rows, n0, n1, scratch, odd_panel);
    for_irregular_rows(flags, rows, [&](int64_t first_row, int64_t some_rows) {
        multiply_in_float<Bfloat>(p, row0 + first_row, some_rows, n0, n1, scratch);
    });
}

#else

template <class Weight>
int64_t packed_bytes(const TransposedProduct<Weight> &, int64_t) {
    return 0;
}

template <class Weight>
void pack(const TransposedProduct<Weight> &, int64_t, int64_t, int64_t, void *) {}

template <class Weight>
int64_t scratch_bytes(const TransposedProduct<Weight> &p, int64_t rows, int64_t) {
    return float_scratch_bytes(p, rows);
}

template <class Weight>
void multiply_bf16(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *,
                   void *scratch) {
    multiply_in_float<Bfloat>(p, row0, rows, n0, n1, scratch);
}

#endif

template <class Weight>
void multiply(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
              const void *packed, void *scratch) {
    switch (p.dtype) {
        case QC_F32:
            multiply_in_float<float>(p, row0, rows, n0, n1, scratch);
            break;
        case QC_F16:
            multiply_in_float<Half>(p, row0, rows, n0, n1, scratch);
            break;
        default:
            multiply_bf16(p, row0, rows, n0, n1, packed, scratch);
    }
}

template <class Weight>
constexpr ProductKernels<TransposedProduct<Weight>> transposed_kernels() {
    return {packed_bytes<Weight>, scratch_bytes<Weight>, pack<Weight>, multiply<Weight>};
}

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_TRANSPOSED_PRODUCT_H
