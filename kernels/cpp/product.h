// Product: small matrices multiplied in registers, TILE columns wide.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vector.h"

constexpr int TILE = 64;  // queries
constexpr int ROWS = 4;   // a register tile: ROWS scalars by WIDE vectors

// How factors of a product lie in memory: one float32 a word.
struct Single {
  static constexpr int PACKED = 1;
  INLINE Vector add(Vector sum, Vector x, const float* word) { return sum + x * all(*word); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 a word: neighbors in depth, multiplied and added in one instruction.
struct Pairs {
  static constexpr int PACKED = 2;
  INLINE Vector add(Vector sum, Vector x, const float* word) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_ps(*word));
  }
  INLINE Vector paired(Vector first, Vector second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    return (Vector)_mm512_permutexvar_epi16(order, both);
  }
};
#endif

// to[ROWS][WIDE vectors] (+)= sum over k: x[k][...] * words[row * row_stride + k * depth_stride]
template <class Mode, bool ACCUMULATE>
INLINE void register_tile(const float* x, const float* words, int64_t row_stride,
                          int64_t depth_stride, int depth, float* to) {
  Vector sums[ROWS][WIDE];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++)
      sums[r][w] = ACCUMULATE ? load(to + r * TILE + w * LANES) : all(0.f);
#pragma GCC unroll 2
  for (int k = 0; k < depth; k++) {
    Vector part[WIDE];
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++) part[w] = load(x + k * TILE + w * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int w = 0; w < WIDE; w++)
        sums[r][w] = Mode::add(sums[r][w], part[w], words + r * row_stride + k * depth_stride);
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++) store(to + r * TILE + w * LANES, sums[r][w]);
}

// The product for `rows` rows, which are laid out up to a multiple of ROWS.
template <class Mode, bool ACCUMULATE>
static void product(const float* x, const float* words, int64_t row_stride, int64_t depth_stride,
                    int depth, float* to, int rows) {
  for (int row = 0; row < rows; row += ROWS)
    for (int q = 0; q < TILE; q += WIDE * LANES)
      register_tile<Mode, ACCUMULATE>(x + q, words + row * row_stride, row_stride, depth_stride,
                                      depth, to + row * TILE + q);
}
