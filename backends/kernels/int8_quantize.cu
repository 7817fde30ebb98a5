// LLM.int8() codes of rows and columns (docs/spec/50-int8.md).
//
// Memory picture. Rows: an element is read for the statistic and again for its code; a row is at most some tens of KiB
// and its second reading comes from L1 or L2, so the floor is (size + 1) bytes an element at copy bandwidth. A team of
// threads, a wave or the whole block of 256, takes a row. With a threshold the outlier columns are only known after the
// last row: a last kernel reads K flags and writes zeros down the few columns that have one. Columns: the statistics
// need all rows before the first code, so the input is read twice from memory: (2 * size + 1) bytes an element. A block
// reads 256 columns at a time, whole cache lines of a row, and adds its maxima to the others' by an atomic maximum,
// whose result does not depend on the order.
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "int8_parts.h"
#include "reduce.cuh"

namespace qcore::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kClearedAtOnce = 64;                              // rows of an outlier column
constexpr int kRowOfWave = 2048;                                // elements of a row that a wave takes, not a block
constexpr int kColumnsOfBlock = 256;                            // 32 threads across, eight columns each
constexpr int kRowsOfBlock = kThreads / (kColumnsOfBlock / 8);  // the other threads share out the rows

// QC-INT8-001.
QC_DEVICE bool is_outlier(float x, float threshold) { return threshold > 0.0f && !(magnitude(x) < threshold); }

// QC-INT8-003, with s = 127 / statistic; the statistic of a row is no NaN.
QC_DEVICE int code_of(float x, float s, float statistic) {
    float q = x * s;
    q = is_nan(q) || statistic == 0.0f ? 0.0f : round_to_even(q);
    q = q > 127.0f ? 127.0f : q;
    q = q < -127.0f ? -127.0f : q;
    return static_cast<int>(q);
}

// The largest magnitude among eight elements that are no outliers.
QC_DEVICE float largest_inlier(const Eight &x, float threshold) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float size = is_outlier(x.value[i], threshold) ? 0.0f : magnitude(x.value[i]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

template <class T, int W>
QC_KERNEL(kThreads)
rows_kernel(const T *a, int64_t m, int64_t k, float threshold, int team, int8_t *out, float *row_stats,
            uint8_t *outlier_cols, bool a_aligned, bool out_aligned) {
    struct Shared {
        float partial[kThreads / W];
    };
    QC_SHARED(Shared, shared);
    const int rows_at_once = kThreads / team, member = thread_index() % team;
    for (int64_t base = block_index_x() * rows_at_once; base < m; base += block_count_x() * rows_at_once) {
        const int64_t row = base + thread_index() / team;
        const bool here = row < m;
        const T *x = a + row * k;
        float largest = 0.0f;
        for (int64_t column = 8 * member; here && column < k; column += 8 * team) {
            const Eight values = load_eight<T>(x + column, k - column, a_aligned);
            const float size = largest_inlier(values, threshold);
            largest = size > largest ? size : largest;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (column + i < k && is_outlier(values.value[i], threshold)) {
                    outlier_cols[column + i] = 1;  // whoever writes last writes the same
                }
            }
        }
        largest = team_max<W, kThreads>(largest, team, shared.partial);
        if (!here) {
            continue;
        }
        if (member == 0) {
            row_stats[row] = largest;
        }
        const float s = 127.0f / largest;
        for (int64_t column = 8 * member; column < k; column += 8 * team) {
            const Eight values = load_eight<T>(x + column, k - column, a_aligned);
            int codes[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                codes[i] = code_of(values.value[i], s, largest);
            }
            store_eight_bytes(reinterpret_cast<uint8_t *>(out) + row * k + column, pack_bytes(codes), k - column,
                              out_aligned);
        }
    }
}

// Zeros every row of the outlier columns (QC-INT8-003). With a list: also notes them there, in ascending order; every
// block counts those of the columns before its own.
QC_KERNEL(kThreads)
clear_columns_kernel(const uint8_t *outlier_cols, int64_t m, int64_t k, int8_t *out, OutlierColumns *list) {
    struct Shared {
        int32_t before[kThreads];
        uint8_t flag[kThreads];
    };
    QC_SHARED(Shared, shared);
    const int64_t first = block_index_x() * kThreads, column = first + thread_index();
    const bool outlier = column < k && outlier_cols[column] != 0;
    if (list != nullptr && block_index_y() == 0) {
        int32_t before = 0;
        for (int64_t i = thread_index(); i < first; i += kThreads) {
            before += outlier_cols[i];
        }
        shared.before[thread_index()] = before;
        shared.flag[thread_index()] = outlier ? 1 : 0;
        block_barrier();
        const bool counts = thread_index() == kThreads - 1 && first + kThreads >= k;
        if (outlier || counts) {
            int32_t place = 0;
            for (int i = 0; i < kThreads; ++i) {
                place += shared.before[i] + (i < thread_index() ? shared.flag[i] : 0);
            }
            if (outlier) {
                list->column[place] = static_cast<int32_t>(column);
            }
            if (counts) {
                list->count = place + (outlier ? 1 : 0);
            }
        }
    }
    if (outlier) {
        for (int64_t row = block_index_y(); row < m; row += block_count_y()) {
            out[row * k + column] = 0;
        }
    }
}

// QC-INT8-004, the statistics; col_stats starts as zeros. A float that is not negative is ordered as its bits are.
template <class T>
QC_KERNEL(kThreads)
column_stats_kernel(const T *a, int64_t m, int64_t k, float threshold, float *col_stats, bool a_aligned) {
    struct Shared {
        float largest[kRowsOfBlock][kColumnsOfBlock];
    };
    QC_SHARED(Shared, shared);
    const int across = thread_index() % 32, down = thread_index() / 32;
    const int64_t column = block_index_x() * kColumnsOfBlock + 8 * across;
    Eight largest = {};
    const int64_t stride = block_count_y() * kRowsOfBlock;
    for (int64_t row = block_index_y() * kRowsOfBlock + down; row < m && column < k; row += stride) {
        const Eight values = load_eight<T>(a + row * k + column, k - column, a_aligned);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float size = is_outlier(values.value[i], threshold) ? 0.0f : magnitude(values.value[i]);
            largest.value[i] = size > largest.value[i] ? size : largest.value[i];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        shared.largest[down][8 * across + i] = largest.value[i];
    }
    block_barrier();
    const int64_t mine = block_index_x() * kColumnsOfBlock + thread_index();
    float most = 0.0f;
    for (int i = 0; i < kRowsOfBlock; ++i) {
        const float other = shared.largest[i][thread_index()];
        most = other > most ? other : most;
    }
    if (mine < k && most > 0.0f) {
        atomic_max(reinterpret_cast<int32_t *>(col_stats) + mine, static_cast<int32_t>(float_to_bits(most)));
    }
}

template <class T>
QC_KERNEL(kThreads)
column_codes_kernel(const T *a, int64_t m, int64_t k, float threshold, const float *col_stats, int8_t *out,
                    bool a_aligned, bool out_aligned) {
    const int across = thread_index() % 32, down = thread_index() / 32;
    const int64_t column = block_index_x() * kColumnsOfBlock + 8 * across;
    if (column >= k) {
        return;
    }
    const Eight statistic = load_eight<float>(col_stats + column, k - column, false);
    Eight s;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        s.value[i] = 127.0f / statistic.value[i];
    }
    const int64_t stride = block_count_y() * kRowsOfBlock;
    for (int64_t row = block_index_y() * kRowsOfBlock + down; row < m; row += stride) {
        const Eight values = load_eight<T>(a + row * k + column, k - column, a_aligned);
        int codes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            codes[i] =
                is_outlier(values.value[i], threshold) ? 0 : code_of(values.value[i], s.value[i], statistic.value[i]);
        }
        store_eight_bytes(reinterpret_cast<uint8_t *>(out) + row * k + column, pack_bytes(codes), k - column,
                          out_aligned);
    }
}

}  // namespace

qc_status quantize_rows(Queue &queue, int32_t dtype, uintptr_t a, int64_t m, int64_t k, float threshold, int8_t *out,
                        float *row_stats, uint8_t *outlier_cols, OutlierColumns *list) {
    qc_status status = QC_OK;
    if (outlier_cols != nullptr && k > 0) {
        status = queue.zero(outlier_cols, k);
    }
    if (status != QC_OK || m == 0) {
        return status;
    }
    const int team = k <= kRowOfWave ? kWave : kThreads;
    const bool rows_aligned = k % 8 == 0;
    status = with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return queue.launch(rows_kernel<T, kWave>, {queue.resident_blocks(m, kThreads / team)}, kThreads,
                            pointer<const T>(a), m, k, threshold, team, out, row_stats, outlier_cols,
                            rows_aligned && aligned(a, 16),
                            rows_aligned && aligned(reinterpret_cast<uintptr_t>(out), 8));
    });
    if (status != QC_OK || threshold == 0.0f || k == 0) {
        return status;
    }
    return queue.launch(clear_columns_kernel, {ceil_div(k, kThreads), std::min<int64_t>(m, kClearedAtOnce)}, kThreads,
                        outlier_cols, m, k, out, list);
}

qc_status int8_quantize_rows(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                             float threshold, uintptr_t out, uintptr_t row_stats, uintptr_t outlier_cols) {
    constexpr char kOp[] = "int8_quantize_rows";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("k", k).extent("m, k", m, k);
        arguments.threshold("threshold", threshold).array("a", a, elements(m, k), dtype_size(dtype));
        arguments.array("out", out, elements(m, k), 1).array("row_stats", row_stats, m, sizeof(float));
        if (threshold > 0.0f) {
            arguments.array("outlier_cols", outlier_cols, k, 1);
        }
        if (!arguments.ok()) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        return quantize_rows(queue, dtype, a, m, k, threshold, pointer<int8_t>(out), pointer<float>(row_stats),
                             pointer<uint8_t>(outlier_cols), nullptr);
    });
}

qc_status int8_quantize_cols(int32_t device, uintptr_t stream, int32_t dtype, uintptr_t a, int64_t m, int64_t k,
                             float threshold, uintptr_t out, uintptr_t col_stats) {
    constexpr char kOp[] = "int8_quantize_cols";
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("k", k).extent("m, k", m, k);
        arguments.threshold("threshold", threshold).array("a", a, elements(m, k), dtype_size(dtype));
        arguments.array("out", out, elements(m, k), 1).array("col_stats", col_stats, k, sizeof(float));
        if (!arguments.ok() || k == 0) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        const qc_status cleared = queue.zero(pointer<void>(col_stats), k * static_cast<int64_t>(sizeof(float)));
        if (cleared != QC_OK || m == 0) {
            return cleared;
        }
        const int64_t across = ceil_div(k, kColumnsOfBlock);
        const Grid grid = {across, ceil_div(queue.resident_blocks(m * across, kRowsOfBlock), across)};
        const bool rows_aligned = k % 8 == 0;
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const bool a_aligned = rows_aligned && aligned(a, 16);
            const qc_status status = queue.launch(column_stats_kernel<T>, grid, kThreads, pointer<const T>(a), m, k,
                                                  threshold, pointer<float>(col_stats), a_aligned);
            if (status != QC_OK) {
                return status;
            }
            return queue.launch(column_codes_kernel<T>, grid, kThreads, pointer<const T>(a), m, k, threshold,
                                pointer<const float>(col_stats), pointer<int8_t>(out), a_aligned,
                                rows_aligned && aligned(out, 8));
        });
    });
}

}  // namespace qcore::gpu
