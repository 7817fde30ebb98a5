// How kernels see a 4-bit weight: its scales, plain or nested, and its codes; and how the products of
// fourbit_product.cuh read them.
#ifndef QCORE_KERNELS_WEIGHT4BIT_CUH
#define QCORE_KERNELS_WEIGHT4BIT_CUH

// The tables as constants that kernels may index.
#define QC_CODEBOOK QC_CONSTANT
#include "numbers.cuh"
#include "qcore_backend.h"
#include "qcore_codebooks.h"

namespace qcore::gpu {

// Eight weights of a word of codes, the first in the high half of the first byte, each rounded once to T (QC-4BIT-003).
template <class T, class Weight>
QC_DEVICE Eight eight_of_word(uint32_t word, const typename Weight::Table &table, typename Weight::Scale raw) {
    const auto scale = Weight::ready(raw);
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t code = word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15;
        out.value[i] = to_float(from_float<T>(Weight::value(table, code, scale)));
    }
    return out;
}

struct Absmax {
    const float *values;   // plain, or null
    const uint8_t *codes;  // nested: QC-NEST-003
    const float *nested;
    const float *table;
    const float *offset;
    int nested_shift;  // log2 of the nested blocksize

    QC_DEVICE float at(int64_t block) const {
        if (values != nullptr) {
            return values[block];
        }
        return table[codes[block]] * nested[block >> nested_shift] + *offset;
    }
};

struct Weight4 {
    const uint8_t *packed;
    Absmax absmax;
    int64_t numel;
    int shift;  // log2 of the blocksize
    int format;

    QC_DEVICE int code(int64_t i) const { return packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15; }
};

QC_DEVICE float table_value(int format, int code) { return format == QC_NF4 ? QC_NF4_TABLE[code] : QC_FP4_TABLE[code]; }

// The sixteen values in shared memory: each in a bank of its own, so any lookup of a wave takes one cycle.
struct Table16 {
    float value[16];

    // Every thread of the block comes here; a barrier follows.
    QC_DEVICE void fill(int format) {
        if (thread_index() < 16) {
            value[thread_index()] = table_value(format, thread_index());
        }
    }
    QC_DEVICE float at(int code) const { return value[code]; }
};

// A weight of `k` columns as the products see it; fourbit_product.cuh says what each member is for.
struct CodebookWeight {
    using Table = Table16;
    using Scale = float;
    Weight4 w;
    int64_t k;

    QC_DEVICE void fill(Table &table) const { table.fill(w.format); }
    QC_DEVICE const uint8_t *bytes(int64_t row, int64_t at) const { return w.packed + (row * k + at) / 2; }
    QC_DEVICE Scale scale(int64_t row, int64_t at) const { return w.absmax.at((row * k + at) >> w.shift); }
    QC_DEVICE static float ready(Scale scale) { return scale; }
    QC_DEVICE static float value(const Table &table, uint32_t code, float scale) {
        return table.at(static_cast<int>(code)) * scale;
    }

    // A row may begin in the middle of a byte and of a block; with `one_word` it does not. A lane past the end of a row
    // has a count that is not positive.
    template <class T>
    QC_DEVICE Eight eight(int64_t row, int64_t at, int64_t count, bool one_word, const Table &table) const {
        const int64_t first = row * k + at;
        if (one_word && count > 0) {
            return eight_of_word<T, CodebookWeight>(load4_once(w.packed + first / 2), table, scale(row, at));
        }
        Eight out;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out.value[i] = 0.0f;
            if (i < count) {
                const float value = table.at(w.code(first + i)) * w.absmax.at((first + i) >> w.shift);
                out.value[i] = to_float(from_float<T>(value));
            }
        }
        return out;
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_WEIGHT4BIT_CUH
