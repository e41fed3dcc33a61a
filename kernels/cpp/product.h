// Product: small matrices multiplied in registers, TILE columns wide.
#pragma once

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <type_traits>

#include "vector.h"

constexpr int TILE = 64;  // queries
constexpr int STEP = 64;  // keys
constexpr int TALL = 6, SHORT = 4;  // register tiles: so many scalars by WIDE vectors

constexpr int padded(int count, int multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// A mode says how the factors of a product lie in memory, and what multiplies them: PACKED
// elements a word, rows and depths laid out in multiples of PAD; values by key, or TURNED. A PANEL
// of queries is multiplied at once. Two keys that share a word lie APART. A Session is held by a
// thread while it multiplies.

// One float32 a word.
struct Single {
  static constexpr int PACKED = 1, PAD = 16, APART = 1, PANEL = TILE;
  static constexpr bool TURNED = false;
  struct Session {};
  INLINE Vector add(Vector sum, Vector x, const float* word) { return sum + x * all(*word); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 a word, multiplied and added in one instruction: neighbors in head_dim, or keys of
// a group of SHORT.
struct Pairs {
  static constexpr int PACKED = 2, PAD = 32, APART = SHORT / 2, PANEL = TILE;
  static constexpr bool TURNED = false;
  struct Session {};
  INLINE Vector add(Vector sum, Vector x, const float* word) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_ps(*word));
  }
  // Rounded, halves up.
  INLINE Vector paired(Vector first, Vector second) {
    const Bits low = (Bits)first + 0x8000, high = (Bits)second + 0x8000;
    return (Vector)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)low, 16),
                                           (__m512i)high);
  }
  // Values of 2 APART keys, as words of pairs.
  static void weave(const Half* const* values, int width, float* to) {
    for (int pair = 0; pair < APART; pair++) {
      const Half *a = values[pair], *b = values[pair + APART];
      uint32_t* words = (uint32_t*)to + pair * width;
      for (int d = 0; d < width; d++) words[d] = a[d] | (uint32_t)b[d] << 16;
    }
  }
};
#endif

// to[ROWS][WIDE vectors] (+)= sum over k: x[k][...] * words[row * row_stride + k * depth_stride]
template <class Mode, bool ACCUMULATE, int ROWS>
INLINE void register_tile(const float* x, const float* words, int64_t row_stride,
                          int64_t depth_stride, int depth, float* to) {
  Vector sums[ROWS][WIDE];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++)
      sums[r][w] = ACCUMULATE ? load(to + r * Mode::PANEL + w * LANES) : all(0.f);
#pragma GCC unroll 2
  for (int k = 0; k < depth; k++) {
    Vector part[WIDE];
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++) part[w] = load(x + k * Mode::PANEL + w * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int w = 0; w < WIDE; w++)
        sums[r][w] = Mode::add(sums[r][w], part[w], words + r * row_stride + k * depth_stride);
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; w++) store(to + r * Mode::PANEL + w * LANES, sums[r][w]);
}

#if defined(__AMX_BF16__)
// Two bfloat16 a word, in tiles of 16 rows by 16 words.
struct Tiles : Pairs {
  static constexpr int APART = 16, PANEL = 32;
  static constexpr bool TURNED = true;

  // Those words by depth.
  static void weave(const Half* const* values, int width, float* to) {
    constexpr int LANE = 4;  // words that stay together
    for (int d = 0; d < width; d += 2 * LANES)
      for (int half = 0; half < 2; half++) {
        Vector rows[LANES];
        for (int pair = 0; pair < APART; pair++) {
          const __m512i a = _mm512_loadu_si512(values[pair] + d);
          const __m512i b = _mm512_loadu_si512(values[pair + APART] + d);
          rows[pair] = (Vector)(half ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
        }
        transpose(rows);
        for (int i = 0; i < LANES; i++)
          store(to + (d + (i / LANE * 2 + half) * LANE + i % LANE) * APART, rows[i]);
      }
  }

  // Linux gives the tile registers to a process that asks for them.
  static bool granted() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    static const bool given = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return given;
  }

  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shape;
      _tile_loadconfig(&shape);
    }
    ~Session() { _tile_release(); }
  };
};

// As `register_tile`, of 16 rows or, if BOTH, of 32, and a panel.
template <bool ACCUMULATE, bool BOTH>
INLINE void tile_block(const float* x, const float* words, int64_t row_stride, int64_t depth_stride,
                       int depth, float* to) {
  constexpr int PANEL = Tiles::PANEL;
  constexpr int64_t WIDTH = PANEL * sizeof(float);
  const int64_t stride = row_stride * sizeof(float);
  float* const low = to + 16 * PANEL;
  if (ACCUMULATE) {
    _tile_loadd(0, to, WIDTH);
    _tile_loadd(1, to + 16, WIDTH);
    if (BOTH) _tile_loadd(2, low, WIDTH);
    if (BOTH) _tile_loadd(3, low + 16, WIDTH);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (BOTH) _tile_zero(2);
    if (BOTH) _tile_zero(3);
  }
  for (int k = 0; k < depth; k += 16) {
    _tile_loadd(4, words + k * depth_stride, stride);
    _tile_loadd(6, x + k * PANEL, WIDTH);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + k * PANEL + 16, WIDTH);
    _tile_dpbf16ps(1, 4, 7);
    if (!BOTH) continue;
    _tile_loadd(5, words + 16 * row_stride + k * depth_stride, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, WIDTH);
  _tile_stored(1, to + 16, WIDTH);
  if (BOTH) _tile_stored(2, low, WIDTH);
  if (BOTH) _tile_stored(3, low + 16, WIDTH);
}

template <bool ACCUMULATE, class Beside>
static void product_of_tiles(const float* x, const float* words, int64_t row_stride,
                             int64_t depth_stride, int depth, float* to, int rows,
                             const Beside& beside) {
  auto block = [&](auto both, int row) {
    tile_block<ACCUMULATE, both>(x, words + row * row_stride, row_stride, depth_stride, depth,
                                 to + row * Tiles::PANEL);
    beside();
  };
  int row = 0;
  for (; row + 16 < rows; row += 32) block(std::true_type{}, row);
  if (row < rows) block(std::false_type{}, row);
}
#endif

constexpr auto NOTHING = [] {};

// The product of a panel for `rows` rows, which are laid out up to a multiple of SHORT. Does
// `beside` after each register tile.
template <class Mode, bool ACCUMULATE, class Beside = decltype(NOTHING)>
static void product(const float* x, const float* words, int64_t row_stride, int64_t depth_stride,
                    int depth, float* to, int rows, const Beside& beside = NOTHING) {
#if defined(__AMX_BF16__)
  if constexpr (Mode::TURNED)
    return product_of_tiles<ACCUMULATE>(x, words, row_stride, depth_stride, depth, to, rows, beside);
#endif
  auto tiles = [&](auto height, int row, int end) {
    for (; row < end; row += height)
      for (int q = 0; q < Mode::PANEL; q += WIDE * LANES) {
        register_tile<Mode, ACCUMULATE, height>(x + q, words + row * row_stride, row_stride,
                                                depth_stride, depth, to + row * Mode::PANEL + q);
        beside();
      }
  };
  rows = std::max(padded(rows, 2), SHORT);
  const int low = (TALL - rows % TALL) / 2 % 3 * SHORT;  // what is left is a multiple of TALL
  tiles(std::integral_constant<int, SHORT>{}, 0, low);
  tiles(std::integral_constant<int, TALL>{}, low, rows);
}

// How often a product of so many rows does what is beside it.
template <class Mode>
constexpr int besides(int rows) {
  return Mode::TURNED ? padded(rows, 32) / 32 : (rows + TALL - 1) / TALL * (TILE / (WIDE * LANES));
}
