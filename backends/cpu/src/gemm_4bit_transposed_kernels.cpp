// gemm_4bit_transposed: which of the ways to compute it this instruction set takes.
//  - gemm_4bit_transposed_rows.h: sums of rows in float32; every instruction set, every dtype, every value.
//  - the same with bfloat16 products, and gemm_4bit_transposed_amx.h (tiles): bfloat16 only, and only where no denormal
//    can arise. Rows and columns where one can are computed again in float32.
#include "gemm_4bit_transposed_kernels.h"

#include "gemm_4bit_transposed_amx.h"
#include "gemm_4bit_transposed_rows.h"
#include "qcore_backend.h"

namespace qcore::cpu::QC_ISA {
namespace {

template <class T>
void multiply_in_float(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, void *scratch) {
    multiply_by_rows<RowsInFloat<T>>(p, row0, rows, n0, n1, scratch, [](int64_t, int64_t) {});
}

#if defined(__AVX512BF16__)

constexpr int64_t kFlagBytes = Gemm4TransposedKernels::kRows;  // the packed X starts with a byte for each row: is it
                                                               // irregular?

int64_t packed_bytes(const Gemm4Transposed &p, int64_t rows) {
    if (p.dtype != QC_BF16) {
        return 0;
    }
#if defined(__AMX_BF16__)
    return kFlagBytes + transposed_tile_bytes(rows, p.k);
#else
    (void)rows;
    return kFlagBytes;
#endif
}

void pack(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t group, void *packed) {
    const Bfloat *x = static_cast<const Bfloat *>(p.x) + row0 * p.k;
    auto *flags = static_cast<uint8_t *>(packed);
    constexpr int64_t kGroup = Gemm4TransposedKernels::kGroup;
    const int64_t end = (group + 1) * kGroup < rows ? (group + 1) * kGroup : rows;
    for (int64_t r = group * kGroup; r < end; ++r) {
        flags[r] = irregular_row(x + r * p.k, p.k);
    }
#if defined(__AMX_BF16__)
    pack_transposed_x(x, rows, p.k, group, flags + kFlagBytes);
#endif
}

int64_t scratch_bytes(const Gemm4Transposed &p, int64_t rows, int64_t columns) {
    const int64_t exact = RowScratch::bytes(rows);
#if defined(__AMX_BF16__)
    if (p.dtype == QC_BF16) {
        const int64_t tiles = transposed_scratch_bytes(rows, columns);
        return tiles > exact ? tiles : exact;
    }
#endif
    (void)p;
    (void)columns;
    return exact;
}

void multiply_bf16(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
                   void *scratch) {
    const auto *flags = static_cast<const uint8_t *>(packed);
    const auto odd_panel = [&](int64_t first, int64_t end) {
        multiply_in_float<Bfloat>(p, row0, rows, first, end, scratch);
    };
#if defined(__AMX_BF16__)
    if (p.k > 0) {
        TransposedTiles(p, row0, rows, n0, n1, flags + kFlagBytes, scratch).run(odd_panel);
    } else
#endif
        multiply_by_rows<RowsInBf16>(p, row0, rows, n0, n1, scratch, odd_panel);
    for (int64_t r = 0; r < rows;) {
        int64_t end = r;
        while (end < rows && flags[end] != 0) {
            ++end;
        }
        if (end > r) {
            multiply_in_float<Bfloat>(p, row0 + r, end - r, n0, n1, scratch);
        }
        r = end + 1;
    }
}

#else

int64_t packed_bytes(const Gemm4Transposed &, int64_t) { return 0; }

void pack(const Gemm4Transposed &, int64_t, int64_t, int64_t, void *) {}

int64_t scratch_bytes(const Gemm4Transposed &, int64_t rows, int64_t) { return RowScratch::bytes(rows); }

void multiply_bf16(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *,
                   void *scratch) {
    multiply_in_float<Bfloat>(p, row0, rows, n0, n1, scratch);
}

#endif

void multiply(const Gemm4Transposed &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1, const void *packed,
              void *scratch) {
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

}  // namespace

const Gemm4TransposedKernels gemm_4bit_transposed_kernels = {packed_bytes, scratch_bytes, pack, multiply};

}  // namespace qcore::cpu::QC_ISA
