// The matrix units of matrix.cuh on NVIDIA: mma.sync, by the capability that a kernel is compiled for.
//
//   sm_80 and newer   m16n8k16 for float16 and bfloat16, m16n8k32 for int8
//   sm_75             float16 as two m16n8k8, int8 as four m8n8k16; bfloat16 has no unit, and has_matrix_unit() says
//   so:
//                     the host never launches it there
#ifndef QCORE_KERNELS_MATRIX_CUDA_CUH
#define QCORE_KERNELS_MATRIX_CUDA_CUH

namespace qcore::gpu {

template <class T, int W>
struct MatrixUnit;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

template <>
struct MatrixUnit<Half, 32> : MatrixLayout<32> {
    QC_DEVICE static void multiply_add(float (&c)[4], const Slice (&a)[2], Slice b) {
        step(c, a[0].low, a[1].low, b.low);
        step(c, a[0].high, a[1].high, b.high);
    }

   private:
    QC_DEVICE static void step(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b));
    }
};

template <>
struct MatrixUnit<BFloat16, 32> : MatrixLayout<32> {
    QC_DEVICE static void multiply_add(float (&)[4], const Slice (&)[2], Slice) { __trap(); }
};

template <>
struct MatrixUnit<int8_t, 32> : MatrixLayout<32> {
    QC_DEVICE static void multiply_add(int32_t (&c)[4], const Slice (&a)[2], Slice b) {
        step(c[0], c[1], a[0].low, b.low);
        step(c[0], c[1], a[0].high, b.high);
        step(c[2], c[3], a[1].low, b.low);
        step(c[2], c[3], a[1].high, b.high);
    }

   private:
    QC_DEVICE static void step(int32_t &c0, int32_t &c1, uint32_t a, uint32_t b) {
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(c0), "+r"(c1)
                     : "r"(a), "r"(b));
    }
};

#else

template <>
struct MatrixUnit<Half, 32> : MatrixLayout<32> {
    QC_DEVICE static void multiply_add(float (&c)[4], const Slice (&a)[2], Slice b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0].low), "r"(a[1].low), "r"(a[0].high), "r"(a[1].high), "r"(b.low), "r"(b.high));
    }
};

template <>
struct MatrixUnit<BFloat16, 32> : MatrixLayout<32> {
    QC_DEVICE static void multiply_add(float (&c)[4], const Slice (&a)[2], Slice b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0].low), "r"(a[1].low), "r"(a[0].high), "r"(a[1].high), "r"(b.low), "r"(b.high));
    }
};

template <>
struct MatrixUnit<int8_t, 32> : MatrixLayout<32> {
    QC_DEVICE static void multiply_add(int32_t (&c)[4], const Slice (&a)[2], Slice b) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0].low), "r"(a[1].low), "r"(a[0].high), "r"(a[1].high), "r"(b.low), "r"(b.high));
    }
};

#endif

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_MATRIX_CUDA_CUH
