// A 256-entry codebook, prepared for quantization (QC-Q8-004).
//
// The clause counts thresholds below y. Here each comparison is an integer one: with key(y) = |y|'s bits, negated for
// negative y, which orders all floats and makes -0 equal 0, "y > m" is key(y) > key(m) and "y > m or a tie that goes
// up" is key(y) > key(m) - 1. So the code is the number of `threshold`s below key(y), whatever their order.
//
// The fast way is one table look-up: |y|'s bits, clamped to [low, high], fall into a bucket of 2^shift values that
// holds at most one threshold of each sign. An entry carries the code below its threshold and the distance of the
// threshold from the bucket's end, so that adding the position inside the bucket carries into the code exactly when
// y is beyond it:
//     position = clamp(|y|) - low;  code = (entry[position >> shift] + (position & (2^shift - 1))) >> shift
// Negative y use the second half of the table and give 255 - code. A codebook whose thresholds lie too close for a
// table of kMaxEntries falls back on a binary search over the sorted thresholds; so does a call too small to pay for
// the table.
#ifndef QCORE_CPU_CODEBOOK_H
#define QCORE_CPU_CODEBOOK_H

#include <cstdint>

namespace qcore::cpu {

struct Codebook {
    static constexpr int kMaxEntries = 8192;
    // Building the table costs as much as searching about this many values.
    static constexpr int64_t kMinIndexedValues = 1024;

    // `code` is valid (QC-Q8-001); n values will be quantized with it. Call it under IeeeArithmetic.
    Codebook(const float *code, int64_t n);

    int32_t threshold[256];  // ascending; the last one, INT32_MAX, is never below a key
    bool indexed = false;
    int32_t zero_code = 0;  // the code of y = 0
    int32_t low = 1;
    int32_t high = 1;
    int32_t shift = 0;
    int32_t half = 1;  // entries per sign
    uint32_t entry[kMaxEntries];

   private:
    bool build_index();
    bool choose_shift(const int32_t *positive, int n_positive, const int32_t *negative, int n_negative);
    void fill_half(uint32_t *half_entry, uint32_t code, const int32_t *limit, int n);
};

}  // namespace qcore::cpu

#endif  // QCORE_CPU_CODEBOOK_H
