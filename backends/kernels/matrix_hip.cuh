// The matrix units of matrix.cuh on AMD, by the target that a kernel is compiled for. A vector of `__attribute__` types
// holds what the instruction reads, in the order of memory.
//
//   gfx942            MFMA 16x16x16 for float16 and bfloat16, 16x16x32 for int8: one slice of a lane each
//   gfx90a            bfloat16 the same; int8 as two 16x16x16; float16 as four 16x16x4 of float32, because its 16-bit
//                     units take denormals for zeros, and a float16 of 2^-15 is a denormal
//   gfx12             WMMA 16x16x16: the two halves of a wave hold the two halves of a row
//   gfx11             the same, but both halves hold the whole row: each gets the other's half by permlanex16
//   gfx10             int8 by dot products of four, rows handed along by the data paths of the vector unit; 16-bit
//   types
//                     have no unit, and has_matrix_unit() says so: the host never launches it there
//
// Not run on hardware yet: the layouts are those of AMD's ISA documents.
#ifndef QCORE_KERNELS_MATRIX_HIP_CUH
#define QCORE_KERNELS_MATRIX_HIP_CUH

namespace qcore::gpu {

template <class T, int W>
struct MatrixUnit;

template <class E, int N>
using Lanes = E __attribute__((ext_vector_type(N)));

#if !defined(__HIP_DEVICE_COMPILE__)

// The host's pass compiles kernels but never runs them.
template <class T, int W>
struct MatrixUnit : MatrixLayout<W> {
    using Sum = typename SumOf<T>::type;
    QC_DEVICE static void multiply_add(Sum (&)[MatrixLayout<W>::kSums], const Slice (&)[MatrixLayout<W>::kRowsPerLane],
                                       Slice) {}
};

#elif QC_WAVE_SIZE == 64

template <class T>
struct MatrixUnit<T, 64> : MatrixLayout<64> {
    using Sum = typename SumOf<T>::type;
    QC_DEVICE static void multiply_add(Sum (&c)[4], const Slice (&a)[1], Slice b) {
        Lanes<Sum, 4> sums = {c[0], c[1], c[2], c[3]};
        step(sums, T(), a[0], b);
        c[0] = sums[0];
        c[1] = sums[1];
        c[2] = sums[2];
        c[3] = sums[3];
    }

   private:
    QC_DEVICE static void step(Lanes<float, 4> &c, Half, Slice a, Slice b) {
#if defined(__gfx90a__)
        float x, y, z, w;
        float p, q, r, s;
        split_word<Half>(a.low, x, y);
        split_word<Half>(a.high, z, w);
        split_word<Half>(b.low, p, q);
        split_word<Half>(b.high, r, s);
        c = __builtin_amdgcn_mfma_f32_16x16x4f32(x, p, c, 0, 0, 0);
        c = __builtin_amdgcn_mfma_f32_16x16x4f32(y, q, c, 0, 0, 0);
        c = __builtin_amdgcn_mfma_f32_16x16x4f32(z, r, c, 0, 0, 0);
        c = __builtin_amdgcn_mfma_f32_16x16x4f32(w, s, c, 0, 0, 0);
#else
        using Four = Lanes<_Float16, 4>;
        c = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(Four, a), __builtin_bit_cast(Four, b), c, 0, 0, 0);
#endif
    }
    QC_DEVICE static void step(Lanes<float, 4> &c, BFloat16, Slice a, Slice b) {
        using Four = Lanes<short, 4>;
        c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(Four, a), __builtin_bit_cast(Four, b), c, 0, 0,
                                                      0);
    }
    QC_DEVICE static void step(Lanes<int32_t, 4> &c, int8_t, Slice a, Slice b) {
#if defined(__gfx90a__)
        c = __builtin_amdgcn_mfma_i32_16x16x16i8(static_cast<int>(a.low), static_cast<int>(b.low), c, 0, 0, 0);
        c = __builtin_amdgcn_mfma_i32_16x16x16i8(static_cast<int>(a.high), static_cast<int>(b.high), c, 0, 0, 0);
#else
        c = __builtin_amdgcn_mfma_i32_16x16x32_i8(__builtin_bit_cast(long, a), __builtin_bit_cast(long, b), c, 0, 0, 0);
#endif
    }
};

#else  // RDNA

// Two slices of a lane: 16 bytes of a row of A or a column of B.
using Pair = Lanes<int, 4>;

QC_DEVICE Pair pair_of(Slice first, Slice second) {
    return Pair{static_cast<int>(first.low), static_cast<int>(first.high), static_cast<int>(second.low),
                static_cast<int>(second.high)};
}

// The word of the same lane in the other half of the wave.
QC_DEVICE int other_half(int word) {
    return __builtin_amdgcn_permlanex16(word, word, 0x76543210, 0xFEDCBA98, false, false);
}

template <class T>
struct MatrixUnit<T, 32> : MatrixLayout<32> {
    static constexpr bool kTakesPairs = true;  // hides the layout's
    using Sum = typename SumOf<T>::type;
    QC_DEVICE static void multiply_add(Sum (&c)[8], const Slice (&a)[2][1], const Slice (&b)[2]) {
        Lanes<Sum, 8> sums;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sums[i] = c[i];
        }
        step(sums, T(), pair_of(a[0][0], a[1][0]), pair_of(b[0], b[1]));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            c[i] = sums[i];
        }
    }

   private:
#if defined(__GFX12__)
    QC_DEVICE static void step(Lanes<float, 8> &c, Half, Pair a, Pair b) {
        using Eight16 = Lanes<_Float16, 8>;
        c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(__builtin_bit_cast(Eight16, a),
                                                             __builtin_bit_cast(Eight16, b), c);
    }
    QC_DEVICE static void step(Lanes<float, 8> &c, BFloat16, Pair a, Pair b) {
        using Eight16 = Lanes<short, 8>;
        c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(__builtin_bit_cast(Eight16, a),
                                                              __builtin_bit_cast(Eight16, b), c);
    }
    QC_DEVICE static void step(Lanes<int32_t, 8> &c, int8_t, Pair a, Pair b) {
        c = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, a.lo, true, b.lo, c, false);
        c = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, a.hi, true, b.hi, c, false);
    }
#elif defined(__GFX11__)
    using Whole = Lanes<int, 8>;  // a row: the lower half's 16 bytes, then the upper's

    QC_DEVICE static Whole whole(Pair own) {
        const bool upper = thread_index() % 32 >= 16;
        Whole out;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int other = other_half(own[i]);
            out[i] = upper ? other : own[i];
            out[i + 4] = upper ? own[i] : other;
        }
        return out;
    }
    QC_DEVICE static void step(Lanes<float, 8> &c, Half, Pair a, Pair b) {
        using Sixteen = Lanes<_Float16, 16>;
        c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(__builtin_bit_cast(Sixteen, whole(a)),
                                                       __builtin_bit_cast(Sixteen, whole(b)), c);
    }
    QC_DEVICE static void step(Lanes<float, 8> &c, BFloat16, Pair a, Pair b) {
        using Sixteen = Lanes<short, 16>;
        c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(__builtin_bit_cast(Sixteen, whole(a)),
                                                        __builtin_bit_cast(Sixteen, whole(b)), c);
    }
    // Any order of depth that A and B share will do: the lower half's bytes first, then the upper's.
    QC_DEVICE static void step(Lanes<int32_t, 8> &c, int8_t, Pair a, Pair b) {
        const Whole x = whole(a), y = whole(b);
        c = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x.lo, true, y.lo, c, false);
        c = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x.hi, true, y.hi, c, false);
    }
#else
    template <class Sums, class U>
    QC_DEVICE static void step(Sums &, U, Pair, Pair) {
        __builtin_trap();
    }
    // A lane sums its own half of the depth for all 16 rows of its column, then gives the other half of its wave the
    // rows that are that one's.
    QC_DEVICE static void step(Lanes<int32_t, 8> &c, int8_t, Pair a, Pair b) {
        const bool upper = thread_index() % 32 >= 16;
        int sum[16] = {};
        add_row<0>(sum, a, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // MatrixLayout<32>::c_row: 2 i in the lower half, 2 i + 1 in the upper
            const int given = upper ? sum[2 * i] : sum[2 * i + 1], kept = upper ? sum[2 * i + 1] : sum[2 * i];
            c[i] += kept + other_half(given);
        }
    }
    template <int Row>
    QC_DEVICE static void add_row(int (&sum)[16], Pair a, Pair b) {
        if constexpr (Row < 16) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int shared = __builtin_amdgcn_mov_dpp(a[i], 0x150 + Row, 0xF, 0xF, true);  // row_share
                sum[Row] = __builtin_amdgcn_sdot4(shared, b[i], sum[Row], false);
            }
            add_row<Row + 1>(sum, a, b);
        }
    }
#endif
};

#endif

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_MATRIX_HIP_CUH
