// The portable kernel language on the SIMT emulation (machine.h); ../portable.cuh says what each name means.
#ifndef QCORE_SIMT_DEVICE_H
#define QCORE_SIMT_DEVICE_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "copies.h"
#include "machine.h"

#define QC_DEVICE inline
#define QC_CONSTANT static constexpr
#define QC_KERNEL(threads) void
#define QC_KERNEL_RESIDENT(threads, blocks) void
#define QC_PARAMETER(Type) const Type
#define QC_SHARED(Type, name)                                                                  \
    static_assert(std::is_trivial<Type>::value && sizeof(Type) <= ::qcore::simt::kSharedBytes, \
                  "shared memory: a plain struct of at most 48 KiB");                          \
    Type &name = *static_cast<Type *>(::qcore::simt::shared_memory(sizeof(Type)))

namespace qcore::gpu {

#ifndef QC_WAVE_SIZE
#error "QC_WAVE_SIZE: 32 or 64"
#endif
inline constexpr int kWave = QC_WAVE_SIZE;

struct alignas(16) Vector16 {
    uint32_t x, y, z, w;
};
struct alignas(8) Vector8 {
    uint32_t x, y;
};

QC_DEVICE int thread_index() { return simt::thread_index(); }
QC_DEVICE int64_t block_index_x() { return simt::block_index_x(); }
QC_DEVICE int64_t block_index_y() { return simt::block_index_y(); }
QC_DEVICE int64_t block_count_x() { return simt::block_count_x(); }
QC_DEVICE int64_t block_count_y() { return simt::block_count_y(); }

template <class T>
QC_DEVICE const T &only_parameter(const T &given) {
    return given;
}

QC_DEVICE void block_barrier(int site = __builtin_LINE()) { simt::wait_for_block(site); }

// What every lane of the wave shows; [i] is lane i's.
template <class T>
class Shown {
   public:
    explicit Shown(const char *slots) : slots_(slots) {}
    const T &operator[](int lane) const {
        return *reinterpret_cast<const T *>(slots_ + static_cast<size_t>(lane) * simt::kSlotBytes);
    }

   private:
    const char *slots_;
};

template <class T>
Shown<T> show_wave(const T &value, int site) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= simt::kSlotBytes, "does not fit a slot");
    return Shown<T>(simt::exchange(&value, sizeof value, site));
}

template <int W, class T>
QC_DEVICE T wave_xor(T value, int mask, int site = __builtin_LINE()) {
    const int lane = simt::thread_index() % W;
    return show_wave(value, site)[lane ^ mask];
}

QC_DEVICE void atomic_max(int32_t *address, int32_t value) {
    int32_t seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

QC_DEVICE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
QC_DEVICE uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
QC_DEVICE float multiply_add(float a, float b, float c) { return a * b + c; }
QC_DEVICE float round_to_even(float x) { return std::nearbyint(x); }
QC_DEVICE float magnitude(float x) { return std::fabs(x); }
QC_DEVICE float square_root(float x) { return std::sqrt(x); }
QC_DEVICE double square_root(double x) { return std::sqrt(x); }

template <class T>
T load_word(const void *address) {
    simt::check_access(address, sizeof(T));
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}
template <class T>
void store_word(void *address, T value) {
    simt::check_access(address, sizeof(T));
    std::memcpy(address, &value, sizeof value);
}

QC_DEVICE Vector16 load16(const void *address) { return load_word<Vector16>(address); }
QC_DEVICE Vector16 load16_once(const void *address) { return load16(address); }
QC_DEVICE uint32_t load4_once(const void *address) { return load_word<uint32_t>(address); }
QC_DEVICE Vector8 load8_once(const void *address) { return load_word<Vector8>(address); }
QC_DEVICE void store16(void *address, Vector16 value) { store_word(address, value); }
QC_DEVICE void store8(void *address, Vector8 value) { store_word(address, value); }
QC_DEVICE void store4(void *address, uint32_t value) { store_word(address, value); }

QC_DEVICE void copy16_async(void *to, const void *from, bool there) {
    simt::check_access(to, 16);
    simt::check_access(from, 16);
    simt::copies().add(to, there ? from : nullptr);
}
QC_DEVICE void close_copies() { simt::copies().close(); }
template <int N>
QC_DEVICE void wait_for_copies() {
    simt::copies().wait(N);
}

float half_bits_to_float(uint16_t bits);
uint16_t float_to_half_bits(float value);

QC_DEVICE float bfloat16_bits_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
QC_DEVICE uint16_t float_to_bfloat16_bits(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) {
        return static_cast<uint16_t>(bits >> 16 | 0x40);
    }
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Runs a kernel; "" or the text of what went wrong.
template <class... Parameters, class... Arguments>
std::string launch_simt(void (*kernel)(Parameters...), int64_t blocks_x, int64_t blocks_y, int threads, int workers,
                        const Arguments &...arguments) {
    const auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
    using Call = decltype(call);
    const auto body = [](const void *context) { (*static_cast<Call *>(context))(); };
    return simt::run({blocks_x, blocks_y, threads, kWave}, body, &call, workers);
}

}  // namespace qcore::gpu

#endif  // QCORE_SIMT_DEVICE_H
