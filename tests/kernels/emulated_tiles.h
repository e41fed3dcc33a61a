// Emulated tiles: the instructions of AMX that cpp/product.h uses, for processors without them.
// Included before everything else; slow.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

static thread_local uint8_t emulated[8][16][64];

static inline void emulated_zero(int tile) { memset(emulated[tile], 0, sizeof *emulated); }
static inline void emulated_load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; row++)
    memcpy(emulated[tile][row], (const char*)from + row * stride, 64);
}
static inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++)
    memcpy((char*)to + row * stride, emulated[tile][row], 64);
}
static inline float emulated_widened(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// sums[m][n] += a[m][k] * b[k][n], of pairs in a word each.
static inline void emulated_multiply(int sums, int a, int b) {
  float(*to)[16] = (float(*)[16])emulated[sums];
  const uint16_t(*left)[32] = (const uint16_t(*)[32])emulated[a];
  const uint16_t(*right)[32] = (const uint16_t(*)[32])emulated[b];
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int half = 0; half < 2; half++) {
          const float x = emulated_widened(left[m][2 * k + half]);
          to[m][n] += x * emulated_widened(right[k][2 * n + half]);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define __AMX_BF16__ 1
#define _tile_loadconfig(shape) (void)(shape)
#define _tile_release() (void)0
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_multiply
#define syscall(...) 0  // grants them
