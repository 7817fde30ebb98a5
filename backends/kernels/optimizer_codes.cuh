// Encoding and decoding of 8-bit optimizer states (QC-OPT-020, QC-Q8-003 to -005).
//
// A binary search in the thresholds would be eight dependent reads of shared memory an element, with bank conflicts:
// more than a step's traffic takes. Here a code is one read. The bits of |y|, clamped to [low, one], fall into buckets
// of 2^shift values that hold at most one threshold each; a bucket's entry carries the number of thresholds below it
// and the distance of its own from the bucket's end, so that adding the position inside the bucket carries into the
// number exactly when y is beyond the threshold. The negative thresholds of the signed codebook are the positive ones
// mirrored, ties included, for the code of 0 is odd; its positive side has one more, whose mirror image saturates.
#ifndef QCORE_KERNELS_OPTIMIZER_CODES_CUH
#define QCORE_KERNELS_OPTIMIZER_CODES_CUH

#include "blockwise.cuh"
#include "weight4bit.cuh"

namespace qcore::gpu {

// Where the buckets of a codebook begin and how wide they are. Both keep QC-Q8-004 at every threshold and beside it;
// the conformance cases *-thresholds say so.
struct StateScale {
    uint32_t low;  // bits of a float below the first threshold
    int shift;
    int zero;   // the code of 0
    int count;  // of thresholds above 0
};
inline constexpr uint32_t kBitsOfOne = 0x3F800000;
inline constexpr uint32_t kSignedLow = 0x34920000, kUnsignedLow = 0x342E0000;
inline constexpr int kSignedShift = 17, kUnsignedShift = 16;
inline constexpr int kSignedEntries = ((kBitsOfOne - kSignedLow) >> kSignedShift) + 1;
inline constexpr int kUnsignedEntries = ((kBitsOfOne - kUnsignedLow) >> kUnsignedShift) + 1;

QC_DEVICE StateScale state_scale(bool of_unsigned) {
    return of_unsigned ? StateScale{kUnsignedLow, kUnsignedShift, 0, 255}
                       : StateScale{kSignedLow, kSignedShift, 127, 128};
}

QC_DEVICE float state_value(bool of_unsigned, int code) {
    return of_unsigned ? QC_DYNAMIC_UNSIGNED_TABLE[code] : QC_DYNAMIC_TABLE[code];
}

// What codes stand for, in shared memory.
template <bool Coded>
struct StateValues {
    float of_signed[256], of_unsigned[256];

    // Every thread of a block of at least 256 comes here; a barrier follows.
    QC_DEVICE void fill() {
        if (thread_index() < 256) {
            of_signed[thread_index()] = state_value(false, thread_index());
            of_unsigned[thread_index()] = state_value(true, thread_index());
        }
    }
};
template <>
struct StateValues<false> {
    float none;
    QC_DEVICE static void fill() {}
};

template <int Entries>
struct StateBook {
    uint32_t entry[Entries];

    // Every thread of a block of at least 256 comes here; `thresholds` is free again after the next barrier.
    template <int Threads>
    QC_DEVICE void build(bool of_unsigned, int32_t (&thresholds)[256]) {
        const StateScale scale = state_scale(of_unsigned);
        const int j = thread_index();
        if (j < 256) {
            const float c = state_value(of_unsigned, j);
            const int place = j - scale.zero;  // threshold j lies between the codes j and j + 1
            if (j < 255 && place >= 0) {
                const float next = state_value(of_unsigned, j + 1);
                thresholds[place] = order_key((c + next) * 0.5f) - (j % 2 == 1 && c < next ? 1 : 0);
            }
            if (j >= scale.count) {
                thresholds[j] = INT32_MAX;
            }
        }
        block_barrier();
        const int entries = static_cast<int>((kBitsOfOne - scale.low) >> scale.shift) + 1;
        const uint32_t mask = (1U << scale.shift) - 1;
        for (int i = j; i < entries; i += Threads) {
            const int32_t start = static_cast<int32_t>(scale.low + (static_cast<uint32_t>(i) << scale.shift));
            int below = 0;
#pragma unroll
            for (int step = 128; step > 0; step /= 2) {
                below += thresholds[below + step - 1] < start ? step : 0;
            }
            const uint32_t distance = static_cast<uint32_t>(thresholds[below] - start);
            entry[i] = (static_cast<uint32_t>(below) << scale.shift) + (distance <= mask ? mask - distance : 0);
        }
        block_barrier();
    }

    // The code of y, which is no NaN.
    QC_DEVICE int code(const StateScale &scale, float y) const {
        uint32_t bits = float_to_bits(y) & 0x7FFFFFFF;
        bits = bits < scale.low ? scale.low : bits;
        bits = bits > kBitsOfOne ? kBitsOfOne : bits;
        const uint32_t place = bits - scale.low, mask = (1U << scale.shift) - 1;
        const int beyond = static_cast<int>((entry[place >> scale.shift] + (place & mask)) >> scale.shift);
        const int signed_code = y < 0.0f ? scale.zero - beyond : scale.zero + beyond;
        return signed_code < 0 ? 0 : signed_code;
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_OPTIMIZER_CODES_CUH
