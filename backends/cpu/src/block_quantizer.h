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

// Encoder: `encode(y, out)`, kVectors vectors of scaled values to kBytes bytes; `bounded(y)`, a value of the same code
// for which that works, infinities included. Writes ceil(n * kBytes / kElements) bytes.
template <class Encoder>
class BlockQuantizer {
   public:
    static constexpr int kElements = Encoder::kVectors * kLanes;

    explicit BlockQuantizer(const Encoder &encoder) : encoder_(encoder) {}

    // The blocks from `first` to `last` - 1 of n elements; arrays start at block 0. The scales of a run of blocks are
    // all found before the first of them is used: a maximum over lanes, a branch and a division take as long as
    // encoding 64 elements, and nothing else would be in flight meanwhile.
    template <class T>
    void quantize_blocks(const T *a, int64_t n, int64_t blocksize, int64_t first, int64_t last, float *absmax,
                         uint8_t *out) const {
        constexpr int64_t kRunElements = 2048;
        constexpr int64_t kMostBlocks = kRunElements / 32;
        const int64_t run = blocksize < kRunElements ? kRunElements / blocksize : 1;
        const auto size = [&](int64_t block) {
            return n - block * blocksize < blocksize ? n - block * blocksize : blocksize;
        };
        for (int64_t start = first; start < last; start += run) {
            const int64_t end = last - start < run ? last : start + run;
            float r[kMostBlocks];
            for (int64_t block = start; block < end; ++block) {
                const T *x = a + block * blocksize;
                const int32_t bits = highest_magnitude(x, size(block));
                r[block - start] = reciprocal(bits);
                absmax[block] = float_of(static_cast<uint32_t>(bits));
            }
            for (int64_t block = start; block < end; ++block) {
                const T *x = a + block * blocksize;
                uint8_t *codes = out + block * blocksize * Encoder::kBytes / kElements;
                if (bits_of(r[block - start]) >= kInfinity) {
                    absmax[block] = quantize_with_care(x, size(block), codes);
                } else {
                    encode(x, size(block), broadcast(r[block - start]), codes, run * blocksize);
                }
            }
        }
    }

    template <class T>
    float quantize(const T *a, int64_t n, uint8_t *out) const {
        float absmax;
        quantize_blocks(a, n, n, 0, 1, &absmax, out);
        return absmax;
    }

   private:
    // 1 / absmax if that makes every y finite and none NaN, else infinity. 0 for a block of zeros: y = 0, whose sign
    // changes no code.
    static float reciprocal(int32_t bits) {
        const float r = bits == 0 ? 0.0f : 1.0f / float_of(static_cast<uint32_t>(bits));
        return bits < static_cast<int32_t>(kInfinity) ? r : float_of(kInfinity);
    }

    // Asks for the elements `ahead` of those that it encodes: the next run. Blocks are read in order, but a page at a
    // time is all that the processor fetches ahead by itself, and only while it finds the maxima.
    template <class T>
    void encode(const T *a, int64_t n, Float r, uint8_t *out, int64_t ahead) const {
        constexpr int64_t kGroupBytes = kElements * static_cast<int64_t>(sizeof(T));
        int64_t i = 0;
        for (; i + kElements <= n; i += kElements, out += Encoder::kBytes) {
            for (int64_t byte = 0; byte < kGroupBytes; byte += 64) {
                __builtin_prefetch(reinterpret_cast<const char *>(a + i + ahead) + byte, 0, 2);
            }
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
        Float y[Encoder::kVectors];
        for (int v = 0; v < Encoder::kVectors; ++v) {
            y[v] = multiply(load(a + v * kLanes), r);
        }
        encoder_.encode(y, out);
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
