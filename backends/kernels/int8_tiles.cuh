// C[M,N] = A[M,K] B[N,K]^T in int8 on matrix units, for more rows of A than product.cuh serves well.
//
// Memory picture. A block takes 128 rows of B and Rows (64 or 128) of A, 64 of the depth at a time: both come from
// memory by copies of 16 bytes that pass no register, kStages - 1 tiles ahead, and are operands as they are. One pass
// over B serves Rows rows of A; the copies of a tile of 128 by 128 are 16 KB for 2 M operations. With few tiles the
// depth is shared out (split-K), sums of int32 going through scratch: they are exact, in whatever order.
//
// Floor: N * K + M * K bytes while M is small; the units' rate beyond.
#ifndef QCORE_KERNELS_INT8_TILES_CUH
#define QCORE_KERNELS_INT8_TILES_CUH

#include "tiled.cuh"

namespace qcore::gpu {

inline constexpr int kInt8TileDepth = 64;  // elements: kTilePieces of 16 bytes

// 48 KiB, for either.
template <int Rows>
struct Int8TilesInFlight {
    static constexpr int kStages = Rows == 128 ? 3 : 4;
    TilePieces<kTileRows> b[kStages];
    TilePieces<Rows> a[kStages];
};

template <int Rows>
union Int8TileShared {
    Int8TilesInFlight<Rows> tiles;
    TileSums<int32_t, Rows> sums;
};

// Rows of a matrix of `rows` by `k` from `first` on, from `at` to `end` of the depth; zeros outside of it. Aligned as
// Activations are.
template <bool Aligned, int Threads, int Rows>
QC_DEVICE void fetch_int8(TilePieces<Rows> &to, const int8_t *matrix, int64_t first, int64_t rows, int64_t k,
                          int64_t at, int64_t end) {
#pragma unroll
    for (int base = 0; base < Rows * kTilePieces; base += Threads) {
        const int i = base + thread_index(), row = i / kTilePieces, p = i % kTilePieces;
        if (Rows * kTilePieces % Threads == 0 || i < Rows * kTilePieces) {
            const int64_t depth = at + 16 * p;
            const bool there = first + row < rows && depth < end;
            const int8_t *from = matrix + (there ? (first + row) * k + depth : 0);
            fetch_piece<Aligned>(to.at(row, p), from, there ? end - depth : 0);
        }
    }
}

// Every thread of a block of kTiledWaves waves comes here. `finish(m, n, sum)` takes the sum over [first, end) of the
// depth; first is a multiple of kInt8TileDepth, and end is one or k.
template <int W, int Rows, bool Aligned, class Finish>
QC_DEVICE void multiply_int8_tile(const int8_t *b, int64_t first_row, int64_t n, const Activations<int8_t> &a,
                                  int64_t first_column, int64_t first, int64_t end, const Finish &finish,
                                  Int8TileShared<Rows> &shared) {
    constexpr int kThreads = kTiledWaves * W, kStages = Int8TilesInFlight<Rows>::kStages;
    Int8TilesInFlight<Rows> &held = shared.tiles;
    const int tiles = static_cast<int>((end - first + kInt8TileDepth - 1) / kInt8TileDepth);  // K is at most 131071
    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            const int stage = tile % kStages;
            const int64_t at = first + int64_t{tile} * kInt8TileDepth;
            fetch_int8<Aligned, kThreads>(held.b[stage], b, first_row, n, a.k, at, end);
            fetch_int8<Aligned, kThreads>(held.a[stage], a.x, first_column, a.m, a.k, at, end);
        }
        close_copies();
    };
    WaveOfTile<int8_t, W, Rows> sums(thread_index());
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
        fetch(tile);
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages;
        wait_for_copies<kStages - 2>();
        block_barrier();  // this int8 tile is there for all, and all are through with the one before
        fetch(tile + kStages - 1);
        sums.multiply(held.b[stage], held.a[stage]);
    }
    wait_for_copies<0>();
    sums.finish(first_row, n, first_column, a.m, finish, shared.sums);
    block_barrier();  // all are through with the sums
}

template <class Finish, int W, int Rows, bool Aligned>
QC_KERNEL_RESIDENT(kTiledWaves *W, blocks_of_tiles(Rows))
int8_tiled_kernel(const int8_t *b, Activations<int8_t> a, int64_t n, TileOutput<Finish, int32_t> output, int splits) {
    QC_SHARED(Int8TileShared<Rows>, shared);
    const int64_t across = (a.m + Rows - 1) / Rows, depth = (a.k + kInt8TileDepth - 1) / kInt8TileDepth;
    for (int64_t i = block_index_y(); i < across * splits; i += block_count_y()) {
        const int64_t part = i / across, last = depth * (part + 1) / splits * kInt8TileDepth;
        multiply_int8_tile<W, Rows, Aligned>(b, block_index_x() * kTileRows, n, a, i % across * Rows,
                                             depth * part / splits * kInt8TileDepth, last < a.k ? last : a.k,
                                             TileFinish<Finish, int32_t>{output, part, n}, shared);
    }
}

inline constexpr int64_t kFewInt8Rows = 16;  // of A, for which tiles do not pay

inline int int8_splits(int32_t device, int64_t m, int64_t n, int64_t k) {
    if (m <= kFewInt8Rows) {
        return 1;
    }
    const int64_t blocks = ceil_div(n, kTileRows) * ceil_div(m, m <= 64 ? 64 : 128);
    return splits_of_blocks(device, blocks, ceil_div(k, kInt8TileDepth));
}

// Of scratch, for the parts of sums.
inline int64_t int8_partial_bytes(int32_t device, int64_t m, int64_t n, int64_t k) {
    return partial_bytes(m, n, int8_splits(device, m, n, k));
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_INT8_TILES_CUH
