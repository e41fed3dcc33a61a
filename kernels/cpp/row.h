// Row: attention of one block of queries, one head, one sample, over the blocks listed for it.
//
// Every vector holds 16, 8 or 4 queries:
//
//     scores[key][query]  = sum over d:    keys[key][d]   * queries[d][query]
//     sums[d][query]     += sum over keys: values[key][d] * weights[key][query]
//
// so that keys and values are read as scalars, the softmax needs no sum across a vector, and only
// queries and outputs are transposed. Keys come in steps: they are copied through the order of
// tokens, and widened or paired, once for all tiles of queries of the block.
#pragma once

#include "ahead.h"
#include "reader.h"

constexpr float HIDDEN = -1e30f;  // score of a pair that is not kept
constexpr float LOWEST = -1e20f;  // running maximum before any score, above HIDDEN
constexpr float GROWTH = 8.f;     // a maximum that grows by less, in powers of two, is not updated

// One query block of one head of one sample.
template <class Mode, class Element>
struct Row : Reader<Mode, Element> {
  static constexpr int PANEL = Mode::PANEL, VECTORS = PANEL / LANES, KEYS = Mode::KEYS;
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;
  using Reader<Mode, Element>::sample, Reader<Mode, Element>::head;
  const Windows& windows;
  const float bound;  // how far below their maximum scores lie whose values are left out
  int tiles = 0, keys = 0;
  bool partial = false, pooled = false;
  int64_t taken = 0;  // keys, padded text among them
  Walk walk;          // over keys that were asked for
  Ahead ahead;
  const int64_t block, next_row;
  int64_t after = 0;  // queries of this row and the next whose memory was asked for

  // `next_row` is likely to be the one that this thread turns to.
  Row(const Call& call, Scratch<Mode>& scratch, int64_t sample, int64_t row, int64_t next_row)
      : Reader<Mode, Element>(call, scratch, sample, row / call.query_blocks),
        windows(call.windows[head]),
        bound((float)call.pv_skip * LOG2_E),
        walk(call, row),
        ahead(call.head_dim * sizeof(Element)),
        block(row % call.query_blocks),
        next_row(next_row) {
    const int64_t end = call.query_offsets[block + 1];
    for (int64_t at = call.query_offsets[block]; at < end; at += TILE)
      start(*scratch.tiles[tiles++], at, std::min<int64_t>(TILE, end - at));
    for (int64_t i = call.row_pointer[row]; i < call.row_pointer[row + 1]; i++)
      visit(call.key_block[i], call.tag[i], call.mask_first ? call.mask_first[i] : -1);
    if (keys) step();
    for (int i = 0; i < tiles; i++) finish(*scratch.tiles[i]);
  }

  void start(Tile& tile, int64_t first, int count) {
    tile.count = count;
    for (int i = 0; i < count; i++) tile.tokens[i] = call.permutation[first + i];
    this->queries(tile, tile.tokens, count);
    memset(tile.sums, 0, sizeof(float) * scratch.width * TILE);
    std::fill_n(tile.largest, TILE, LOWEST);
    std::fill_n(tile.total, TILE, 0.f);
    // Lanes without a query never keep a tile.
    for (int i = 0; i < TILE; i++) tile.peak[i] = i < count ? LOWEST : INFINITY;
    tile.bounds = {};
    for (int axis = 0; axis < windows.axes; axis++) {
      std::fill_n(tile.known[axis], SLOTS, INT64_MIN);
      // Lanes without a query see nothing: what an earlier row left there would decide when
      // maxima are updated, and so how outputs are rounded.
      for (int i = 0; i < TILE; i++) {
        const int64_t at = i < count ? axis * call.queries + tile.tokens[i] : -1;
        tile.low[axis][i] = at < 0 ? 0 : windows.low[at];
        tile.size[axis][i] = at < 0 ? 0 : windows.size[at];
        if (at < 0) continue;
        tile.bounds.low[axis].add(tile.low[axis][i]);
        tile.bounds.end[axis].add((int64_t)tile.low[axis][i] + tile.size[axis][i]);
      }
    }
  }

  // Take the keys of a block: one by one, or in runs of 2^tag positions that count as one. `mask`
  // is where those of a partial block begin.
  void visit(int64_t block, int8_t tag, int64_t mask) {
    const uint8_t* hidden = call.hidden ? call.hidden + sample * call.keys : nullptr;
    const int64_t run = tag > 0 ? 1 << tag : 1, end = call.key_offsets[block + 1];
    const int64_t start = call.key_offsets[block];
    if (keys && (tag == PARTIAL) != partial) step();
    partial = tag == PARTIAL;
    const uint64_t* own = mask < 0 ? nullptr : call.masks + mask;
    for (int64_t first = start; first < end; first += run) {
      taken++;
      int64_t seen[1 << 7];
      const int64_t* tokens = call.key_permutation + first;
      int64_t count = std::min(run, end - first);
      if (hidden) {
        auto shown = [hidden](int64_t token) { return !hidden[token]; };
        count = std::copy_if(tokens, tokens + count, seen, shown) - seen;
        tokens = seen;
      }
      if (!count) continue;
      take(tokens, count);
      scratch.masks[keys] = own ? own + (first - start) * tiles : nullptr;
      if (++keys == KEYS) step();
    }
    if (keys && leaves_out()) step();
  }

  void take(const int64_t* tokens, int64_t count) {
    float* key = scratch.keys + (int64_t)keys * scratch.depth;
    float* value = scratch.values + (int64_t)keys * scratch.width;
    scratch.value[keys] = value;
    scratch.positions[keys] = tokens[0];
    scratch.bias[keys] = 0.f;
    if (count == 1) {
      this->copy(this->at(call.key, tokens[0]), key);
      // Weaving needs no copy of whole vectors.
      if (Mode::PACKED == 2 && call.head_dim == scratch.width)
        scratch.value[keys] = this->at(call.value, tokens[0]);
      else
        this->copy(this->at(call.value, tokens[0]), value);
    } else {
      this->mean(call.key, tokens, count, key);
      this->mean(call.value, tokens, count, value);
      scratch.bias[keys] = log2f((float)count);
      pooled = true;
    }
  }

  bool leaves_out() const { return bound > -INFINITY; }

  // Let every tile of queries look at the keys that were taken.
  void step() {
    const float* values = nullptr;
    look_ahead();
    const auto beside = [this] { ahead.some(); };
    const int packs = padded(keys, Mode::APART * Mode::PACKED) / Mode::PACKED;
    Span places[AXES];
    const bool windowed = partial && !scratch.masks[0];
    for (int axis = 0; windowed && axis < windows.axes; axis++)
      for (int key = 0; key < keys; key++) places[axis].add(place(axis, key));
    for (int i = 0; i < tiles; i++) {
      Tile& tile = *scratch.tiles[i];
      const Kept kept = windowed ? tile.bounds.kept(places, windows.axes) : Kept::SOME;
      if (kept == Kept::NONE) continue;
      const bool masked = partial && kept == Kept::SOME;
      for (int q = 0; q < TILE; q += PANEL) {
        product<Mode, false>(tile.queries + q * scratch.depth, scratch.keys, scratch.depth, 1,
                             this->words(), scratch.scores, keys, beside);
        if (!(masked ? soften<true>(tile, i, q) : soften<false>(tile, i, q))) continue;
        if constexpr (Mode::PACKED == 2)
          values = values ? values : weave();
        else
          values = scratch.values;
        product<Mode, true>(Mode::PACKED == 2 ? scratch.weights : scratch.scores, values,
                            Mode::TURNED ? STEP / 2 : 1, scratch.width, packs,
                            tile.sums + q * scratch.width, call.head_dim, beside);
      }
    }
    keys = 0;
    pooled = false;
  }

  // Asks for the key and the value of a token.
  auto both(const Reader<Mode, Element>& of) {
    const Element *key = of.at(call.key, 0), *value = of.at(call.value, 0);
    return [this, key, value, key_step = call.key.token,
            value_step = call.value.token](int64_t token) {
      ahead.add(key + token * key_step);
      ahead.add(value + token * value_step);
    };
  }

  // What the next step reads; before the last ones, outputs and what the next row begins with.
  void look_ahead() {
    ahead.clear();
    walk.on(taken, [](int64_t) {});
    walk.on(taken + KEYS, both(*this));
    const int64_t left = walk.end - walk.entry;
    if (left <= 2) {
      const Reader<Mode, Element> next(call, scratch, sample, next_row / call.query_blocks);
      auto add = [&](const Reader<Mode, Element>& of, const Operand& operand, int64_t number) {
        const int64_t at = call.query_offsets[number] + after;
        if (at < call.query_offsets[number + 1]) ahead.add(of.at(operand, call.permutation[at]));
      };
      for (int i = 0; i < KEYS / 2; i++, after++) {
        add(*this, call.output, block);
        add(next, call.query, next_row % call.query_blocks);
      }
      if (!left)
        Walk(call, next_row).on(KEYS, both(next));
    }
    ahead.spread(tiles * (TILE / PANEL) * (besides<Mode>(KEYS) + besides<Mode>(call.head_dim)));
  }

  // Values of two keys side by side in a word; by depth and then key where TURNED.
  const float* weave() {
    const int width = scratch.width, end = padded(keys, 2 * Mode::APART);
    float* nothing = scratch.values + (int64_t)STEP * width;
    for (int key = keys; key < end; key++) scratch.value[key] = nothing;
    for (int key = 0; key < end; key += 2 * Mode::APART) {
      const Half* const* values = (const Half* const*)(scratch.value + key);
      if constexpr (Mode::TURNED)
        Mode::weave(values, width, scratch.woven + key / 2, STEP / 2);
      else
        Mode::weave(values, width, scratch.woven + key / 2 * width);
    }
    return scratch.woven;
  }

  // Scores of a panel, from query `q` of the tile, to weights; what was summed up before is scaled
  // down where a maximum grew. Returns whether their values are to be summed up.
  template <bool MASKED>
  bool soften(Tile& tile, int number, int q) {
    constexpr bool ROUGH = Mode::PACKED == 2;
    float *const scores = scratch.scores, *const weights = scratch.weights;
    const int keys = this->keys;
    constexpr int APART = Mode::APART;
    const int end = padded(keys, APART * Mode::PACKED);
    const bool changed = MASKED || pooled || keys < end;
    Vector largest[VECTORS];
    for (int v = 0; v < VECTORS; v++) largest[v] = all(HIDDEN);
    for (int key = 0; key < keys; key++) {
      const int32_t* inside[AXES];
      const uint64_t* own = MASKED ? scratch.masks[key] : nullptr;
      if (MASKED)
        for (int axis = 0; axis < windows.axes; axis++) inside[axis] = mask(tile, axis, key);
      for (int v = 0; v < VECTORS; v++) {
        float* at = scores + key * PANEL + v * LANES;
        Vector score = load(at);
        if (changed) score = score * all(this->factor) + all(scratch.bias[key]);
        if (MASKED) {
          Bits kept = ~(Bits){};
          for (int axis = 0; axis < windows.axes; axis++)
            kept &= *(const Bits*)(inside[axis] + q + v * LANES);
          if (own) kept &= spread(own[number] >> (q + v * LANES));
          score = where(kept, score, all(HIDDEN));
        }
        if (changed) store(at, score);
        largest[v] = larger(score, largest[v]);
      }
    }
    for (int key = keys; key < end; key++)
      for (int v = 0; v < VECTORS; v++) store(scores + key * PANEL + v * LANES, all(HIDDEN));
    const Vector unit = all(changed ? 1.f : this->factor);
    Bits grew = {};
    for (int v = 0; v < VECTORS; v++) {
      largest[v] *= unit;
      grew |= largest[v] > load(tile.largest + q + v * LANES) + all(GROWTH);
    }
    if (any(grew)) raise(tile, q, largest);
    const bool summed = !leaves_out() || near(tile, q, largest);
    for (int v = 0; v < VECTORS; v++) {
      const Vector top = load(tile.largest + q + v * LANES);
      Vector total = load(tile.total + q + v * LANES);
      for (int first = 0; first < end; first += APART * Mode::PACKED)
        for (int key = first; key < first + APART; key++) {
          float* at = scores + key * PANEL + v * LANES;
          const Vector weight = exp2<ROUGH>(load(at) * unit - top);
          total += weight;
          if constexpr (Mode::PACKED == 1) {
            store(at, weight);
          } else {
            const Vector other = exp2<ROUGH>(load(at + APART * PANEL) * unit - top);
            total += other;
            store(weights + (key - first / 2) * PANEL + v * LANES,
                  Mode::paired(weight, other));
          }
        }
      store(tile.total + q + v * LANES, total);
    }
    return summed;
  }

  // Whether a query of the panel has scores near its maximum, which is kept up to date here.
  bool near(Tile& tile, int q, const Vector* largest) {
    Bits found = {};
    for (int v = 0; v < VECTORS; v++) {
      const Vector peak = larger(largest[v], load(tile.peak + q + v * LANES));
      store(tile.peak + q + v * LANES, peak);
      found |= ~(Bits)(largest[v] - peak < all(bound));
    }
    return any(found);
  }

  void raise(Tile& tile, int q, const Vector* largest) {
    for (int v = 0; v < VECTORS; v++) {
      const Vector before = load(tile.largest + q + v * LANES);
      const Vector after = larger(largest[v], before), shrink = exp2<false>(before - after);
      store(tile.largest + q + v * LANES, after);
      store(tile.total + q + v * LANES, load(tile.total + q + v * LANES) * shrink);
      for (int d = 0; d < call.head_dim; d++) {
        float* sum = tile.sums + scratch.place(q, d, scratch.width) + v * LANES;
        store(sum, load(sum) * shrink);
      }
    }
  }

  int64_t place(int axis, int key) const {
    return windows.place[axis * call.keys + scratch.positions[key]];
  }

  // Which queries of the tile have the key's place on an axis inside their window.
  const int32_t* mask(Tile& tile, int axis, int key) {
    const int64_t own = place(axis, key);
    const int slot = own & (SLOTS - 1);
    int32_t* inside = tile.inside[axis][slot];
    if (tile.known[axis][slot] != own) {
      tile.known[axis][slot] = own;
      for (int i = 0; i < TILE; i++) {
        const int64_t offset = own - tile.low[axis][i];
        inside[i] = -(int32_t)(offset >= 0 && offset < tile.size[axis][i]);
      }
    }
    return inside;
  }

  void finish(Tile& tile) {
    for (int d = 0; d < scratch.width; d += LANES)
      for (int i = 0; i < TILE; i += LANES)
        transpose(tile.sums + scratch.place(i, d, scratch.width), PANEL,
                  scratch.rows + i * scratch.width + d, scratch.width);
    for (int i = 0; i < tile.count; i++) {
      // A total that is not a number makes the output not a number, as it must.
      const bool empty = tile.largest[i] == LOWEST && tile.total[i] < 1.f;
      const float inverse = empty ? 0.f : 1.f / tile.total[i];
      Element* to = (Element*)this->at(call.output, tile.tokens[i]);
      const float* row = scratch.rows + i * scratch.width;
      for (int d = 0; d < call.head_dim; d++) narrow(empty ? 0.f : row[d] * inverse, to[d]);
      call.lse[(sample * call.heads + head) * call.queries + tile.tokens[i]] =
          empty ? -INFINITY : (tile.largest[i] + log2f(tile.total[i])) * LN_2;
    }
  }
};
