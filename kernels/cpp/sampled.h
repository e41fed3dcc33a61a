// Sampled: how near the keys that stand for a block come to the largest logit of a query.
#pragma once

#include "row.h"

// Samples of a block, `each` in a row, -1 for none: raster tokens [query_blocks][each] and
// [key_blocks][each].
struct Samples {
  const int64_t *rows, *columns;
  int64_t each, query_blocks, key_blocks;

  // Lanes that a block takes of a tile: a power of two, so that none is cut in two.
  int64_t lanes() const {
    int64_t lanes = 1;
    while (lanes < each) lanes *= 2;
    return lanes;
  }
};

// The query blocks of as many tiles as `scratch` has, from `first`, of one head of one sample:
//
//     out[i][j] = max over rows m of i of (r[m][j] - max over j of r[m][j]),
//     r[m][j]   = max over the samples of j of their score, in powers of two
template <class Mode, class Element>
struct Sampled : Reader<Mode, Element> {
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;
  const Samples& samples;
  const int64_t lanes, first;
  int tiles = 0;

  Sampled(const Call& call, Scratch<Mode>& scratch, int64_t pair, const Samples& samples,
          int64_t first, float* out)
      : Reader<Mode, Element>(call, scratch, pair),
        samples(samples),
        lanes(samples.lanes()),
        first(first) {
    const int64_t per_tile = TILE / lanes;
    for (int64_t block = first; block < samples.query_blocks && tiles < (int)scratch.tiles.size();
         block += per_tile)
      start(*scratch.tiles[tiles++], block);
    for (int64_t column = 0; column < samples.key_blocks; column++) step(column);
    for (int i = 0; i < tiles; i++) finish(*scratch.tiles[i], i, first + i * per_tile, out);
  }

  // What a tile has found for a block of keys.
  float* found(int tile, int64_t column) const {
    return scratch.found + (tile * samples.key_blocks + column) * TILE;
  }

  void start(Tile& tile, int64_t block) {
    for (int i = 0; i < TILE; i++) {
      const int64_t own = block + i / lanes, place = i % lanes;
      const bool there = own < samples.query_blocks && place < samples.each;
      tile.tokens[i] = there ? samples.rows[own * samples.each + place] : -1;
    }
    this->queries(tile, tile.tokens, TILE);
    std::fill_n(tile.largest, TILE, -INFINITY);
  }

  void step(int64_t column) {
    int keys = 0;
    for (int64_t i = column * samples.each; i < (column + 1) * samples.each; i++)
      if (samples.columns[i] >= 0)
        this->copy(this->at(call.key, samples.columns[i]),
                   scratch.keys + (int64_t)keys++ * scratch.depth, scratch.depth);
    for (int i = 0; i < tiles; i++) {
      Tile& tile = *scratch.tiles[i];
      for (int q = 0; q < TILE; q += Mode::PANEL) {
        product<Mode, false>(tile.queries + q * scratch.depth, scratch.keys, scratch.depth, 1,
                             this->words(), scratch.scores, keys);
        for (int v = 0; v < Mode::PANEL; v += LANES) {
          Vector best = all(-INFINITY);
          for (int key = 0; key < keys; key++)
            best = larger(load(scratch.scores + key * Mode::PANEL + v), best);
          store(found(i, column) + q + v, best);
          float* largest = tile.largest + q + v;
          store(largest, larger(best, load(largest)));
        }
      }
    }
  }

  void finish(Tile& tile, int number, int64_t block, float* out) {
    // Lanes without a query never come near.
    for (int i = 0; i < TILE; i++)
      if (tile.tokens[i] < 0) tile.largest[i] = INFINITY;
    for (int64_t column = 0; column < samples.key_blocks; column++) {
      float* best = found(number, column);
      for (int v = 0; v < TILE; v += LANES) store(best + v, load(best + v) - load(tile.largest + v));
      for (int64_t i = 0; i < TILE / lanes && block + i < samples.query_blocks; i++)
        out[(block + i) * samples.key_blocks + column] =
            this->factor * *std::max_element(best + i * lanes, best + (i + 1) * lanes);
    }
  }
};
