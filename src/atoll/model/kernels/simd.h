// Sixteen floats at a time, on whatever the processor has.
//
// GCC's and Clang's vector extensions turn `Vec` into one AVX-512 register, two AVX2 registers or four NEON registers, so everything but three
// operations is written once. The three are the product of bfloat16 pairs, rounding to bfloat16 and the broadcast of a pair: with AVX512-BF16 each is
// one instruction, elsewhere a few shifts and two fused multiply-adds.
//
// A bfloat16 is the upper half of a float; a Pairs holds 16 lanes of two neighbouring bfloat16, the lower one in the lower half.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) || defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kernels {

using bf16 = uint16_t;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int LANES = 16;

inline Vec load(const float* p) { Vec v; memcpy(&v, p, 64); return v; }
inline void store(float* p, Vec v) { memcpy(p, &v, 64); }
inline Pairs load_pairs(const bf16* p) { Pairs v; memcpy(&v, p, 64); return v; }
inline Vec all(float x) { return Vec{} + x; }
// Where a lane of b is not a number, so is the result.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline Pairs pair(const bf16* p) { uint32_t bits; memcpy(&bits, p, 4); return Pairs{} + bits; }

inline Vec widen(const bf16* p) {
    Halves h; memcpy(&h, p, 32);
    return (Vec)(__builtin_convertvector(h, Pairs) << 16);
}

inline float widen(bf16 h) { uint32_t bits = (uint32_t)h << 16; float f; memcpy(&f, &bits, 4); return f; }

// Round to the nearest bfloat16, ties to even.
inline Halves narrow(Vec v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    Pairs bits = (Pairs)v;
    Pairs rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Pairs nan = (bits >> 16) | 0x40;
    Pairs is_nan = (Pairs)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Halves);
#endif
}
inline bf16 narrow(float f) {
    uint32_t bits; memcpy(&bits, &f, 4);
    return f != f ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline void store_narrow(bf16* p, Vec v) { Halves h = narrow(v); memcpy(p, &h, 32); }

// sum + w.low * x.low + w.high * x.high in each lane.
inline Vec dot2(Vec sum, Pairs w, Pairs x) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
    sum += (Vec)(w << 16) * (Vec)(x << 16);
    return sum + (Vec)(w & 0xffff0000u) * (Vec)(x & 0xffff0000u);
#endif
}

// Lane sums and maxima, always in the same order.
inline float sum_lanes(Vec v) {
    float f[LANES]; store(f, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) f[i] += f[i + width];
    return f[0];
}
inline float max_lanes(Vec v) {
    float f[LANES]; store(f, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) f[i] = f[i] > f[i + width] ? f[i] : f[i + width];
    return f[0];
}

// e^x: 2^n times a polynomial in the rest (relative error below 2e-7 for |x| < 87; smaller x give 0, larger are held at e^87; NaN stays NaN).
inline Vec exp(Vec x) {
    Ints tiny = x < all(-87.0f);
    Ints strange = x != x;
    Vec held = min(all(87.0f), max(all(-87.0f), x));
    Vec scaled = held * 1.44269504088896f;
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Vec whole = (scaled + magic) - magic;
    Vec rest = scaled - whole;
    Vec p = all(1.535336188319500e-4f);
    p = p * rest + 1.339887440266574e-3f;
    p = p * rest + 9.618437357674640e-3f;
    p = p * rest + 5.550332471162809e-2f;
    p = p * rest + 2.402264791363012e-1f;
    p = p * rest + 6.931472028550421e-1f;
    p = p * rest + 1.0f;
    Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Vec result = p * (Vec)exponent;
    return strange ? x : (Vec)((Ints)result & ~tiny);
}

// Whole vectors, then what is left one by one in a vector that is padded with `rest`.
template <class Body> inline void in_vectors(int count, Body body) {
    for (int i = 0; i < count; i += LANES) body(i, std::min(LANES, count - i));
}

inline Vec load_some(const float* p, int n, float rest = 0) {
    if (n == LANES) return load(p);
    Vec v = all(rest); memcpy(&v, p, n * sizeof(float)); return v;
}
inline Vec widen_some(const bf16* p, int n) {
    if (n == LANES) return widen(p);
    bf16 padded[LANES] = {}; memcpy(padded, p, n * sizeof(bf16)); return widen(padded);
}
inline void store_some(float* p, Vec v, int n) { memcpy(p, &v, n * sizeof(float)); }
inline void narrow_some(bf16* p, Vec v, int n) { Halves h = narrow(v); memcpy(p, &h, n * sizeof(bf16)); }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace kernels
