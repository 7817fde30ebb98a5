// Where an op's kernels run: a device's stream, or the emulation. Also how an op picks the kernel of a dtype.
#ifndef QCORE_GPU_QUEUE_H
#define QCORE_GPU_QUEUE_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "../numbers.cuh"
#include "../weight4bit.cuh"
#include "arguments.h"
#include "device.h"
#if !defined(QC_TARGET_SIMT)
#include "runtime.h"
#endif

namespace qcore::gpu {

struct Grid {
    int64_t x;
    int64_t y = 1;
};

class Queue {
   public:
    Queue(const char *op, int32_t device, uintptr_t stream) : op_(op), device_(device), stream_(stream) {}

    // Starts kernel<<<grid, threads>>>(arguments...). The arguments have been checked; a refusal comes from the
    // runtime.
    template <class... Parameters, class... Arguments>
    qc_status launch(void (*kernel)(Parameters...), Grid grid, int threads, const Arguments &...arguments) {
        if (grid.x > kMaxBlocks) {
            return fail(QC_UNSUPPORTED, "%s: a grid of %lld blocks is more than a launch takes", op_,
                        static_cast<long long>(grid.x));
        }
#if defined(QC_TARGET_SIMT)
        const std::string error = launch_simt(kernel, grid.x, grid.y, threads, static_cast<int>(stream_), arguments...);
        return error.empty() ? QC_OK : fail(QC_DEVICE_ERROR, "%s: %s", op_, error.c_str());
#else
        const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
        kernel<<<blocks, static_cast<unsigned>(threads), 0, runtime_stream()>>>(static_cast<Parameters>(arguments)...);
        return checked(runtime::last_error());
#endif
    }

    // Fills an array with zero bytes.
    qc_status zero(void *address, int64_t bytes) {
#if defined(QC_TARGET_SIMT)
        std::memset(address, 0, static_cast<size_t>(bytes));
        return QC_OK;
#else
        return checked(runtime::zero(address, static_cast<size_t>(bytes), runtime_stream()));
#endif
    }

    // Blocks for `n` elements in tiles of `tile`, but no more than keep the device busy: kernels take tile after tile.
    int64_t resident_blocks(int64_t n, int64_t tile) const {
        return std::min<int64_t>(ceil_div(n, tile), blocks_at_once(device_));
    }

    // Blocks of a grid's y for `tiles` tiles, of which a kernel takes one after another: no more than a launch takes,
    // and under emulation few, so that kernels go round that loop too.
    static int64_t tile_blocks(int64_t tiles) {
#if defined(QC_TARGET_SIMT)
        return std::min<int64_t>(tiles, 2);
#else
        return std::min<int64_t>(tiles, 65535);
#endif
    }

   private:
    static constexpr int64_t kMaxBlocks = (1LL << 31) - 1;

#if !defined(QC_TARGET_SIMT)
    runtime::Stream runtime_stream() const { return reinterpret_cast<runtime::Stream>(stream_); }
    qc_status checked(runtime::Error error) const {
        if (error == runtime::kSuccess) {
            return QC_OK;
        }
        static_cast<void>(runtime::last_error());  // what a call returned also waits there for the caller's next check
        return fail(QC_DEVICE_ERROR, "%s: %s: %s", op_, runtime::name(error), runtime::text(error));
    }
#endif

    const char *op_;
    int32_t device_;
    uintptr_t stream_;
};

template <class T>
struct Type {
    using type = T;
};

// use(Type<T>) for the element type of a dtype that has been checked.
template <class Use>
qc_status with_dtype(int32_t dtype, const Use &use) {
    switch (dtype) {
        case QC_F32:
            return use(Type<float>());
        case QC_F16:
            return use(Type<Half>());
        default:
            return use(Type<BFloat16>());
    }
}

inline Weight4 weight_view(const qc_weight_4bit &w) {
    Weight4 view = {};
    view.packed = pointer<const uint8_t>(w.packed);
    view.numel = w.numel;
    view.shift = log2_of(w.blocksize);
    view.format = w.format;
    if (w.nested_absmax == 0) {
        view.absmax.values = pointer<const float>(w.absmax);
        return view;
    }
    view.absmax.codes = pointer<const uint8_t>(w.absmax);
    view.absmax.nested = pointer<const float>(w.nested_absmax);
    view.absmax.table = pointer<const float>(w.nested_code);
    view.absmax.offset = pointer<const float>(w.nested_offset);
    view.absmax.nested_shift = log2_of(w.nested_blocksize);
    return view;
}

}  // namespace qcore::gpu

#endif  // QCORE_GPU_QUEUE_H
