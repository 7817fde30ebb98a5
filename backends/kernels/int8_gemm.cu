// int8 products (docs/spec/50-int8.md, QC-INT8-005 to QC-INT8-007), plain and with the epilogue fused.
//
// Up to 16 rows of A: product.cuh has the memory picture, B[N,K] is the A operand of the units, one 16-byte load a lane
// and row. More: int8_tiles.cuh has it. Floor: N * K + M * K bytes read and 2 or 4 bytes an output written while M is
// small; what the units do a second for large M.
// The fused form saves 8 bytes an output against the two ops one after the other: the sums never leave the chip.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "int8_parts.h"
#include "int8_tiles.cuh"
#include "product.cuh"
#include "scale.cuh"

namespace qcore::gpu {
namespace {

constexpr int64_t kMaxK = 131071;  // QC-INT8-005

template <bool Aligned>
struct Int8Rows {
    static constexpr int kStretch = 16;
    using Stretch = Vector16;
    const int8_t *b;
    int64_t n, k;

    QC_DEVICE Vector16 load(int64_t row, int64_t at) const {
        if (row >= n || at >= k) {
            return Vector16{0, 0, 0, 0};
        }
        const int8_t *address = b + row * k + at;
        return Aligned ? load16(address) : gather_sixteen_bytes(address, k - at);
    }
    QC_DEVICE Slice slice(const Vector16 &stretch, int step) const {
        return step == 0 ? Slice{stretch.x, stretch.y} : Slice{stretch.z, stretch.w};
    }
};

struct Sums {
    int32_t *out;
    int64_t n;
    QC_DEVICE void operator()(int64_t m_index, int64_t n_index, int32_t sum) const { out[m_index * n + n_index] = sum; }
};

template <class T>
struct Scaled {
    T *out;
    int64_t n;
    const float *row_stats;
    const float *col_stats;
    Bias<T> bias;
    QC_DEVICE void operator()(int64_t m_index, int64_t n_index, int32_t sum) const {
        out[m_index * n + n_index] =
            from_float<T>(scaled_sum<T>(sum, row_stats[m_index], col_stats[n_index], bias, n_index));
    }
};

// QC-INT8-010: the columns in their order, products and sums each rounded.
template <class T>
struct ScaledWithOutliers {
    Scaled<T> scaled;
    OutlierTerms<T> terms;
    QC_DEVICE void operator()(int64_t m_index, int64_t n_index, int32_t sum) const {
        const float col_stat = scaled.col_stats[n_index];
        float t = scaled_sum<T>(sum, scaled.row_stats[m_index], col_stat, scaled.bias, n_index);
        const int32_t count = terms.list->count;
#pragma unroll 1
        for (int32_t j = 0; j < count; ++j) {
            const int64_t column = terms.list->column[j];
            const float w = j < terms.expanded ? terms.weights[j * scaled.n + n_index]
                                               : int8_weight(terms.b[n_index * terms.k + column], col_stat);
            t = t + to_float(terms.a[m_index * terms.k + column]) * w;
        }
        scaled.out[m_index * scaled.n + n_index] = from_float<T>(t);
    }
};

template <class Finish, int W, int C, bool Aligned>
QC_KERNEL(kProductWaves *W)
int8_kernel(Int8Rows<Aligned> rows, Activations<int8_t> a, Finish finish) {
    struct Shared {
        ProductSums<int8_t, W, C> sums;
    };
    QC_SHARED(Shared, shared);
    multiply<int8_t, W, C, Aligned>(rows, a, rows.n, finish, shared.sums);
}

// B[N,K], and whether it is aligned as Activations are.
struct Factor {
    const int8_t *b;
    int64_t n, k;
    bool aligned;
};

template <bool Aligned, int C, class Finish>
qc_status launch_rows(Queue &queue, const Factor &b, const Activations<int8_t> &a, const Finish &finish) {
    const Grid grid = {ceil_div(b.n, kRowsOfTile)};
    const Int8Rows<Aligned> rows = {b.b, b.n, b.k};
    return queue.launch(int8_kernel<Finish, kWave, C, Aligned>, grid, kProductWaves * kWave, rows, a, finish);
}

template <bool Aligned, int Rows, class Finish>
qc_status launch_int8_tiles(Queue &queue, const Factor &b, const Activations<int8_t> &a, const Finish &finish,
                            int splits, int32_t *partial) {
    const auto kernel = int8_tiled_kernel<Finish, kWave, Rows, Aligned>;
    return launch_tiles<Rows>(queue, kernel, finish, a.m, b.n, splits, partial, b.b, a, b.n);
}

// `partial`: int8_partial_bytes() of scratch.
template <class Finish>
qc_status run(Queue &queue, int32_t device, const Factor &b, const Activations<int8_t> &a, const Finish &finish,
              int32_t *partial) {
    constexpr int kUnit = MatrixLayout<kWave>::kColumns;
    const bool aligned = a.aligned && b.aligned;
    if (a.m <= kUnit) {
        return aligned ? launch_rows<true, 1>(queue, b, a, finish) : launch_rows<false, 1>(queue, b, a, finish);
    }
    if (a.m <= kFewInt8Rows) {
        constexpr int kFragments = kFewInt8Rows / kUnit;
        return aligned ? launch_rows<true, kFragments>(queue, b, a, finish)
                       : launch_rows<false, kFragments>(queue, b, a, finish);
    }
    const int splits = int8_splits(device, a.m, b.n, b.k);
    if (!aligned) {
        return launch_int8_tiles<false, 64>(queue, b, a, finish, splits, partial);
    }
    return a.m <= 64 ? launch_int8_tiles<true, 64>(queue, b, a, finish, splits, partial)
                     : launch_int8_tiles<true, 128>(queue, b, a, finish, splits, partial);
}

Arguments check_sizes(const char *op, int32_t device, int64_t m, int64_t n, int64_t k) {
    Arguments arguments(op, device);
    arguments.count("m", m).count("n", n).count("k", k).at_most("k", k, kMaxK);
    arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
    return arguments;
}

Factor factor_of(uintptr_t b, int64_t n, int64_t k) {
    return {pointer<const int8_t>(b), n, k, k % 16 == 0 && aligned(b, 16)};
}

Activations<int8_t> activations_of(uintptr_t a, int64_t m, int64_t k) {
    return {pointer<const int8_t>(a), m, k, k % 16 == 0 && aligned(a, 16)};
}

template <class T>
Scaled<T> scaled_of(uintptr_t out, int64_t n, const float *row_stats, uintptr_t col_stats, int32_t bias_dtype,
                    uintptr_t bias) {
    return {pointer<T>(out), n, row_stats, pointer<const float>(col_stats), bias_view<T>(bias_dtype, bias)};
}

}  // namespace

int64_t linear_product_bytes(int32_t device, int64_t m, int64_t n, int64_t k) {
    return int8_partial_bytes(device, m, n, k);
}

qc_status linear_product(Queue &queue, int32_t device, const LinearProduct &p) {
    const Factor b = factor_of(p.b, p.n, p.k);
    const Activations<int8_t> a = activations_of(reinterpret_cast<uintptr_t>(p.codes), p.m, p.k);
    return with_dtype(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const Scaled<T> scaled = scaled_of<T>(p.out, p.n, p.row_stats, p.col_stats, p.bias_dtype, p.bias);
        if (p.list == nullptr) {
            return run(queue, device, b, a, scaled, p.partial);
        }
        const OutlierTerms<T> terms = {p.list, pointer<const T>(p.a), b.b, p.weights, p.expanded, p.k};
        return run(queue, device, b, a, ScaledWithOutliers<T>{scaled, terms}, p.partial);
    });
}

qc_status int8_gemm_workspace(int32_t device, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    Arguments arguments("workspace", device, Arguments::Starts::nothing);
    arguments.extent("m, n", m, n);
    if (arguments.ok()) {
        *bytes = m == 0 || n == 0 ? 0 : int8_partial_bytes(device, m, n, k);
    }
    return arguments.status();
}

qc_status int8_gemm(int32_t device, uintptr_t stream, int64_t m, int64_t n, int64_t k, uintptr_t a, uintptr_t b,
                    uintptr_t out, uintptr_t workspace, int64_t workspace_bytes) {
    constexpr char kOp[] = "int8_gemm";
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, m, n, k);
        arguments.array("a", a, elements(m, k), 1)
            .array("b", b, elements(n, k), 1)
            .array("out", out, elements(m, n), sizeof(int32_t));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        if (!arguments.workspace(workspace, workspace_bytes, int8_partial_bytes(device, m, n, k)).ok()) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return run(queue, device, factor_of(b, n, k), activations_of(a, m, k), Sums{pointer<int32_t>(out), n},
                   pointer<int32_t>(workspace));
    });
}

qc_status int8_scaled_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, uintptr_t b, uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype,
                           uintptr_t bias, uintptr_t out, uintptr_t workspace, int64_t workspace_bytes) {
    constexpr char kOp[] = "int8_scaled_gemm";
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, m, n, k);
        arguments.dtype("dtype", dtype).array("a", a, elements(m, k), 1).array("b", b, elements(n, k), 1);
        arguments.array("row_stats", row_stats, m, sizeof(float)).array("col_stats", col_stats, n, sizeof(float));
        arguments.bias(bias_dtype, bias, dtype, n).array("out", out, elements(m, n), dtype_size(dtype));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        if (!arguments.workspace(workspace, workspace_bytes, int8_partial_bytes(device, m, n, k)).ok()) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            return run(queue, device, factor_of(b, n, k), activations_of(a, m, k),
                       scaled_of<T>(out, n, pointer<const float>(row_stats), col_stats, bias_dtype, bias),
                       pointer<int32_t>(workspace));
        });
    });
}

}  // namespace qcore::gpu
