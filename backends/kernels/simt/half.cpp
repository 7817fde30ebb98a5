// float16 in plain C++, for processors and compilers without it: a table one way, bit arithmetic the other.
#include <cmath>
#include <memory>

#include "device.h"

namespace qcore::gpu {
namespace {

float decode(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = 0.0f;
    if (exponent == 31) {
        value = fraction != 0 ? NAN : INFINITY;
    } else if (exponent == 0) {
        value = std::ldexp(static_cast<float>(fraction), -24);
    } else {
        value = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    }
    return bits & 0x8000 ? -value : value;
}

struct Table {
    Table() {
        for (int i = 0; i < 1 << 16; ++i) {
            value[i] = decode(static_cast<uint16_t>(i));
        }
    }
    float value[1 << 16];
};

}  // namespace

float half_bits_to_float(uint16_t bits) {
    static const std::unique_ptr<Table> table = std::make_unique<Table>();
    return table->value[bits];
}

uint16_t float_to_half_bits(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) {
        return static_cast<uint16_t>(sign | 0x7E00);
    }
    if (rest >= 0x477FF000) {  // 65520, where the tie goes to infinity
        return static_cast<uint16_t>(sign | 0x7C00);
    }
    if (rest < 0x38800000) {  // below 2^-14: a whole number of 2^-24, which the addition of 0.5 rounds to
        const float shifted = bits_to_float(rest) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3F000000));
    }
    const uint32_t rounded = rest + 0xFFF + (rest >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

}  // namespace qcore::gpu
