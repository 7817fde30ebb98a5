// 8-bit blockwise quantization and dequantization (docs/spec/10-blockwise-8bit.md).
//
// Memory picture, fp32: quantize reads 4 bytes and writes 1 per element, dequantize the reverse; both are one stream
// in and one out. With the signed dynamic codebook AVX-512 holds all tables in registers and L1 (state_codes.h); with
// any other, and without AVX-512, the codebook's index (quantize, up to 32 KiB) or the codebook itself (dequantize,
// 1 KiB) is read by gathers, one per vector, which is what bounds the work when the data are in cache.
#include "quantize_kernels.h"

#include "block_quantizer.h"
#include "optimizer_simd.h"

namespace qcore::cpu::QC_ISA {
namespace {

template <int G>
struct ByteEncoder {
    static constexpr int kVectors = G;
    static constexpr int kBytes = G * kLanes;

    void encode(const Float (&y)[G], uint8_t *out) const {
        Int codes[G];
        for (int v = 0; v < G; ++v) {
            codes[v] = search(y[v]);
        }
        pack_bytes(codes, out);
    }
    float bounded(float y) const { return y; }  // integer keys order infinities too

    CodebookCodes search;
};

template <class T, class Encoder>
void quantize_blocks(const T *a, const Encoder &encoder, int64_t n, int64_t blocksize, int64_t first, int64_t last,
                     float *absmax, uint8_t *out) {
    BlockQuantizer<Encoder>(encoder).quantize_blocks(a, n, blocksize, first, last, absmax, out);
}

#if defined(__AVX512F__)
struct LineEncoder {
    static constexpr int kVectors = QC_ISA::kVectors;
    static constexpr int kBytes = kGroup;

    __attribute__((always_inline)) void encode(const Float (&y)[kVectors], uint8_t *out) const { find.encode(y, out); }
    // No threshold lies outside [-1, 1] (StateLines::proven).
    float bounded(float y) const { return y < -1.0f ? -1.0f : y > 1.0f ? 1.0f : y; }

    StateCodes<false> find;
};
#endif

// Four vectors at a time are at most 64 elements; AVX-512 takes two for the block size of 32.
template <class T>
void quantize(const void *a, const Codebook &codebook, [[maybe_unused]] const StateLines *lines, int64_t n,
              int64_t blocksize, int64_t first, int64_t last, float *absmax, uint8_t *out) {
    const T *values = static_cast<const T *>(a);
    const CodebookCodes search(codebook);
#if defined(__AVX512F__)
    if (blocksize == 32) {
        return quantize_blocks(values, ByteEncoder<2>{search}, n, blocksize, first, last, absmax, out);
    }
    if (lines != nullptr) {
        const LineEncoder encoder{StateCodes<false>(codebook, *lines)};
        return quantize_blocks(values, encoder, n, blocksize, first, last, absmax, out);
    }
#endif
    quantize_blocks(values, ByteEncoder<4>{search}, n, blocksize, first, last, absmax, out);
}

template <bool kPastCaches, class T>
__attribute__((always_inline)) inline void store_group(const Float (&x)[kVectors], T *out) {
#if defined(__AVX512F__)
    for (int v = 0; v < kVectors; v += sizeof(T) == 4 ? 1 : 2) {
        put<kPastCaches>(out + v * kLanes, joined(x + v, T{}));
    }
#else
    for (int v = 0; v < kVectors; ++v) {
        store(out + v * kLanes, x[v]);
    }
#endif
}

template <bool kPastCaches, class T, class Decoder>
void dequantize_blocks(const Decoder &decode, const uint8_t *a, const float *absmax, const float *code, int64_t n,
                       int64_t blocksize, int64_t first, int64_t last, T *out) {
    constexpr int64_t kAheadBytes = 4096;  // what is fetched ahead by itself ends at the next page
    for (int64_t block = first; block < last; ++block) {
        const int64_t end = n < (block + 1) * blocksize ? n : (block + 1) * blocksize;
        const Float scale = broadcast(absmax[block]);
        int64_t i = block * blocksize;
        for (; i + kGroup <= end; i += kGroup) {
            __builtin_prefetch(a + i + kAheadBytes, 0, 2);
            Float x[kVectors];
            decode(a + i, x);
            for (Float &value : x) {
                value = multiply(value, scale);
            }
            store_group<kPastCaches>(x, out + i);
        }
        for (; i + kLanes <= end; i += kLanes) {
            store(out + i, multiply(gather(code, load_codes(a + i)), scale));
        }
        for (; i < end; ++i) {
            out[i] = from_float<T>(code[a[i]] * absmax[block]);
        }
    }
}

template <class T>
void dequantize(const uint8_t *a, const float *absmax, const float *code, const StateLines *lines, int64_t n,
                int64_t blocksize, int64_t first, int64_t last, bool past_caches, void *out) {
    const auto blocks = [&](const auto &decode) {
        T *values = static_cast<T *>(out);
        if (past_caches) {
            dequantize_blocks<true>(decode, a, absmax, code, n, blocksize, first, last, values);
#if defined(__AVX512F__)
            _mm_sfence();  // such stores are in no order with others: whoever is told of the end must see them
#endif
        } else {
            dequantize_blocks<false>(decode, a, absmax, code, n, blocksize, first, last, values);
        }
    };
    if (lines != nullptr) {
        blocks(SymmetricDecoder(code, *lines));
    } else {
        blocks(GatheringDecoder(code));
    }
}

}  // namespace

const QuantizeKernels quantize_kernels = {{quantize<float>, quantize<Half>, quantize<Bfloat>},
                                          {dequantize<float>, dequantize<Half>, dequantize<Bfloat>}};

}  // namespace qcore::cpu::QC_ISA
