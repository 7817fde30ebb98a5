// NF4 and FP4 (docs/spec/20-4bit.md).
//
// Memory picture. quantize: each element read once (2 or 4 bytes), half a byte written, one float a block; the floor is
// (size + 0.5 + 4 / blocksize) bytes an element at copy bandwidth. Tiles and teams as in blockwise.cuh; a thread's
// eight codes are one word. dequantize: the same bytes the other way; absmax, nested or not, is decoded on the way: one
// value for eight elements, found in L1 by the neighbours of its block.
#include "blockwise.cuh"
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "weight4bit.cuh"

namespace qcore::gpu {
namespace {

// The thresholds of a format in shared memory, each in a bank of its own.
struct Thresholds {
    float value[16];
    int code[8];  // of FP4, by position

    // Every thread of the block comes here; a barrier follows.
    QC_DEVICE void fill(int format) {
        const int j = thread_index();
        if (format == QC_NF4 && j < 15) {
            value[j] = (QC_NF4_TABLE[j] + QC_NF4_TABLE[j + 1]) * 0.5f;
        }
        if (format == QC_FP4 && j < 7) {
            value[j] = QC_FP4_THRESHOLDS[j];
        }
        if (format == QC_FP4 && j < 8) {
            code[j] = QC_FP4_ORDER[j];
        }
    }

    // How many of the first 2 * Half - 1 are below y.
    template <int Half>
    QC_DEVICE int below(float y) const {
        int position = 0;
#pragma unroll
        for (int step = Half; step > 0; step /= 2) {
            position += y > value[position + step - 1] ? step : 0;
        }
        return position;
    }
};

template <int Format>
QC_DEVICE int nearest_code(float y, const Thresholds &thresholds) {
    if (Format == QC_NF4) {
        return thresholds.below<8>(y);  // QC-NF4-002
    }
    return thresholds.code[thresholds.below<4>(magnitude(y))] + (y < 0.0f ? 8 : 0);  // QC-FP4-002
}

template <class T, int Format, int W>
QC_KERNEL(kTileThreads)
quantize_4bit_kernel(Plain<T> source, int64_t n, int blocksize, float *absmax, uint8_t *out, bool out_aligned) {
    struct Shared {
        Thresholds thresholds;
        float partial[kTileThreads / W];
    };
    QC_SHARED(Shared, shared);
    shared.thresholds.fill(Format);
    block_barrier();
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
        uint32_t word = 0;  // QC-4BIT-002: the first of two in the high nibble; past the end stands the code of 0
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float y = scaled(x.value[i], r, largest);
            word |= static_cast<uint32_t>(nearest_code<Format>(y, shared.thresholds))
                    << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
        }
        uint8_t *bytes = out + first / 2;
        if (out_aligned && count >= 8) {
            store4(bytes, word);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (2 * i < count) {
                    bytes[i] = static_cast<uint8_t>(word >> 8 * i);
                }
            }
        }
    }
}

// QC-4BIT-003.
template <class T>
QC_KERNEL(kTileThreads)
dequantize_4bit_kernel(Weight4 w, T *out, bool w_aligned, bool out_aligned) {
    struct Shared {
        Table16 table;
    };
    QC_SHARED(Shared, shared);
    shared.table.fill(w.format);
    block_barrier();
    const int64_t stride = block_count_x() * kTile;
    for (int64_t first = block_index_x() * kTile + 8 * thread_index(); first < w.numel; first += stride) {
        const int64_t count = w.numel - first;
        const uint8_t *bytes = w.packed + first / 2;
        uint32_t word = 0;
        if (w_aligned && count >= 8) {
            word = load4_once(bytes);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                word |= 2 * i < count ? static_cast<uint32_t>(bytes[i]) << 8 * i : 0;
            }
        }
        const float scale = w.absmax.at(first >> w.shift);
        Eight values;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            values.value[i] =
                shared.table.at(static_cast<int>(word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15)) * scale;
        }
        store_eight<T>(out + first, values, count, out_aligned);
    }
}

}  // namespace

qc_status quantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                        int64_t blocksize, uintptr_t absmax, uintptr_t out) {
    constexpr char kOp[] = "quantize_4bit";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).format(format).count("n", n).blocksize("blocksize", blocksize);
        arguments.array("a", a, n, dtype_size(dtype)).array("absmax", absmax, n, sizeof(float)).array("out", out, n, 1);
        if (!arguments.ok() || n == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const auto kernel =
                format == QC_NF4 ? quantize_4bit_kernel<T, QC_NF4, kWave> : quantize_4bit_kernel<T, QC_FP4, kWave>;
            const Plain<T> source = {pointer<const T>(a), aligned(a, 16)};
            return queue.launch(kernel, {queue.resident_blocks(n, kTile)}, kTileThreads, source, n,
                                static_cast<int>(blocksize), pointer<float>(absmax), pointer<uint8_t>(out),
                                aligned(out, 4));
        });
    });
}

qc_status dequantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w, uintptr_t out) {
    constexpr char kOp[] = "dequantize_4bit";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).weight("w", w);
        if (arguments.ok()) {
            arguments.array("out", out, w->numel, dtype_size(dtype));
        }
        if (!arguments.ok() || w->numel == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            return queue.launch(dequantize_4bit_kernel<T>, {queue.resident_blocks(w->numel, kTile)}, kTileThreads,
                                weight_view(*w), pointer<T>(out), aligned(w->packed, 4), aligned(out, 16));
        });
    });
}

}  // namespace qcore::gpu
