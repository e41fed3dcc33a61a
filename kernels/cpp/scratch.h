// Scratch: what one thread works on. Its size does not depend on the number of tokens.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "bounds.h"
#include "product.h"

constexpr int VECTORS = TILE / LANES;
constexpr int SLOTS = 64;  // places of an axis whose windows are remembered for a tile

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
  alignas(64) int32_t inside[AXES][SLOTS][TILE];             // masks of places, by place % SLOTS
};

template <class Mode>
struct Scratch {
  const int depth, width;  // words of a key, elements of a value, as they are laid out
  std::unique_ptr<float, void (*)(void*)> memory{nullptr, free};
  float *keys, *values, *woven, *scores, *weights, *rows;
  int64_t positions[STEP];
  const uint64_t* masks[STEP];  // of a key: which queries of each tile see it; or null
  const void* value[STEP];      // of a key, where it is read
  float bias[STEP];
  float* found;                 // `more` words, in multiples of TILE
  std::vector<std::unique_ptr<Tile>> tiles;

  Scratch(int head_dim, int64_t block_q, int64_t more = 0)
      : depth(padded((head_dim + Mode::PACKED - 1) / Mode::PACKED, Mode::PAD)),
        width(padded(head_dim, Mode::PAD)),
        tiles((block_q + TILE - 1) / TILE) {
    const size_t words = (size_t)STEP * (depth + 2 * width) + width + 2 * STEP * TILE +
                         (size_t)TILE * width + (size_t)(depth + width) * TILE * tiles.size() +
                         (size_t)more;
    memory.reset((float*)aligned_alloc(64, words * sizeof(float)));
    if (!memory) throw std::bad_alloc();
    memset(memory.get(), 0, words * sizeof(float));
    float* next = memory.get();
    auto take = [&](size_t count) { return std::exchange(next, next + count); };
    keys = take((size_t)STEP * depth);
    values = take((size_t)(STEP + 1) * width);  // the last one is zeros
    woven = take((size_t)STEP * width);
    scores = take(STEP * TILE);
    weights = take(STEP * TILE);
    rows = take((size_t)TILE * width);
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
