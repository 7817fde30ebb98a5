// A tile of both factors in shared memory, and what a wave of its block does with it. tiled.cuh fills tiles with
// decoded weights, int8_tiles.cuh with int8 as it is.
//
// A row of a tile is four pieces of 16 bytes, and piece p stands at p ^ (row / 2 % 4): then the reads of a wave, by 8
// rows or by 16, take each bank once. A wave multiplies 16 * Rows / 32 rows of W by 32 of X: 12 reads of 16 bytes for
// 32 products of the unit with 128 rows. Sums leave through the shared memory that the tiles were in: there a wave has
// 8 neighbours of a row of the output, and writes 32 (64) from there.
#ifndef QCORE_KERNELS_TILE_CUH
#define QCORE_KERNELS_TILE_CUH

#include "product.cuh"

namespace qcore::gpu {

inline constexpr int kTileRows = 128;  // of W
inline constexpr int kTilePieces = 4;  // of 16 bytes
inline constexpr int kTiledWaves = 8;
inline constexpr int kColumnsOfWave = 32;  // rows of X that a wave takes

// That a multiprocessor of NVIDIA's has to hold. Left to itself nvcc spills for a second one where 128 registers nearly
// suffice.
constexpr int blocks_of_tiles(int rows) { return rows == 128 ? 1 : 2; }

template <int Rows>
struct TilePieces {
    Vector16 piece[Rows][kTilePieces];
    QC_DEVICE static int place(int row, int p) { return p ^ (row >> 1 & 3); }
    QC_DEVICE Vector16 &at(int row, int p) { return piece[row][place(row, p)]; }
    QC_DEVICE const Vector16 &at(int row, int p) const { return piece[row][place(row, p)]; }
};

// Brings the elements at `from` to a place in shared memory, where they are after the next wait_for_copies. Aligned:
// all 16 bytes, or zeros if count is zero. Else count elements and zeros past them.
template <bool Aligned, class T>
QC_DEVICE void fetch_piece(Vector16 &to, const T *from, int64_t count) {
    if constexpr (Aligned) {
        copy16_async(&to, from, count > 0);
    } else {
        to = gather_sixteen_bytes(from, count);
    }
}

// Sums of a tile on their way out, as many of its columns as there is room for. Four more of a row than it has: then a
// wave's writes of 2 x 4 columns by 8 rows take each bank once.
template <class Sum, int Rows>
struct TileSums {
    static constexpr int kColumns = Rows < 64 ? Rows : 64;
    Sum value[kColumns][kTileRows + 4];
};

// The sums of a wave: kA fragments along the rows of W, kB along those of X.
template <class T, int W, int Rows>
class WaveOfTile {
    using Unit = MatrixUnit<T, W>;
    using Sum = typename SumOf<T>::type;
    static constexpr int kWavesAcross = Rows / kColumnsOfWave;  // waves that share rows of W
    static constexpr int kRowsOfWave = kTileRows * kWavesAcross / kTiledWaves, kA = kRowsOfWave / kRowsOfTile;
    static constexpr int kB = kColumnsOfWave / Unit::kColumns;

   public:
    QC_DEVICE explicit WaveOfTile(int thread)
        : lane_(thread % W),
          row_(thread / W / kWavesAcross * kRowsOfWave),
          column_(thread / W % kWavesAcross * kColumnsOfWave) {}

    QC_DEVICE void multiply(const TilePieces<kTileRows> &weights, const TilePieces<Rows> &x) {
#pragma unroll
        for (int part = 0; part < kTilePieces / Unit::kGroups; ++part) {
            const int p = part * Unit::kGroups + Unit::group(lane_);
            Slice b[kB][2];
#pragma unroll
            for (int j = 0; j < kB; ++j) {
                const Vector16 v = x.at(column_ + j * Unit::kColumns + Unit::column(lane_), p);
                b[j][0] = {v.x, v.y};
                b[j][1] = {v.z, v.w};
            }
#pragma unroll
            for (int i = 0; i < kA; ++i) {
                Slice a[2][Unit::kRowsPerLane];
#pragma unroll
                for (int r = 0; r < Unit::kRowsPerLane; ++r) {
                    const Vector16 v = weights.at(row_ + i * kRowsOfTile + Unit::row(lane_, r), p);
                    a[0][r] = {v.x, v.y};
                    a[1][r] = {v.z, v.w};
                }
#pragma unroll
                for (int j = 0; j < kB; ++j) {
                    multiply_add_pair<Unit>(sum_[i][j], a, b[j]);
                }
            }
        }
    }
    // finish(m, n, sum) for each sum of a tile at (first_row, first_column) that is inside of n by m. Every thread of
    // the block comes here, and none has copies under way; `out` may be where the tiles were. A barrier follows.
    template <class Finish>
    QC_DEVICE void finish(int64_t first_row, int64_t n, int64_t first_column, int64_t m, const Finish &finish,
                          TileSums<Sum, Rows> &out) const {
        constexpr int kColumns = TileSums<Sum, Rows>::kColumns, kAtOnce = kTiledWaves * W / kTileRows;
        const int local = thread_index() % kTileRows;
#pragma unroll 1
        for (int start = 0; start < Rows; start += kColumns) {
            block_barrier();  // all are through with the tiles, or with the columns before
            if (column_ / kColumns * kColumns == start) {
                put(out, column_ - start);
            }
            block_barrier();
#pragma unroll 4
            for (int base = 0; base < kColumns; base += kAtOnce) {
                const int from = base + thread_index() / kTileRows;
                if (first_row + local < n && first_column + start + from < m) {
                    finish(first_column + start + from, first_row + local, out.value[from][local]);
                }
            }
        }
    }

   private:
    int lane_, row_, column_;
    Sum sum_[kA][kB][Unit::kSums] = {};

    QC_DEVICE void put(TileSums<Sum, Rows> &out, int first) const {
#pragma unroll
        for (int i = 0; i < kA; ++i) {
#pragma unroll
            for (int j = 0; j < kB; ++j) {
#pragma unroll
                for (int s = 0; s < Unit::kSums; ++s) {
                    const int column = first + j * Unit::kColumns + Unit::c_column(lane_, s);
                    out.value[column][row_ + i * kRowsOfTile + Unit::c_row(lane_, s)] = sum_[i][j][s];
                }
            }
        }
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_TILE_CUH
