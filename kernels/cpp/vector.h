// Vectors of the machine at hand, and the element types that tensors come in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 2;
#else
constexpr int LANES = 4, WIDE = 2;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float* from) { return *(const Vector*)from; }
INLINE Vector load_anywhere(const float* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}
INLINE void store(float* to, Vector x) { *(Vector*)to = x; }
INLINE Vector all(float x) { return x - (Vector){}; }
INLINE Vector where(Bits mask, Vector yes, Vector no) {
  return (Vector)((mask & (Bits)yes) | (~mask & (Bits)no));
}
// The larger or smaller one, `b` if either is not a number. Compilers do not find the instructions.
INLINE Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

INLINE float total(Vector x) {
  for (int half = LANES / 2; half; half /= 2) {
    Bits other;
    for (int i = 0; i < LANES; i++) other[i] = i ^ half;
    x += __builtin_shuffle(x, other);
  }
  return x[0];
}

// Where a bit of `word` is set, lowest first.
INLINE void store(float* to, uint64_t word, Vector x) {
#if defined(__AVX512F__)
  _mm512_mask_store_ps(to, (__mmask16)word, (__m512)x);
#else
  Bits own;
  for (int i = 0; i < LANES; i++) own[i] = 1 << i;
  store(to, where((own & (int32_t)(word & 0xffff)) != 0, x, load(to)));
#endif
}

// A bit of each lane, lowest first.
INLINE uint64_t word_of(Bits mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX__)
  return (uint64_t)_mm256_movemask_ps((__m256)mask);
#else
  uint64_t word = 0;
  for (int i = 0; i < LANES; i++) word |= (uint64_t)(mask[i] & 1) << i;
  return word;
#endif
}

INLINE bool any(Bits mask) {
  int64_t words[LANES / 2], found = 0;
  memcpy(words, &mask, sizeof mask);
  for (int i = 0; i < LANES / 2; i++) found |= words[i];
  return found != 0;
}

// 2^x, not below 2^-64, by rounding, a polynomial on [-1/2, 1/2] and a factor made of an exponent.
// The bound keeps products with it out of the subnormal numbers, which take a hundred times as
// long. ROUGH is for what is rounded to 8 bits afterwards. NaN stays NaN.
template <bool ROUGH>
INLINE Vector exp2(Vector x) {
  x = larger(all(-64.f), x);
#if defined(__AVX512DQ__)
  const Vector part = (Vector)_mm512_reduce_ps((__m512)x, 0);
#else
  const Vector shift = all(12582912.f);  // 1.5 * 2^23: integers are its units in the last place
  const Vector rounded = x + shift, part = x - (rounded - shift);
#endif
  Vector y;
  if (ROUGH) {
    y = all(5.5171669e-2f);
    y = y * part + all(2.4261262e-1f);
    y = y * part + all(6.9326099e-1f);
    y = y * part + all(9.9992807e-1f);
  } else {
    y = all(1.33335581e-3f);
    y = y * part + all(9.6181291e-3f);
    y = y * part + all(5.5504109e-2f);
    y = y * part + all(2.4022651e-1f);
    y = y * part + all(6.9314718e-1f);
    y = y * part + all(1.f);
  }
#if defined(__AVX512DQ__)
  return (Vector)_mm512_scalef_ps((__m512)y, (__m512)(x - part));
#else
  return y * (Vector)(((Bits)rounded << 23) + 0x3f800000);
#endif
}

// LANES x LANES words, in log2(LANES) rounds that interleave the first half with the second.
INLINE void transpose(Vector (&rows)[LANES]) {
  Vector mixed[LANES];
  Bits low, high;
  for (int i = 0; i < LANES; i++) {
    low[i] = i / 2 + (i % 2) * LANES;
    high[i] = low[i] + LANES / 2;
  }
  for (int round = 1; round < LANES; round *= 2) {
    for (int i = 0; i < LANES / 2; i++) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
    }
    for (int i = 0; i < LANES; i++) rows[i] = mixed[i];
  }
}

typedef uint16_t Half;  // bits of a bfloat16 or float16

INLINE float widened(float x) { return x; }
struct Bfloat {
  Half bits;
};
struct Float16 {
  Half bits;
};
INLINE float widened(Bfloat x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE void narrow(float x, float& to) { to = x; }
INLINE void narrow(float x, Bfloat& to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// By hand, for compilers without _Float16 on some machines; subnormals included.
INLINE float widened(Float16 x) {
  uint32_t bits = (uint32_t)(x.bits & 0x7fff) << 13, special = bits >= 0x0f800000u;
  float y, scale = 0x1p112f;
  memcpy(&y, &bits, 4);
  y *= scale;
  memcpy(&bits, &y, 4);
  bits |= special * 0x7f800000u | (uint32_t)(x.bits & 0x8000) << 16;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE void narrow(float x, Float16& to) {
  uint32_t bits, sign;
  memcpy(&bits, &x, 4);
  sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    to.bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {
    to.bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // the addition rounds to units of 2^-24
    float y;
    memcpy(&y, &bits, 4);
    y += 0.5f;
    memcpy(&bits, &y, 4);
    to.bits = sign | (bits - 0x3f000000);
  } else {
    to.bits = sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
}

// LANES elements.
template <class Element>
INLINE void narrow(Vector x, Element* to) {
  alignas(64) float lanes[LANES];
  store(lanes, x);
  for (int i = 0; i < LANES; i++) narrow(lanes[i], to[i]);
}
INLINE void narrow(Vector x, float* to) { memcpy(to, &x, sizeof x); }
// Compilers do not find it.
INLINE void narrow(Vector x, Bfloat* to) {
  typedef Half Halves __attribute__((vector_size(2 * LANES)));
  const Bits bits = (Bits)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Vector known = where(x == x, (Vector)(rounded >> 16), (Vector)((Bits){} + 0x7fc0));
  const Halves halves = __builtin_convertvector((Bits)known, Halves);
  memcpy(to, &halves, sizeof halves);
}

// LANES elements.
template <class Element>
INLINE Vector widened(const Element* from) {
  alignas(64) float lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = widened(from[i]);
  return load(lanes);
}
INLINE Vector widened(const float* from) { return load_anywhere(from); }
// The next LANES of `left` elements, then zeros.
template <class Element>
INLINE Vector widened(const Element* from, int64_t left) {
  if (left >= LANES) return widened(from);
  Vector lanes = {};
  for (int i = 0; i < left; i++) lanes[i] = widened(from[i]);
  return lanes;
}
// As many of them as are left.
template <class Element>
INLINE void narrow(Vector x, Element* to, int64_t left) {
  if (left >= LANES) return narrow(x, to);
  Element part[LANES];
  narrow(x, part);
  for (int i = 0; i < left; i++) to[i] = part[i];
}
