// The matrix units of ../matrix.cuh in plain C++: each lane shows its slices to the wave, then adds up its
// own sums.
#ifndef QCORE_SIMT_MATRIX_H
#define QCORE_SIMT_MATRIX_H

namespace qcore::gpu {

// One slice as numbers: 4 of a 16-bit type, 8 of int8.
template <class T>
struct SliceNumbers {
    static constexpr int kCount = 4;
    float value[kCount];
    explicit SliceNumbers(Slice s) {
        split_word<T>(s.low, value[0], value[1]);
        split_word<T>(s.high, value[2], value[3]);
    }
    SliceNumbers() = default;
};
template <>
struct SliceNumbers<int8_t> {
    static constexpr int kCount = 8;
    int8_t value[kCount];
    explicit SliceNumbers(Slice s) {
        std::memcpy(value, &s.low, 4);
        std::memcpy(value + 4, &s.high, 4);
    }
    SliceNumbers() = default;
};

template <class T, int W>
struct MatrixUnit : MatrixLayout<W> {
    using Layout = MatrixLayout<W>;
    using Sum = typename SumOf<T>::type;

    static void multiply_add(Sum (&c)[Layout::kSums], const Slice (&a)[Layout::kRowsPerLane], Slice b,
                             int site = __builtin_LINE()) {
        struct Operands {
            SliceNumbers<T> a[Layout::kRowsPerLane];
            SliceNumbers<T> b;
        };
        Operands mine;
        for (int r = 0; r < Layout::kRowsPerLane; ++r) {
            mine.a[r] = SliceNumbers<T>(a[r]);
        }
        mine.b = SliceNumbers<T>(b);
        const int lane = simt::thread_index() % W;
        const Shown<Operands> wave = show_wave(mine, site);
        for (int i = 0; i < Layout::kSums; ++i) {
            const int row = Layout::c_row(lane, i), column = Layout::c_column(lane, i);
            for (int group = 0; group < Layout::kGroups; ++group) {
                const SliceNumbers<T> &x = wave[Layout::lane_of_row(row, group)].a[Layout::index_of_row(row)];
                const SliceNumbers<T> &y = wave[Layout::lane_of_column(column, group)].b;
                for (int j = 0; j < SliceNumbers<T>::kCount; ++j) {
                    c[i] += static_cast<Sum>(x.value[j]) * static_cast<Sum>(y.value[j]);
                }
            }
        }
    }
};

}  // namespace qcore::gpu

#endif  // QCORE_SIMT_MATRIX_H
