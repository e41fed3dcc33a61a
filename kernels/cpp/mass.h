// Mass: what share of attention some queries give to every block of keys, given their LSE.
#pragma once

#include "row.h"

constexpr float HIGHEST = 126.f;  // power of two of a share, if the LSE is of other scores

// TILE `slots` of one head of one sample: tokens, or -1 for none.
template <class Mode, class Element>
struct Mass : Reader<Mode, Element> {
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;
  using Reader<Mode, Element>::sample, Reader<Mode, Element>::head;
  alignas(64) float level[TILE], share[TILE];

  // Adds to `out` [query_blocks][key_blocks]; `block` is that of each slot.
  Mass(const Call& call, Scratch<Mode>& scratch, int64_t sample, int64_t head,
       const int64_t* slots, const int64_t* block, float* out, int64_t key_blocks)
      : Reader<Mode, Element>(call, scratch, sample, head) {
    Tile& tile = *scratch.tiles[0];
    const float* lse = call.lse + (sample * call.heads + head) * call.queries;
    for (int i = 0; i < TILE; i++) {
      // A query that saw nothing has no share to give.
      const float known = slots[i] < 0 ? -INFINITY : lse[slots[i]];
      level[i] = known == -INFINITY ? INFINITY : known * LOG2_E;
    }
    this->queries(tile, slots, TILE);
    for (int64_t column = 0; column < key_blocks; column++) {
      std::fill_n(share, TILE, 0.f);
      for (int64_t at = call.key_offsets[column]; at < call.key_offsets[column + 1]; at += STEP)
        step(tile, at, std::min<int64_t>(STEP, call.key_offsets[column + 1] - at));
      for (int i = 0; i < TILE; i++)
        if (level[i] != INFINITY) out[block[i] * key_blocks + column] += share[i];
    }
  }

  void step(Tile& tile, int64_t first, int count) {
    const uint8_t* hidden = call.hidden ? call.hidden + sample * call.keys : nullptr;
    int keys = 0;
    for (int i = 0; i < count; i++) {
      const int64_t token = call.key_permutation[first + i];
      if (hidden && hidden[token]) continue;
      this->copy(this->at(call.key, token), scratch.keys + (int64_t)keys++ * scratch.depth);
    }
    product<Mode, false>(tile.queries, scratch.keys, scratch.depth, 1, this->words(),
                         scratch.scores, keys);
    for (int v = 0; v < VECTORS; v++) {
      const Vector top = load(level + v * LANES);
      Vector sum = load(share + v * LANES);
      for (int key = 0; key < keys; key++) {
        const Vector score = load(scratch.scores + key * TILE + v * LANES) * all(this->factor);
        // In this order, what is not a number stays so.
        sum += exp2<true>(-larger(all(-HIGHEST), top - score));
      }
      store(share + v * LANES, sum);
    }
  }
};
