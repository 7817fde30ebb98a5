// Y[M,N] = X[M,K] W[N,K]^T for a weight of four bits an element, whatever the four bits mean. Kernels of two kinds,
// chosen by dtype and shape alone, never by alignment:
//
//   matrix units   16-bit dtypes, K a multiple of 32. Up to 16 rows of X: product.cuh has the memory picture, a weight
//                  is decoded in registers: one lookup, one product, half a conversion. More rows: tiled.cuh has it, a
//                  weight is decoded once for up to 128 of them.
//   plain          float32, any other K, units without the dtype: a wave a row of W, eight codes a lane at a time, up
//                  to eight rows of X at once. Reads the same bytes of W; X comes from L1.
//
// Weights are rounded to the dtype of X whatever the kernel (QC-GEMM4-001, QC-INT4-002: `compute`). The declared depth
// is the ceiling, K + 8: what a matrix unit does inside (alignment to the largest term, truncation) is published
// nowhere; from measurements of others it costs less than one rounding a term.
//
// A `Weight` (CodebookWeight, Int4Weight) is a parameter of kernels that knows
//
//   Table, fill(table)       what its codes are looked up in; in shared memory
//   bytes(row, at)           where the codes from an even column are
//   Scale, scale(row, at)    what the 32 codes from a multiple of 32 share, as it comes from memory
//   ready(scale)             the same, ready to multiply; value(table, code, ready) is a weight in float32
//   eight<T>(row, at, ...)   eight weights from a multiple of eight, rounded to T, of any shape and group
#ifndef QCORE_KERNELS_FOURBIT_PRODUCT_CUH
#define QCORE_KERNELS_FOURBIT_PRODUCT_CUH

#include "host/queue.h"
#include "product.cuh"
#include "scale.cuh"
#include "tiled.cuh"

namespace qcore::gpu {

// Two neighbouring weights of a byte of codes, each rounded once to T.
template <class T, class Weight, class Ready>
QC_DEVICE uint32_t two_weights(const typename Weight::Table &table, uint32_t byte, const Ready &scale) {
    return pack_two<T>(Weight::value(table, byte >> 4 & 15, scale), Weight::value(table, byte & 15, scale));
}

// As product.cuh takes them.
template <class T, class Weight, bool Aligned>
struct PackedRows {
    static constexpr int kStretch = 32;  // one 16-byte load; inside one block or group, for K is a multiple of 32
    struct Stretch {
        Vector16 codes;
        typename Weight::Scale scale;
    };
    const Weight &w;
    int64_t n, k;
    const typename Weight::Table &table;

    QC_DEVICE Stretch load(int64_t row, int64_t at) const {
        if (row >= n || at >= k) {
            return {Vector16{0, 0, 0, 0}, {}};
        }
        const uint8_t *bytes = w.bytes(row, at);
        return {Aligned ? load16_once(bytes) : gather_sixteen_bytes(bytes, 16), w.scale(row, at)};
    }
    QC_DEVICE Slice slice(const Stretch &stretch, int step) const {
        const Vector16 &codes = stretch.codes;
        const uint32_t word = step < 2 ? codes.x : step < 4 ? codes.y : step < 6 ? codes.z : codes.w;
        const uint32_t two = step % 2 == 0 ? word : word >> 16;
        const auto scale = Weight::ready(stretch.scale);
        return {two_weights<T, Weight>(table, two, scale), two_weights<T, Weight>(table, two >> 8, scale)};
    }
};

// As tiled.cuh takes them.
template <class T, class Weight>
struct RowsOfCodes {
    using Carry = typename Weight::Scale;  // of the thread's row in the next tile
    const Weight &w;
    int64_t n;
    const typename Weight::Table &table;

    template <bool Aligned>
    QC_DEVICE void fetch(Vector16 &to, int slot, int64_t first_row, int64_t at) const {
        const bool there = first_row + slot < n;
        const uint8_t *bytes = there ? w.bytes(first_row + slot, at) : w.bytes(0, 0);
        fetch_piece<Aligned>(to, bytes, there ? 16 : 0);
    }
    template <int Threads>
    QC_DEVICE Carry begin(int thread, int64_t first_row, int64_t at, int64_t end) const {
        const int64_t row = first_row + thread * words<Threads>() / kTilePieces;
        return row < n && at < end ? w.scale(row, at) : Carry{};
    }
    template <int Threads>
    QC_DEVICE void decode(TilePieces<kTileRows> &tile, const Vector16 (&codes)[kTileRows], Carry &carry, int thread,
                          int64_t first_row, int64_t at, int64_t end) const {
        constexpr int kWords = words<Threads>();
        const auto scale = Weight::ready(carry);
        carry = begin<Threads>(thread, first_row, at + kTileDepth, end);
        const int row = thread * kWords / kTilePieces, first = thread * kWords % kTilePieces;
        const uint32_t *word = reinterpret_cast<const uint32_t *>(&codes[row]);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const uint32_t eight = word[first + i];
            tile.at(row, first + i) = Vector16{
                two_weights<T, Weight>(table, eight, scale), two_weights<T, Weight>(table, eight >> 8, scale),
                two_weights<T, Weight>(table, eight >> 16, scale), two_weights<T, Weight>(table, eight >> 24, scale)};
        }
    }

   private:
    // Of codes that a thread decodes: two or one.
    template <int Threads>
    QC_DEVICE static constexpr int words() {
        return kTileRows * kTilePieces / Threads;
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

template <class Weight, class T, int W, int C, bool Aligned>
QC_KERNEL(kProductWaves *W)
matrix_kernel(Weight w, Activations<T> x, Output<T> output) {
    struct Shared {
        typename Weight::Table table;
        ProductSums<T, W, C> sums;
    };
    QC_SHARED(Shared, shared);
    w.fill(shared.table);
    block_barrier();
    const PackedRows<T, Weight, Aligned> rows = {w, output.n, x.k, shared.table};
    multiply<T, W, C, Aligned>(rows, x, output.n, output, shared.sums);
}

template <class Weight, class T, int W, int Rows, bool Aligned>
QC_KERNEL_RESIDENT(kTiledWaves *W, blocks_of_tiles(Rows))
tiled_kernel(Weight w, Activations<T> x, TileOutput<Output<T>> output, int splits) {
    struct Shared {
        TileShared<Rows> tile;
        typename Weight::Table table;
    };
    QC_SHARED(Shared, shared);
    w.fill(shared.table);
    block_barrier();
    const RowsOfCodes<T, Weight> codes = {w, output.out.n, shared.table};
    multiply_tiles<T, W, Rows, Aligned>(codes, x, output.out.n, splits, output, shared.tile);
}

inline constexpr int kPlainThreads = 256;

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

template <class Weight, class T, int W, int M>
QC_KERNEL_RESIDENT(kPlainThreads, 4)
plain_kernel(Weight w, Activations<T> x, Output<T> output, bool words) {
    struct Shared {
        typename Weight::Table table;
    };
    QC_SHARED(Shared, shared);
    w.fill(shared.table);
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
            const Eight weights = w.template eight<T>(row, at, count, words, shared.table);
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

inline constexpr int64_t kFewRows = 16;  // of X, for which tiles do not pay

inline bool takes_matrix(int32_t device, int32_t dtype, int64_t k) {
    return dtype != QC_F32 && k > 0 && k % kTileDepth == 0 && has_matrix_unit(device, dtype);
}

// Parts of the depth; only tiles have several.
inline int splits_of(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k) {
    return m > kFewRows && takes_matrix(device, dtype, k) ? tile_splits(device, m, n, k) : 1;
}

template <class Weight, class T>
struct FourbitProduct {
    Weight w;
    Activations<T> x;
    Output<T> output;
    bool w_aligned;
    Queue queue;
    float *partial;
    int splits;

    // `units`: on matrix units.
    qc_status run(bool units) {
        // float32 has no matrix unit here: one that rounds its inputs would not multiply the weights of the clause.
        if constexpr (sizeof(T) == 2) {
            if (units) {
                return run_matrix();
            }
        }
        if (x.m == 1) {
            return plain<1>();
        }
        return x.m <= 4 ? plain<4>() : plain<8>();
    }

   private:
    qc_status run_matrix() {
        constexpr int kUnit = MatrixLayout<kWave>::kColumns;
        if (x.m <= kUnit) {
            return matrix<1>();
        }
        if (x.m <= kFewRows) {
            return matrix<16 / kUnit>();
        }
        if (x.m <= 32) {
            return tiled<32>();
        }
        return x.m <= 64 ? tiled<64>() : tiled<128>();
    }
    template <int C>
    qc_status matrix() {
        const auto kernel = w_aligned && x.aligned ? matrix_kernel<Weight, T, kWave, C, true>
                                                   : matrix_kernel<Weight, T, kWave, C, false>;
        const Grid grid = {ceil_div(output.n, kRowsOfTile)};
        return queue.launch(kernel, grid, kProductWaves * kWave, w, x, output);
    }
    template <int Rows>
    qc_status tiled() {
        const auto kernel = w_aligned && x.aligned ? tiled_kernel<Weight, T, kWave, Rows, true>
                                                   : tiled_kernel<Weight, T, kWave, Rows, false>;
        return launch_tiles<Rows>(queue, kernel, output, x.m, output.n, splits, partial, w, x);
    }
    template <int M>
    qc_status plain() {
        const Grid grid = {ceil_div(output.n, kPlainThreads / kWave), Queue::tile_blocks(ceil_div(x.m, M))};
        return queue.launch(plain_kernel<Weight, T, kWave, M>, grid, kPlainThreads, w, x, output,
                            w_aligned && x.k % 8 == 0);
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_FOURBIT_PRODUCT_CUH
