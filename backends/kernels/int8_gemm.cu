// int8 products (docs/spec/50-int8.md, QC-INT8-005 to QC-INT8-007), plain and with the epilogue fused.
//
// product.cuh has the memory picture: B[N,K] is the A operand of the units, one 16-byte load a lane and row. Floor:
// N * K + M * K bytes read and 2 or 4 bytes an output written while M is small; what the units do a second for large M.
// The fused form saves 8 bytes an output against the two ops one after the other: the sums never leave the chip.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "int8_parts.h"
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

template <class Finish, int W, int C, int KW, bool Aligned>
QC_KERNEL(kProductWaves *W)
int8_kernel(Int8Rows<Aligned> rows, Activations<int8_t> a, Finish finish) {
    struct Shared {
        ProductSums<int8_t, W, C> sums;
    };
    QC_SHARED(Shared, shared);
    multiply<int8_t, W, C, KW, Aligned>(rows, a, rows.n, finish, shared.sums);
}

// B[N,K], and whether it is aligned as Activations are.
struct Factor {
    const int8_t *b;
    int64_t n, k;
    bool aligned;
};

template <bool Aligned, int C, int KW, class Finish>
qc_status launch(Queue &queue, const Factor &b, const Activations<int8_t> &a, const Finish &finish) {
    constexpr int kColumns = C * MatrixLayout<kWave>::kColumns, kRows = kProductWaves / KW * kRowsOfTile;
    const Grid grid = {ceil_div(b.n, kRows), Queue::tile_blocks(ceil_div(a.m, kColumns))};
    const Int8Rows<Aligned> rows = {b.b, b.n, b.k};
    return queue.launch(int8_kernel<Finish, kWave, C, KW, Aligned>, grid, kProductWaves * kWave, rows, a, finish);
}

template <bool Aligned, class Finish>
qc_status run_rows(Queue &queue, const Factor &b, const Activations<int8_t> &a, const Finish &finish) {
    constexpr int kUnit = MatrixLayout<kWave>::kColumns;
    constexpr int kMost = Aligned ? 64 : 32;  // to gather 16 bytes one by one takes registers too
    if (a.m <= kUnit) {
        return launch<Aligned, 1, 8>(queue, b, a, finish);
    }
    if (a.m <= 16) {
        return launch<Aligned, 16 / kUnit, 8>(queue, b, a, finish);
    }
    return launch<Aligned, kMost / kUnit, 2>(queue, b, a, finish);
}

template <class Finish>
qc_status run(Queue &queue, const Factor &b, const Activations<int8_t> &a, const Finish &finish) {
    return a.aligned && b.aligned ? run_rows<true>(queue, b, a, finish) : run_rows<false>(queue, b, a, finish);
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

qc_status linear_product(Queue &queue, const LinearProduct &p) {
    const Factor b = factor_of(p.b, p.n, p.k);
    const Activations<int8_t> a = activations_of(reinterpret_cast<uintptr_t>(p.codes), p.m, p.k);
    return with_dtype(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const Scaled<T> scaled = scaled_of<T>(p.out, p.n, p.row_stats, p.col_stats, p.bias_dtype, p.bias);
        if (p.list == nullptr) {
            return run(queue, b, a, scaled);
        }
        const OutlierTerms<T> terms = {p.list, pointer<const T>(p.a), b.b, p.weights, p.expanded, p.k};
        return run(queue, b, a, ScaledWithOutliers<T>{scaled, terms});
    });
}

qc_status int8_gemm(int32_t device, uintptr_t stream, int64_t m, int64_t n, int64_t k, uintptr_t a, uintptr_t b,
                    uintptr_t out, uintptr_t, int64_t) {
    constexpr char kOp[] = "int8_gemm";
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, m, n, k);
        arguments.array("a", a, elements(m, k), 1)
            .array("b", b, elements(n, k), 1)
            .array("out", out, elements(m, n), sizeof(int32_t));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return run(queue, factor_of(b, n, k), activations_of(a, m, k), Sums{pointer<int32_t>(out), n});
    });
}

qc_status int8_scaled_gemm(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           uintptr_t a, uintptr_t b, uintptr_t row_stats, uintptr_t col_stats, int32_t bias_dtype,
                           uintptr_t bias, uintptr_t out, uintptr_t, int64_t) {
    constexpr char kOp[] = "int8_scaled_gemm";
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, m, n, k);
        arguments.dtype("dtype", dtype).array("a", a, elements(m, k), 1).array("b", b, elements(n, k), 1);
        arguments.array("row_stats", row_stats, m, sizeof(float)).array("col_stats", col_stats, n, sizeof(float));
        arguments.bias(bias_dtype, bias, dtype, n).array("out", out, elements(m, n), dtype_size(dtype));
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            return run(queue, factor_of(b, n, k), activations_of(a, m, k),
                       scaled_of<T>(out, n, pointer<const float>(row_stats), col_stats, bias_dtype, bias));
        });
    });
}

}  // namespace qcore::gpu
