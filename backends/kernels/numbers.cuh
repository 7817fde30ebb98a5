// Element types, and eight of them at a time: the unit that a thread of the memory-bound kernels reads and writes.
//
// Eight elements are 16 bytes of a 16-bit type and two times 16 of float32: neighbouring threads read neighbouring
// pieces, so a wave's loads cover whole cache lines. Where an array is not aligned for that (the ABI asks only for the
// alignment of the element), and at the end of an array, the same eight are read one by one: the values, and so the
// results, do not depend on it.
#ifndef QCORE_KERNELS_NUMBERS_CUH
#define QCORE_KERNELS_NUMBERS_CUH

#include "portable.cuh"

namespace qcore::gpu {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

QC_DEVICE float to_float(float x) { return x; }
QC_DEVICE float to_float(Half x) { return half_bits_to_float(x.bits); }
QC_DEVICE float to_float(BFloat16 x) { return bfloat16_bits_to_float(x.bits); }

template <class T>
QC_DEVICE T from_float(float x);  // QC-NUM-003
template <>
QC_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
QC_DEVICE Half from_float<Half>(float x) {
    return {float_to_half_bits(x)};
}
template <>
QC_DEVICE BFloat16 from_float<BFloat16>(float x) {
    return {float_to_bfloat16_bits(x)};
}

// Two 16-bit elements as the word that holds them, the first in the low half.
template <class T>
QC_DEVICE uint32_t pack_two(float first, float second) {
    return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

QC_DEVICE bool is_nan(float x) { return !(x == x); }

struct Eight {
    float value[8];
};

template <class T>
QC_DEVICE void split_word(uint32_t word, float &first, float &second) {
    first = to_float(T{static_cast<uint16_t>(word & 0xFFFF)});
    second = to_float(T{static_cast<uint16_t>(word >> 16)});
}

// The eight elements from `x`, at an aligned address.
template <class T>
QC_DEVICE Eight load_aligned(const T *x) {
    Eight out;
    const Vector16 v = load16_once(x);
    split_word<T>(v.x, out.value[0], out.value[1]);
    split_word<T>(v.y, out.value[2], out.value[3]);
    split_word<T>(v.z, out.value[4], out.value[5]);
    split_word<T>(v.w, out.value[6], out.value[7]);
    return out;
}
template <>
QC_DEVICE Eight load_aligned<float>(const float *x) {
    const Vector16 a = load16_once(x), b = load16_once(x + 4);
    return {{bits_to_float(a.x), bits_to_float(a.y), bits_to_float(a.z), bits_to_float(a.w), bits_to_float(b.x),
             bits_to_float(b.y), bits_to_float(b.z), bits_to_float(b.w)}};
}

// The elements x[0] to x[count - 1], zeros after them; `count` may be 8 or more, or not positive.
template <class T>
QC_DEVICE Eight load_eight(const T *x, int64_t count, bool aligned) {
    if (aligned && count >= 8) {
        return load_aligned<T>(x);
    }
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out.value[i] = i < count ? to_float(x[i]) : 0.0f;
    }
    return out;
}

template <class T>
QC_DEVICE void store_aligned(T *out, const Eight &x) {
    store16(out, Vector16{pack_two<T>(x.value[0], x.value[1]), pack_two<T>(x.value[2], x.value[3]),
                          pack_two<T>(x.value[4], x.value[5]), pack_two<T>(x.value[6], x.value[7])});
}
template <>
QC_DEVICE void store_aligned<float>(float *out, const Eight &x) {
    store16(out, Vector16{float_to_bits(x.value[0]), float_to_bits(x.value[1]), float_to_bits(x.value[2]),
                          float_to_bits(x.value[3])});
    store16(out + 4, Vector16{float_to_bits(x.value[4]), float_to_bits(x.value[5]), float_to_bits(x.value[6]),
                              float_to_bits(x.value[7])});
}

template <class T>
QC_DEVICE void store_eight(T *out, const Eight &x, int64_t count, bool aligned) {
    if (aligned && count >= 8) {
        store_aligned<T>(out, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count) {
            out[i] = from_float<T>(x.value[i]);
        }
    }
}

// Eight bytes, likewise.
struct EightBytes {
    uint32_t low, high;
    QC_DEVICE int byte(int i) const { return static_cast<int>((i < 4 ? low : high) >> 8 * (i & 3) & 255); }
};

QC_DEVICE EightBytes pack_bytes(const int (&code)[8]) {
    EightBytes out = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.low |= static_cast<uint32_t>(code[i] & 255) << 8 * i;
        out.high |= static_cast<uint32_t>(code[i + 4] & 255) << 8 * i;
    }
    return out;
}

QC_DEVICE EightBytes load_eight_bytes(const uint8_t *x, int64_t count, bool aligned) {
    if (aligned && count >= 8) {
        const Vector8 v = load8_once(x);
        return {v.x, v.y};
    }
    int code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        code[i] = i < count ? x[i] : 0;
    }
    return pack_bytes(code);
}

QC_DEVICE void store_eight_bytes(uint8_t *out, EightBytes x, int64_t count, bool aligned) {
    if (aligned && count >= 8) {
        store8(out, Vector8{x.low, x.high});
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count) {
            out[i] = static_cast<uint8_t>(x.byte(i));
        }
    }
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_NUMBERS_CUH
