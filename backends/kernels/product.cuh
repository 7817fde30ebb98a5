// Y[M,N] = X[M,K] W[N,K]^T on matrix units: the part that is the same whether W holds 4-bit codes or int8.
//
// Memory picture. W is the A operand: 16 of its rows a block, from memory by 16-byte loads, once for up to 16 rows of
// X. The four lanes of a row (two with WMMA) each take a stretch of their own, next to the others', so that a wave
// reads 64 (32) neighbouring bytes of each row and all of them end in registers (matrix.cuh says why a permuted depth
// is allowed). X is the B operand and small: its 16-byte loads come from L1 and L2. Nothing passes through shared
// memory but the sums at the end. Up to 8 rows of X cost what one costs; for more than 16 there are tiles (tile.cuh).
//
// The eight waves of a block share out the depth of its rows, so that enough loads are in flight when N is small. Their
// sums are added in a fixed order: the result does not depend on timing (QC-NUM-007).
//
// Floor: the bytes of W at read bandwidth.
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
// elements (load) and their slices (slice); `finish(m, n, sum)` writes one element. C fragments of columns are all the
// rows of X. The next stretch is on its way while one is multiplied.
template <class T, int W, int C, bool Aligned, class Weights, class Finish>
QC_DEVICE void multiply(const Weights &weights, const Activations<T> &x, int64_t n, const Finish &finish,
                        ProductSums<T, W, C> &sums) {
    using Unit = MatrixUnit<T, W>;
    using Sum = typename SumOf<T>::type;
    constexpr int kColumns = Unit::kColumns * C;
    constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements of one load of X: two slices
    constexpr int kPieces = Weights::kStretch / kPiece;
    constexpr int64_t kStep = int64_t{Unit::kGroups} * Weights::kStretch;  // of a wave
    const int lane = thread_index() % W, wave = thread_index() / W;
    const int64_t row = block_index_x() * kRowsOfTile;
    Sum c[C][Unit::kSums] = {};
    int64_t at = wave * kStep + Unit::group(lane) * Weights::kStretch;
    typename Weights::Stretch next[Unit::kRowsPerLane];
#pragma unroll
    for (int r = 0; r < Unit::kRowsPerLane; ++r) {
        next[r] = weights.load(row + Unit::row(lane, r), at);
    }
#pragma unroll 1
    for (int64_t base = wave * kStep; base < x.k; base += kProductWaves * kStep, at += kProductWaves * kStep) {
        typename Weights::Stretch stretch[Unit::kRowsPerLane];
#pragma unroll
        for (int r = 0; r < Unit::kRowsPerLane; ++r) {
            stretch[r] = next[r];
            next[r] = weights.load(row + Unit::row(lane, r), at + kProductWaves * kStep);
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
                const int64_t column = i * Unit::kColumns + Unit::column(lane);
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
    for (int i = thread_index(); i < kRowsOfTile * kColumns; i += kProductWaves * W) {
        const int local = i % kRowsOfTile, column = i / kRowsOfTile;
        if (row + local < n && column < x.m) {
            Sum sum = sums.value[0][column][local];
#pragma unroll
            for (int other = 1; other < kProductWaves; ++other) {
                sum += sums.value[other][column][local];
            }
            finish(column, row + local, sum);
        }
    }
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_PRODUCT_CUH
