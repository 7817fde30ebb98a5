// Vectors of float32 as wide as the instruction set of the including kernel file, for code that is written once for all
// of them. Only kernel files include it: everything lives in their namespace (dispatch.h says why).
#ifndef QCORE_CPU_LANES_H
#define QCORE_CPU_LANES_H

#include <cstdint>

#include "scalar.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace qcore::cpu::QC_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef int8_t I8 __attribute__((vector_size(kLanes)));

template <class V, class T>
inline V load_vector(const T *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline void store_vector(T *p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

inline F32 splat(float x) { return x - F32{}; }

// One rounding on every instruction set that has it; used where the spec leaves the choice (QC-GEMM4-002).
inline F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// kLanes words as integers. GCC 12 takes such a conversion apart: into halves, and a conversion from bytes into
// elements.
inline U32 load_unsigned(const Bfloat *p) {
#if defined(__AVX512F__)
    return (U32)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    return (U32)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    return __builtin_convertvector(load_vector<U16>(p), U32);
#endif
}

// QC-NUM-002.
inline F32 load(const float *p) { return load_vector<F32>(p); }
inline F32 load(const Bfloat *p) { return (F32)(load_unsigned(p) << 16); }
inline F32 load(const Half *p) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    F32 v;
    for (int i = 0; i < kLanes; ++i) {
        v[i] = to_float(p[i]);
    }
    return v;
#endif
}

// QC-NUM-003.
inline U32 bf16_bits(F32 x) {
    const U32 u = (U32)x;
    const U32 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return x == x ? rounded : (u >> 16 | 0x40u);
}

// kLanes bytes as integers.
inline I32 load_signed(const int8_t *p) {
#if defined(__AVX512F__)
    return (I32)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
    return (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
    return __builtin_convertvector(load_vector<I8>(p), I32);
#endif
}

inline void store(float *p, F32 x) { store_vector(p, x); }
inline void store(Bfloat *p, F32 x) { store_vector(p, __builtin_convertvector(bf16_bits(x), U16)); }
inline void store(Half *p, F32 x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) {
        p[i] = from_float<Half>(x[i]);
    }
#endif
}

// x rounded to T, as float32.
template <class T>
inline F32 rounded_to(F32 x) {
    alignas(64) T rounded[kLanes];
    store(rounded, x);
    return load(rounded);
}
template <>
inline F32 rounded_to<float>(F32 x) {
    return x;
}
template <>
inline F32 rounded_to<Bfloat>(F32 x) {
    return (F32)(bf16_bits(x) << 16);
}
#if defined(__AVX512F__)
template <>
inline F32 rounded_to<Half>(F32 x) {
    return (F32)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_LANES_H
