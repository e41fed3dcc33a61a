// Row: attention of one block of queries, one head, one sample, over the blocks listed for it.
//
// Every vector holds 16, 8 or 4 queries:
//
//     scores[key][query]  = sum over d:    keys[key][d]   * queries[d][query]
//     sums[d][query]     += sum over keys: values[key][d] * weights[key][query]
//
// so that keys and values are read as scalars, the softmax needs no sum across a vector, and only
// queries and outputs are transposed. Keys come in steps, each a part of what lies on the shelf.
#pragma once

#include "ahead.h"
#include "shelf.h"

constexpr float LOWEST = -1e20f;  // running maximum before any score, above HIDDEN
constexpr float GROWTH = 8.f;     // a maximum that grows by less, in powers of two, is not updated

// One query block of one head of one sample.
template <class Mode, class Element>
struct Row : Reader<Mode, Element> {
  static constexpr int PANEL = Mode::PANEL, VECTORS = PANEL / LANES;
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;
  using Reader<Mode, Element>::pair, Reader<Mode, Element>::head;
  Shelf<Mode, Element>& shelf;
  const Windows& windows;
  const float bound;  // how far below their maximum scores lie whose values are left out
  const int64_t block, next_row;
  int tiles = 0;
  Walk walk;
  Piece piece;                      // where the walk is
  int32_t places[AXES][PIECE];      // of its keys, if windows decide
  uint64_t seen[PIECE];             // by which queries of a tile, where not by all or by none
  int first = 0, keys = 0;          // of the piece, in a step
  Ahead ahead;
  int64_t after = 0;  // queries of this row and the next whose memory was asked for

  // `next_row` is likely to be the one that this thread turns to.
  Row(const Call& call, Scratch<Mode>& scratch, Shelf<Mode, Element>& shelf, int64_t row,
      int64_t next_row)
      : Reader<Mode, Element>(call, scratch, row / call.query_blocks),
        shelf(shelf),
        windows(call.windows[head]),
        bound((float)call.pv_skip * LOG2_E),
        block(row % call.query_blocks),
        next_row(next_row),
        walk(call, row) {
    const int64_t end = call.query_offsets[block + 1];
    for (int64_t at = call.query_offsets[block]; at < end; at += TILE)
      start(*scratch.tiles[tiles++], at, std::min<int64_t>(TILE, end - at));
    for (; !walk.over(); walk.next()) visit();
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

  bool leaves_out() const { return bound > -INFINITY; }

  // Let every panel of queries look at the keys of a piece.
  void visit() {
    piece = shelf.take(scratch, pair, walk.spot);
    if (!piece.shown) return;
    look_ahead();
    const int count = walk.keys(), start = walk.spot.part * PIECE;
    const bool partial = walk.tag() == PARTIAL;
    const int64_t own = partial && call.mask_first ? call.mask_first[walk.entry] : -1;
    const uint64_t* masks = own < 0 ? nullptr : call.masks + own + start * tiles;
    const int64_t* tokens = call.key_permutation + call.key_offsets[walk.spot.block] + start;
    Span spans[PIECE / STEP][AXES];
    for (int axis = 0; partial && !masks && axis < windows.axes; axis++)
      for (int key = 0; key < count; key++) {
        places[axis][key] = windows.place[axis * call.keys + tokens[key]];
        spans[key / STEP][axis].add(places[axis][key]);
      }
    for (int i = 0; i < tiles; i++) {
      Tile& tile = *scratch.tiles[i];
      Kept kept[PIECE / STEP];
      for (int step = 0; step * STEP < count; step++) {
        kept[step] = !partial ? Kept::ALL
                     : masks  ? Kept::SOME
                              : tile.bounds.kept(spans[step], windows.axes);
        if (kept[step] != Kept::SOME) continue;
        for (int key = step * STEP; key < std::min(count, (step + 1) * STEP); key++)
          seen[key] = masks ? masks[key * tiles + i] : inside(tile, key);
      }
      for (int q = 0; q < TILE; q += PANEL)
        for (first = 0; first < count; first += STEP) {
          keys = std::min(STEP, count - first);
          if (kept[first / STEP] != Kept::NONE) step(tile, q, kept[first / STEP] == Kept::SOME);
        }
    }
  }

  // The panel from query `q` of a tile, and some keys of the piece.
  void step(Tile& tile, int q, bool masked) {
    const auto beside = [this] { ahead.some(); };
    const int depth = scratch.depth, width = scratch.width;
    product<Mode, false>(tile.queries + q * depth, piece.keys + first * depth, depth, 1,
                         this->words(), scratch.scores, keys, beside);
    if (!(masked ? soften<true>(tile, q) : soften<false>(tile, q))) return;
    product<Mode, true>(Mode::PACKED == 2 ? scratch.weights : scratch.scores,
                        piece.values + first / Mode::PACKED * width, Mode::TURNED ? LANES : 1,
                        width, padded(keys, Mode::APART * Mode::PACKED) / Mode::PACKED,
                        tile.sums + q * width, call.head_dim, beside);
  }

  // What the next piece is made of; towards the end, outputs and what the next row begins with.
  void look_ahead() {
    ahead.clear();
    Walk later = walk;
    later.next();
    if (!later.over()) lay_ahead(later, *this);
    if (walk.end - walk.entry <= 2) {
      const Reader<Mode, Element> next(call, scratch, next_row / call.query_blocks);
      auto add = [&](const Rows<Element>& rows, int64_t number) {
        const int64_t at = call.query_offsets[number] + after;
        const int64_t left = call.query_offsets[number + 1] - at;
        ahead.add(rows, call.permutation + at, std::min<int64_t>(left, PIECE / 2), this->bytes());
      };
      add(this->rows(call.output), block);
      add(next.rows(call.query), next_row % call.query_blocks);
      after += PIECE / 2;
      const Walk start(call, next_row);
      if (later.over() && !start.over()) lay_ahead(start, next);
    }
    const int steps = (walk.keys() + STEP - 1) / STEP * tiles * (TILE / PANEL);
    ahead.spread(steps * (besides<Mode>(STEP) + besides<Mode>(call.head_dim)));
  }

  void lay_ahead(const Walk& later, const Reader<Mode, Element>& of) {
    if (const Piece* next = shelf.find(of.pair, later.spot)) {
      const int64_t keys = later.keys();
      ahead.add(next->keys, keys * scratch.depth * sizeof(float));
      ahead.add(next->values, value_words<Mode>(later.keys(), scratch.width) * sizeof(float));
      return;
    }
    if (float* room = shelf.room(of.pair, later.spot))
      ahead.add(room, sizeof(float) * piece_words<Mode>(later.keys(), scratch.depth,
                                                        scratch.width));
    const int64_t from = call.key_offsets[later.spot.block], level = later.spot.level;
    const int64_t start = from + ((int64_t)later.spot.part * PIECE << level);
    const int64_t end = std::min(start + ((int64_t)later.keys() << level),
                                 call.key_offsets[later.spot.block + 1]);
    const int64_t* tokens = call.key_permutation + start;
    ahead.add(of.rows(call.key), tokens, end - start, this->bytes());
    ahead.add(of.rows(call.value), tokens, end - start, this->bytes());
  }

  // Scores of a panel, from query `q` of the tile, to weights; what was summed up before is scaled
  // down where a maximum grew. Returns whether their values are to be summed up.
  template <bool MASKED>
  bool soften(Tile& tile, int q) {
    constexpr bool ROUGH = Mode::PACKED == 2;
    float *const scores = scratch.scores, *const weights = scratch.weights;
    constexpr int APART = Mode::APART;
    const int end = padded(keys, APART);
    for (int key = 0; piece.biased && key < keys; key++)
      for (int v = 0; v < VECTORS; v++) {
        float* at = scores + key * PANEL + v * LANES;
        store(at, load(at) * all(this->factor) + all(piece.bias[first + key]));
      }
    for (int key = 0; MASKED && key < keys; key++)
      for (int v = 0; v < VECTORS; v++)
        store(scores + key * PANEL + v * LANES, ~seen[first + key] >> (q + v * LANES), all(HIDDEN));
    for (int key = keys; key < end; key++)
      for (int v = 0; v < VECTORS; v++) store(scores + key * PANEL + v * LANES, all(HIDDEN));
    const Vector unit = all(piece.biased ? 1.f : this->factor);
    Bits grew = {};
    Vector largest[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      largest[v] = largest_of(scores + v * LANES) * unit;
      grew |= largest[v] > load(tile.largest + q + v * LANES) + all(GROWTH);
    }
    if (any(grew)) raise(tile, q, largest);
    const bool summed = !leaves_out() || near(tile, q, largest);
    for (int v = 0; v < VECTORS; v++) {
      const Vector top = load(tile.largest + q + v * LANES);
      Vector total = load(tile.total + q + v * LANES);
      auto weight = [&](int key) {
        const Vector own = exp2<ROUGH>(load(scores + key * PANEL + v * LANES) * unit - top);
        total += own;
        return own;
      };
      if constexpr (Mode::PACKED == 1) {
        for (int key = 0; key < end; key++) store(scores + key * PANEL + v * LANES, weight(key));
      } else {
        float* to = weights + v * LANES;
        for (int first = 0; first < end; first += 2 * APART) {
          const bool both = first + APART < end;
          for (int key = first; both && key < first + APART; key++, to += PANEL)
            store(to, Mode::paired(weight(key), weight(key + APART)));
          for (int key = first; !both && key < first + APART; key++, to += PANEL)
            store(to, Mode::paired(weight(key), all(0.f)));
        }
      }
      store(tile.total + q + v * LANES, total);
    }
    return summed;
  }

  // The largest score of each lane; what is not a number is left out.
  Vector largest_of(const float* scores) const {
    constexpr int CHAINS = 4;  // for none to wait for the one before
    Vector most[CHAINS];
    for (auto& own : most) own = all(HIDDEN);
    int key = 0;
    for (; key + CHAINS <= keys; key += CHAINS)
      for (int i = 0; i < CHAINS; i++) most[i] = larger(load(scores + (key + i) * PANEL), most[i]);
    for (; key < keys; key++) most[0] = larger(load(scores + key * PANEL), most[0]);
    return larger(larger(most[0], most[1]), larger(most[2], most[3]));
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
      if (!any(before > all(LOWEST))) continue;  // nothing was summed up yet
      for (int d = 0; d < call.head_dim; d++) {
        float* sum = tile.sums + scratch.place(q, d, scratch.width) + v * LANES;
        store(sum, load(sum) * shrink);
      }
    }
  }

  // Which queries of the tile have the key inside their windows.
  uint64_t inside(Tile& tile, int key) const {
    uint64_t word = ~(uint64_t)0;
    for (int axis = 0; axis < windows.axes; axis++) {
      const int32_t own = places[axis][key];
      const int slot = own & (SLOTS - 1);
      uint64_t& known = tile.inside[axis][slot];
      if (tile.known[axis][slot] != own) {
        tile.known[axis][slot] = own;
        known = 0;
        for (int i = 0; i < TILE; i += LANES) {
          const Bits offset = own - *(const Bits*)(tile.low[axis] + i);
          const Bits within = (offset >= 0) & (offset < *(const Bits*)(tile.size[axis] + i));
          known |= word_of(within) << i;
        }
      }
      word &= known;
    }
    return word;
  }

  void finish(Tile& tile) {
    for (int i = 0; i < tile.count; i += LANES) {
      const Vector largest = load(tile.largest + i), total = load(tile.total + i);
      // A total that is not a number makes the output not a number, as it must.
      const Bits empty = (largest == all(LOWEST)) & (total < all(1.f));
      const Vector inverse = all(1.f) / total;
      const int count = std::min(LANES, tile.count - i);
      Element* rows[LANES];
      for (int lane = 0; lane < count; lane++)
        rows[lane] = (Element*)this->at(call.output, tile.tokens[i + lane]);
      for (int d = 0; d < call.head_dim; d += LANES) {
        Vector part[LANES];
        for (int row = 0; row < LANES; row++) {
          const Vector sum = load(tile.sums + scratch.place(i, d + row, scratch.width));
          part[row] = where(empty, all(0.f), sum * inverse);
        }
        transpose(part);
        for (int lane = 0; lane < count; lane++)
          narrow(part[lane], rows[lane] + d, call.head_dim - d);
      }
      for (int lane = 0; lane < count; lane++)
        call.lse[pair * call.queries + tile.tokens[i + lane]] =
            empty[lane] ? -INFINITY : (largest[lane] + log2f(total[lane])) * LN_2;
    }
  }
};
