// Nested quantization of absmax (docs/spec/30-nested.md).
//
// Memory picture: 4 bytes in and 1 out per block of the weight, 1/64 of the weight's own traffic at block size 64. The
// mean is a read of its own, because every difference needs it.
#include "abi.h"
#include "call_codebook.h"
#include "ieee.h"
#include "ops.h"
#include "parallel.h"
#include "quantize_kernels.h"

namespace qcore::cpu {
namespace {

// QC-NEST-001: 256 sums, each in index order, then their sum in index order.
float mean(const float *x, int64_t n) {
    constexpr int64_t kSums = 256;
    if (n == 0) {
        return 0.0f;
    }
    double sums[kSums] = {};
    int64_t start = 0;
    for (; start + kSums <= n; start += kSums) {
        for (int64_t l = 0; l < kSums; ++l) {
            sums[l] += static_cast<double>(x[start + l]);
        }
    }
    for (int64_t l = 0; start + l < n; ++l) {
        sums[l] += static_cast<double>(x[start + l]);
    }
    double total = sums[0];
    for (int64_t l = 1; l < kSums; ++l) {
        total += sums[l];
    }
    return static_cast<float>(total / static_cast<double>(n));
}

}  // namespace

qc_status quantize_absmax(int32_t device, uintptr_t stream, uintptr_t absmax, uintptr_t code, int64_t n,
                          int64_t blocksize, uintptr_t out, uintptr_t nested_absmax, uintptr_t offset) {
    return guarded("quantize_absmax", [&] {
        Arguments arguments("quantize_absmax", device);
        arguments.count("n", n).blocksize("blocksize", blocksize).array("absmax", absmax, n, sizeof(float));
        arguments.array("out", out, n, 1).array("nested_absmax", nested_absmax, n, sizeof(float));
        arguments.array("offset", offset, 1, sizeof(float)).codebook("code", code);
        if (!arguments.ok()) {
            return arguments.status();
        }
        const float *x = pointer<const float>(absmax);
        float center = 0.0f;
        parallel_for(1, 1, [&](int64_t) { center = mean(x, n); });
        const IeeeArithmetic ieee;
        const CallCodebook codebook(pointer<const float>(code), n);
        const auto quantize = quantize_kernels().quantize[QC_F32];
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const int64_t start = block * blocksize;
                const int64_t size = n - start < blocksize ? n - start : blocksize;
                float difference[kMaxBlocksize];
                for (int64_t i = 0; i < size; ++i) {
                    difference[i] = x[start + i] - center;
                }
                quantize(difference, codebook.codes(), codebook.lines(), size, blocksize, 0, 1,
                         pointer<float>(nested_absmax) + block, pointer<uint8_t>(out) + start);
            }
        });
        *pointer<float>(offset) = center;
        return qc_status{QC_OK};
    });
}

qc_status dequantize_absmax(int32_t device, uintptr_t stream, uintptr_t a, uintptr_t nested_absmax, uintptr_t code,
                            uintptr_t offset, int64_t n, int64_t blocksize, uintptr_t out) {
    return guarded("dequantize_absmax", [&] {
        Arguments arguments("dequantize_absmax", device);
        arguments.count("n", n).blocksize("blocksize", blocksize).array("a", a, n, 1);
        arguments.array("nested_absmax", nested_absmax, n, sizeof(float)).array("offset", offset, 1, sizeof(float));
        arguments.array("out", out, n, sizeof(float)).finite_table("code", code);
        if (!arguments.ok()) {
            return arguments.status();
        }
        const uint8_t *codes = pointer<const uint8_t>(a);
        const float *table = pointer<const float>(code);
        const float *scales = pointer<const float>(nested_absmax);
        const float center = *pointer<const float>(offset);
        float *values = pointer<float>(out);
        for_blocks(n, blocksize, stream, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const float scale = scales[block];
                const int64_t end = (block + 1) * blocksize < n ? (block + 1) * blocksize : n;
                for (int64_t i = block * blocksize; i < end; ++i) {
                    values[i] = table[codes[i]] * scale + center;
                }
            }
        });
        return qc_status{QC_OK};
    });
}

}  // namespace qcore::cpu
