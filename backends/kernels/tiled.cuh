// Y[M,N] = X[M,K] W[N,K]^T on matrix units for more rows of X than product.cuh serves well: tiles in shared memory.
//
// Memory picture. A block takes 128 rows of W and Rows (32, 64 or 128) of X, 32 of the depth at a time. Codes of W and
// elements of X come by copies that pass no register, kStages - 1 tiles ahead; so the codes' reads are in flight
// however long a tile takes. Each code is decoded once a block, into shared memory, and then is an operand of all rows
// of X there. A wave multiplies Rows / 2 rows of W by 32 of X (16 * Rows / 32 by 32): 12 reads of 16 bytes for 32
// products of 16 x 8 x 16 with 128 rows. With few tiles the depth is shared out too (split-K), the partial sums going
// through scratch in float32 and being added in their order: the result does not depend on timing (QC-NUM-007).
//
// A row of a tile is four pieces of 16 bytes, and piece p stands at p ^ (row / 2 % 4): then the reads of a wave, by 8
// rows or by 16, take each bank once.
//
// Floor: N * K / 2 bytes of codes a pass over Rows of X, at read bandwidth, while 4 * Rows operations a byte are below
// what the units do; the units' rate beyond.
#ifndef QCORE_KERNELS_TILED_CUH
#define QCORE_KERNELS_TILED_CUH

#include "host/queue.h"
#include "product.cuh"

namespace qcore::gpu {

inline constexpr int kTileRows = 128;  // of W
inline constexpr int kTileDepth = 32;  // elements
inline constexpr int kTilePieces = 4;  // of 16 bytes: eight elements
inline constexpr int kTiledWaves = 8;
inline constexpr int kColumnsOfWave = 32;  // rows of X that a wave takes

template <int Rows>
struct TilePieces {
    Vector16 piece[Rows][kTilePieces];
    QC_DEVICE static int place(int row, int p) { return p ^ (row >> 1 & 3); }
    QC_DEVICE Vector16 &at(int row, int p) { return piece[row][place(row, p)]; }
    QC_DEVICE const Vector16 &at(int row, int p) const { return piece[row][place(row, p)]; }
};

// As many as fit beside the decoded tiles.
constexpr int tile_stages(int rows) { return rows == 128 ? 3 : rows == 64 ? 5 : 7; }

template <int Rows>
struct TileShared {
    static constexpr int kStages = tile_stages(Rows);
    TilePieces<kTileRows> weights[2];
    TilePieces<Rows> x[kStages];
    Vector16 codes[kStages][kTileRows];  // 32 of four bits
};

// Every thread of a block of kTiledWaves waves comes here. `weights` knows the kTileRows pieces of 16 bytes that are
// the codes of a tile (fetch: one of them), and how its threads make a tile of weights of them (decode), with what a
// thread carries from one tile to the next (Carry; begin: that of the first, a barrier before the first decode).
// `finish(m, n, sum)` takes the sum over [first, end) of the depth, both multiples of kTileDepth.
template <class T, int W, int Rows, bool Aligned, class Weights, class Finish>
QC_DEVICE void multiply_tile(const Weights &weights, const Activations<T> &x, int64_t first_row, int64_t n,
                             int64_t first_column, int64_t first, int64_t end, const Finish &finish,
                             TileShared<Rows> &shared) {
    using Unit = MatrixUnit<T, W>;
    constexpr int kThreads = kTiledWaves * W, kStages = TileShared<Rows>::kStages;
    constexpr int kWavesAcross = Rows / kColumnsOfWave;  // waves that share rows of W
    constexpr int kRowsOfWave = kTileRows * kWavesAcross / kTiledWaves, kA = kRowsOfWave / kRowsOfTile;
    constexpr int kB = kColumnsOfWave / Unit::kColumns;
    const int thread = thread_index(), lane = thread % W, wave = thread / W;
    const int wave_row = wave / kWavesAcross * kRowsOfWave, wave_column = wave % kWavesAcross * kColumnsOfWave;
    const int64_t tiles = (end - first) / kTileDepth;

    const auto fetch = [&](int64_t tile) {
        if (tile < tiles) {
            const int stage = static_cast<int>(tile % kStages);
            const int64_t at = first + tile * kTileDepth;
            if (thread < kTileRows) {
                weights.template fetch<Aligned>(shared.codes[stage][thread], thread, first_row, at);
            }
            for (int i = thread; i < Rows * kTilePieces; i += kThreads) {
                const int row = i / kTilePieces, p = i % kTilePieces;
                const bool there = first_column + row < x.m;
                const T *from = x.x + (there ? (first_column + row) * x.k + at + 8 * p : 0);
                if constexpr (Aligned) {
                    copy16_async(&shared.x[stage].at(row, p), from, there);
                } else {
                    shared.x[stage].at(row, p) = gather_sixteen_bytes(from, there ? 8 : 0);
                }
            }
        }
        close_copies();
    };

    typename SumOf<T>::type c[kA][kB][Unit::kSums] = {};
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
        fetch(tile);
    }
    typename Weights::Carry carry = weights.template begin<kThreads>(thread, first_row, first, end);
    const auto decode = [&](int64_t tile) {
        weights.template decode<kThreads>(shared.weights[tile % 2], shared.codes[tile % kStages], carry, thread,
                                          first_row, first + tile * kTileDepth, end);
    };
    wait_for_copies<kStages - 2>();
    block_barrier();
    decode(0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int stage = static_cast<int>(tile % kStages), half = static_cast<int>(tile % 2);
        wait_for_copies<kStages - 3>();
        block_barrier();  // this tile is decoded and the next one there, for all; all are through with the one before
        fetch(tile + kStages - 1);
        if (tile + 1 < tiles) {
            decode(tile + 1);
        }
#pragma unroll
        for (int part = 0; part < kTilePieces / Unit::kGroups; ++part) {
            const int p = part * Unit::kGroups + Unit::group(lane);
            Slice b[kB][2];
#pragma unroll
            for (int j = 0; j < kB; ++j) {
                const Vector16 v = shared.x[stage].at(wave_column + j * Unit::kColumns + Unit::column(lane), p);
                b[j][0] = {v.x, v.y};
                b[j][1] = {v.z, v.w};
            }
#pragma unroll
            for (int i = 0; i < kA; ++i) {
                Slice a[2][Unit::kRowsPerLane];
#pragma unroll
                for (int r = 0; r < Unit::kRowsPerLane; ++r) {
                    const Vector16 v = shared.weights[half].at(wave_row + i * kRowsOfTile + Unit::row(lane, r), p);
                    a[0][r] = {v.x, v.y};
                    a[1][r] = {v.z, v.w};
                }
#pragma unroll
                for (int j = 0; j < kB; ++j) {
                    multiply_add_pair<Unit>(c[i][j], a, b[j]);
                }
            }
        }
    }
    wait_for_copies<0>();
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
        for (int j = 0; j < kB; ++j) {
#pragma unroll
            for (int s = 0; s < Unit::kSums; ++s) {
                const int64_t row = first_row + wave_row + i * kRowsOfTile + Unit::c_row(lane, s);
                const int64_t column = first_column + wave_column + j * Unit::kColumns + Unit::c_column(lane, s);
                if (row < n && column < x.m) {
                    finish(column, row, c[i][j][s]);
                }
            }
        }
    }
    block_barrier();  // all are through with the last tile
}

// Where a sum goes: to the output, or as one of the parts of a sum to `partial`, [part][m][n].
template <class Out>
struct TileOutput {
    Out out;
    float *partial;
    int64_t m;
};

template <class Out>
struct TileFinish {
    const TileOutput<Out> &output;
    int64_t part, n;
    QC_DEVICE void operator()(int64_t m_index, int64_t n_index, float sum) const {
        if (output.partial != nullptr) {
            output.partial[(part * output.m + m_index) * n + n_index] = sum;
        } else {
            output.out(m_index, n_index, sum);
        }
    }
};

// The tiles of a grid: x along the rows of W, y along those of X and the parts of the depth.
template <class T, int W, int Rows, bool Aligned, class Weights, class Out>
QC_DEVICE void multiply_tiles(const Weights &weights, const Activations<T> &x, int64_t n, int splits,
                              const TileOutput<Out> &output, TileShared<Rows> &shared) {
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
template <class Out>
QC_KERNEL(kAddThreads)
add_parts_kernel(Out out, const float *partial, int64_t m, int64_t n, int splits) {
    const int64_t size = m * n, stride = block_count_x() * kAddThreads;
    for (int64_t i = block_index_x() * kAddThreads + thread_index(); i < size; i += stride) {
        float sum = partial[i];
        for (int part = 1; part < splits; ++part) {
            sum += partial[part * size + i];
        }
        out(i / n, i % n, sum);
    }
}

template <class Out>
qc_status add_parts(Queue &queue, const Out &out, int64_t m, int64_t n, int splits, const float *partial) {
    return queue.launch(add_parts_kernel<Out>, {queue.resident_blocks(m * n, kAddThreads)}, kAddThreads, out, partial,
                        m, n, splits);
}

// Parts of the depth, so that about as many blocks run as the device holds, each with a pipeline's worth of tiles.
inline int tile_splits(int32_t device, int64_t m, int64_t n, int64_t k) {
    constexpr int64_t kFewestTiles = 2, kMostSplits = 16;
    const int64_t rows = m <= 32 ? 32 : m <= 64 ? 64 : 128;
    const int64_t blocks = ceil_div(n, kTileRows) * ceil_div(m, rows);
    const int64_t wanted = std::max<int64_t>(blocks_at_once(device) / 4, 4) / std::max<int64_t>(blocks, 1);
    const int64_t most = std::min(kMostSplits, k / kTileDepth / kFewestTiles);
    return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
}

// Starts a kernel of tiles for an output of `m` by `n`, and adds the parts if there are several. `arguments`: the
// kernel's parameters before the output.
template <int Rows, class Kernel, class Out, class... Arguments>
qc_status launch_tiles(Queue &queue, Kernel kernel, const Out &out, int64_t m, int64_t n, int splits, float *partial,
                       const Arguments &...arguments) {
    const Grid grid = {ceil_div(n, kTileRows), Queue::tile_blocks(ceil_div(m, Rows) * splits)};
    const TileOutput<Out> to = {out, splits > 1 ? partial : nullptr, m};
    const qc_status status = queue.launch(kernel, grid, kTiledWaves * kWave, arguments..., to, splits);
    return status != QC_OK || splits == 1 ? status : add_parts(queue, out, m, n, splits, partial);
}

inline int64_t partial_bytes(int64_t m, int64_t n, int splits) {
    return splits > 1 ? splits * m * n * static_cast<int64_t>(sizeof(float)) : 0;
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_TILED_CUH
