// The scales of rows of W that are decoded side by side (gemm_4bit_split.h). Only kernel files include it.
//
// Scales of neighbouring rows lie behind each other, so those of whole rows are made and looked through in one go: a
// row of 64 to 1536 elements has 1 to 24 of them, and each row by itself would pay for a whole vector and more.
#ifndef QCORE_CPU_GEMM_4BIT_SCALES_H
#define QCORE_CPU_GEMM_4BIT_SCALES_H

#include "gemm_int4_decode.h"

#if defined(__AVX512BF16__)

namespace qcore::cpu::QC_ISA {

// RowScales<Weight, kRows>: of up to kRows rows
//   load(n, rows, k0, count)   of elements k0 ... of the rows n ...; k0 and count are multiples of 64, count is at most
//                              kScaleElements. Answers whether all blocks are regular.
//   at(i)                      those of row n + i
//   lies(n, rows)              where load() reads of all k elements of these rows, for fetching ahead
struct Extent {
    const char *first;
    int64_t bytes;
};

template <class Weight, int kRows>
class RowScales;

template <int kRows>
class RowScales<Gemm4Weight, kRows> {
   public:
    explicit RowScales(const Gemm4Weight &w) : w_(w) {}

    bool load(int64_t n, int64_t rows, int64_t k0, int64_t count) {
        stride_ = count >> kScaleUnit;
        if (count == w_.k) {
            return run(n * stride_, rows * stride_);
        }
        bool regular = true;
        for (int64_t i = 0; i < rows; ++i) {
            float *row = made_ + i * stride_;
            const float *scale = scale_run(w_, kScaleUnit, ((n + i) * w_.k + k0) >> kScaleUnit, stride_, row);
            regular &= regular_blocks(scale, stride_);
            copy(scale, stride_, row);
        }
        values_ = made_;
        return regular;
    }
    typename Split<Gemm4Weight>::Scales at(int64_t i) const { return {values_ + i * stride_}; }
    Extent lies(int64_t n, int64_t rows) const {
        const int64_t first = n * w_.k >> w_.shift, count = rows * w_.k >> w_.shift;
        if (w_.absmax != nullptr) {
            return {reinterpret_cast<const char *>(w_.absmax + first), count * static_cast<int64_t>(sizeof(float))};
        }
        return {reinterpret_cast<const char *>(w_.codes + first), count};
    }

   private:
    static void copy(const float *from, int64_t count, float *to) {
        if (from != to) {
            __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
        }
    }
    // Of whole rows: `count` scales from number `first` on.
    bool run(int64_t first, int64_t count) {
        if (w_.absmax != nullptr && w_.shift == kScaleUnit) {
            values_ = w_.absmax + first;
            return regular_blocks(values_, count);
        }
        for (int64_t i = 0; i < count; i += kAbsmaxRun) {
            const int64_t some = count - i < kAbsmaxRun ? count - i : kAbsmaxRun;
            copy(scale_run(w_, kScaleUnit, first + i, some, made_ + i), some, made_ + i);
        }
        values_ = made_;
        return regular_blocks(values_, count);
    }

    const Gemm4Weight &w_;
    const float *values_ = nullptr;
    int64_t stride_ = 0;
    alignas(64) float made_[kRows * (kScaleElements >> kScaleUnit)];
};

template <int kRows>
class RowScales<Int4Weight, kRows> {
    using Of = Split<Int4Weight>;

   public:
    explicit RowScales(const Int4Weight &w) : w_(w) {
        const int64_t units = w.group_size >> (Of::is_fine(w) ? 5 : 6);
        shift_ = w.groups == 1 ? 62 : (units & (units - 1)) == 0 ? __builtin_ctzll((unsigned long long)units) : -1;
    }

    bool load(int64_t n, int64_t rows, int64_t k0, int64_t count) {
        together_ = shift_ >= 0 && k0 == 0 && w_.groups <= Of::kMostScales && count > (w_.groups - 1) * w_.group_size;
        if (together_) {
            regular_ = load_groups(w_, n * w_.groups, rows * w_.groups, made_.all);
            return regular_;
        }
        bool regular = true;
        for (int64_t i = 0; i < rows; ++i) {
            scales_[i] = Of::scales(w_, n + i, k0, count, made_.room[i]);
            regular &= scales_[i].regular;
        }
        return regular;
    }
    typename Of::Scales at(int64_t i) const {
        if (!together_) {
            return scales_[i];
        }
        return {made_.all + i * w_.groups, 0, shift_, regular_};
    }
    Extent lies(int64_t n, int64_t rows) const {
        const int64_t row = w_.groups * (w_.scale_dtype == QC_F32 ? 4 : 2);
        return {static_cast<const char *>(w_.scales) + n * row, rows * row};
    }

   private:
    const Int4Weight &w_;
    int32_t shift_;  // log2 of the units of a group; 62: there is one group; -1: no power of two
    bool together_ = false;
    bool regular_ = true;  // all together
    typename Of::Scales scales_[kRows];
    union {
        alignas(64) GroupValues all[kRows * Of::kMostScales];
        typename Of::Room room[kRows];
    } made_;
};

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_GEMM_4BIT_SCALES_H
