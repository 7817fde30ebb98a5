// The pass over blocks that 8-bit and 4-bit quantization share (QC-Q8-002, QC-Q8-003, QC-4BIT-001). For kernel files.
//
// Memory picture: each block is read twice, the first time from memory (its absmax), the second time from the L1 cache
// (at most 16 KiB: its codes). Per element that is 4 or 2 bytes in and 1 or 1/2 byte out; the floor is the reading.
#ifndef QCORE_CPU_BLOCK_QUANTIZER_H
#define QCORE_CPU_BLOCK_QUANTIZER_H

#include "simd.h"

namespace qcore::cpu::QC_ISA {

template <class T>
inline int32_t highest_magnitude(const T *a, int64_t n) {
    Int m0 = zero();
    Int m1 = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        m0 = maximum(m0, magnitude(load(a + i)));
        m1 = maximum(m1, magnitude(load(a + i + kLanes)));
    }
    int32_t result = highest(maximum(m0, m1));
    for (; i < n; ++i) {
        const int32_t m = static_cast<int32_t>(bits_of(to_float(a[i])) & kMagnitude);
        result = m > result ? m : result;
    }
    return result;
}

// Largest |x| that is no NaN; 0 if there is none (QC-Q8-002).
template <class T>
float absmax_without_nan(const T *a, int64_t n) {
    uint32_t result = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t m = bits_of(to_float(a[i])) & kMagnitude;
        result = m <= kInfinity && m > result ? m : result;
    }
    return float_of(result);
}

// QC-Q8-003 to the letter, with r = 1 / absmax.
inline float scaled(float x, float absmax, float r) {
    const float y = x * r;
    return absmax == 0.0f || y != y ? 0.0f : y;
}

// Encoder: kVectors vectors of codes at a time, `codes(y)` and `pack(codes, out)`, and kBytes bytes out for them.
// Writes ceil(n * kBytes / kElements) bytes.
template <class Encoder>
class BlockQuantizer {
   public:
    static constexpr int kElements = Encoder::kVectors * kLanes;

    explicit BlockQuantizer(const Encoder &encoder) : encoder_(encoder) {}

    template <class T>
    float quantize(const T *a, int64_t n, uint8_t *out) const {
        // Blocks are read in order, but a page at a time is all that the processor fetches ahead by itself.
        for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64) {
            __builtin_prefetch(reinterpret_cast<const char *>(a) + byte + kAheadBytes, 0, 2);
        }
        if (n == kElements) {
            return quantize_group(a, out);
        }
        const int32_t bits = highest_magnitude(a, n);
        const float r = reciprocal(bits);
        if (bits_of(r) >= kInfinity) {
            return quantize_with_care(a, n, out);
        }
        encode(a, n, broadcast(r), out);
        return float_of(static_cast<uint32_t>(bits));
    }

   private:
    static constexpr int64_t kAheadBytes = 4096;

    // 1 / absmax if that makes every y finite and none NaN, else infinity. 0 for a block of zeros: y = 0, whose sign
    // changes no code.
    static float reciprocal(int32_t bits) {
        const float r = bits == 0 ? 0.0f : 1.0f / float_of(static_cast<uint32_t>(bits));
        return bits < static_cast<int32_t>(kInfinity) ? r : float_of(kInfinity);
    }

    // A block of one group never leaves the registers.
    template <class T>
    float quantize_group(const T *a, uint8_t *out) const {
        Float x[Encoder::kVectors];
        Int m = zero();
        for (int v = 0; v < Encoder::kVectors; ++v) {
            x[v] = load(a + v * kLanes);
            m = maximum(m, magnitude(x[v]));
        }
        const int32_t bits = highest(m);
        const float r = reciprocal(bits);
        if (bits_of(r) >= kInfinity) {
            return quantize_with_care(a, kElements, out);
        }
        Int codes[Encoder::kVectors];
        for (int v = 0; v < Encoder::kVectors; ++v) {
            codes[v] = encoder_.codes(multiply(x[v], broadcast(r)));
        }
        encoder_.pack(codes, out);
        return float_of(static_cast<uint32_t>(bits));
    }

    template <class T>
    void encode(const T *a, int64_t n, Float r, uint8_t *out) const {
        int64_t i = 0;
        for (; i + kElements <= n; i += kElements, out += Encoder::kBytes) {
            encode_group(a + i, r, out);
        }
        if (i < n) {  // the tail, filled up with zeros
            T rest[kElements] = {};
            uint8_t bytes[Encoder::kBytes];
            std::memcpy(rest, a + i, static_cast<size_t>(n - i) * sizeof(T));
            encode_group(rest, r, bytes);
            std::memcpy(out, bytes, static_cast<size_t>(((n - i) * Encoder::kBytes + kElements - 1) / kElements));
        }
    }

    template <class T>
    void encode_group(const T *a, Float r, uint8_t *out) const {
        Int codes[Encoder::kVectors];
        for (int v = 0; v < Encoder::kVectors; ++v) {
            codes[v] = encoder_.codes(multiply(load(a + v * kLanes), r));
        }
        encoder_.pack(codes, out);
    }

    // A block with a NaN or an infinity, or so small that r overflows. Here y may be infinite, which the vector codes
    // need not stand, so it is brought to the nearest finite value beyond every code's range first.
    template <class T>
    __attribute__((noinline)) float quantize_with_care(const T *a, int64_t n, uint8_t *out) const {
        const float absmax = absmax_without_nan(a, n);
        const float r = 1.0f / absmax;
        for (int64_t i = 0; i < n; i += kElements, out += Encoder::kBytes) {
            const int64_t count = n - i < kElements ? n - i : kElements;
            float y[kElements] = {};
            uint8_t bytes[Encoder::kBytes];
            for (int64_t j = 0; j < count; ++j) {
                y[j] = encoder_.bounded(scaled(to_float(a[i + j]), absmax, r));
            }
            encode_group(y, broadcast(1.0f), bytes);
            std::memcpy(out, bytes, static_cast<size_t>((count * Encoder::kBytes + kElements - 1) / kElements));
        }
        return absmax;
    }

    const Encoder &encoder_;
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_BLOCK_QUANTIZER_H
