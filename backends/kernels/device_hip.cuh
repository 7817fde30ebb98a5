// The portable kernel language on HIP; portable.cuh says what each name means.
//
// Compiled by clang for AMD GPUs alone. QC_WAVE_SIZE is the size of a wave of the targets of one compilation: 64 on
// CDNA (gfx9), 32 on RDNA (gfx10 and later). All of the compiler's defaults that a clause relies on are also flags of
// the build: IEEE division, denormals kept, no contraction.
#ifndef QCORE_KERNELS_DEVICE_HIP_CUH
#define QCORE_KERNELS_DEVICE_HIP_CUH

#include <hip/hip_runtime.h>

#include <cstdint>
#include <type_traits>

#define QC_DEVICE __device__ __forceinline__
#define QC_CONSTANT static __device__ constexpr
#define QC_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define QC_KERNEL_RESIDENT(threads, blocks) QC_KERNEL(threads)
#define QC_PARAMETER(Type) const Type
#define QC_SHARED(Type, name)                                               \
    static_assert(std::is_trivial<Type>::value && sizeof(Type) <= 48 << 10, \
                  "shared memory: a plain struct of at most 48 KiB");       \
    __shared__ Type name

#ifndef QC_WAVE_SIZE
#error "QC_WAVE_SIZE: 32 or 64"
#endif
#if defined(__HIP_DEVICE_COMPILE__) && defined(__AMDGCN_WAVEFRONT_SIZE) && __AMDGCN_WAVEFRONT_SIZE != QC_WAVE_SIZE
#error "QC_WAVE_SIZE is not the size of this target's waves"
#endif

namespace qcore::gpu {

inline constexpr int kWave = QC_WAVE_SIZE;

struct alignas(16) Vector16 {
    uint32_t x, y, z, w;
};
struct alignas(8) Vector8 {
    uint32_t x, y;
};

QC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
QC_DEVICE int64_t block_index_x() { return blockIdx.x; }
QC_DEVICE int64_t block_index_y() { return blockIdx.y; }
QC_DEVICE int64_t block_count_x() { return gridDim.x; }
QC_DEVICE int64_t block_count_y() { return gridDim.y; }

// The parameter where the host has put it. By its name a kernel would get a copy in scratch memory, for it indexes the
// arrays at run time.
template <class T>
QC_DEVICE const T &only_parameter(const T &given) {
#if defined(__HIP_DEVICE_COMPILE__)
    static_cast<void>(given);
    return *(const T *)__builtin_amdgcn_kernarg_segment_ptr();
#else
    return given;
#endif
}

QC_DEVICE void block_barrier() { __syncthreads(); }

// The word of lane `lane ^ mask`. A mask that the compiler knows, which is every one of an unrolled loop, is a data
// path of the vector unit or a swizzle; another goes through the crossbar of shared memory with an address.
template <int W>
QC_DEVICE int wave_xor_word(int word, int mask) {
#if defined(__HIP_DEVICE_COMPILE__)
    if (__builtin_constant_p(mask)) {
        switch (mask) {
            case 1:
                return __builtin_amdgcn_mov_dpp(word, 0xB1, 0xF, 0xF, true);  // quad_perm [1, 0, 3, 2]
            case 2:
                return __builtin_amdgcn_mov_dpp(word, 0x4E, 0xF, 0xF, true);  // quad_perm [2, 3, 0, 1]
            case 4:
                return __builtin_amdgcn_ds_swizzle(word, 0x101F);  // xor 4
            case 8:
                return __builtin_amdgcn_mov_dpp(word, 0x128, 0xF, 0xF, true);  // row_ror 8
            case 16:
                return __builtin_amdgcn_ds_swizzle(word, 0x401F);  // xor 16
            default:
                break;
        }
    }
    const int lane = thread_index() % W;
    return __builtin_amdgcn_ds_bpermute(4 * (lane ^ mask), word);
#else
    return word + mask;  // for the host's pass, which compiles kernels but never runs them
#endif
}

template <int W, class T>
QC_DEVICE T wave_xor(T value, int mask) {
    static_assert(W == kWave, "the wave that the host launches for");
    static_assert(sizeof(T) == sizeof(int), "a word");
    return __builtin_bit_cast(T, wave_xor_word<W>(__builtin_bit_cast(int, value), mask));
}

QC_DEVICE void atomic_max(int32_t *address, int32_t value) {
    __hip_atomic_fetch_max(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

QC_DEVICE float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
QC_DEVICE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }
QC_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
QC_DEVICE float round_to_even(float x) { return __builtin_rintf(x); }
QC_DEVICE float magnitude(float x) { return __builtin_fabsf(x); }
QC_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
QC_DEVICE double square_root(double x) { return __builtin_sqrt(x); }

using Words4 = uint32_t __attribute__((ext_vector_type(4)));
using Words2 = uint32_t __attribute__((ext_vector_type(2)));

QC_DEVICE Vector16 load16(const void *address) { return *static_cast<const Vector16 *>(address); }
QC_DEVICE Vector16 load16_once(const void *address) {
    return __builtin_bit_cast(Vector16, __builtin_nontemporal_load(static_cast<const Words4 *>(address)));
}
QC_DEVICE Vector8 load8_once(const void *address) {
    return __builtin_bit_cast(Vector8, __builtin_nontemporal_load(static_cast<const Words2 *>(address)));
}
QC_DEVICE uint32_t load4_once(const void *address) {
    return __builtin_nontemporal_load(static_cast<const uint32_t *>(address));
}
QC_DEVICE void store16(void *address, Vector16 value) { *static_cast<Vector16 *>(address) = value; }
QC_DEVICE void store8(void *address, Vector8 value) { *static_cast<Vector8 *>(address) = value; }
QC_DEVICE void store4(void *address, uint32_t value) { *static_cast<uint32_t *>(address) = value; }

// Through registers.
QC_DEVICE void copy16_async(void *to, const void *from, bool there) {
    store16(to, there ? load16(from) : Vector16{0, 0, 0, 0});
}
QC_DEVICE void close_copies() {}
template <int N>
QC_DEVICE void wait_for_copies() {}

QC_DEVICE float half_bits_to_float(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
QC_DEVICE uint16_t float_to_half_bits(float value) {
    return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}
QC_DEVICE float bfloat16_bits_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
QC_DEVICE uint16_t float_to_bfloat16_bits(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : bits >> 16 | 0x40);
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_DEVICE_HIP_CUH
