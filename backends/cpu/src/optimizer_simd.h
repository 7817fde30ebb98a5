// What the optimizers need of an instruction set beyond simd.h. For kernel files.
//
//   square_root(x)              IEEE, one rounding; so are + - * / of two Floats
//   sign(x)                     1, -1, and 0 for zeros and NaN
//   minimum(a, b), add(a, b)    signed integers, by lane
//   bits(x)                     the bits of a Float
//   maximum_unsigned(a, b), highest_unsigned(a)  by lane and over all lanes
//   Decoders<n>                 object: kGroup codes -> 4 vectors table[code], for each of n states
//   StateCodes(codes, lines)    object: encode<kFloored>(kGroup values, their scale, codes) (QC-Q8-004, QC-OPT-021)
#ifndef QCORE_CPU_OPTIMIZER_SIMD_H
#define QCORE_CPU_OPTIMIZER_SIMD_H

#include "simd.h"
#include "state_codes.h"

namespace qcore::cpu::QC_ISA {

inline constexpr int kVectors = 4;  // at a time
inline constexpr int kGroup = kVectors * kLanes;

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

#endif

inline uint32_t highest_unsigned(Int a) {
    uint32_t lane[kLanes];
    std::memcpy(lane, &a, sizeof lane);
    uint32_t result = 0;
    for (int i = 0; i < kLanes; ++i) {
        result = lane[i] > result ? lane[i] : result;
    }
    return result;
}

#if defined(__AVX512VBMI__)

// 64 codes at once: each byte of the floats is a look-up in four registers, and two rounds of unpacking put them
// together. The codes are brought into the order in which the unpacking, which works within 128 bits, needs them.
// This keeps the ports of the arithmetic busy, a gather those of the loads: a loop that decodes two states takes one of
// each.
class PermutingDecoder {
   public:
    PermutingDecoder() = default;
    PermutingDecoder(const float *, const StateLines &lines) : plane_(lines.plane) {}
    void operator()(const uint8_t *codes, Float (&out)[kVectors]) const {
        const Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const Int index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
        const __mmask64 upper = _mm512_movepi8_mask(index);
        const Int b0 = look_up(0, index, upper);
        const Int b1 = look_up(1, index, upper);
        const Int b2 = look_up(2, index, upper);
        const Int b3 = look_up(3, index, upper);
        const Int low0 = _mm512_unpacklo_epi8(b0, b1);
        const Int low1 = _mm512_unpackhi_epi8(b0, b1);
        const Int high0 = _mm512_unpacklo_epi8(b2, b3);
        const Int high1 = _mm512_unpackhi_epi8(b2, b3);
        out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0));
        out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0));
        out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1));
        out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1));
    }

   private:
    Int look_up(int byte, Int index, __mmask64 upper) const {
        const uint8_t *plane = plane_[byte];
        const Int low = _mm512_permutex2var_epi8(_mm512_load_si512(plane), index, _mm512_load_si512(plane + 64));
        const Int high =
            _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), index, _mm512_load_si512(plane + 192));
        return _mm512_mask_mov_epi8(low, upper, high);
    }

    const uint8_t (*plane_)[256];
};

#endif

class Decoder {
   public:
    Decoder() = default;
    Decoder(const float *table, const StateLines &) : table_(table) {}
    void operator()(const uint8_t *codes, Float (&out)[kVectors]) const {
        for (int v = 0; v < kVectors; ++v) {
            out[v] = gather(table_, load_codes(codes + v * kLanes));
        }
    }

   private:
    const float *table_;
};

#if !defined(__AVX512VBMI__)
using PermutingDecoder = Decoder;
#endif

// The states of an element, decoded: the last of several by permutes.
template <int kStates>
class Decoders {
   public:
    void prepare(int s, const float *table, const StateLines &lines) {
        if (s > 0 && s == kStates - 1) {
            last_ = PermutingDecoder(table, lines);
        } else {
            gather_[s] = Decoder(table, lines);
        }
    }
    template <int s>
    void decode(const uint8_t *codes, Float (&out)[kVectors]) const {
        if constexpr (s > 0 && s == kStates - 1) {
            last_(codes, out);
        } else {
            gather_[s](codes, out);
        }
    }

   private:
    Decoder gather_[kStates];
    PermutingDecoder last_;
};

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

// state_codes.h says how.
class StateCodes {
   public:
    StateCodes(const Codebook &codes, const StateLines &lines)
        : exact_(codes),
          zero_code_(codes.zero_code),
          entry_{_mm512_load_si512(lines.entry), _mm512_load_si512(lines.entry + 16)},
          slope_(_mm512_load_ps(lines.slope)),
          offset_(_mm512_load_ps(lines.offset)),
          cap_(_mm512_load_ps(lines.cap)) {}

    template <bool kFloored>
    void encode(const float *values, Float scale, uint8_t *out) const {
        Int count[kVectors];
        __mmask16 sure = 0xFFFF;
        for (int v = 0; v < kVectors; ++v) {
            const Float value = load(values + v * kLanes);
            count[v] = estimate(multiply(value, scale), sure);
            if constexpr (kFloored) {  // as integers: 1 if above 0, 0 if 0, no matter what if below
                count[v] = _mm512_max_epi32(count[v], _mm512_min_epi32(bits(value), _mm512_set1_epi32(1)));
            }
        }
        if (__builtin_expect(sure != 0xFFFF, 0)) {
            encode_exactly<kFloored>(exact_, values, scale, out);
            return;
        }
        const Int zero = _mm512_set1_epi16(static_cast<int16_t>(zero_code_));
        const Int low = _mm512_add_epi16(_mm512_packs_epi32(count[0], count[1]), zero);
        const Int high = _mm512_add_epi16(_mm512_packs_epi32(count[2], count[3]), zero);
        const Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
    }

   private:
    // The code less that of 0; takes the lanes in doubt out of `sure`.
    Int estimate(Float y, __mmask16 &sure) const {
        constexpr int kLargerMagnitude = 0x0B;  // of vrangeps: max(|a|, |b|), sign clear
        const Float size = _mm512_range_ps(y, _mm512_set1_ps(StateLines::kSmallest), kLargerMagnitude);
        const Int exponent = _mm512_srli_epi32(bits(size), 23);  // the permutes look at its lowest 5 bits
        const Int entry = _mm512_permutex2var_epi32(entry_[0], exponent, entry_[1]);
        const Int segment = _mm512_srli_epi32(_mm512_add_epi32(entry, bits(size)), 23);
        const Float line =
            _mm512_fmadd_ps(size, _mm512_permutexvar_ps(segment, slope_), _mm512_permutexvar_ps(segment, offset_));
        const Float f = _mm512_min_ps(line, _mm512_permutexvar_ps(segment, cap_));
        // With 12 bits behind the point, rounded, values no further than kGuard from an integer are one.
        static_assert(StateLines::kGuard == 0x1p-13f);
        const Int fixed = bits(_mm512_add_ps(f, _mm512_set1_ps(0x1p11f)));
        sure = _mm512_mask_test_epi32_mask(sure, fixed, _mm512_set1_epi32(0xFFF));
        const Int sign = _mm512_set1_epi32(INT32_MIN);
        constexpr int kFirstOrBoth = 0xF8;  // of vpternlogd: a | (b & c)
        const Float signed_f = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits(f), bits(y), sign, kFirstOrBoth));
        return _mm512_cvttps_epi32(signed_f);
    }

    const Codebook &exact_;
    int32_t zero_code_;
    Int entry_[2];
    Float slope_, offset_, cap_;
};

#else

class StateCodes {
   public:
    StateCodes(const Codebook &codes, const StateLines &) : exact_(codes) {}

    template <bool kFloored>
    void encode(const float *values, Float scale, uint8_t *out) const {
        encode_exactly<kFloored>(exact_, values, scale, out);
    }

   private:
    const Codebook &exact_;
};

#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_OPTIMIZER_SIMD_H
