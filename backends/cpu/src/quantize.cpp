// 8-bit blockwise ops: arguments, chunks, threads (docs/spec/10-blockwise-8bit.md).
#include <cstring>

#include "abi.h"
#include "call_codebook.h"
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
        {Isa::avx512_vnni, &avx512_vnni::quantize_kernels},
        {Isa::avx512_bf16, &avx512_bf16::quantize_kernels},
        {Isa::amx, &avx512_vnni::quantize_kernels},  // Intel's again (optimizer_simd.h)
#endif
    });
    return kernels;
}

namespace {

const DynamicCodebook *dynamic_codebook(const float *code) {
    const DynamicCodebook &dynamic = signed_dynamic_codebook();
    return std::memcmp(code, dynamic.table, 256 * sizeof *code) == 0 ? &dynamic : nullptr;
}

}  // namespace

CallCodebook::CallCodebook(const float *code, int64_t n) : dynamic_(dynamic_codebook(code)) {
    if (dynamic_ == nullptr) {
        own_.emplace(code, n);
    }
}

const StateLines *lines_of(const float *code) {
    const DynamicCodebook *dynamic = dynamic_codebook(code);
    return dynamic != nullptr ? &dynamic->lines : nullptr;
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
        const CallCodebook codebook(pointer<const float>(code), n);
        prefer_huge_pages(out, n);
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            quantize(pointer<const void>(a), codebook.codes(), codebook.lines(), n, blocksize, first, last,
                     pointer<float>(absmax), pointer<uint8_t>(out));
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
        const StateLines *lines = lines_of(pointer<const float>(code));
        const bool past_caches = writes_past_caches(out, n * dtype_size(dtype));
        prefer_huge_pages(out, n * dtype_size(dtype));
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            dequantize(pointer<const uint8_t>(a), pointer<const float>(absmax), pointer<const float>(code), lines, n,
                       blocksize, first, last, past_caches, pointer<void>(out));
        });
        return qc_status{QC_OK};
    });
}

}  // namespace qcore::cpu
