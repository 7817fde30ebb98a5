// gemm_4bit: checks, and how a product is cut into chunks. gemm_4bit_kernels.cpp computes.
#include <initializer_list>

#include "abi.h"
#include "dispatch.h"
#include "gemm_4bit_kernels.h"
#include "ops.h"
#include "parallel.h"
#include "qcore_codebooks.h"

namespace qcore::cpu {
namespace {

constexpr char kOp[] = "gemm_4bit";
constexpr int64_t kAlign = 64;
constexpr int64_t kOnStack = 48 << 10;     // a call that needs no more scratch than this takes it from its stack
constexpr int64_t kRangesPerThread = 4;    // so that a thread that is late holds up a quarter of its share at most

int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

const Gemm4Kernels &kernels() {
    static const Gemm4Kernels &selected = select<Gemm4Kernels>({
        {Isa::portable, &portable::gemm_4bit_kernels},
#ifdef __x86_64__
        {Isa::avx2, &avx2::gemm_4bit_kernels},
        {Isa::avx512, &avx512::gemm_4bit_kernels},
        {Isa::avx512_bf16, &avx512_bf16::gemm_4bit_kernels},
        {Isa::amx, &amx::gemm_4bit_kernels},
#endif
    });
    return selected;
}

// How a call is cut, and the scratch that it needs: the packed X, then a part for each range of columns.
struct Plan {
    int64_t rows;     // of X at a time
    int64_t columns;  // of a range
    int64_t ranges;
    int64_t packed_bytes;
    int64_t range_bytes;

    Plan(const Gemm4 &p, int64_t threads) {
        rows = p.m < kGemm4Rows ? p.m : kGemm4Rows;
        // A weight takes about 0.1 ns to decode, and 0.02 ns for each row of X.
        const double nanoseconds = static_cast<double>(p.n) * static_cast<double>(p.k) *
                                   (0.1 + 0.02 * static_cast<double>(rows));
        const int64_t most = threads > 1 ? threads * kRangesPerThread : 1;
        const double wanted = nanoseconds / static_cast<double>(kMinChunkNanoseconds);
        const int64_t cuts = wanted < 1 ? 1 : wanted < static_cast<double>(most) ? static_cast<int64_t>(wanted) : most;
        columns = round_up(ceil_div(p.n, cuts), kGemm4Columns);
        ranges = ceil_div(p.n, columns);
        packed_bytes = round_up(kernels().packed_bytes(p, rows), kAlign);
        range_bytes = round_up(kernels().scratch_bytes(p, rows, columns), kAlign);
    }
    int64_t bytes() const { return packed_bytes + ranges * range_bytes; }
    int64_t workspace_bytes() const { return bytes() <= kOnStack ? 0 : bytes() + kAlign; }
};

char *align(char *address) {
    return address + (kAlign - reinterpret_cast<uintptr_t>(address) % kAlign) % kAlign;
}

void run(const Gemm4 &p, const Plan &plan, int64_t threads, char *scratch) {
    const Gemm4Kernels &k = kernels();
    char *packed = scratch;
    char *ranges = scratch + plan.packed_bytes;
    for (int64_t row0 = 0; row0 < p.m; row0 += plan.rows) {
        const int64_t rows = row0 + plan.rows < p.m ? plan.rows : p.m - row0;
        if (plan.packed_bytes > 0) {
            const int64_t groups = ceil_div(rows, kGemm4Group);
            // 16 rows of 4096 take about 10 microseconds.
            const int64_t chunks = p.k >= 4096 ? groups : ceil_div(groups * p.k, 4096);
            parallel_for(chunks, threads, [&](int64_t chunk) {
                for (int64_t g = groups * chunk / chunks; g < groups * (chunk + 1) / chunks; ++g) {
                    k.pack(p, row0, rows, g, packed);
                }
            });
        }
        parallel_for(plan.ranges, threads, [&](int64_t range) {
            const int64_t n0 = range * plan.columns;
            const int64_t n1 = n0 + plan.columns < p.n ? n0 + plan.columns : p.n;
            k.multiply(p, row0, rows, n0, n1, packed, ranges + range * plan.range_bytes);
        });
    }
}

int32_t log2_of(int64_t power_of_two) { return __builtin_ctzll(static_cast<unsigned long long>(power_of_two)); }

Gemm4Weight weight_of(const qc_weight_4bit &w) {
    Gemm4Weight weight = {};
    weight.packed = pointer<const uint8_t>(w.packed);
    weight.shift = log2_of(w.blocksize);
    weight.table = w.format == QC_NF4 ? QC_NF4_TABLE : QC_FP4_TABLE;
    if (w.nested_absmax == 0) {
        weight.absmax = pointer<const float>(w.absmax);
        return weight;
    }
    weight.codes = pointer<const uint8_t>(w.absmax);
    weight.nested_absmax = pointer<const float>(w.nested_absmax);
    weight.nested_code = pointer<const float>(w.nested_code);
    weight.nested_offset = w.numel > 0 ? *pointer<const float>(w.nested_offset) : 0.0f;
    weight.nested_shift = log2_of(w.nested_blocksize);
    return weight;
}

}  // namespace

qc_status gemm_4bit_workspace(uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    const Arguments arguments = Arguments("workspace", 0)
                                    .dtype("dtype", dtype)
                                    .extent("m, k", m, k)
                                    .extent("n, k", n, k)
                                    .extent("m, n", m, n);
    if (!arguments.ok()) {
        return arguments.status();
    }
    Gemm4 p = {};
    p.dtype = dtype;
    p.m = m;
    p.n = n;
    p.k = k;
    *bytes = m == 0 || n == 0 ? 0 : Plan(p, thread_limit(stream)).workspace_bytes();
    return QC_OK;
}

qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n).weight("w", w);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (w->numel != n * k) {
            return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", kOp,
                        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
        }
        if (bias != 0 && bias_dtype != QC_F32 && bias_dtype != dtype) {
            return fail(QC_INVALID_ARGUMENT, "%s: bias_dtype: expected QC_F32 (0) or the dtype of a (%d), got %d", kOp,
                        dtype, bias_dtype);
        }
        arguments.array("a", a, m * k, dtype_size(dtype)).array("out", out, m * n, dtype_size(dtype));
        arguments.optional_array("bias", bias, n, bias != 0 ? dtype_size(bias_dtype) : 1);
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        Gemm4 p = {};
        p.dtype = dtype;
        p.bias_dtype = bias_dtype;
        p.m = m;
        p.n = n;
        p.k = k;
        p.x = pointer<const void>(a);
        p.bias = pointer<const void>(bias);
        p.out = pointer<void>(out);
        p.w = weight_of(*w);
        const int64_t threads = thread_limit(stream);
        const Plan plan(p, threads);
        if (plan.workspace_bytes() == 0) {
            alignas(kAlign) char scratch[kOnStack];
            run(p, plan, threads, scratch);
            return QC_OK;
        }
        if (workspace == 0 || workspace_bytes < plan.workspace_bytes()) {
            return fail(QC_INVALID_ARGUMENT, "%s: workspace: expected %lld bytes, got %lld at 0x%llx", kOp,
                        static_cast<long long>(plan.workspace_bytes()), static_cast<long long>(workspace_bytes),
                        static_cast<unsigned long long>(workspace));
        }
        run(p, plan, threads, align(pointer<char>(workspace)));
        return QC_OK;
    });
}

}  // namespace qcore::cpu
