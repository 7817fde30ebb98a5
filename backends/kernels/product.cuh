// Y[M,N] = X[M,K] W[N,K]^T on matrix units: the part that is the same whether W holds 4-bit codes or int8.
//
// Memory picture. W is the A operand: 16 of its rows a wave, from memory by 16-byte loads, once for up to 64 rows of X.
// The four lanes of a row (two with WMMA) each take a stretch of their own, next to the others', so that a wave reads
// 64 (32) neighbouring bytes of each row and all of them end in registers (matrix.cuh says why a permuted depth is
// allowed). X is the B operand and small: its 16-byte loads come from L1 and L2. Nothing passes through shared memory
// but the sums at the end. Up to 8 rows of X cost what one costs.
//
// A block has eight waves. With few rows of X they share out the depth of the same 16 rows of W (KW of them), so that
// enough loads are in flight when N is small; with many, they take different rows of W and share X in L1. Sums of the
// waves are added in a fixed order: the result does not depend on timing (QC-NUM-007).
//
// Floor: the bytes of W at read bandwidth while 2 M N K / bytes of W stays below what the units do a byte; above M of
// about 64, W is read again for each 64 rows of X, from L2.
#ifndef QCORE_KERNELS_PRODUCT_CUH
#define QCORE_KERNELS_PRODUCT_CUH

#include "matrix.cuh"

namespace qcore::gpu {

inline constexpr int kProductWaves = 8;
inline constexpr int kRowsOfTile = 16;

QC_DEVICE uint32_t element_bits(Half x) { return x.bits; }
QC_DEVICE uint32_t element_bits(BFloat16 x) { return x.bits; }
QC_DEVICE uint32_t element_bits(int8_t x) { return static_cast<uint8_t>(x); }
QC_DEVICE uint32_t element_bits(uint8_t x) { return x; }

// `count` elements from `address` as 16 bytes, zeros past them, one by one.
template <class T>
QC_DEVICE Vector16 gather_sixteen_bytes(const T *address, int64_t count) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        word[i] = 0;
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) {
            if (i * kPerWord + j < count) {
                word[i] |= element_bits(address[i * kPerWord + j]) << j * 8 * static_cast<int>(sizeof(T));
            }
        }
    }
    return Vector16{word[0], word[1], word[2], word[3]};
}

// X. Aligned: every row starts at a multiple of 16 bytes and is a multiple of 16 long. That is a parameter of kernels,
// not a branch in them: between the branches of a loop the compiler moves no load.
template <class T>
struct Activations {
    const T *x;
    int64_t m, k;
    bool aligned;

    template <bool Aligned>
    QC_DEVICE Vector16 load(int64_t row, int64_t at) const {
        if (row >= m || at >= k) {
            return Vector16{0, 0, 0, 0};
        }
        const T *address = x + row * k + at;
        return Aligned ? load16(address) : gather_sixteen_bytes(address, k - at);
    }
};

template <class T, int W, int C>
struct ProductSums {
    typename SumOf<T>::type value[kProductWaves][MatrixLayout<W>::kColumns * C][kRowsOfTile];
};

// Every thread of a block of kProductWaves waves comes here. `weights` knows a row's stretches of `Weights::kStretch`
// elements (load) and their slices (slice); `finish(m, n, sum)` writes one element. C fragments of columns; KW waves
// share out the depth. The next stretch is on its way while one is multiplied.
template <class T, int W, int C, int KW, bool Aligned, class Weights, class Finish>
QC_DEVICE void multiply(const Weights &weights, const Activations<T> &x, int64_t n, const Finish &finish,
                        ProductSums<T, W, C> &sums) {
    using Unit = MatrixUnit<T, W>;
    using Sum = typename SumOf<T>::type;
    constexpr int kColumns = Unit::kColumns * C, kRowWaves = kProductWaves / KW;
    constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements of one load of X: two slices
    constexpr int kPieces = Weights::kStretch / kPiece;
    const int lane = thread_index() % W, wave = thread_index() / W;
    const int64_t block_row = block_index_x() * kRowWaves * kRowsOfTile;
    const int64_t row = block_row + wave / KW * kRowsOfTile;
    for (int64_t first = block_index_y() * kColumns; first < x.m; first += block_count_y() * kColumns) {
        Sum c[C][Unit::kSums] = {};
        const int64_t step = int64_t{Unit::kGroups} * Weights::kStretch;
        int64_t at = wave % KW * step + Unit::group(lane) * Weights::kStretch;
        typename Weights::Stretch next[Unit::kRowsPerLane];
#pragma unroll
        for (int r = 0; r < Unit::kRowsPerLane; ++r) {
            next[r] = weights.load(row + Unit::row(lane, r), at);
        }
#pragma unroll 1
        for (int64_t base = wave % KW * step; base < x.k; base += KW * step, at += KW * step) {
            typename Weights::Stretch stretch[Unit::kRowsPerLane];
#pragma unroll
            for (int r = 0; r < Unit::kRowsPerLane; ++r) {
                stretch[r] = next[r];
                next[r] = weights.load(row + Unit::row(lane, r), at + KW * step);
            }
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                Slice a[2][Unit::kRowsPerLane];
#pragma unroll
                for (int r = 0; r < Unit::kRowsPerLane; ++r) {
                    a[0][r] = weights.slice(stretch[r], 2 * piece);
                    a[1][r] = weights.slice(stretch[r], 2 * piece + 1);
                }
#pragma unroll
                for (int i = 0; i < C; ++i) {
                    const int64_t column = first + i * Unit::kColumns + Unit::column(lane);
                    const Vector16 b = x.template load<Aligned>(column, at + piece * kPiece);
                    const Slice slices[2] = {{b.x, b.y}, {b.z, b.w}};
                    multiply_add_pair<Unit>(c[i], a, slices);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < C; ++i) {
#pragma unroll
            for (int j = 0; j < Unit::kSums; ++j) {
                sums.value[wave][i * Unit::kColumns + Unit::c_column(lane, j)][Unit::c_row(lane, j)] = c[i][j];
            }
        }
        block_barrier();
        constexpr int kRows = kRowWaves * kRowsOfTile;
        for (int i = thread_index(); i < kRows * kColumns; i += kProductWaves * W) {
            const int local = i % kRows, column = i / kRows;
            const int64_t out_row = block_row + local, out_column = first + column;
            if (out_row < n && out_column < x.m) {
                const int leader = local / kRowsOfTile * KW;
                Sum sum = sums.value[leader][column][local % kRowsOfTile];
#pragma unroll
                for (int other = 1; other < KW; ++other) {
                    sum += sums.value[leader + other][column][local % kRowsOfTile];
                }
                finish(out_column, out_row, sum);
            }
        }
        block_barrier();
    }
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_PRODUCT_CUH
