// Mass: what share of attention some queries give to every block of keys, given their LSE.
#pragma once

#include "row.h"

constexpr float HIGHEST = 126.f;  // power of two of a share, if the LSE is of other scores

// Tiles of TILE `slots` of one head of one sample: tokens, or -1 for none.
template <class Mode, class Element>
struct Mass : Reader<Mode, Element> {
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;
  using Reader<Mode, Element>::pair, Reader<Mode, Element>::sample;
  Ahead ahead;

  // Adds to `out` [query_blocks][key_blocks]; `block` is that of each slot.
  Mass(const Call& call, Scratch<Mode>& scratch, int64_t pair, const int64_t* slots,
       const int64_t* block, int tiles, float* out)
      : Reader<Mode, Element>(call, scratch, pair) {
    for (int i = 0; i < tiles; i++) start(*scratch.tiles[i], slots + i * TILE);
    for (int64_t column = 0; column < call.key_blocks; column++) {
      for (int i = 0; i < tiles; i++) std::fill_n(scratch.tiles[i]->total, TILE, 0.f);
      for (int64_t at = call.key_offsets[column]; at < call.key_offsets[column + 1]; at += STEP)
        step(tiles, at, std::min<int64_t>(STEP, call.key_offsets[column + 1] - at));
      for (int i = 0; i < tiles; i++)
        add(*scratch.tiles[i], block + i * TILE, out + column);
    }
  }

  void start(Tile& tile, const int64_t* slots) {
    const float* lse = call.lse + pair * call.queries;
    for (int i = 0; i < TILE; i++) {
      // A query that saw nothing has no share to give.
      const float known = slots[i] < 0 ? -INFINITY : lse[slots[i]];
      tile.largest[i] = known == -INFINITY ? INFINITY : known * LOG2_E;
    }
    this->queries(tile, slots, TILE);
  }

  void step(int tiles, int64_t first, int count) {
    const uint8_t* hidden = call.hidden ? call.hidden + sample * call.keys : nullptr;
    int keys = 0;
    const int64_t next = first + count, left = call.keys - next;
    ahead.clear();
    ahead.add(this->rows(call.key), call.key_permutation + next, std::min<int64_t>(left, STEP),
              this->bytes());
    ahead.spread(tiles * (TILE / Mode::PANEL) * besides<Mode>(STEP));
    for (int i = 0; i < count; i++) {
      const int64_t token = call.key_permutation[first + i];
      if (hidden && hidden[token]) continue;
      this->copy(this->at(call.key, token), scratch.keys + (int64_t)keys++ * scratch.depth,
                 scratch.depth);
    }
    for (int i = 0; i < tiles; i++) {
      Tile& tile = *scratch.tiles[i];
      for (int q = 0; q < TILE; q += Mode::PANEL) {
        product<Mode, false>(tile.queries + q * scratch.depth, scratch.keys, scratch.depth, 1,
                             this->words(), scratch.scores, keys, [this] { ahead.some(); });
        for (int v = 0; v < Mode::PANEL; v += LANES) {
          const Vector top = load(tile.largest + q + v), factor = all(this->factor);
          Vector sum = load(tile.total + q + v);
          for (int key = 0; key < keys; key++) {
            const Vector score = load(scratch.scores + key * Mode::PANEL + v) * factor;
            // In this order, what is not a number stays so.
            sum += exp2<true>(smaller(all(HIGHEST), score - top));
          }
          store(tile.total + q + v, sum);
        }
      }
    }
  }

  void add(const Tile& tile, const int64_t* block, float* out) {
    for (int v = 0; v < TILE; v += LANES) {
      const Bits none = load(tile.largest + v) == all(INFINITY);
      const Vector share = where(none, all(0.f), load(tile.total + v));
      if (block[v] == block[v + LANES - 1] && block[v] >= 0) {  // and so are all between
        out[block[v] * call.key_blocks] += total(share);
      } else {
        for (int i = 0; i < LANES; i++)
          if (block[v + i] >= 0) out[block[v + i] * call.key_blocks] += share[i];
      }
    }
  }
};
