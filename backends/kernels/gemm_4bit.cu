// W4A16 product (docs/spec/40-gemm-4bit.md). Kernels of two kinds, chosen by dtype and shape alone, never by alignment:
//
//   matrix units   16-bit dtypes, K a multiple of 32. Up to 16 rows of X: product.cuh has the memory picture, a weight
//                  is decoded in registers: one lookup, one product, half a conversion. More rows: tiled.cuh has it, a
//                  weight is decoded once for up to 128 of them.
//   plain          float32, any other K, units without the dtype: a wave a row of W, eight codes a lane at a time, up
//   to
//                  eight rows of X at once. Reads the same bytes of W; X comes from L1.
//
// Floor for all: N * K / 2 bytes of codes and 4 (1 with nested absmax) a block, at read bandwidth.
//
// Weights are rounded to the dtype of X (QC-GEMM4-001: `compute`) whatever the kernel. The declared depth is the
// ceiling, K + 8: what a matrix unit does inside (alignment to the largest term, truncation) is published nowhere; from
// measurements of others it costs less than one rounding a term.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "product.cuh"
#include "scale.cuh"
#include "tiled.cuh"
#include "weight4bit.cuh"

namespace qcore::gpu {
namespace {

template <class T, bool Aligned>
struct PackedRows {
    static constexpr int kStretch = 32;  // one 16-byte load; inside one block, for K is a multiple of 32
    struct Stretch {
        Vector16 codes;
        float scale;
    };
    Weight4 w;
    int64_t n, k;
    const Table16 *table;

    QC_DEVICE Stretch load(int64_t row, int64_t at) const {
        if (row >= n || at >= k) {
            return {Vector16{0, 0, 0, 0}, 0.0f};
        }
        const int64_t first = row * k + at;
        const uint8_t *bytes = w.packed + first / 2;
        return {Aligned ? load16_once(bytes) : gather_sixteen_bytes(bytes, 16), w.absmax.at(first >> w.shift)};
    }

    // Four weights, each rounded once to T (QC-4BIT-003).
    QC_DEVICE Slice slice(const Stretch &stretch, int step) const {
        const Vector16 &codes = stretch.codes;
        const uint32_t word = step < 2 ? codes.x : step < 4 ? codes.y : step < 6 ? codes.z : codes.w;
        const uint32_t bytes = step % 2 == 0 ? word : word >> 16;
        const float scale = stretch.scale;
        return {pack_two<T>(table->at(bytes >> 4 & 15) * scale, table->at(bytes & 15) * scale),
                pack_two<T>(table->at(bytes >> 12 & 15) * scale, table->at(bytes >> 8 & 15) * scale)};
    }
};

// QC-GEMM4-003.
template <class T>
struct Output {
    T *out;
    int64_t n;
    Bias<T> bias;
    QC_DEVICE void operator()(int64_t m_index, int64_t n_index, float sum) const {
        out[m_index * n + n_index] = from_float<T>(bias.any() ? sum + bias.at(n_index) : sum);
    }
};

template <class T, int W, int C, int KW, bool Aligned>
QC_KERNEL(kProductWaves *W)
matrix_kernel(Weight4 w, Activations<T> x, Output<T> output) {
    struct Shared {
        Table16 table;
        ProductSums<T, W, C> sums;
    };
    QC_SHARED(Shared, shared);
    shared.table.fill(w.format);
    block_barrier();
    const PackedRows<T, Aligned> rows = {w, output.n, x.k, &shared.table};
    multiply<T, W, C, KW, Aligned>(rows, x, output.n, output, shared.sums);
}

// The same codes as tiled.cuh takes them.
template <class T>
struct TiledCodes {
    Weight4 w;
    int64_t k;
    const Table16 *table;

    template <bool Aligned>
    QC_DEVICE void fetch(Vector16 &to, int64_t row, int64_t at, bool there) const {
        const uint8_t *bytes = w.packed + (there ? (row * k + at) / 2 : 0);
        if constexpr (Aligned) {
            copy16_async(&to, bytes, there);
        } else {
            to = gather_sixteen_bytes(bytes, there ? 16 : 0);
        }
    }
    QC_DEVICE float scale(int64_t row, int64_t at, bool there) const {
        return there ? w.absmax.at((row * k + at) >> w.shift) : 0.0f;
    }
    QC_DEVICE Vector16 decode(uint32_t codes, float scale) const {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = pack_two<T>(table->at(codes >> (8 * i + 4) & 15) * scale, table->at(codes >> 8 * i & 15) * scale);
        }
        return Vector16{word[0], word[1], word[2], word[3]};
    }
};

template <class T, int W, int Rows, bool Aligned>
QC_KERNEL(kTiledWaves *W)
tiled_kernel(Weight4 w, Activations<T> x, TileOutput<Output<T>> output, int splits) {
    struct Shared {
        TileShared<Rows> tile;
        Table16 table;
    };
    QC_SHARED(Shared, shared);
    shared.table.fill(w.format);
    block_barrier();
    const TiledCodes<T> codes = {w, x.k, &shared.table};
    multiply_tiles<T, W, Rows, Aligned>(codes, x, output.out.n, splits, output, shared.tile);
}

constexpr int kPlainThreads = 256;

// Eight weights from element `first`, those past `count` zero.
template <class T>
QC_DEVICE Eight decode_eight(const Weight4 &w, int64_t first, int64_t count, bool one_word, const Table16 &table) {
    Eight out;
    if (one_word) {
        const uint32_t word = load4_once(w.packed + first / 2);
        const float scale = w.absmax.at(first >> w.shift);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int code = static_cast<int>(word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15);
            out.value[i] = to_float(from_float<T>(table.at(code) * scale));
        }
        return out;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out.value[i] = 0.0f;
        if (i < count) {
            const float value = table.at(w.code(first + i)) * w.absmax.at((first + i) >> w.shift);
            out.value[i] = to_float(from_float<T>(value));
        }
    }
    return out;
}

// Adds up sum[i] over the lanes of a wave, for every i; sum[0] becomes the total of the i that it returns. In each of
// the first rounds a lane keeps half of its sums and gives its neighbour the other half: M - 1 exchanges and log2(W /
// M), not M log2(W).
template <int W, int M>
QC_DEVICE int add_lanes(float (&sum)[M]) {
    const int lane = thread_index() % W;
    int mine = 0;
#pragma unroll
    for (int half = M / 2, mask = 1; half > 0; half /= 2, mask *= 2) {
        const bool upper = (lane & mask) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float given = upper ? sum[i] : sum[i + half], kept = upper ? sum[i + half] : sum[i];
            sum[i] = kept + wave_xor<W>(given, mask);
        }
        mine += upper ? half : 0;
    }
#pragma unroll
    for (int mask = M; mask < W; mask *= 2) {
        sum[0] += wave_xor<W>(sum[0], mask);
    }
    return mine;
}

template <class T, int W, int M>
QC_KERNEL(kPlainThreads)
plain_kernel(Weight4 w, Activations<T> x, Output<T> output, bool words) {
    struct Shared {
        Table16 table;
    };
    QC_SHARED(Shared, shared);
    shared.table.fill(w.format);
    block_barrier();
    const int lane = thread_index() % W;
    const int64_t row = block_index_x() * (kPlainThreads / W) + thread_index() / W;
    if (row >= output.n) {
        return;
    }
    for (int64_t first = block_index_y() * M; first < x.m; first += block_count_y() * M) {
        float sum[M] = {};
        for (int64_t at = 8 * lane; at < x.k; at += 8 * W) {
            const int64_t count = x.k - at;
            const Eight weights = decode_eight<T>(w, row * x.k + at, count, words, shared.table);
#pragma unroll
            for (int j = 0; j < M; ++j) {
                const int64_t here = first + j < x.m ? count : 0;
                const Eight values = load_eight<T>(x.x + (first + j) * x.k + at, here, x.aligned);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    sum[j] = multiply_add(weights.value[i], values.value[i], sum[j]);
                }
            }
        }
        const int mine = add_lanes<W>(sum);
        if (lane < M && first + mine < x.m) {
            output(first + mine, row, sum[0]);
        }
    }
}

constexpr int64_t kFewRows = 16;  // of X, for which tiles do not pay

bool takes_matrix(int32_t device, int32_t dtype, int64_t k) {
    return dtype != QC_F32 && k > 0 && k % kTileDepth == 0 && has_matrix_unit(device, dtype);
}

int splits_of(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k) {
    return m > kFewRows && takes_matrix(device, dtype, k) ? tile_splits(device, m, n, k) : 1;
}

template <class T>
struct Problem {
    Weight4 w;
    Activations<T> x;
    Output<T> output;
    bool w_aligned;
    Queue queue;
    float *partial;
    int splits;

    template <int C, int KW>
    qc_status matrix() {
        constexpr int kColumns = C * MatrixLayout<kWave>::kColumns, kRows = kProductWaves / KW * kRowsOfTile;
        const Grid grid = {ceil_div(output.n, kRows), Queue::tile_blocks(ceil_div(x.m, kColumns))};
        const auto kernel =
            w_aligned && x.aligned ? matrix_kernel<T, kWave, C, KW, true> : matrix_kernel<T, kWave, C, KW, false>;
        return queue.launch(kernel, grid, kProductWaves * kWave, w, x, output);
    }
    template <int Rows>
    qc_status tiled() {
        const Grid grid = {ceil_div(output.n, kTileRows), Queue::tile_blocks(ceil_div(x.m, Rows) * splits)};
        const auto kernel =
            w_aligned && x.aligned ? tiled_kernel<T, kWave, Rows, true> : tiled_kernel<T, kWave, Rows, false>;
        const TileOutput<Output<T>> out = {output, splits > 1 ? partial : nullptr, x.m};
        const qc_status status = queue.launch(kernel, grid, kTiledWaves * kWave, w, x, out, splits);
        if (status != QC_OK || splits == 1) {
            return status;
        }
        return queue.launch(add_parts_kernel<Output<T>>, {queue.resident_blocks(x.m * output.n, kAddThreads)},
                            kAddThreads, output, partial, x.m, output.n, splits);
    }
    template <int M>
    qc_status plain() {
        const Grid grid = {ceil_div(output.n, kPlainThreads / kWave), Queue::tile_blocks(ceil_div(x.m, M))};
        return queue.launch(plain_kernel<T, kWave, M>, grid, kPlainThreads, w, x, output, w_aligned && x.k % 8 == 0);
    }
};

template <class T>
qc_status run_matrix(Problem<T> &p) {
    constexpr int kUnit = MatrixLayout<kWave>::kColumns;
    if (p.x.m <= kUnit) {
        return p.template matrix<1, 8>();
    }
    if (p.x.m <= kFewRows) {
        return p.template matrix<16 / kUnit, 8>();
    }
    if (p.x.m <= 32) {
        return p.template tiled<32>();
    }
    return p.x.m <= 64 ? p.template tiled<64>() : p.template tiled<128>();
}

template <class T>
qc_status run_plain(Problem<T> &p) {
    if (p.x.m == 1) {
        return p.template plain<1>();
    }
    return p.x.m <= 4 ? p.template plain<4>() : p.template plain<8>();
}

// float32 has no matrix unit here: one that rounds its inputs would not multiply the weights of the clause.
qc_status run_problem(Problem<float> &p, bool) { return run_plain(p); }
template <class T>
qc_status run_problem(Problem<T> &p, bool units) {
    return units ? run_matrix(p) : run_plain(p);
}

}  // namespace

const char *gemm_4bit_declaration() {
    return "{\"depth\": {\"lanes\": 1, \"extra\": 8}, \"weight_rounding\": \"compute\"}";
}

qc_status gemm_4bit_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k, int64_t *bytes) {
    Arguments arguments("workspace", device, Arguments::Starts::nothing);
    arguments.dtype("dtype", dtype).extent("m, n", m, n);
    if (arguments.ok()) {
        *bytes = m == 0 || n == 0 ? 0 : partial_bytes(m, n, splits_of(device, dtype, m, n, k));
    }
    return arguments.status();
}

qc_status gemm_4bit(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_4bit *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    constexpr char kOp[] = "gemm_4bit";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n).weight("w", w);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (w->numel != elements(n, k)) {
            return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", kOp,
                        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
        }
        arguments.array("a", a, elements(m, k), dtype_size(dtype)).array("out", out, elements(m, n), dtype_size(dtype));
        arguments.bias(bias_dtype, bias, dtype, n);
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        const int splits = splits_of(device, dtype, m, n, k);
        if (!arguments.workspace(workspace, workspace_bytes, partial_bytes(m, n, splits)).ok()) {
            return arguments.status();
        }
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            Problem<T> problem = {weight_view(*w),
                                  {pointer<const T>(a), m, k, k % 8 == 0 && aligned(a, 16)},
                                  {pointer<T>(out), n, bias_view<T>(bias_dtype, bias)},
                                  aligned(w->packed, 16),
                                  Queue(kOp, device, stream),
                                  pointer<float>(workspace),
                                  splits};
            return run_problem(problem, takes_matrix(device, dtype, k));
        });
    });
}

}  // namespace qcore::gpu
