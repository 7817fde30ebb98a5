// X[M,K] = Y[M,N] W[N,K] for an int8 weight with a scale for each of its rows (QC-INT8-011 to -015): the gradient of
// int8_linear. A weight is decoded as int8_dequantize_rows decodes it and rounded to the dtype of Y (`compute`): a
// scale that went to Y instead would have to be rounded with it to 16 bits, and small gradients of float16 vanish. The
// sum runs over the rows of W, so what is contiguous in W is a row of the result and not the depth. Three kernels,
// chosen by dtype and shape alone:
//
//   few rows   up to 16 of Y, 16-bit dtypes, N and K multiples of 32. W comes from memory straight into the registers
//              that feed the matrix units, once, and passes no shared memory. A lane takes 16 neighbouring columns (8
//              with one row of A a lane) of eight rows of W: the eight codes of a column, decoded, are its two slices
//              of A, so the transposition is in which register is packed with which. A wave reads 128 neighbouring
//              bytes of a row, of 32 (16) rows at once, and the next ones are on their way while these are multiplied.
//              The waves of a block share out the depth, the blocks of a column too (split-K); the waves' sums meet in
//              shared memory.
//   tiles      more rows: tiled.cuh, with the columns of W as rows of the A operand. A tile is 32 rows of W by 128
//              columns: eight pieces of 16 bytes a row. A thread takes two (one) columns of eight rows out of shared
//              memory by words, whose banks a wave takes once each, and writes the eight weights of a column side by
//              side. The eight scales it needs are neighbours in memory and come a tile ahead.
//   plain      any other shape, float32, units without the dtype: transposed.cuh.
//
// Floor: N * K bytes of codes for 16 rows of Y, or for each 128 (8 without units), at read bandwidth; the units' rate
// beyond.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "transposed.cuh"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "int8_linear_transposed";

struct EightScales {
    float value[8];
};

struct Int8Columns {
    struct Table {
        char none;
    };
    const int8_t *codes;
    const float *stats;  // of a row
    int64_t k;

    QC_DEVICE static void fill(Table &) {}
    QC_DEVICE const int8_t *at(int64_t row, int64_t column) const { return codes + row * k + column; }
    // Of eight rows from a multiple of eight.
    template <bool Aligned>
    QC_DEVICE EightScales scales(int64_t row) const {
        EightScales out;
        if constexpr (Aligned) {
            const Vector16 a = load16(stats + row), b = load16(stats + row + 4);
            out = {{bits_to_float(a.x), bits_to_float(a.y), bits_to_float(a.z), bits_to_float(a.w), bits_to_float(b.x),
                    bits_to_float(b.y), bits_to_float(b.z), bits_to_float(b.w)}};
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                out.value[i] = stats[row + i];
            }
        }
        return out;
    }
    // As transposed.cuh takes them.
    template <class T>
    QC_DEVICE Eight eight(int64_t row, int64_t column, int64_t count, bool words, const Table &) const {
        const EightBytes bytes =
            load_eight_bytes(reinterpret_cast<const uint8_t *>(at(row, count > 0 ? column : 0)), count, words);
        const float stat = stats[row];
        Eight out;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out.value[i] = to_float(from_float<T>(int8_weight(static_cast<int8_t>(bytes.byte(i)), stat)));
        }
        return out;
    }
};

QC_DEVICE int8_t byte_of(uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i & 255); }

// As tiled.cuh takes them: its row is a column here, and its depth the rows of the weight.
template <class T, bool Aligned>
struct TilesOfColumns {
    using Carry = EightScales;                            // of the thread's rows in the next tile
    static constexpr int kPiecesAcross = kTileRows / 16;  // of 16 bytes, a row of the weight
    static constexpr int kCodes = kTileDepth * kPiecesAcross;
    const Int8Columns &w;

    template <bool>
    QC_DEVICE void fetch(Vector16 &to, int slot, int64_t first_column, int64_t at) const {
        const int64_t column = first_column + slot % kPiecesAcross * 16;
        const bool there = column < w.k;
        const int8_t *codes = w.at(there ? at + slot / kPiecesAcross : 0, there ? column : 0);
        fetch_piece<Aligned>(to, codes, there ? 16 : 0);
    }
    template <int Threads>
    QC_DEVICE Carry begin(int thread, int64_t, int64_t at, int64_t end) const {
        return at < end ? w.scales<Aligned>(at + 8 * (thread / kAcross<Threads>)) : Carry{};
    }
    template <int Threads>
    QC_DEVICE void decode(TilePieces<kTileRows> &tile, const Vector16 (&codes)[kCodes], Carry &carry, int thread,
                          int64_t first_column, int64_t at, int64_t end) const {
        constexpr int kColumns = kTileRows / kAcross<Threads>, kWords = 4 * kPiecesAcross;  // a row of the tile
        const int column = thread % kAcross<Threads> * kColumns, p = thread / kAcross<Threads>;
        const uint32_t *word = reinterpret_cast<const uint32_t *>(&codes[8 * p * kPiecesAcross]) + column / 4;
        const int shift = column % 4 * 8;
        float value[kColumns][8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t mine = word[i * kWords] >> shift;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                value[c][i] = int8_weight(byte_of(mine, c), carry.value[i]);
            }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            tile.at(column + c, p) = eight_of_depth<T>(value[c]);
        }
        // Last: no register holds both tiles' scales, and the product that follows hides the load.
        carry = begin<Threads>(thread, first_column, at + kTileDepth, end);
    }

   private:
    template <int Threads>
    static constexpr int kAcross = Threads / kTilePieces;  // threads along the columns: two or one each
};

// One block for 64 rows too: held to 128 registers they spill one for sm_86 and sm_89.
template <class T, int W, int Rows, bool Aligned>
QC_KERNEL_RESIDENT(kTiledWaves *W, Rows == 32 ? 2 : 1)
tiled_columns_kernel(Int8Columns w, Activations<T> y, TileOutput<Output<T>> output, int splits) {
    using Columns = TilesOfColumns<T, Aligned>;
    struct Shared {
        TileShared<Rows, Columns::kCodes> tile;
    };
    QC_SHARED(Shared, shared);
    multiply_tiles<T, W, Rows, Aligned>(Columns{w}, y, w.k, splits, output, shared.tile);
}

// What a lane of the kernel for few rows holds, and which columns of W are whose.
template <class T, int W>
struct FewRows {
    using Unit = MatrixUnit<T, W>;
    static constexpr int kColumnsOfLane = 8 * Unit::kRowsPerLane;
    static constexpr int kLanesAcross = kRowsOfTile / Unit::kRowsPerLane;
    static constexpr int kColumns = kColumnsOfLane * kLanesAcross;         // of a wave: 128
    static constexpr int kProducts = kColumnsOfLane / Unit::kRowsPerLane;  // of the unit, 16 columns each
    static constexpr int64_t kDepth = 8 * Unit::kGroups;                   // rows of W at once
    static constexpr int64_t kDepthOfBlock = kProductWaves * kDepth;
    static constexpr int kAtOnce = 8;                                        // rows of Y whose sums meet at once
    static constexpr int kPlaces = kColumnsOfLane * (kLanesAcross + 1) + 4;  // of a row of sums, some left free

    // Sums of the waves: a column's place is such that lanes that hold neighbouring products, and lanes that read
    // neighbouring columns, meet in few banks.
    struct Sums {
        float value[kProductWaves][kAtOnce][kPlaces];
    };
    QC_DEVICE static int place(int of_lane, int lane_across) { return of_lane * (kLanesAcross + 1) + lane_across; }

    // Eight rows of the lane's columns.
    struct Stretch {
        uint32_t word[8][kColumnsOfLane / 4];
        EightScales scales;
    };
    template <bool Aligned>
    QC_DEVICE static Stretch load(const Int8Columns &w, int64_t row, int64_t column, int64_t end) {
        Stretch out = {};
        if (row >= end || column >= w.k) {
            return out;
        }
        out.scales = w.scales<Aligned>(row);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int8_t *codes = w.at(row + i, column);
            if constexpr (!Aligned) {
                const Vector16 v = gather_sixteen_bytes(codes, kColumnsOfLane);
                keep(out.word[i], v);
            } else if constexpr (kColumnsOfLane == 16) {
                keep(out.word[i], load16_once(codes));
            } else {
                const Vector8 v = load8_once(codes);
                keep(out.word[i], Vector16{v.x, v.y, 0, 0});
            }
        }
        return out;
    }
    // Slice `half` of the lane's row r of A in product u.
    QC_DEVICE static Slice slice(const Stretch &s, int u, int r, int half) {
        const int column = u * Unit::kRowsPerLane + r;
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 4 * half + i;
            value[i] = int8_weight(byte_of(s.word[row][column / 4], column % 4), s.scales.value[row]);
        }
        return {pack_two<T>(value[0], value[1]), pack_two<T>(value[2], value[3])};
    }

   private:
    QC_DEVICE static void keep(uint32_t (&word)[kColumnsOfLane / 4], const Vector16 &v) {
        word[0] = v.x;
        word[1] = v.y;
        if constexpr (kColumnsOfLane == 16) {
            word[2] = v.z;
            word[3] = v.w;
        }
    }
};

// C fragments of columns are all the rows of Y.
template <class T, int W, int C, bool Aligned>
QC_KERNEL(kProductWaves *W)
few_columns_kernel(Int8Columns w, Activations<T> y, TileOutput<Output<T>> output, int splits) {
    using Few = FewRows<T, W>;
    using Unit = typename Few::Unit;
    struct Shared {
        typename Few::Sums sums;
    };
    QC_SHARED(Shared, shared);
    const int lane = thread_index() % W, wave = thread_index() / W;
    const int64_t first_column = block_index_x() * Few::kColumns, part = block_index_y();
    const int64_t column = first_column + Unit::row(lane, 0) * Few::kColumnsOfLane;
    const int64_t depth = (y.k + Few::kDepthOfBlock - 1) / Few::kDepthOfBlock;
    const int64_t last = depth * (part + 1) / splits * Few::kDepthOfBlock, end = last < y.k ? last : y.k;
    int64_t at = depth * part / splits * Few::kDepthOfBlock + wave * Few::kDepth;
    float c[Few::kProducts][C][Unit::kSums] = {};
    typename Few::Stretch next = Few::template load<Aligned>(w, at + 8 * Unit::group(lane), column, end);
#pragma unroll 1
    for (; at < end; at += Few::kDepthOfBlock) {
        const int64_t row = at + 8 * Unit::group(lane);
        const typename Few::Stretch stretch = next;
        next = Few::template load<Aligned>(w, row + Few::kDepthOfBlock, column, end);
        Slice b[C][2];
#pragma unroll
        for (int i = 0; i < C; ++i) {
            const Vector16 v = y.template load<Aligned>(i * Unit::kColumns + Unit::column(lane), row);
            b[i][0] = {v.x, v.y};
            b[i][1] = {v.z, v.w};
        }
#pragma unroll
        for (int u = 0; u < Few::kProducts; ++u) {
            Slice a[2][Unit::kRowsPerLane];
#pragma unroll
            for (int r = 0; r < Unit::kRowsPerLane; ++r) {
                a[0][r] = Few::slice(stretch, u, r, 0);
                a[1][r] = Few::slice(stretch, u, r, 1);
            }
#pragma unroll
            for (int i = 0; i < C; ++i) {
                multiply_add_pair<Unit>(c[u][i], a, b[i]);
            }
        }
    }
#pragma unroll 1
    for (int first = 0; first < y.m; first += Few::kAtOnce) {
#pragma unroll
        for (int u = 0; u < Few::kProducts; ++u) {
#pragma unroll
            for (int i = 0; i < C; ++i) {
#pragma unroll
                for (int s = 0; s < Unit::kSums; ++s) {
                    const int row = i * Unit::kColumns + Unit::c_column(lane, s) - first, of_a = Unit::c_row(lane, s);
                    if (row >= 0 && row < Few::kAtOnce) {
                        const int of_lane = u * Unit::kRowsPerLane + of_a / Few::kLanesAcross;
                        shared.sums.value[wave][row][Few::place(of_lane, of_a % Few::kLanesAcross)] = c[u][i][s];
                    }
                }
            }
        }
        block_barrier();
        for (int i = thread_index(); i < Few::kAtOnce * Few::kColumns; i += kProductWaves * W) {
            const int row = i / Few::kColumns, local = i % Few::kColumns;
            const int place = Few::place(local % Few::kColumnsOfLane, local / Few::kColumnsOfLane);
            float sum = shared.sums.value[0][row][place];
#pragma unroll
            for (int other = 1; other < kProductWaves; ++other) {
                sum += shared.sums.value[other][row][place];
            }
            if (first + row < y.m && first_column + local < w.k) {
                TileFinish<Output<T>>{output, part, w.k}(first + row, first_column + local, sum);
            }
        }
        block_barrier();  // all are through with these rows
    }
}

constexpr int64_t kDepthOfFew = 256;  // rows of W that a block takes at once; half of it with two groups in a wave
constexpr int64_t kColumnsOfFew = 128;

// The sum over N, in parts.
int parts_of(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k) {
    if (m <= kFewRows && takes_columns(device, dtype, n, k)) {
        return splits_of_blocks(device, ceil_div(k, kColumnsOfFew), ceil_div(n, kDepthOfFew));
    }
    return tile_splits(device, m, k, n);
}

template <class T>
struct Int8Transposed {
    Int8Columns w;
    Activations<T> y;
    Output<T> output;
    bool w_aligned;  // codes and scales
    Queue queue;
    float *partial;
    int splits;

    qc_status run(bool units) {
        if constexpr (sizeof(T) == 2) {
            if (units) {
                return run_matrix();
            }
        }
        return PlainTransposed<Int8Columns, T>{w, y, output, w_aligned && w.k % 8 == 0, partial, splits}.run(queue);
    }

   private:
    qc_status run_matrix() {
        constexpr int kUnit = MatrixLayout<kWave>::kColumns;
        if (y.m <= kUnit) {
            return few<1>();
        }
        if (y.m <= kFewRows) {
            return few<static_cast<int>(kFewRows) / kUnit>();
        }
        return y.m <= 32 ? tiled<32>() : y.m <= 64 ? tiled<64>() : tiled<128>();
    }
    template <int C>
    qc_status few() {
        static_assert(FewRows<T, kWave>::kColumns == kColumnsOfFew, "parts_of counts blocks");
        const auto kernel =
            w_aligned && y.aligned ? few_columns_kernel<T, kWave, C, true> : few_columns_kernel<T, kWave, C, false>;
        const TileOutput<Output<T>> to = {output, splits > 1 ? partial : nullptr, y.m};
        const qc_status status =
            queue.launch(kernel, {ceil_div(w.k, kColumnsOfFew), splits}, kProductWaves * kWave, w, y, to, splits);
        return status != QC_OK || splits == 1 ? status : add_parts(queue, output, y.m, w.k, splits, partial);
    }
    template <int Rows>
    qc_status tiled() {
        const auto kernel = w_aligned && y.aligned ? tiled_columns_kernel<T, kWave, Rows, true>
                                                   : tiled_columns_kernel<T, kWave, Rows, false>;
        return launch_tiles<Rows>(queue, kernel, output, y.m, w.k, splits, partial, w, y);
    }
};

Arguments check_sizes(const char *op, int32_t device, Arguments::Starts starts, int32_t dtype, int64_t m, int64_t n,
                      int64_t k) {
    Arguments arguments(op, device, starts);
    arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
    arguments.extent("m, n", m, n).extent("n, k", n, k).extent("m, k", m, k);
    return arguments;
}

}  // namespace

qc_status int8_linear_transposed_workspace(int32_t device, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                           int64_t *bytes) {
    const Arguments arguments = check_sizes("workspace", device, Arguments::Starts::nothing, dtype, m, n, k);
    if (arguments.ok()) {
        *bytes = m == 0 || k == 0 ? 0 : partial_bytes(m, k, parts_of(device, dtype, m, n, k));
    }
    return arguments.status();
}

qc_status int8_linear_transposed(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k,
                                 uintptr_t a, uintptr_t b, uintptr_t col_stats, uintptr_t out, uintptr_t workspace,
                                 int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments = check_sizes(kOp, device, Arguments::Starts::kernels, dtype, m, n, k);
        arguments.array("a", a, elements(m, n), dtype_size(dtype)).array("b", b, elements(n, k), 1);
        arguments.array("col_stats", col_stats, n, sizeof(float));
        arguments.array("out", out, elements(m, k), dtype_size(dtype));
        if (!arguments.ok() || m == 0 || k == 0) {
            return arguments.status();
        }
        const int splits = parts_of(device, dtype, m, n, k);
        if (!arguments.workspace(workspace, workspace_bytes, partial_bytes(m, k, splits)).ok()) {
            return arguments.status();
        }
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            Int8Transposed<T> product = {{pointer<const int8_t>(b), pointer<const float>(col_stats), k},
                                         {pointer<const T>(a), m, n, n % 8 == 0 && aligned(a, 16)},
                                         {pointer<T>(out), k, {nullptr, nullptr}},
                                         aligned(b, 16) && aligned(col_stats, 16),
                                         Queue(kOp, device, stream),
                                         pointer<float>(workspace),
                                         splits};
            return product.run(takes_columns(device, dtype, n, k));
        });
    });
}

}  // namespace qcore::gpu
