// Scratch: what one thread works on. Its size does not depend on the number of tokens.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "bounds.h"
#include "product.h"

constexpr int SLOTS = 64;  // places of an axis whose windows are remembered for a tile
constexpr int PIECE = 128;  // keys
constexpr int ROWS = 4;     // of float32, that means are made in

// Keys that are laid out together.
template <class Mode>
constexpr int GROUP = Mode::PACKED == 2 ? 2 * Mode::APART : SHORT;

// Words of so many values, as they are laid out.
template <class Mode>
constexpr size_t value_words(int keys, int width) {
  return (size_t)padded(keys, GROUP<Mode>) / Mode::PACKED * width;
}
// And of their keys and biases beside.
template <class Mode>
constexpr size_t piece_words(int keys, int depth, int width) {
  return value_words<Mode>(keys, width) + (size_t)padded(keys, GROUP<Mode>) * depth +
         padded(keys, LANES);
}

// The queries of a tile, and what is summed up for them while their row is visited.
struct Tile {
  int count;
  int64_t tokens[TILE];
  float *queries, *sums;                                     // panels of [depth], [head_dim]
  alignas(64) float largest[TILE], total[TILE];
  alignas(64) float peak[TILE];                              // the true maximum, for pv_skip
  alignas(64) int32_t low[AXES][TILE], size[AXES][TILE];
  Bounds bounds;
  int64_t known[AXES][SLOTS];
  uint64_t inside[AXES][SLOTS];                              // who sees a place, by place % SLOTS
};

template <class Mode>
struct Scratch {
  const int depth, width;  // words of a key, elements of a value, as they are laid out
  std::unique_ptr<float, void (*)(void*)> memory{nullptr, free};
  float *keys, *values, *scores, *weights, *rows;
  float* own;    // a piece
  float* found;  // `more` words, in multiples of TILE
  std::vector<std::unique_ptr<Tile>> tiles;

  Scratch(int head_dim, int64_t block_q, int64_t more = 0)
      : depth(padded((head_dim + Mode::PACKED - 1) / Mode::PACKED, Mode::PAD)),
        width(padded(head_dim, Mode::PAD)),
        tiles((block_q + TILE - 1) / TILE) {
    const size_t words = (size_t)STEP * depth + (size_t)GROUP<Mode> * width + 2 * STEP * TILE +
                         (size_t)ROWS * width + (size_t)(depth + width) * TILE * tiles.size() +
                         piece_words<Mode>(PIECE, depth, width) + (size_t)more;
    memory.reset((float*)aligned_alloc(64, words * sizeof(float)));
    if (!memory) throw std::bad_alloc();
    memset(memory.get(), 0, words * sizeof(float));
    float* next = memory.get();
    auto take = [&](size_t count) { return std::exchange(next, next + count); };
    keys = take((size_t)STEP * depth);
    values = take((size_t)GROUP<Mode> * width);
    scores = take(STEP * TILE);
    weights = take(STEP * TILE);
    rows = take((size_t)ROWS * width);
    own = take(piece_words<Mode>(PIECE, depth, width));
    found = take((size_t)more);
    for (auto& tile : tiles) {
      tile.reset(new Tile);
      tile->queries = take((size_t)depth * TILE);
      tile->sums = take((size_t)width * TILE);
    }
  }

  // Of query `i` of a tile at `row`, in panels of so many rows.
  static int place(int i, int row, int rows) {
    return (i / Mode::PANEL * rows + row) * Mode::PANEL + i % Mode::PANEL;
  }
};
