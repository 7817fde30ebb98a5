// Matrix units behind one name, on every target: a wave multiplies 16 rows of A by kColumns columns of B.
//
//   multiply_add_pair<Unit>(c, a, b)             c += A B^T over two slices of every lane
//   MatrixUnit<T, W>::multiply_add(c, a, b)      over one, where Unit::kTakesPairs is false
//
// What a lane holds is the same for every unit: `Slice` is 8 neighbouring bytes along the depth of one row of A or one
// column of B; the kGroups lanes of a row hold slices of their own, and which are whose is `group(lane)`. Since a sum
// does not care in which order its terms stand, a kernel may give each lane slices of its own stretch of memory, as
// long as A and B agree: so operands come from memory by 16-byte loads, straight into registers, without a way through
// shared memory.
//
//   wave  columns  rows a lane  row(lane, r)      column(lane)  group(lane)  unit
//   32    8        2            lane/4 + 8 r      lane/4        lane%4       mma.sync m16n8k16, m16n8k32 (m16n8k8 and
//                                                                            m8n8k16 on sm_75)
//   64    16       1            lane%16           lane%16       lane/16      MFMA 16x16x16, 16x16x32
//   32    16       1            lane%16           lane%16       lane/16      WMMA 16x16x16: QC_MATRIX_WMMA
//
// c[i] of a lane, of kSums, is the sum at row c_row(lane, i), column c_column(lane, i).
#ifndef QCORE_KERNELS_MATRIX_CUH
#define QCORE_KERNELS_MATRIX_CUH

#include "numbers.cuh"

#if defined(__HIP__) && QC_WAVE_SIZE == 32
#define QC_MATRIX_WMMA
#endif

namespace qcore::gpu {

struct Slice {
    uint32_t low, high;
};

template <int W>
struct MatrixLayout;

#if defined(QC_MATRIX_WMMA)
template <>
struct MatrixLayout<32> {
    static constexpr int kColumns = 16;
    static constexpr int kRowsPerLane = 1;
    static constexpr int kGroups = 2;
    static constexpr int kSums = 8;
    static constexpr bool kTakesPairs = false;  // the emulation's; the hardware's unit does
    QC_DEVICE static int row(int lane, int) { return lane % 16; }
    QC_DEVICE static int column(int lane) { return lane % 16; }
    QC_DEVICE static int group(int lane) { return lane / 16; }
#if defined(__GFX12__)
    QC_DEVICE static int c_row(int lane, int i) { return 8 * (lane / 16) + i; }
#else
    QC_DEVICE static int c_row(int lane, int i) { return 2 * i + lane / 16; }
#endif
    QC_DEVICE static int c_column(int lane, int) { return lane % 16; }
    QC_DEVICE static int lane_of_row(int row, int group) { return 16 * group + row; }
    QC_DEVICE static int index_of_row(int) { return 0; }
    QC_DEVICE static int lane_of_column(int column, int group) { return 16 * group + column; }
};
#else
template <>
struct MatrixLayout<32> {
    static constexpr int kColumns = 8;
    static constexpr int kRowsPerLane = 2;
    static constexpr int kGroups = 4;
    static constexpr int kSums = 4;
    static constexpr bool kTakesPairs = false;
    QC_DEVICE static int row(int lane, int r) { return lane / 4 + 8 * r; }
    QC_DEVICE static int column(int lane) { return lane / 4; }
    QC_DEVICE static int group(int lane) { return lane % 4; }
    QC_DEVICE static int c_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
    QC_DEVICE static int c_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }
    // Which lane holds slice `group` of a row, and as its which; likewise of a column.
    QC_DEVICE static int lane_of_row(int row, int group) { return 4 * (row % 8) + group; }
    QC_DEVICE static int index_of_row(int row) { return row / 8; }
    QC_DEVICE static int lane_of_column(int column, int group) { return 4 * column + group; }
};
#endif

template <>
struct MatrixLayout<64> {
    static constexpr int kColumns = 16;
    static constexpr int kRowsPerLane = 1;
    static constexpr int kGroups = 4;
    static constexpr int kSums = 4;
    static constexpr bool kTakesPairs = false;
    QC_DEVICE static int row(int lane, int) { return lane % 16; }
    QC_DEVICE static int column(int lane) { return lane % 16; }
    QC_DEVICE static int group(int lane) { return lane / 16; }
    QC_DEVICE static int c_row(int lane, int i) { return 4 * (lane / 16) + i; }
    QC_DEVICE static int c_column(int lane, int) { return lane % 16; }
    QC_DEVICE static int lane_of_row(int row, int group) { return 16 * group + row; }
    QC_DEVICE static int index_of_row(int) { return 0; }
    QC_DEVICE static int lane_of_column(int column, int group) { return 16 * group + column; }
};

template <class T>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<int8_t> {
    using type = int32_t;
};

}  // namespace qcore::gpu

#if defined(QC_TARGET_SIMT)
#include "simt/matrix.h"
#elif defined(__CUDACC__)
#include "matrix_cuda.cuh"
#else
#include "matrix_hip.cuh"
#endif

namespace qcore::gpu {

// A unit that takes pairs has operands of 16 bytes a lane.
template <class Unit, class Sum>
QC_DEVICE void multiply_add_pair(Sum (&c)[Unit::kSums], const Slice (&a)[2][Unit::kRowsPerLane], const Slice (&b)[2]) {
    if constexpr (Unit::kTakesPairs) {
        Unit::multiply_add(c, a, b);
    } else {
        Unit::multiply_add(c, a[0], b[0]);
        Unit::multiply_add(c, a[1], b[1]);
    }
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_MATRIX_CUH
