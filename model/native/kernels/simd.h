// SIMD vectors of the widest instruction set that this file is compiled for; the kernels use only these.
//
// Included by kernels.cpp only, which is compiled once for each instruction set. Multiply-adds are fused if the
// instruction set has them, and only in calls of `fma`: the build disables the compiler's own contraction.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vf __attribute__((vector_size(4 * W)));
typedef int32_t Vi __attribute__((vector_size(4 * W)));
typedef uint32_t Vu __attribute__((vector_size(4 * W)));
typedef uint16_t Vh __attribute__((vector_size(2 * W)));
typedef int8_t Vb __attribute__((vector_size(W)));

template <class V>
INLINE V load(const void* from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <class V>
INLINE void store(void* to, V value) {
    memcpy(to, &value, sizeof value);
}

INLINE Vf splat(float x) {
#if defined(__AVX512F__)
    return (Vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vf)_mm256_set1_ps(x);
#else
    return Vf{x, x, x, x};
#endif
}

INLINE Vi splat_int(int32_t x) {
#if defined(__AVX512F__)
    return (Vi)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
    return (Vi)_mm256_set1_epi32(x);
#else
    return Vi{x, x, x, x};
#endif
}

// a * b + c
INLINE Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
    return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The larger one; b if either is NaN.
INLINE Vf larger(Vf a, Vf b) { return a > b ? a : b; }

INLINE Vf absolute(Vf a) { return (Vf)((Vi)a & splat_int(0x7fffffff)); }

// Round to integers, ties to even, for |a| below 2^22.
INLINE Vi to_int(Vf a) {
    const Vf magic = splat(12582912.0f);  // 1.5 * 2^23: the unit of its last bit is 1
    return (Vi)(a + magic) - (Vi)magic;
}

INLINE Vf from_bf16(const uint16_t* from) {
#if defined(__AVX512F__)  // the general conversion takes five instructions
    return (Vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif defined(__AVX2__)
    return (Vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
    return (Vf)(__builtin_convertvector(load<Vh>(from), Vu) << 16);
#endif
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Sums lanes in a fixed order, so that all kernels get the same sum.
INLINE float sum_lanes(Vf a) {
    float lanes[W];
    store(lanes, a);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE bool any_lane(Vi a) {
    int32_t lanes[W], any = 0;
    store(lanes, a);
    for (int i = 0; i < W; i++) any |= lanes[i];
    return any != 0;
}

INLINE float largest_lane(Vf a) {
    float lanes[W], best;
    store(lanes, a);
    best = lanes[0];
    for (int i = 1; i < W; i++) best = lanes[i] > best ? lanes[i] : best;
    return best;
}

// e^x to about one unit in the last place; below -87 it is the smallest normal number, above 88 about 1.6e38.
INLINE Vf exponential(Vf x) {
    x = larger(splat(-87.0f), x < splat(88.0f) ? x : splat(88.0f));
    const Vi n = to_int(x * splat(1.44269504088896341f));
    const Vf whole = __builtin_convertvector(n, Vf);
    // ln 2 in two parts; the first times any n is exact.
    Vf r = fma(whole, splat(-0.693359375f), x);
    r = fma(whole, splat(2.12194440e-4f), r);
    Vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return (Vf)((Vi)p + (n << 23));
}

// 2^x for x <= 0 to about two units in the last place; below -126 it is the smallest normal number. NaN stays NaN.
// The polynomial has the smallest relative error on [-1/2, 1/2], 7.5e-8.
INLINE Vf power_of_two(Vf x) {
    x = larger(splat(-126.0f), x);
    const Vf magic = splat(12582912.0f);  // as in `to_int`: the last bits of `shifted` are the integer
    const Vf shifted = x + magic;
    const Vf r = x - (shifted - magic);
    Vf p = splat(1.3276472454890609e-3f);
    p = fma(p, r, splat(9.675540961325169e-3f));
    p = fma(p, r, splat(5.550713092088699e-2f));
    p = fma(p, r, splat(2.4022120237350464e-1f));
    p = fma(p, r, splat(6.931469440460205e-1f));
    p = fma(p, r, splat(1.0000001192092896f));
    return (Vf)((Vi)p + ((Vi)shifted << 23));
}

}  // namespace
