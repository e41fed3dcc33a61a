// Peak: what the instruction that products are made of reaches where nothing else is to be done.
#pragma once

#include "scratch.h"

// Multiplies and adds in registers; returns how many of both.
template <class Mode>
static double burn(Scratch<Mode>& scratch) {
  constexpr int64_t ROUNDS = 1 << 17;
#if defined(__AMX_BF16__)
  if constexpr (Mode::TURNED) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < ROUNDS; i++) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    return ROUNDS * 4 * 2. * 16 * 16 * 32;
  }
#endif
  Vector sums[TALL][WIDE], x[WIDE];
#pragma GCC unroll 16
  for (int w = 0; w < WIDE; w++) x[w] = load(scratch.weights + w * LANES);
#pragma GCC unroll 16
  for (int r = 0; r < TALL; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++) sums[r][w] = all(0.f);
  for (int64_t i = 0; i < ROUNDS; i++) {
    const float* words = scratch.keys + i % 8 * 8;  // of others each time, or products are kept
#pragma GCC unroll 16
    for (int r = 0; r < TALL; r++)
#pragma GCC unroll 16
      for (int w = 0; w < WIDE; w++) sums[r][w] = Mode::add(sums[r][w], x[w], words + r);
  }
#pragma GCC unroll 16
  for (int r = 0; r < TALL; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++) store(scratch.scores + (r * WIDE + w) * LANES, sums[r][w]);
  return ROUNDS * 2. * Mode::PACKED * TALL * WIDE * LANES;
}
