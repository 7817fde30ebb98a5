// 8-bit blockwise quantization and dequantization (docs/spec/10-blockwise-8bit.md).
//
// Memory picture, fp32: quantize reads 4 bytes and writes 1 per element, dequantize the reverse; both are one stream
// in and one out. The codebook's table (quantize, up to 32 KiB) or the codebook (dequantize, 1 KiB) stays in L1 and is
// read by gathers, one per vector, which is what bounds the work when the data are in cache.
#include "quantize_kernels.h"

#include "block_quantizer.h"

namespace qcore::cpu::QC_ISA {
namespace {

template <int G>
struct ByteEncoder {
    static constexpr int kVectors = G;
    static constexpr int kBytes = G * kLanes;

    Int codes(Float y) const { return search(y); }
    void pack(const Int (&c)[G], uint8_t *out) const { pack_bytes(c, out); }
    float bounded(float y) const { return y; }  // integer keys order infinities too

    CodebookCodes search;
};

template <class T, int G>
void quantize_blocks(const T *a, const Codebook &codebook, int64_t n, int64_t blocksize, int64_t first, int64_t last,
                     float *absmax, uint8_t *out) {
    const ByteEncoder<G> encoder{CodebookCodes(codebook)};
    const BlockQuantizer<ByteEncoder<G>> quantizer(encoder);
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * blocksize;
        const int64_t size = n - start < blocksize ? n - start : blocksize;
        absmax[block] = quantizer.quantize(a + start, size, out + start);
    }
}

// Four vectors at a time are at most 64 elements; AVX-512 takes two for the block size of 32.
template <class T>
void quantize(const void *a, const Codebook &codebook, int64_t n, int64_t blocksize, int64_t first, int64_t last,
              float *absmax, uint8_t *out) {
    if constexpr (kLanes == 16) {
        if (blocksize == 32) {
            quantize_blocks<T, 2>(static_cast<const T *>(a), codebook, n, blocksize, first, last, absmax, out);
            return;
        }
    }
    quantize_blocks<T, 4>(static_cast<const T *>(a), codebook, n, blocksize, first, last, absmax, out);
}

template <class T>
void dequantize(const uint8_t *a, const float *absmax, const float *code, int64_t n, int64_t blocksize, int64_t first,
                int64_t last, void *out) {
    T *values = static_cast<T *>(out);
    for (int64_t block = first; block < last; ++block) {
        const int64_t end = n < (block + 1) * blocksize ? n : (block + 1) * blocksize;
        const Float scale = broadcast(absmax[block]);
        int64_t i = block * blocksize;
        for (; i + kLanes <= end; i += kLanes) {
            store(values + i, multiply(gather(code, load_codes(a + i)), scale));
        }
        for (; i < end; ++i) {
            values[i] = from_float<T>(code[a[i]] * absmax[block]);
        }
    }
}

}  // namespace

const QuantizeKernels quantize_kernels = {{quantize<float>, quantize<Half>, quantize<Bfloat>},
                                          {dequantize<float>, dequantize<Half>, dequantize<Bfloat>}};

}  // namespace qcore::cpu::QC_ISA
