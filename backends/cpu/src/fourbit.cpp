// 4-bit quantize and dequantize: arguments, chunks, threads (docs/spec/20-4bit.md).
#include "abi.h"
#include "dispatch.h"
#include "fourbit_kernels.h"
#include "ops.h"
#include "pages.h"
#include "parallel.h"

namespace qcore::cpu {
namespace {

const FourbitKernels &fourbit_kernels() {
    static const FourbitKernels &kernels = select<FourbitKernels>({
        {Isa::portable, &portable::fourbit_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::fourbit_kernels},
        {Isa::avx512, &avx512::fourbit_kernels},
#endif
    });
    return kernels;
}

BlockScales scales_of(const qc_weight_4bit &w) {
    if (w.nested_absmax == 0) {
        return {pointer<const float>(w.absmax), nullptr, nullptr, nullptr, 0.0f, 0};
    }
    return {nullptr,
            pointer<const uint8_t>(w.absmax),
            pointer<const float>(w.nested_absmax),
            pointer<const float>(w.nested_code),
            *pointer<const float>(w.nested_offset),
            __builtin_ctzll(static_cast<unsigned long long>(w.nested_blocksize))};
}

}  // namespace

qc_status quantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, int32_t format, uintptr_t a, int64_t n,
                        int64_t blocksize, uintptr_t absmax, uintptr_t out) {
    return guarded("quantize_4bit", [&] {
        Arguments arguments("quantize_4bit", device);
        arguments.dtype("dtype", dtype).format(format).count("n", n).blocksize("blocksize", blocksize);
        arguments.array("a", a, n, dtype_size(dtype)).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, 1);
        if (!arguments.ok()) {
            return arguments.status();
        }
        const auto quantize = fourbit_kernels().quantize[dtype][format];
        prefer_huge_pages(out, n / 2);
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            quantize(pointer<const void>(a), n, blocksize, first, last, pointer<float>(absmax), pointer<uint8_t>(out));
        });
        return qc_status{QC_OK};
    });
}

qc_status dequantize_4bit(int32_t device, uintptr_t stream, int32_t dtype, const qc_weight_4bit *w, uintptr_t out) {
    return guarded("dequantize_4bit", [&] {
        Arguments arguments("dequantize_4bit", device);
        arguments.dtype("dtype", dtype).weight("w", w);
        if (arguments.ok()) {
            arguments.array("out", out, w->numel, dtype_size(dtype));
        }
        if (!arguments.ok() || w->numel == 0) {
            return arguments.status();
        }
        const auto dequantize = fourbit_kernels().dequantize[dtype][w->format];
        const BlockScales scales = scales_of(*w);
        const bool past_caches = writes_past_caches(out, w->numel * dtype_size(dtype));
        prefer_huge_pages(out, w->numel * dtype_size(dtype));
        for_blocks(w->numel, w->blocksize, stream, [&](int64_t first, int64_t last) {
            dequantize(pointer<const uint8_t>(w->packed), scales, w->numel, w->blocksize, first, last, past_caches,
                       pointer<void>(out));
        });
        return qc_status{QC_OK};
    });
}

}  // namespace qcore::cpu
