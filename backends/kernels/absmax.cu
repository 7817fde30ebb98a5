// Nested quantization of absmax (docs/spec/30-nested.md).
//
// Memory picture. 4 bytes in and 1 out for each block of the weight, 1/64 of the weight's own traffic at blocksize 64.
// The mean needs a pass of its own, in the one order that the clause allows: 256 threads of one block, each the lane of
// that number, read whole cache lines and keep eight loads in flight. That pass runs at the speed of one
// multiprocessor: it happens once in the life of a weight, and the weight itself is read 16 times as long.
#include "blockwise.cuh"
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "weight4bit.cuh"

namespace qcore::gpu {
namespace {

constexpr int kLanes = 256;

// QC-NEST-001.
QC_KERNEL(kLanes)
mean_kernel(const float *absmax, int64_t n, float *offset) {
    struct Shared {
        double lane[kLanes];
    };
    QC_SHARED(Shared, shared);
    double sum = 0.0;
    int64_t i = thread_index();
    for (; i + 7 * kLanes < n; i += 8 * kLanes) {
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = absmax[i + j * kLanes];
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sum += static_cast<double>(x[j]);
        }
    }
    for (; i < n; i += kLanes) {
        sum += static_cast<double>(absmax[i]);
    }
    shared.lane[thread_index()] = sum;
    block_barrier();
    if (thread_index() == 0) {
        double total = shared.lane[0];
        for (int lane = 1; lane < kLanes; ++lane) {
            total += shared.lane[lane];
        }
        *offset = n == 0 ? 0.0f : static_cast<float>(total / static_cast<double>(n));
    }
}

// QC-NEST-003.
QC_KERNEL(kTileThreads)
dequantize_absmax_kernel(Absmax absmax, int64_t n, float *out) {
    for (int64_t i = block_index_x() * kTileThreads + thread_index(); i < n; i += block_count_x() * kTileThreads) {
        out[i] = absmax.at(i);
    }
}

}  // namespace

qc_status quantize_absmax(int32_t device, uintptr_t stream, uintptr_t absmax, uintptr_t code, int64_t n,
                          int64_t blocksize, uintptr_t out, uintptr_t nested_absmax, uintptr_t offset) {
    constexpr char kOp[] = "quantize_absmax";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.count("n", n).blocksize("blocksize", blocksize).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, 1).array("nested_absmax", nested_absmax, n, sizeof(float));
        arguments.array("offset", offset, 1, sizeof(float)).codebook("code", code);
        if (!arguments.ok()) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        const qc_status status =
            queue.launch(mean_kernel, {1}, kLanes, pointer<const float>(absmax), n, pointer<float>(offset));
        if (status != QC_OK || n == 0) {
            return status;
        }
        const Centered source = {pointer<const float>(absmax), pointer<const float>(offset), aligned(absmax, 16)};
        return queue.launch(quantize_blockwise_kernel<Centered, kWave>, {queue.resident_blocks(n, kTile)}, kTileThreads,
                            source, pointer<const float>(code), n, static_cast<int>(blocksize),
                            pointer<float>(nested_absmax), pointer<uint8_t>(out), aligned(out, 8));
    });
}

qc_status dequantize_absmax(int32_t device, uintptr_t stream, uintptr_t a, uintptr_t nested_absmax, uintptr_t code,
                            uintptr_t offset, int64_t n, int64_t blocksize, uintptr_t out) {
    constexpr char kOp[] = "dequantize_absmax";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.count("n", n).blocksize("blocksize", blocksize).array("a", a, n, 1);
        arguments.array("nested_absmax", nested_absmax, n, sizeof(float)).array("offset", offset, 1, sizeof(float));
        arguments.array("out", out, n, sizeof(float)).finite_table("code", code);
        if (!arguments.ok() || n == 0) {
            return arguments.status();
        }
        Absmax view = {};
        view.codes = pointer<const uint8_t>(a);
        view.nested = pointer<const float>(nested_absmax);
        view.table = pointer<const float>(code);
        view.offset = pointer<const float>(offset);
        view.nested_shift = log2_of(blocksize);
        Queue queue(kOp, device, stream);
        return queue.launch(dequantize_absmax_kernel, {queue.resident_blocks(n, kTileThreads)}, kTileThreads, view, n,
                            pointer<float>(out));
    });
}

}  // namespace qcore::gpu
