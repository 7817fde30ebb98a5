// What a lane of an optimizer step holds: eight neighbouring elements of one tensor, read first and converted later, so
// that all reads of an element are on their way at once.
#ifndef QCORE_KERNELS_OPTIMIZER_BLOCK_CUH
#define QCORE_KERNELS_OPTIMIZER_BLOCK_CUH

#include "host/optimizer_job.h"
#include "optimizer_codes.cuh"

namespace qcore::gpu {

inline constexpr int kLanesOfBlock = static_cast<int>(kOptimizerBlock / 8);  // one block of states: 32 lanes

QC_DEVICE bool is_aligned(const void *address, int bytes) {
    return (reinterpret_cast<uintptr_t>(address) & static_cast<uintptr_t>(bytes - 1)) == 0;
}

// Eight elements as they lie in memory: 16 bytes, or 32 of float32.
struct RawEight {
    Vector16 low, high;
};

template <class Word>
QC_DEVICE Vector16 gather_words(const Word *x, int64_t count) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Word));
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        word[i] = 0;
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) {
            const int at = i * kPerWord + j;
            word[i] |= at < count ? static_cast<uint32_t>(x[at]) << 8 * j * static_cast<int>(sizeof(Word)) : 0;
        }
    }
    return Vector16{word[0], word[1], word[2], word[3]};
}

// Elements `first` to `first + count - 1` of an array in `dtype`, zeros after them.
QC_DEVICE RawEight load_raw(int dtype, uint64_t address, int64_t first, int64_t count) {
    if (dtype == QC_F32) {
        const uint32_t *x = reinterpret_cast<const uint32_t *>(address) + first;
        if (count >= 8 && is_aligned(x, 16)) {
            return {load16_once(x), load16_once(x + 4)};
        }
        return {gather_words(x, count), gather_words(x + 4, count - 4)};
    }
    const uint16_t *x = reinterpret_cast<const uint16_t *>(address) + first;
    return {count >= 8 && is_aligned(x, 16) ? load16_once(x) : gather_words(x, count), Vector16{0, 0, 0, 0}};
}

template <class T>
QC_DEVICE Eight split_raw(const Vector16 &v) {
    Eight out;
    split_word<T>(v.x, out.value[0], out.value[1]);
    split_word<T>(v.y, out.value[2], out.value[3]);
    split_word<T>(v.z, out.value[4], out.value[5]);
    split_word<T>(v.w, out.value[6], out.value[7]);
    return out;
}

QC_DEVICE Eight convert(int dtype, const RawEight &raw) {
    if (dtype == QC_F32) {
        return {{bits_to_float(raw.low.x), bits_to_float(raw.low.y), bits_to_float(raw.low.z), bits_to_float(raw.low.w),
                 bits_to_float(raw.high.x), bits_to_float(raw.high.y), bits_to_float(raw.high.z),
                 bits_to_float(raw.high.w)}};
    }
    return dtype == QC_F16 ? split_raw<Half>(raw.low) : split_raw<BFloat16>(raw.low);
}

// Stores those of eight elements that are no further than `count` and not kept.
template <class T>
QC_DEVICE void store_moved(T *out, const Eight &x, int64_t count, uint32_t kept) {
    if (kept == 0) {
        store_eight<T>(out, x, count, is_aligned(out, 16));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count && (kept >> i & 1) == 0) {
            out[i] = from_float<T>(x.value[i]);
        }
    }
}

QC_DEVICE bool is_finite(float x) { return (float_to_bits(x) & 0x7FFFFFFF) < 0x7F800000; }

// QC-OPT-006: parameters and what their rounding left over.
template <class T>
QC_DEVICE void store_compensated(T *param, T *compensation, const Eight &moved, int64_t count, uint32_t kept) {
    Eight rest;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float high = to_float(from_float<T>(moved.value[i]));
        rest.value[i] = is_finite(high) ? moved.value[i] - high : 0.0f;
    }
    store_moved<T>(param, moved, count, kept);
    store_moved<T>(compensation, rest, count, kept);
}

// QC-OPT-007: Philox4x32-10 for one counter, as eight numbers of 16 bits.
QC_DEVICE Vector16 philox(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return Vector16{c0, c1, c2, c3};
}

QC_DEVICE uint16_t raised(float x, uint32_t random) {
    const uint32_t bits = float_to_bits(x);
    return static_cast<uint16_t>(is_nan(x) ? bits >> 16 | 0x40 : (bits + random) >> 16);
}

QC_DEVICE void store_stochastic(BFloat16 *param, const Eight &moved, const Vector16 &random, int64_t count,
                                uint32_t kept) {
    const uint32_t word[4] = {random.x, random.y, random.z, random.w};
    uint16_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        bits[i] = raised(moved.value[i], i % 2 == 0 ? word[i / 2] & 0xFFFF : word[i / 2] >> 16);
    }
    if (kept == 0 && count >= 8 && is_aligned(param, 16)) {
        store16(
            param,
            Vector16{bits[0] | static_cast<uint32_t>(bits[1]) << 16, bits[2] | static_cast<uint32_t>(bits[3]) << 16,
                     bits[4] | static_cast<uint32_t>(bits[5]) << 16, bits[6] | static_cast<uint32_t>(bits[7]) << 16});
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count && (kept >> i & 1) == 0) {
            param[i].bits = bits[i];
        }
    }
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_OPTIMIZER_BLOCK_CUH
