// Element types and their conversions, one value at a time (QC-NUM-002, QC-NUM-003). For kernel files.
#ifndef QCORE_CPU_SCALAR_H
#define QCORE_CPU_SCALAR_H

#include <cstdint>
#include <cstring>

namespace qcore::cpu {

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

namespace QC_ISA {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline constexpr uint32_t kMagnitude = 0x7FFFFFFF;
inline constexpr uint32_t kInfinity = 0x7F800000;

inline float to_float(float x) { return x; }

inline float to_float(Bfloat x) { return float_of(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7FFFu;
    if (magnitude >= 0x7C00) {  // infinity, NaN
        return float_of(sign | kInfinity | (magnitude & 0x3FF) << 13);
    }
    if (magnitude >= 0x0400) {
        return float_of(sign | ((magnitude << 13) + (112u << 23)));
    }
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // denormal: exact
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

template <>
inline Bfloat from_float<Bfloat>(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & kMagnitude) > kInfinity) {
        return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    }
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000;
    uint32_t magnitude = bits_of(x) & kMagnitude;
    if (magnitude > kInfinity) {
        magnitude = 0x7E00;
    } else if (magnitude >= 0x477FF000) {  // 65520 and more round to infinity
        magnitude = 0x7C00;
    } else if (magnitude >= 0x38800000) {  // 2^-14 and more: normal
        magnitude = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    } else {  // denormal: the last place of a float in [1/2, 1) is that of a half denormal, 2^-24
        magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    }
    return {static_cast<uint16_t>(sign | magnitude)};
}

}  // namespace QC_ISA
}  // namespace qcore::cpu

#endif  // QCORE_CPU_SCALAR_H
