// X[M,K] = Y[M,N] W[N,K] for an NF4 or FP4 weight (QC-GEMM4-008 to -012): the gradient of gemm_4bit. The sum runs over
// the rows of W, so what is contiguous in its codes is a row of the result and not the depth. Two kernels, chosen by
// dtype and shape alone:
//
//   matrix units   16-bit dtypes, N and K multiples of 32. tiled.cuh, with the columns of W as rows of the A operand. A
//                  tile is 32 rows of W by 128 columns: four pieces of 16 bytes a row. A thread takes one byte (or one
//                  nibble) of eight rows and writes the eight weights of a column side by side: the transposition costs
//                  reads of shared memory by bytes, and those of a wave are neighbours. Scales, one for 32 columns of a
//                  row, come two tiles ahead and pass through shared memory, for a thread needs those of eight rows.
//   plain          any other shape, float32, units without the dtype: transposed.cuh has it; a lane's eight columns are
//                  a word of codes.
//
// Floor: N * K / 2 bytes of codes and 4 (1 with nested absmax) a block for each 128 rows of Y (8 without units), at
// read bandwidth; the units' rate beyond.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "transposed.cuh"
#include "weight4bit.cuh"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "gemm_4bit_transposed";
constexpr int kSegment = 32;  // columns that share a scale, whatever the blocksize, for K is a multiple of it
constexpr int kSegments = kTileRows / kSegment;

// Scales of a tile, eight of them neighbours for the thread that decodes eight rows; and of the next tile.
struct TileScales {
    float value[2][kSegments][kTileDepth];
};

// As tiled.cuh takes them: its row is a column here, and its depth the rows of the weight.
template <class T>
struct ColumnsOfCodes {
    using Carry = float;  // a scale of the tile after the next one
    const CodebookWeight &w;
    const Table16 &table;
    TileScales &scales;

    template <bool Aligned>
    QC_DEVICE void fetch(Vector16 &to, int slot, int64_t first_column, int64_t at) const {
        const int64_t column = first_column + slot % kSegments * kSegment;
        const bool there = column < w.k;
        const uint8_t *bytes = w.bytes(there ? at + slot / kSegments : 0, there ? column : 0);
        fetch_piece<Aligned>(to, bytes, there ? 16 : 0);
    }
    template <int Threads>
    QC_DEVICE Carry begin(int thread, int64_t first_column, int64_t at, int64_t end) const {
        put(thread, at, scale(thread, first_column, at, end));
        return scale(thread, first_column, at + kTileDepth, end);
    }
    template <int Threads>
    QC_DEVICE void decode(TilePieces<kTileRows> &tile, const Vector16 (&codes)[kTileRows], Carry &carry, int thread,
                          int64_t first_column, int64_t at, int64_t end) const {
        put(thread, at + kTileDepth, carry);
        carry = scale(thread, first_column, at + 2 * kTileDepth, end);
        constexpr int kColumns = kTileRows * kTilePieces / Threads;  // that a thread decodes: two or one
        constexpr int kAcross = kTileRows / kColumns;
        const int column = thread % kAcross * kColumns, p = thread / kAcross;
        const uint8_t *byte = reinterpret_cast<const uint8_t *>(&codes[8 * p * kSegments]) + column / 2;
        const float *scale = scales.value[parity(at)][column / kSegment] + 8 * p;
        float even[8], odd[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t two = byte[i * kSegments * 16];
            if constexpr (kColumns == 2) {
                even[i] = CodebookWeight::value(table, two >> 4, scale[i]);
                odd[i] = CodebookWeight::value(table, two & 15, scale[i]);
            } else {
                even[i] = CodebookWeight::value(table, column % 2 == 0 ? two >> 4 : two & 15, scale[i]);
            }
        }
        tile.at(column, p) = eight_of_depth<T>(even);
        if constexpr (kColumns == 2) {
            tile.at(column + 1, p) = eight_of_depth<T>(odd);
        }
    }

   private:
    QC_DEVICE static int parity(int64_t at) { return static_cast<int>(at / kTileDepth % 2); }
    // Four threads a row of the weight, one a segment.
    QC_DEVICE float scale(int thread, int64_t first_column, int64_t at, int64_t end) const {
        const int64_t column = first_column + thread % kSegments * kSegment;
        const bool there = thread < kTileRows && column < w.k && at < end;
        return there ? w.scale(at + thread / kSegments, column) : 0.0f;
    }
    QC_DEVICE void put(int thread, int64_t at, float scale) const {
        if (thread < kTileRows) {
            scales.value[parity(at)][thread % kSegments][thread / kSegments] = scale;
        }
    }
};

template <class T, int W, int Rows, bool Aligned>
QC_KERNEL(kTiledWaves *W)
tiled_transposed_kernel(CodebookWeight w, Activations<T> y, TileOutput<Output<T>> output, int splits) {
    struct Shared {
        TileShared<Rows> tile;
        TileScales scales;
        Table16 table;
    };
    QC_SHARED(Shared, shared);
    w.fill(shared.table);
    block_barrier();
    const ColumnsOfCodes<T> codes = {w, shared.table, shared.scales};
    multiply_tiles<T, W, Rows, Aligned>(codes, y, w.k, splits, output, shared.tile);
}

// The sum over N, in parts for both kernels.
int parts_of(int32_t device, int64_t m, int64_t n, int64_t k) { return tile_splits(device, m, k, n); }

template <class T>
struct Transposed {
    CodebookWeight w;
    Activations<T> y;
    Output<T> output;
    bool w_aligned;
    Queue queue;
    float *partial;
    int splits;

    qc_status run(bool units) {
        if constexpr (sizeof(T) == 2) {
            if (units) {
                return y.m <= 32 ? tiled<32>() : y.m <= 64 ? tiled<64>() : tiled<128>();
            }
        }
        return PlainTransposed<CodebookWeight, T>{w, y, output, w_aligned && w.k % 8 == 0, partial, splits}.run(queue);
    }

   private:
    template <int Rows>
    qc_status tiled() {
        const auto kernel = w_aligned && y.aligned ? tiled_transposed_kernel<T, kWave, Rows, true>
                                                   : tiled_transposed_kernel<T, kWave, Rows, false>;
        return launch_tiles<Rows>(queue, kernel, output, y.m, w.k, splits, partial, w, y);
    }
};

}  // namespace

qc_status gemm_4bit_transposed_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                         int64_t *bytes) {
    Arguments arguments("workspace", device, Arguments::Starts::nothing);
    arguments.dtype("dtype", dtype).extent("m, k", m, k);
    if (arguments.ok()) {
        *bytes = m == 0 || k == 0 ? 0 : partial_bytes(m, k, parts_of(device, m, n, k));
    }
    return arguments.status();
}

qc_status gemm_4bit_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                               uintptr_t a, const qc_weight_4bit *w, uintptr_t out, uintptr_t workspace,
                               int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, n", m, n).extent("n, k", n, k).extent("m, k", m, k).weight("w", w);
        if (!arguments.ok()) {
            return arguments.status();
        }
        if (w->numel != elements(n, k)) {
            return fail(QC_INVALID_ARGUMENT, "%s: w.numel: expected n * k = %lld * %lld, got %lld", kOp,
                        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(w->numel));
        }
        arguments.array("a", a, elements(m, n), dtype_size(dtype)).array("out", out, elements(m, k), dtype_size(dtype));
        if (!arguments.ok() || m == 0 || k == 0) {
            return arguments.status();
        }
        const int splits = parts_of(device, m, n, k);
        if (!arguments.workspace(workspace, workspace_bytes, partial_bytes(m, k, splits)).ok()) {
            return arguments.status();
        }
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            Transposed<T> product = {{weight_view(*w), k},
                                     {pointer<const T>(a), m, n, n % 8 == 0 && aligned(a, 16)},
                                     {pointer<T>(out), k, {nullptr, nullptr}},
                                     aligned(w->packed, 16),
                                     Queue(kOp, device, stream),
                                     pointer<float>(workspace),
                                     splits};
            return product.run(takes_columns(device, dtype, n, k));
        });
    });
}

}  // namespace qcore::gpu
