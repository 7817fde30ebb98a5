// What 8-bit states and 8-bit blocks need of an instruction set beyond simd.h. For kernel files.
//
//   square_root(x)              IEEE, one rounding; so are + - * / of two Floats
//   sign(x)                     1, -1, and 0 for zeros and NaN
//   minimum(a, b), add(a, b)    signed integers, by lane
//   bits(x)                     the bits of a Float
//   maximum_unsigned(a, b), highest_unsigned(a)  by lane and over all lanes
//   finite_or_zero(x)           0 in place of infinities and NaN
//   TableDecoder, SymmetricDecoder  objects: kGroup codes -> 4 vectors table[code]
//   StateCodes(codes, lines)    object: encode<kFloored>(kGroup values, their scale, codes) (QC-Q8-004, QC-OPT-021)
#ifndef QCORE_CPU_OPTIMIZER_SIMD_H
#define QCORE_CPU_OPTIMIZER_SIMD_H

#include <type_traits>

#include "simd.h"
#include "state_codes.h"

namespace qcore::cpu::QC_ISA {

inline constexpr int kVectors = 4;  // at a time
inline constexpr int kGroup = kVectors * kLanes;

// What the path for BF16 without tiles does in another way, because its processors are AMD's. On a Zen 4 a permute of
// bytes out of two registers costs what one out of a single register costs (three times as much on a Sapphire Rapids),
// and a store of 512 bits takes two cycles, so that a root is better taken where it is needed than kept, beside the
// encoding. And prefetches are spread over both loops of a block.
#if defined(QC_ISA_avx512_bf16)
inline constexpr bool kWidePermutes = true;
template <bool kCoded>
inline constexpr bool kLateRoots = kCoded;
template <bool kCoded>
inline constexpr bool kLateParams = kCoded;
#define QC_SUMS_BESIDE_UPDATES 1
#else
inline constexpr bool kWidePermutes = false;
template <bool kCoded>
inline constexpr bool kLateRoots = false;
template <bool kCoded>
inline constexpr bool kLateParams = false;
#endif

#if defined(__AVX512F__)

inline Float square_root(Float x) { return _mm512_sqrt_ps(x); }
inline Float sign(Float x) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(above, _mm512_set1_ps(1.0f)), below, _mm512_set1_ps(-1.0f));
}
inline Int minimum(Int a, Int b) { return _mm512_min_epi32(a, b); }
inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline Int bits(Float x) { return _mm512_castps_si512(x); }
inline Int broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Int maximum_unsigned(Int a, Int b) { return _mm512_max_epu32(a, b); }
inline uint32_t highest_unsigned(Int a) { return _mm512_reduce_max_epu32(a); }
inline Float finite_or_zero(Float x) {
    return _mm512_maskz_mov_ps(_mm512_cmplt_epi32_mask(magnitude(x), _mm512_set1_epi32(kInfinity)), x);
}

// QC-OPT-009 of one block, whose vectors come in order. Squares are exact in double, so that fused sums are rounded as
// others are.
class SquareSum {
   public:
    __attribute__((always_inline)) void add(Float x) {
        low_ = with_squares(low_, _mm512_castps512_ps256(x));
        high_ = with_squares(high_, _mm512_extractf32x8_ps(x, 1));
    }
    __attribute__((always_inline)) void add(const float *x) {
        low_ = with_squares(low_, _mm256_loadu_ps(x));
        high_ = with_squares(high_, _mm256_loadu_ps(x + kLanes / 2));
    }
    __attribute__((always_inline)) double total() const {
        const __m512d eight = _mm512_add_pd(low_, high_);
        const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }

   private:
    __attribute__((always_inline)) static __m512d with_squares(__m512d sum, __m256 x) {
        const __m512d wide = _mm512_cvtps_pd(x);
        return _mm512_fmadd_pd(wide, wide, sum);
    }
    __m512d low_ = _mm512_setzero_pd(), high_ = _mm512_setzero_pd();
};

#elif defined(__AVX2__)

inline Float square_root(Float x) { return _mm256_sqrt_ps(x); }
inline Float sign(Float x) {
    const Float above = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ);
    const Float below = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_or_ps(_mm256_and_ps(above, _mm256_set1_ps(1.0f)), _mm256_and_ps(below, _mm256_set1_ps(-1.0f)));
}
inline Int minimum(Int a, Int b) { return _mm256_min_epi32(a, b); }
inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Int bits(Float x) { return _mm256_castps_si256(x); }
inline Int broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Int maximum_unsigned(Int a, Int b) { return _mm256_max_epu32(a, b); }
inline Float finite_or_zero(Float x) {
    const Int finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(kInfinity), magnitude(x));
    return _mm256_and_ps(_mm256_castsi256_ps(finite), x);
}

#else

inline Float square_root(Float x) {
    for (int i = 0; i < kLanes; ++i) {
        x[i] = __builtin_sqrtf(x[i]);
    }
    return x;
}
inline Float sign(Float x) {
    const Int above = x > 0.0f;  // a lane that compares true is -1
    const Int below = x < 0.0f;
    return __builtin_convertvector(below - above, Float);
}
inline Int minimum(Int a, Int b) { return a < b ? a : b; }
inline Int add(Int a, Int b) { return a + b; }
inline Int bits(Float x) { return reinterpret_cast<Int>(x); }
inline Int broadcast_int(int32_t x) { return Int{x, x, x, x}; }
inline Int maximum_unsigned(Int a, Int b) {
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    return reinterpret_cast<Unsigned>(a) > reinterpret_cast<Unsigned>(b) ? a : b;
}
inline Float finite_or_zero(Float x) {
    const Int finite = magnitude(x) < broadcast_int(kInfinity);  // a lane that compares true is -1
    return reinterpret_cast<Float>(bits(x) & finite);
}

#endif

#if !defined(__AVX512F__)
inline uint32_t highest_unsigned(Int a) {
    uint32_t lane[kLanes];
    std::memcpy(lane, &a, sizeof lane);
    uint32_t result = 0;
    for (int i = 0; i < kLanes; ++i) {
        result = lane[i] > result ? lane[i] : result;
    }
    return result;
}
#endif

class GatheringDecoder {
   public:
    GatheringDecoder() = default;
    explicit GatheringDecoder(const float *table) : table_(table) {}
    GatheringDecoder(const float *table, const StateLines &) : table_(table) {}
    __attribute__((always_inline)) void operator()(const uint8_t *codes, Float (&out)[kVectors]) const {
        for (int v = 0; v < kVectors; ++v) {
            out[v] = gather(table_, load_codes(codes + v * kLanes));
        }
    }

   private:
    const float *table_;
};

#if defined(__AVX512VBMI__)

// 64 codes at once: each byte of the floats is a look-up in registers, and two rounds of unpacking put them together.
// The codes are brought into the order in which the unpacking, which works within 128 bits, needs them: by vpermb,
// because vpermd waits for the old value of the register that it writes, on Sapphire Rapids, and so for the group
// before.
__attribute__((always_inline)) inline Int decoding_order(const uint8_t *codes) {
    alignas(64) static constexpr uint8_t kOrder[64] = {0,  1,  2,  3,  16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51,
                                                       4,  5,  6,  7,  20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55,
                                                       8,  9,  10, 11, 24, 25, 26, 27, 40, 41, 42, 43, 56, 57, 58, 59,
                                                       12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63};
    return _mm512_permutexvar_epi8(_mm512_load_si512(kOrder), _mm512_loadu_si512(codes));
}

__attribute__((always_inline)) inline void join_bytes(Int b0, Int b1, Int b2, Int b3, Float (&out)[kVectors]) {
    const Int low0 = _mm512_unpacklo_epi8(b0, b1);
    const Int low1 = _mm512_unpackhi_epi8(b0, b1);
    const Int high0 = _mm512_unpacklo_epi8(b2, b3);
    const Int high1 = _mm512_unpackhi_epi8(b2, b3);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1));
}

// Bytes of `half`, 128 of them, by the lower 7 bits of `index`; 0 where `wanted` has a 0.
__attribute__((always_inline)) inline Int half_plane(const uint8_t *half, Int index, __mmask64 wanted) {
    const Int low = _mm512_load_si512(half), high = _mm512_load_si512(half + 64);
    if constexpr (kWidePermutes) {
        return _mm512_maskz_permutex2var_epi8(wanted, low, index, high);
    }
    const __mmask64 odd = _mm512_test_epi8_mask(index, _mm512_set1_epi8(64));
    return _mm512_mask_permutexvar_epi8(_mm512_maskz_permutexvar_epi8(wanted, index, low), odd, index, high);
}

class TableDecoder {
   public:
    TableDecoder() = default;
    TableDecoder(const float *, const StateLines &lines) : plane_(lines.plane) {}
    __attribute__((always_inline)) void operator()(const uint8_t *codes, Float (&out)[kVectors]) const {
        const Int index = decoding_order(codes);
        const __mmask64 upper = _mm512_movepi8_mask(index);
        join_bytes(look_up(0, index, upper), look_up(1, index, upper), look_up(2, index, upper),
                   look_up(3, index, upper), out);
    }

   private:
    __attribute__((always_inline)) Int look_up(int byte, Int index, __mmask64 upper) const {
        const uint8_t *plane = plane_[byte];
        const Int line[] = {_mm512_load_si512(plane), _mm512_load_si512(plane + 64), _mm512_load_si512(plane + 128),
                            _mm512_load_si512(plane + 192)};
        if constexpr (kWidePermutes) {
            const Int low = _mm512_permutex2var_epi8(line[0], index, line[1]);
            return _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(line[2], index, line[3]));
        }
        const __mmask64 odd = _mm512_test_epi8_mask(index, _mm512_set1_epi8(64));
        Int found = _mm512_permutexvar_epi8(index, line[0]);
        found = _mm512_mask_permutexvar_epi8(found, odd, index, line[1]);
        found = _mm512_mask_permutexvar_epi8(found, upper, index, line[2]);
        return _mm512_mask_permutexvar_epi8(found, _kand_mask64(upper, odd), index, line[3]);
    }

    const uint8_t (*plane_)[256];
};

// Half the look-ups, for a codebook whose values below 0 are those above it with another sign: by |code - 127|, whose
// lowest 7 bits are 0 for codes 127 (the value 0) and 255 (StateLines::half_plane).
class SymmetricDecoder {
   public:
    SymmetricDecoder() = default;
    SymmetricDecoder(const float *, const StateLines &lines) : plane_(lines.half_plane) {}
    __attribute__((always_inline)) void operator()(const uint8_t *codes, Float (&out)[kVectors]) const {
        const Int code = decoding_order(codes);
        const Int distance = _mm512_sub_epi8(code, _mm512_set1_epi8(127));
        const __mmask64 not_zero = _mm512_test_epi8_mask(distance, distance);
        const Int index = _mm512_abs_epi8(distance);
        const Int sign = _mm512_andnot_si512(code, _mm512_set1_epi8(INT8_MIN));
        const Int top = half_plane(plane_[3], index, not_zero);
        join_bytes(half_plane(plane_[0], index, not_zero), half_plane(plane_[1], index, not_zero),
                   half_plane(plane_[2], index, not_zero), _mm512_mask_add_epi8(top, not_zero, top, sign), out);
    }

   private:
    const uint8_t (*plane_)[128];
};

#else
using TableDecoder = GatheringDecoder;
using SymmetricDecoder = GatheringDecoder;
#endif

// The decoder of state `s` of a rule.
template <class Rule, int s>
using DecoderOf = std::conditional_t<Rule::kSquares[s], TableDecoder, SymmetricDecoder>;

inline constexpr uint16_t kAllSure = 0xFFFF;

// kGroup codes by the codebook's own index. With kFloored a value above 0 has at least the code after that of 0
// (QC-OPT-021).
template <bool kFloored>
#if defined(__AVX512F__)
__attribute__((noinline, cold))
#endif
void encode_exactly(const Codebook &book, const float *values, Float scale, uint8_t *out) {
    const CodebookCodes find(book);
    Int codes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const Float value = load(values + v * kLanes);
        codes[v] = find(multiply(value, scale));
        if constexpr (kFloored) {  // as integers: 1 if above 0, 0 if 0, no matter what if below
            codes[v] = maximum(codes[v], add(broadcast_int(book.zero_code), minimum(bits(value), broadcast_int(1))));
        }
    }
    pack_bytes(codes, out);
}

#if defined(__AVX512F__)

// On Sapphire Rapids vrangeps and vpermps wait for the old value of the register that they write, which strings the
// vectors of a group together: twice the time. vrangeps therefore gets a register of zeros to write to, and vpermps
// gives way to vpermt2ps, which reads its destination in earnest.
template <int kWhich>
__attribute__((always_inline)) inline Float of_magnitude(Float x, Float y) {
    Float result = _mm512_setzero_ps();
    asm("vrangeps %3, %2, %1, %0" : "+v"(result) : "v"(x), "v"(y), "i"(kWhich));
    return result;
}
__attribute__((always_inline)) inline Float look_up(Int index, Float table) {
    return _mm512_permutex2var_ps(table, index, table);
}

// Of each lane the third byte, in order.
__attribute__((always_inline)) inline Int third_bytes(const Int (&c)[kVectors]) {
#if defined(__AVX512VBMI__)
    const __m128i one = _mm_setr_epi8(2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62);
    const Int third = _mm512_broadcast_i32x4(one);
    if constexpr (kWidePermutes) {
        const Int second = _mm512_set1_epi8(64);  // of two registers
        const Int pair = _mm512_mask_or_epi64(third, 0xCC, third, second);
        const Int low = _mm512_permutex2var_epi8(c[0], pair, c[1]);
        return _mm512_mask_mov_epi64(low, 0xF0, _mm512_permutex2var_epi8(c[2], pair, c[3]));
    }
    Int all = _mm512_permutexvar_epi8(third, c[0]);
    all = _mm512_mask_permutexvar_epi8(all, 0xFFFFULL << 16, third, c[1]);
    all = _mm512_mask_permutexvar_epi8(all, 0xFFFFULL << 32, third, c[2]);
    return _mm512_mask_permutexvar_epi8(all, 0xFFFFULL << 48, third, c[3]);
#else
    Int all = zero();
    for (int v = kVectors - 1; v >= 0; --v) {
        const Int code = _mm512_and_si512(_mm512_srli_epi32(c[v], 16), _mm512_set1_epi32(0xFF));
        const Int low = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(code));
        all = _mm512_mask_mov_epi64(_mm512_shuffle_i64x2(all, all, 0x90), 0x3, low);
    }
    return all;
#endif
}

// state_codes.h says how. With kPositive no value is below 0.
template <bool kPositive>
class StateCodes {
   public:
    StateCodes(const Codebook &codes, const StateLines &lines) : exact_(codes), lines_(lines) {}

    // Returns one bit for each lane, 0 where a value may have another code: the caller has these encoded exactly, after
    // its loop, so that no call stands in the way of keeping constants and masks in registers.
    template <bool kFloored>
    __attribute__((always_inline)) uint16_t encode(const float *values, Float scale, uint8_t *out) const {
        Int found[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            found[v] = estimate<kFloored>(load(values + v * kLanes), scale);
        }
        put(found, out);
        return sure(found);
    }

    // The same of values that are scaled already, in [-1, 1].
    __attribute__((always_inline)) void encode(const Float (&y)[kVectors], uint8_t *out) const {
        Int found[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            found[v] = estimate<false>(y[v], _mm512_set1_ps(1.0f));
        }
        if (__builtin_expect(sure(found) != kAllSure, 0)) {
            float values[kGroup];
            for (int v = 0; v < kVectors; ++v) {
                store(values + v * kLanes, y[v]);
            }
            encode_exactly<false>(exact_, values, _mm512_set1_ps(1.0f), out);
            return;
        }
        put(found, out);
    }

   private:
    // Of vrangeps: the value of larger or smaller magnitude, with the sign of the first.
    static constexpr int kLargerMagnitude = 0x3;
    static constexpr int kSmallerMagnitude = 0x2;

    __attribute__((always_inline)) static uint16_t sure(const Int (&found)[kVectors]) {
        const Int least = _mm512_min_epu16(_mm512_min_epu16(found[0], found[1]), _mm512_min_epu16(found[2], found[3]));
        return _mm512_test_epi32_mask(least, _mm512_set1_epi32(StateLines::kSure));
    }
    __attribute__((always_inline)) void put(const Int (&found)[kVectors], uint8_t *out) const {
        const Int codes = third_bytes(found);
        _mm512_storeu_si512(out, kPositive ? _mm512_sub_epi8(codes, _mm512_set1_epi32(lines_.bias)) : codes);
    }

    // The code in the third byte; below it the fraction, kSure of it 0 where the code is in doubt.
    template <bool kFloored>
    __attribute__((always_inline)) Int estimate(Float value, Float scale) const {
        Float y = multiply(value, scale);
        if constexpr (!kPositive) {
            y = of_magnitude<kLargerMagnitude>(y, _mm512_set1_ps(StateLines::kSmallest));
        } else if constexpr (!kFloored) {
            y = _mm512_max_ps(y, _mm512_set1_ps(StateLines::kSmallest));
        } else {  // all but 0
            const __mmask16 counts = _mm512_test_epi32_mask(bits(value), bits(value));
            y = _mm512_mask_max_ps(y, counts, y, _mm512_set1_ps(lines_.smallest_counted));
        }
        const Int exponent = _mm512_srli_epi32(bits(y), 23);  // the permutes look at its lowest 5 bits
        const Int entry = _mm512_permutex2var_epi32(line(lines_.entry), exponent, line(lines_.entry + 16));
        const Int segment = _mm512_srli_epi32(_mm512_add_epi32(entry, bits(y)), 27);
        const Float cap = look_up(segment, line(lines_.cap));
        static_assert(StateLines::kFraction == 16 && StateLines::kSure <= 0xFFFF);
        if constexpr (kPositive) {
            const Float slope = look_up(segment, line(lines_.slope));
            const Float offset = look_up(segment, line(lines_.offset));
            return bits(_mm512_fmadd_ps(_mm512_min_ps(y, cap), slope, offset));
        } else {
            const Float slope = _mm512_permutex2var_ps(line(lines_.slope), segment, line(lines_.slope + 16));
            const Float offset = _mm512_permutex2var_ps(line(lines_.offset), segment, line(lines_.offset + 16));
            return bits(_mm512_fmadd_ps(of_magnitude<kSmallerMagnitude>(y, cap), slope, offset));
        }
    }
    static Float line(const float *of) { return _mm512_load_ps(of); }
    static Int line(const int32_t *of) { return _mm512_load_si512(of); }

    const Codebook &exact_;
    const StateLines &lines_;
};

#else

template <bool kPositive>
class StateCodes {
   public:
    StateCodes(const Codebook &codes, const StateLines &) : exact_(codes) {}

    template <bool kFloored>
    uint16_t encode(const float *values, Float scale, uint8_t *out) const {
        encode_exactly<kFloored>(exact_, values, scale, out);
        return kAllSure;
    }

   private:
    const Codebook &exact_;
};

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_OPTIMIZER_SIMD_H
