// The portable kernel language on CUDA; portable.cuh says what each name means.
#ifndef QCORE_KERNELS_DEVICE_CUDA_CUH
#define QCORE_KERNELS_DEVICE_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define QC_DEVICE __device__ __forceinline__
#define QC_CONSTANT static __device__ constexpr
#define QC_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define QC_KERNEL_RESIDENT(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Without a copy in local memory: reads by index come from the constant bank.
#define QC_PARAMETER(Type) const __grid_constant__ Type
#define QC_SHARED(Type, name)                                               \
    static_assert(std::is_trivial<Type>::value && sizeof(Type) <= 48 << 10, \
                  "shared memory: a plain struct of at most 48 KiB");       \
    __shared__ Type name

namespace qcore::gpu {

inline constexpr int kWave = 32;

using Vector16 = uint4;
using Vector8 = uint2;

QC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
QC_DEVICE int64_t block_index_x() { return blockIdx.x; }
QC_DEVICE int64_t block_index_y() { return blockIdx.y; }
QC_DEVICE int64_t block_count_x() { return gridDim.x; }
QC_DEVICE int64_t block_count_y() { return gridDim.y; }

template <class T>
QC_DEVICE const T &only_parameter(const T &given) {
    return given;
}

QC_DEVICE void block_barrier() { __syncthreads(); }

template <int W, class T>
QC_DEVICE T wave_xor(T value, int mask) {
    static_assert(W == 32, "a warp has 32 lanes");
    return __shfl_xor_sync(0xFFFFFFFFU, value, mask);
}

QC_DEVICE void atomic_max(int32_t *address, int32_t value) { atomicMax(address, value); }

QC_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
QC_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
QC_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QC_DEVICE float round_to_even(float x) { return rintf(x); }
QC_DEVICE float magnitude(float x) { return fabsf(x); }
QC_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
QC_DEVICE double square_root(double x) { return __dsqrt_rn(x); }

QC_DEVICE Vector16 load16(const void *address) { return *static_cast<const uint4 *>(address); }
QC_DEVICE Vector16 load16_once(const void *address) { return __ldcs(static_cast<const uint4 *>(address)); }
QC_DEVICE uint32_t load4_once(const void *address) { return __ldcs(static_cast<const unsigned *>(address)); }
QC_DEVICE Vector8 load8_once(const void *address) { return __ldcs(static_cast<const uint2 *>(address)); }
// Intrinsics: of an assignment the compiler makes stores of single words where a branch beside it stores elements.
QC_DEVICE void store16(void *address, Vector16 value) { __stwb(static_cast<uint4 *>(address), value); }
QC_DEVICE void store8(void *address, Vector8 value) { __stwb(static_cast<uint2 *>(address), value); }
QC_DEVICE void store4(void *address, uint32_t value) { *static_cast<uint32_t *>(address) = value; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
QC_DEVICE void copy16_async(void *to, const void *from, bool there) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
QC_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
QC_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
QC_DEVICE void copy16_async(void *to, const void *from, bool there) {
    *static_cast<uint4 *>(to) = there ? load16(from) : Vector16{0, 0, 0, 0};
}
QC_DEVICE void close_copies() {}
template <int N>
QC_DEVICE void wait_for_copies() {}
#endif

QC_DEVICE float half_bits_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
QC_DEVICE uint16_t float_to_half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
QC_DEVICE float bfloat16_bits_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
QC_DEVICE uint16_t float_to_bfloat16_bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_DEVICE_CUDA_CUH
