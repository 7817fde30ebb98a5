// Blockwise 8-bit ops (docs/spec/10-blockwise-8bit.md); blockwise.cuh holds the memory picture and the search.
#include "blockwise.cuh"
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"

namespace qcore::gpu {
namespace {

// QC-Q8-005.
template <class T>
QC_KERNEL(kTileThreads)
dequantize_blockwise_kernel(const uint8_t *a, const float *absmax, const float *code, int64_t n, int blocksize, T *out,
                            bool a_aligned, bool out_aligned) {
    struct Shared {
        float code[256];
    };
    QC_SHARED(Shared, shared);
    if (thread_index() < 256) {
        shared.code[thread_index()] = code[thread_index()];
    }
    block_barrier();
    const int64_t stride = block_count_x() * kTile;
    for (int64_t first = block_index_x() * kTile + 8 * thread_index(); first < n; first += stride) {
        const EightBytes codes = load_eight_bytes(a + first, n - first, a_aligned);
        const float scale = absmax[first / blocksize];
        Eight values;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            values.value[i] = shared.code[codes.byte(i)] * scale;
        }
        store_eight<T>(out + first, values, n - first, out_aligned);
    }
}

}  // namespace

qc_status quantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t code, int64_t n,
                             int64_t blocksize, uintptr_t absmax, uintptr_t out) {
    constexpr char kOp[] = "quantize_blockwise";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("n", n).blocksize("blocksize", blocksize);
        arguments.array("a", a, n, dtype_size(dtype)).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, 1).codebook("code", code);
        if (!arguments.ok() || n == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const Plain<T> source = {pointer<const T>(a), aligned(a, 16)};
            return queue.launch(quantize_blockwise_kernel<Plain<T>, kWave>, {queue.resident_blocks(n, kTile)},
                                kTileThreads, source, pointer<const float>(code), n, static_cast<int>(blocksize),
                                pointer<float>(absmax), pointer<uint8_t>(out), aligned(out, 8));
        });
    });
}

qc_status dequantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                               uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out) {
    constexpr char kOp[] = "dequantize_blockwise";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("n", n).blocksize("blocksize", blocksize);
        arguments.array("a", a, n, 1).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, dtype_size(dtype)).finite_table("code", code);
        if (!arguments.ok() || n == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            return queue.launch(dequantize_blockwise_kernel<T>, {queue.resident_blocks(n, kTile)}, kTileThreads,
                                pointer<const uint8_t>(a), pointer<const float>(absmax), pointer<const float>(code), n,
                                static_cast<int>(blocksize), pointer<T>(out), aligned(a, 8), aligned(out, 16));
        });
    });
}

}  // namespace qcore::gpu
