// X[M,K] = Y[M,N] W[N,K] without matrix units, and what the transposed products share otherwise: the sum runs over the
// rows of W, so what is contiguous in memory is a row of the result and not the depth.
//
// Memory picture. A lane takes eight neighbouring columns of W, and the waves of a block share out its rows: a wave
// reads 256 columns (512 with waves of 64) of one row, and a value of Y goes to all of its lanes from one place. Up to
// eight rows of Y a reading of W. The sums of the waves meet in shared memory, a row of Y at a time.
//
// Floor: the bytes of W for each eight rows of Y, at read bandwidth.
#ifndef QCORE_KERNELS_TRANSPOSED_CUH
#define QCORE_KERNELS_TRANSPOSED_CUH

#include "fourbit_product.cuh"

namespace qcore::gpu {

// Eight weights of a column, rounded to T, as a piece of the A operand.
template <class T>
QC_DEVICE Vector16 eight_of_depth(const float (&value)[8]) {
    return Vector16{pack_two<T>(value[0], value[1]), pack_two<T>(value[2], value[3]), pack_two<T>(value[4], value[5]),
                    pack_two<T>(value[6], value[7])};
}

// `Weight` is a parameter of kernels that knows its columns k; Table and fill as fourbit_product.cuh says; and
// eight<T>(row, column, count, words, table), eight weights of a row, rounded to T, of which `count` are there.
// `words`: each eight are aligned.
template <class Weight, class T, int W, int M>
QC_KERNEL_RESIDENT(kPlainThreads, M == 1 ? 4 : 2)
plain_transposed_kernel(Weight w, Activations<T> y, TileOutput<Output<T>> output, int splits, bool words) {
    constexpr int kWaves = kPlainThreads / W, kColumns = 8 * W;
    struct Shared {
        float sum[kWaves][kColumns];
        typename Weight::Table table;
    };
    QC_SHARED(Shared, shared);
    w.fill(shared.table);
    block_barrier();
    const int lane = thread_index() % W, wave = thread_index() / W;
    const int64_t first_column = block_index_x() * kColumns, column = first_column + 8 * lane;
    const int64_t across = (y.m + M - 1) / M, depth = y.k / kTileDepth;
    for (int64_t i = block_index_y(); i < across * splits; i += block_count_y()) {
        const int64_t first = i % across * M, part = i / across;
        const int64_t start = depth * part / splits * kTileDepth;
        const int64_t end = part + 1 == splits ? y.k : depth * (part + 1) / splits * kTileDepth;
        float sum[M][8] = {};
        for (int64_t row = start + wave; row < end; row += kWaves) {
            const Eight weights = w.template eight<T>(row, column, w.k - column, words, shared.table);
#pragma unroll
            for (int j = 0; j < M; ++j) {
                const float value = first + j < y.m ? to_float(y.x[(first + j) * y.k + row]) : 0.0f;
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    sum[j][c] = multiply_add(weights.value[c], value, sum[j][c]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < M; ++j) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                shared.sum[wave][8 * lane + c] = sum[j][c];
            }
            block_barrier();
            for (int c = thread_index(); c < kColumns; c += kPlainThreads) {
                float total = shared.sum[0][c];
#pragma unroll
                for (int other = 1; other < kWaves; ++other) {
                    total += shared.sum[other][c];
                }
                if (first + j < y.m && first_column + c < w.k) {
                    TileFinish<Output<T>>{output, part, w.k}(first + j, first_column + c, total);
                }
            }
            block_barrier();
        }
    }
}

template <class Weight, class T>
struct PlainTransposed {
    const Weight &w;
    const Activations<T> &y;
    const Output<T> &output;
    bool words;
    float *partial;
    int splits;

    qc_status run(Queue &queue) const { return y.m == 1 ? rows<1>(queue) : rows<8>(queue); }

   private:
    template <int M>
    qc_status rows(Queue &queue) const {
        const Grid grid = {ceil_div(w.k, 8 * kWave), Queue::tile_blocks(ceil_div(y.m, M) * splits)};
        const TileOutput<Output<T>> to = {output, splits > 1 ? partial : nullptr, y.m};
        const qc_status status =
            queue.launch(plain_transposed_kernel<Weight, T, kWave, M>, grid, kPlainThreads, w, y, to, splits, words);
        return status != QC_OK || splits == 1 ? status : add_parts(queue, output, y.m, w.k, splits, partial);
    }
};

// Whether the tiles of tiled.cuh, their depth along the rows of W, serve.
inline bool takes_columns(int32_t device, int32_t dtype, int64_t n, int64_t k) {
    return takes_matrix(device, dtype, n) && k % kTileDepth == 0;
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_TRANSPOSED_CUH
