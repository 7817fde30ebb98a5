// NF4 and FP4 quantization and dequantization (docs/spec/20-4bit.md).
//
// Memory picture: quantize reads 4 (fp32) or 2 bytes per element and writes 1/2; dequantize the reverse. The tables
// live in registers. Dequantization scales and rounds the 16 values of the table once per block, which gives the same
// bits as doing it per element (QC-4BIT-003), so an element costs one look-up.
#include "fourbit_kernels.h"

#include "block_quantizer.h"

namespace qcore::cpu::QC_ISA {
namespace {

template <class Codes, int G>
struct NibbleEncoder {
    static constexpr int kVectors = G;
    static constexpr int kBytes = G * kLanes / 2;

    void encode(const Float (&y)[G], uint8_t *out) const {
        Int codes[G];
        for (int v = 0; v < G; ++v) {
            codes[v] = search(y[v]);
        }
        pack_nibbles(codes, out);
    }
    // All thresholds lie inside (-1, 1).
    float bounded(float y) const { return y < -1.0f ? -1.0f : y > 1.0f ? 1.0f : y; }

    Codes search;
};

template <class T, class Codes, int G>
void quantize_blocks(const T *a, int64_t n, int64_t blocksize, int64_t first, int64_t last, float *absmax,
                     uint8_t *out) {
    const NibbleEncoder<Codes, G> encoder{};
    BlockQuantizer<NibbleEncoder<Codes, G>>(encoder).quantize_blocks(a, n, blocksize, first, last, absmax, out);
}

// Four vectors at a time are at most 64 elements; AVX-512 takes two for the block size of 32.
template <class T, class Codes>
void quantize(const void *a, int64_t n, int64_t blocksize, int64_t first, int64_t last, float *absmax, uint8_t *out) {
    if constexpr (kLanes == 16) {
        if (blocksize == 32) {
            quantize_blocks<T, Codes, 2>(static_cast<const T *>(a), n, blocksize, first, last, absmax, out);
            return;
        }
    }
    quantize_blocks<T, Codes, 4>(static_cast<const T *>(a), n, blocksize, first, last, absmax, out);
}

inline float scale_of(const BlockScales &scales, int64_t block) {
    if (scales.absmax != nullptr) {
        return scales.absmax[block];
    }
    return scales.nested_code[scales.codes[block]] * scales.nested_absmax[block >> scales.nested_shift] +
           scales.nested_offset;
}

template <bool kPastCaches, class T>
void dequantize_blocks(const float *table, const uint8_t *packed, const BlockScales &scales, int64_t n,
                       int64_t blocksize, int64_t first, int64_t last, T *out) {
    constexpr int kStep = 32;
    for (int64_t block = first; block < last; ++block) {
        const int64_t end = n < (block + 1) * blocksize ? n : (block + 1) * blocksize;
        const NibbleTable<T> decoder(table, scale_of(scales, block));
        int64_t i = block * blocksize;
        for (; i + kStep <= end; i += kStep) {
            decoder.template decode<kPastCaches>(packed + i / 2, out + i);
        }
        if (i < end) {  // the tail of the last block
            uint8_t codes[kStep / 2] = {};
            T values[kStep];
            std::memcpy(codes, packed + i / 2, static_cast<size_t>((end - i + 1) / 2));
            decoder.template decode<false>(codes, values);
            std::memcpy(out + i, values, static_cast<size_t>(end - i) * sizeof(T));
        }
    }
}

template <class T, int kFormat>
void dequantize(const uint8_t *packed, const BlockScales &scales, int64_t n, int64_t blocksize, int64_t first,
                int64_t last, bool past_caches, void *out) {
    const float *table = kFormat == 0 ? QC_NF4_TABLE : QC_FP4_TABLE;
    T *values = static_cast<T *>(out);
    if (past_caches) {
        dequantize_blocks<true>(table, packed, scales, n, blocksize, first, last, values);
#if defined(__AVX2__)
        _mm_sfence();  // such stores are in no order with others: whoever is told of the end must see them
#endif
    } else {
        dequantize_blocks<false>(table, packed, scales, n, blocksize, first, last, values);
    }
}

}  // namespace

const FourbitKernels fourbit_kernels = {{{quantize<float, Nf4Codes>, quantize<float, Fp4Codes>},
                                         {quantize<Half, Nf4Codes>, quantize<Half, Fp4Codes>},
                                         {quantize<Bfloat, Nf4Codes>, quantize<Bfloat, Fp4Codes>}},
                                        {{dequantize<float, 0>, dequantize<float, 1>},
                                         {dequantize<Half, 0>, dequantize<Half, 1>},
                                         {dequantize<Bfloat, 0>, dequantize<Bfloat, 1>}}};

}  // namespace qcore::cpu::QC_ISA
