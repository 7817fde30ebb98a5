// simd.h in the vector extensions of GCC and Clang: 4 lanes, for any processor.
#ifndef QCORE_CPU_SIMD_PORTABLE_H
#define QCORE_CPU_SIMD_PORTABLE_H

#include "codebook.h"
#include "qcore_codebooks.h"
#include "scalar.h"

namespace qcore::cpu::QC_ISA {

inline constexpr int kLanes = 4;
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));

template <class T>
inline Float load(const T *p) {
    return Float{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
inline void store(T *p, Float x) {
    for (int i = 0; i < kLanes; ++i) {
        p[i] = from_float<T>(x[i]);
    }
}

inline Float broadcast(float x) { return Float{x, x, x, x}; }
inline Float multiply(Float a, Float b) { return a * b; }

inline Int zero() { return Int{}; }
inline Int magnitude(Float x) { return reinterpret_cast<Int>(x) & static_cast<int32_t>(kMagnitude); }
inline Int maximum(Int a, Int b) { return a > b ? a : b; }
inline int32_t highest(Int a) {
    const int32_t x = a[0] > a[1] ? a[0] : a[1];
    const int32_t y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}

inline Int load_codes(const uint8_t *p) { return Int{p[0], p[1], p[2], p[3]}; }
inline Float gather(const float *table, Int index) {
    return Float{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

template <int G>
inline void pack_bytes(const Int (&c)[G], uint8_t *out) {
    for (int i = 0; i < G * kLanes; ++i) {
        out[i] = static_cast<uint8_t>(c[i / kLanes][i % kLanes]);
    }
}
template <int G>
inline void pack_nibbles(const Int (&c)[G], uint8_t *out) {
    for (int i = 0; i < G * kLanes; i += 2) {
        out[i / 2] = static_cast<uint8_t>(c[i / kLanes][i % kLanes] << 4 | c[i / kLanes][i % kLanes + 1]);
    }
}

class Nf4Codes {
   public:
    Nf4Codes() {
        for (int j = 0; j < 15; ++j) {
            threshold_[j] = broadcast((QC_NF4_TABLE[j] + QC_NF4_TABLE[j + 1]) * 0.5f);
        }
    }
    Int operator()(Float y) const {
        Int code = zero();
        for (int j = 0; j < 15; ++j) {
            code -= y > threshold_[j];  // a lane that compares true is -1
        }
        return code;
    }

   private:
    Float threshold_[15];
};

class Fp4Codes {
   public:
    Fp4Codes() {
        for (int j = 0; j < 7; ++j) {
            threshold_[j] = broadcast(QC_FP4_THRESHOLDS[j]);
        }
    }
    Int operator()(Float y) const {
        const Float a = reinterpret_cast<Float>(magnitude(y));
        Int position = zero();
        for (int j = 0; j < 7; ++j) {
            position -= a > threshold_[j];
        }
        const Int code = {QC_FP4_ORDER[position[0]], QC_FP4_ORDER[position[1]], QC_FP4_ORDER[position[2]],
                          QC_FP4_ORDER[position[3]]};
        return code | ((y < 0.0f) & 8);
    }

   private:
    Float threshold_[7];
};

// codebook.h says how the table works.
class CodebookCodes {
   public:
    explicit CodebookCodes(const Codebook &book) : book_(book) {}
    Int operator()(Float y) const {
        const Int size = magnitude(y);
        const Int sign = reinterpret_cast<Int>(y) >> 31;
        Int code = zero();
        for (int i = 0; i < kLanes; ++i) {
            code[i] = size[i] == 0    ? book_.zero_code
                      : book_.indexed ? look_up(size[i], sign[i])
                                      : search((size[i] ^ sign[i]) - sign[i]);
        }
        return code;
    }

   private:
    int32_t look_up(int32_t size, int32_t sign) const {
        const int32_t clamped = size < book_.low ? book_.low : size > book_.high ? book_.high : size;
        const uint32_t position = static_cast<uint32_t>(clamped - book_.low);
        const uint32_t entry = book_.entry[(position >> book_.shift) + static_cast<uint32_t>(sign & book_.half)];
        const uint32_t inside = position & ((1u << book_.shift) - 1);
        return static_cast<int32_t>((entry + inside) >> book_.shift) ^ (sign & 255);
    }
    int32_t search(int32_t key) const {
        int32_t code = 0;
        for (int32_t step = 128; step > 0; step /= 2) {
            code += key > book_.threshold[code + step - 1] ? step : 0;
        }
        return code;
    }

    const Codebook &book_;
};

template <class T>
class NibbleTable {
   public:
    NibbleTable(const float *table, float scale) {
        for (int i = 0; i < 16; ++i) {
            table_[i] = from_float<T>(table[i] * scale);
        }
    }
    template <bool>
    void decode(const uint8_t *codes, T *out) const {
        for (int i = 0; i < 16; ++i) {
            out[2 * i] = table_[codes[i] >> 4];
            out[2 * i + 1] = table_[codes[i] & 15];
        }
    }

   private:
    T table_[16];
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_SIMD_PORTABLE_H
