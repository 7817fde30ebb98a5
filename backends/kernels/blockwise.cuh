// Blockwise 8-bit quantization, docs/spec/10-blockwise-8bit.md: the parts that nested absmax shares.
//
// Memory picture. quantize: each element is read once (2 or 4 bytes), each code written once (1 byte), one float a
// block; the floor is (size + 1 + 4 / blocksize) bytes an element at copy bandwidth. A block of 512 threads takes tiles
// of 4096 elements, eight a thread, so every blocksize is a whole number of threads of one tile: a team, whose absmax
// is found by shuffles. dequantize: the same bytes the other way. The codebook (1 KiB) comes from L2 once a block of
// threads; as many of those are started as run at once, and each takes tile after tile.
#ifndef QCORE_KERNELS_BLOCKWISE_CUH
#define QCORE_KERNELS_BLOCKWISE_CUH

#include "reduce.cuh"

namespace qcore::gpu {

inline constexpr int kTileThreads = 512;
inline constexpr int kTile = 8 * kTileThreads;  // elements: the largest blocksize

// Floats in the order of their values, as integers; -0 and 0 are one (not for NaN).
QC_DEVICE int32_t order_key(float x) {
    const uint32_t bits = float_to_bits(x);
    return bits >> 31 != 0 ? -static_cast<int32_t>(bits & 0x7FFFFFFF) : static_cast<int32_t>(bits);
}

// QC-Q8-003 with r = 1 / absmax: NaN, and everything in a block of zeros, becomes 0.
QC_DEVICE float scaled(float x, float r, float absmax) {
    const float y = x * r;
    return absmax == 0.0f || is_nan(y) ? 0.0f : y;
}

// QC-Q8-004 as a search: the code of y is the number of keys below its own. A midpoint whose tie goes up counts from
// one key lower on, which can put two neighbours out of order (codes that are adjacent floats): then they are sorted,
// for the number does not depend on their order.
struct CodebookKeys {
    int32_t raw[256];
    int32_t sorted[256];
    int32_t unordered;
};

QC_DEVICE void build_keys(const float *code, CodebookKeys &keys) {
    const int j = thread_index();
    int32_t mine = 0;
    if (j < 255) {
        const float c = code[j], next = code[j + 1], midpoint = (c + next) * 0.5f;
        mine = order_key(midpoint) - (j % 2 == 1 && c < next ? 1 : 0);
        keys.raw[j] = mine;
        keys.sorted[j] = mine;
    }
    if (j == 0) {
        keys.unordered = 0;
    }
    block_barrier();
    if (j < 254 && mine > keys.raw[j + 1]) {
        keys.unordered = 1;
    }
    block_barrier();
    if (keys.unordered != 0 && j < 255) {
        int rank = 0;
        for (int i = 0; i < 255; ++i) {
            rank += keys.raw[i] < mine || (keys.raw[i] == mine && i < j) ? 1 : 0;
        }
        keys.sorted[rank] = mine;
    }
    block_barrier();
}

QC_DEVICE int nearest_code(float y, const int32_t (&sorted)[256]) {
    const int32_t key = order_key(y);
    int code = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
        code += key > sorted[code + step - 1] ? step : 0;
    }
    return code;
}

// What is quantized: an array, or an array about its mean (QC-NEST-002).
template <class T>
struct Plain {
    const T *x;
    bool aligned;
    QC_DEVICE Eight eight(int64_t first, int64_t count) const { return load_eight<T>(x + first, count, aligned); }
};
struct Centered {
    const float *x;
    const float *offset;
    bool aligned;
    QC_DEVICE Eight eight(int64_t first, int64_t count) const {
        Eight out = load_eight<float>(x + first, count, aligned);
        const float center = *offset;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out.value[i] = i < count ? out.value[i] - center : 0.0f;
        }
        return out;
    }
};

template <class Source, int W>
QC_KERNEL(kTileThreads)
quantize_blockwise_kernel(Source source, const float *code, int64_t n, int blocksize, float *absmax, uint8_t *out,
                          bool out_aligned) {
    struct Shared {
        CodebookKeys keys;
        float partial[kTileThreads / W];
    };
    QC_SHARED(Shared, shared);
    build_keys(code, shared.keys);
    const int team = blocksize / 8;
    for (int64_t tile = block_index_x() * kTile; tile < n; tile += block_count_x() * kTile) {
        const int64_t first = tile + 8 * thread_index(), count = n - first;
        const Eight x = source.eight(first, count);
        const float largest = team_max<W, kTileThreads>(largest_magnitude(x), team, shared.partial);
        if (count <= 0) {
            continue;
        }
        if (thread_index() % team == 0) {
            absmax[first / blocksize] = largest;
        }
        const float r = 1.0f / largest;
        int codes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            codes[i] = nearest_code(scaled(x.value[i], r, largest), shared.keys.sorted);
        }
        store_eight_bytes(out + first, pack_bytes(codes), count, out_aligned);
    }
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_BLOCKWISE_CUH
