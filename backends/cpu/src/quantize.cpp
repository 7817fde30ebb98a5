// 8-bit blockwise ops: arguments, chunks, threads (docs/spec/10-blockwise-8bit.md).
#include "abi.h"
#include "codebook.h"
#include "dispatch.h"
#include "ieee.h"
#include "ops.h"
#include "pages.h"
#include "parallel.h"
#include "quantize_kernels.h"

namespace qcore::cpu {

const QuantizeKernels &quantize_kernels() {
    static const QuantizeKernels &kernels = select<QuantizeKernels>({
        {Isa::portable, &portable::quantize_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::quantize_kernels},
        {Isa::avx512, &avx512::quantize_kernels},
#endif
    });
    return kernels;
}

qc_status quantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t code, int64_t n,
                             int64_t blocksize, uintptr_t absmax, uintptr_t out) {
    return guarded("quantize_blockwise", [&] {
        Arguments arguments("quantize_blockwise", device);
        arguments.dtype("dtype", dtype).count("n", n).blocksize("blocksize", blocksize);
        arguments.array("a", a, n, dtype_size(dtype)).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, 1).codebook("code", code);
        if (!arguments.ok() || n == 0) {
            return arguments.status();
        }
        const auto quantize = quantize_kernels().quantize[dtype];
        const IeeeArithmetic ieee;
        const Codebook codebook(pointer<const float>(code), n);
        prefer_huge_pages(out, n);
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            quantize(pointer<const void>(a), codebook, n, blocksize, first, last, pointer<float>(absmax),
                     pointer<uint8_t>(out));
        });
        return qc_status{QC_OK};
    });
}

qc_status dequantize_blockwise(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, uintptr_t absmax,
                               uintptr_t code, int64_t n, int64_t blocksize, uintptr_t out) {
    return guarded("dequantize_blockwise", [&] {
        Arguments arguments("dequantize_blockwise", device);
        arguments.dtype("dtype", dtype).count("n", n).blocksize("blocksize", blocksize);
        arguments.array("a", a, n, 1).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, dtype_size(dtype)).finite_table("code", code);
        if (!arguments.ok()) {
            return arguments.status();
        }
        const auto dequantize = quantize_kernels().dequantize[dtype];
        prefer_huge_pages(out, n * dtype_size(dtype));
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            dequantize(pointer<const uint8_t>(a), pointer<const float>(absmax), pointer<const float>(code), n,
                       blocksize, first, last, pointer<void>(out));
        });
        return qc_status{QC_OK};
    });
}

}  // namespace qcore::cpu
