// Y[M,N] = X[M,K] W[N,K]^T on matrix units for more rows of X than product.cuh serves well: tiles in shared memory.
//
// Memory picture. A block takes 128 rows of W and Rows (32, 64 or 128) of X, 32 of the depth at a time. Codes of W and
// elements of X come by copies that pass no register, kStages - 1 tiles ahead; so the codes' reads are in flight
// however long a tile takes. Each code is decoded once a block, into shared memory, and then is an operand of all rows
// of X there. A wave multiplies Rows / 2 rows of W by 32 of X (16 * Rows / 32 by 32): 12 reads of 16 bytes for 32
// products of 16 x 8 x 16 with 128 rows. With few tiles the depth is shared out too (split-K), the partial sums going
// through scratch in float32 and being added in their order: the result does not depend on timing (QC-NUM-007).
//
// Floor: N * K / 2 bytes of codes a pass over Rows of X, at read bandwidth, while 4 * Rows operations a byte are below
// what the units do; the units' rate beyond.
#ifndef QCORE_KERNELS_TILED_CUH
#define QCORE_KERNELS_TILED_CUH

#include "host/queue.h"
#include "tile.cuh"

namespace qcore::gpu {

inline constexpr int kTileDepth = 32;  // elements of 16 bits

// As many as fit beside the decoded tiles.
constexpr int tile_stages(int rows, int codes) {
    return rows == 128 ? 3 : rows == 64 ? (codes == kTileRows ? 5 : 4) : (codes == kTileRows ? 7 : 5);
}

// Codes: pieces of 16 bytes that are the codes of a tile; kTileRows of four bits, twice as many of eight.
template <int Rows, int Codes>
struct TilesInFlight {
    static constexpr int kStages = tile_stages(Rows, Codes);
    static constexpr int kCodeStages = kStages - 1;  // codes are through with one tile before X is
    TilePieces<kTileRows> weights[2];
    TilePieces<Rows> x[kStages];
    Vector16 codes[kCodeStages][Codes];
};

template <int Rows, int Codes = kTileRows>
union TileShared {
    TilesInFlight<Rows, Codes> tiles;
    TileSums<float, Rows> sums;
};

// Every thread of a block of kTiledWaves waves comes here. `weights` knows the pieces of 16 bytes that are the codes of
// a tile (fetch: one of them), and how its threads make a tile of weights of them (decode), with what a thread carries
// from one tile to the next (Carry; begin: that of the first, a barrier before the first decode).
// `finish(m, n, sum)` takes the sum over [first, end) of the depth, both multiples of kTileDepth.
template <class T, int W, int Rows, bool Aligned, int Codes, class Weights, class Finish>
QC_DEVICE void multiply_tile(const Weights &weights, const Activations<T> &x, int64_t first_row, int64_t n,
                             int64_t first_column, int64_t first, int64_t end, const Finish &finish,
                             TileShared<Rows, Codes> &shared) {
    constexpr int kThreads = kTiledWaves * W;
    using Tiles = TilesInFlight<Rows, Codes>;
    constexpr int kStages = Tiles::kStages, kCodeStages = Tiles::kCodeStages;
    static_assert(Codes <= kThreads, "a thread copies one piece of codes");
    Tiles &held = shared.tiles;
    const int thread = thread_index();
    const int tiles = static_cast<int>((end - first) / kTileDepth);  // no memory holds 2^31 tiles of two dimensions

    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            const int stage = tile % kStages;
            const int64_t at = first + int64_t{tile} * kTileDepth;
            if (thread < Codes) {
                weights.template fetch<Aligned>(held.codes[tile % kCodeStages][thread], thread, first_row, at);
            }
#pragma unroll
            for (int base = 0; base < Rows * kTilePieces; base += kThreads) {
                const int i = base + thread, row = i / kTilePieces, p = i % kTilePieces;
                if (Rows * kTilePieces % kThreads == 0 || i < Rows * kTilePieces) {
                    const bool there = first_column + row < x.m;
                    const T *from = x.x + (there ? (first_column + row) * x.k + at + 8 * p : 0);
                    fetch_piece<Aligned>(held.x[stage].at(row, p), from, there ? 8 : 0);
                }
            }
        }
        close_copies();
    };

    WaveOfTile<T, W, Rows> sums(thread);
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
        fetch(tile);
    }
    typename Weights::Carry carry = weights.template begin<kThreads>(thread, first_row, first, end);
    const auto decode = [&](int tile) {
        weights.template decode<kThreads>(held.weights[tile % 2], held.codes[tile % kCodeStages], carry, thread,
                                          first_row, first + int64_t{tile} * kTileDepth, end);
    };
    wait_for_copies<kStages - 2>();
    block_barrier();
    decode(0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies<kStages - 3>();
        block_barrier();  // this tile is decoded and the next one there, for all; all are through with the one before
        fetch(tile + kStages - 1);
        if (tile + 1 < tiles) {
            decode(tile + 1);
        }
        sums.multiply(held.weights[tile % 2], held.x[tile % kStages]);
    }
    wait_for_copies<0>();
    sums.finish(first_row, n, first_column, x.m, finish, shared.sums);
    block_barrier();  // all are through with the sums
}

// Where a sum goes: to the output, or as one of the parts of a sum to `partial`, [part][m][n].
template <class Out, class Sum = float>
struct TileOutput {
    Out out;
    Sum *partial;
    int64_t m;
};

template <class Out, class Sum = float>
struct TileFinish {
    const TileOutput<Out, Sum> &output;
    int64_t part, n;
    QC_DEVICE void operator()(int64_t m_index, int64_t n_index, Sum sum) const {
        if (output.partial != nullptr) {
            output.partial[(part * output.m + m_index) * n + n_index] = sum;
        } else {
            output.out(m_index, n_index, sum);
        }
    }
};

// The tiles of a grid: x along the rows of W, y along those of X and the parts of the depth.
template <class T, int W, int Rows, bool Aligned, int Codes, class Weights, class Out>
QC_DEVICE void multiply_tiles(const Weights &weights, const Activations<T> &x, int64_t n, int splits,
                              const TileOutput<Out> &output, TileShared<Rows, Codes> &shared) {
    const int64_t across = (x.m + Rows - 1) / Rows, depth = x.k / kTileDepth;
    for (int64_t i = block_index_y(); i < across * splits; i += block_count_y()) {
        const int64_t part = i / across;
        const int64_t first = depth * part / splits * kTileDepth, end = depth * (part + 1) / splits * kTileDepth;
        multiply_tile<T, W, Rows, Aligned>(weights, x, block_index_x() * kTileRows, n, i % across * Rows, first, end,
                                           TileFinish<Out>{output, part, n}, shared);
    }
}

inline constexpr int kAddThreads = 256;

// Adds the parts in their order.
template <class Out, class Sum>
QC_KERNEL(kAddThreads)
add_parts_kernel(Out out, const Sum *partial, int64_t m, int64_t n, int splits) {
    const int64_t size = m * n, stride = block_count_x() * kAddThreads;
#pragma unroll 1
    for (int64_t i = block_index_x() * kAddThreads + thread_index(); i < size; i += stride) {
        Sum sum = partial[i];
#pragma unroll 4
        for (int part = 1; part < splits; ++part) {
            sum += partial[part * size + i];
        }
        out(i / n, i % n, sum);
    }
}

template <class Out, class Sum>
qc_status add_parts(Queue &queue, const Out &out, int64_t m, int64_t n, int splits, const Sum *partial) {
    return queue.launch(add_parts_kernel<Out, Sum>, {queue.resident_blocks(m * n, kAddThreads)}, kAddThreads, out,
                        partial, m, n, splits);
}

// Parts of a depth of `tiles`, so that about as many blocks run as the device holds, each with a pipeline's worth.
inline int splits_of_blocks(int32_t device, int64_t blocks, int64_t tiles) {
    constexpr int64_t kFewestTiles = 2, kMostSplits = 16;
    const int64_t wanted = std::max<int64_t>(blocks_at_once(device) / 4, 4) / std::max<int64_t>(blocks, 1);
    const int64_t most = std::min(kMostSplits, tiles / kFewestTiles);
    return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
}

inline int tile_splits(int32_t device, int64_t m, int64_t n, int64_t k) {
    const int64_t rows = m <= 32 ? 32 : m <= 64 ? 64 : 128;
    return splits_of_blocks(device, ceil_div(n, kTileRows) * ceil_div(m, rows), k / kTileDepth);
}

// Starts a kernel of tiles for an output of `m` by `n`, and adds the parts if there are several. `arguments`: the
// kernel's parameters before the output.
template <int Rows, class Kernel, class Out, class Sum, class... Arguments>
qc_status launch_tiles(Queue &queue, Kernel kernel, const Out &out, int64_t m, int64_t n, int splits, Sum *partial,
                       const Arguments &...arguments) {
    const Grid grid = {ceil_div(n, kTileRows), Queue::tile_blocks(ceil_div(m, Rows) * splits)};
    const TileOutput<Out, Sum> to = {out, splits > 1 ? partial : nullptr, m};
    const qc_status status = queue.launch(kernel, grid, kTiledWaves * kWave, arguments..., to, splits);
    return status != QC_OK || splits == 1 ? status : add_parts(queue, out, m, n, splits, partial);
}

inline int64_t partial_bytes(int64_t m, int64_t n, int splits) {
    return splits > 1 ? splits * m * n * static_cast<int64_t>(sizeof(float)) : 0;
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_TILED_CUH
