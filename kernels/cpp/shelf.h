// Shelf: keys and values as products read them, laid out once for all the rows that read them.
//
// Rows are taken in groups whose keys and values have room on the shelf together. What a row needs
// beyond that, it lays out for itself, to the same numbers. So what is held beside the operands is
// bounded, and a block is laid out once for a group, not once for each row that lists it.
#pragma once

#include <atomic>

#include "reader.h"

constexpr int LEVELS = 8;
constexpr float HIDDEN = -3e38f;  // score of a pair that is not kept, whatever its factor

// At most PIECE keys of a block: its tokens, or the means of runs of 2^level of them.
struct Spot {
  int64_t block = 0;
  int level = 0, part = 0;
};

// Keys of a block at a level.
static int64_t keys_of(const Call& call, int64_t block, int level) {
  const int64_t run = (int64_t)1 << level;
  return (call.key_offsets[block + 1] - call.key_offsets[block] + run - 1) / run;
}

// Rows are numbered by sample, head and query block; all samples share the lists.
static int64_t list_of(const Call& call, int64_t row) {
  return row % (call.heads * call.query_blocks);
}

// The spots that a row lists, one after the other.
struct Walk {
  const Call& call;
  int64_t entry, end;
  Spot spot;
  int64_t left = 0;  // keys of the block, from the spot on

  Walk(const Call& call, int64_t row)
      : call(call),
        entry(call.row_pointer[list_of(call, row)]),
        end(call.row_pointer[list_of(call, row) + 1]) {
    enter();
  }

  bool over() const { return entry == end; }
  int8_t tag() const { return call.tag[entry]; }
  int keys() const { return (int)std::min<int64_t>(left, PIECE); }

  void next() {
    left -= keys();
    spot.part++;
    if (left) return;
    entry++;
    enter();
  }

 private:
  void enter() {
    for (left = 0; entry < end; entry++) {
      spot = {call.key_block[entry], std::max<int8_t>(tag(), 0)};
      if ((left = keys_of(call, spot.block, spot.level))) return;
    }
  }
};

// A spot, laid out: keys in rows, values in rows or, in pairs, by groups.
struct Piece {
  const float *keys = nullptr, *values = nullptr;
  const float* bias = nullptr;  // of scores, in powers of two
  bool biased = false, shown = false;
};

// Lays out keys and values of one head of one sample.
template <class Mode, class Element>
struct Layout : Reader<Mode, Element> {
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;
  static constexpr int GROUP = ::GROUP<Mode>;

  Layout(const Call& call, Scratch<Mode>& scratch, int64_t pair)
      : Reader<Mode, Element>(call, scratch, pair) {}

  // Padded text, and what fills up a group, are zeros.
  Piece make(const Spot& spot, float* to) {
    const uint8_t* hidden = call.hidden ? call.hidden + this->sample * call.keys : nullptr;
    const int64_t run = (int64_t)1 << spot.level, end = call.key_offsets[spot.block + 1];
    int64_t at = call.key_offsets[spot.block] + spot.part * PIECE * run;
    const int count = (int)std::min<int64_t>(PIECE, (end - at + run - 1) / run);
    float* keys = to;
    float* values = keys + (int64_t)padded(count, GROUP) * scratch.depth;
    float* bias = values + value_words<Mode>(count, scratch.width);
    Piece piece{keys, values, bias, spot.level > 0};
    const Rows<Element> all_keys = this->rows(call.key), all_values = this->rows(call.value);
    const Element* woven[GROUP];
    for (int key = 0; key < padded(count, GROUP); key++, keys += scratch.depth) {
      const int64_t stop = std::min(at + run, end);
      int64_t seen[1 << (LEVELS - 1)], shown = 0;
      for (; at < stop; at++) {
        seen[shown] = call.key_permutation[at];
        shown += !hidden || !hidden[seen[shown]];
      }
      const int row = key % GROUP;
      float* value = Mode::PACKED == 2 ? scratch.values + row * scratch.width
                                       : values + (int64_t)key * scratch.width;
      this->read(all_keys, seen, shown, keys, scratch.depth);
      if (shown == 1 && Mode::PACKED == 2 && call.head_dim == scratch.width) {
        woven[row] = all_values.at(seen[0]);  // weaving needs no copy of whole vectors
      } else {
        this->read(all_values, seen, shown, value, scratch.width / Mode::PACKED);
        woven[row] = (const Element*)value;
      }
      if (key < count) {
        bias[key] = shown == 1 ? 0.f : shown ? log2f((float)shown) : HIDDEN;
        piece.biased |= !shown;
        piece.shown |= shown > 0;
      }
      if constexpr (Mode::PACKED == 2)
        if (row == GROUP - 1) {
          Mode::weave((const Half* const*)woven, scratch.width, values);
          values += GROUP / 2 * scratch.width;
        }
    }
    return piece;
  }
};

// Memory for a shelf. If it is neither small nor large, the thread that calls keeps it: to ask for
// it anew each time takes as long as to fill it.
class Room {
  static constexpr int64_t SMALL = 1 << 18, LARGE = 5 << 20;  // words
  using Owned = std::unique_ptr<float, void (*)(void*)>;
  Owned own{nullptr, free};

 public:
  float* of(int64_t words) {
    static thread_local Owned kept{nullptr, free};
    static thread_local int64_t size = 0;
    const bool keep = words >= SMALL && words <= LARGE;
    if (!keep || words > size) {
      Owned& memory = keep ? kept : own;
      memory.reset((float*)aligned_alloc(64, (words / LANES + 1) * sizeof(Vector)));
      if (keep) size = memory ? words : 0;
      if (!memory) throw std::bad_alloc();
    }
    return keep ? kept.get() : own.get();
  }
};

// The keys and values of a group of rows.
template <class Mode, class Element>
class Shelf {
  enum State { EMPTY, BEGUN, READY };
  struct Slot {
    Piece piece;
    std::atomic<State> state{EMPTY};
  };
  const Call& call;
  const int depth, width;
  std::vector<int64_t> before[LEVELS];  // of a level that is listed: number of a block's first spot
  int64_t spots = 0;                    // of a head
  int64_t first_pair = 0, words;
  Room memory;
  float* start;
  std::vector<float*> rooms;  // of the heads of the group, by number; null where there is none
  std::vector<Slot> slots;

 public:
  // Has room for `floor` elements of the operands, or for a part of them all, if that is more.
  Shelf(const Call& call, const Scratch<Mode>& scratch, int64_t floor)
      : call(call), depth(scratch.depth), width(scratch.width) {
    const int64_t entries = call.row_pointer[call.heads * call.query_blocks];
    bool listed[LEVELS] = {};
    for (int64_t i = 0; i < entries; i++) listed[std::max<int8_t>(call.tag[i], 0)] = true;
    int64_t all = 0;
    for (int level = 0; level < LEVELS; level++)
      for (int64_t block = 0; listed[level] && block < call.key_blocks; block++) {
        before[level].push_back(spots);
        for (int64_t left = keys_of(call, block, level); left > 0; left -= PIECE, spots++)
          all += size(left);
      }
    const int64_t pairs = call.batch * call.heads;
    const int64_t elements = pairs * call.head_dim * (call.queries + 2 * call.keys);
    words = std::min(std::max(floor, elements / PART) * (int64_t)sizeof(Element) / 4, all * pairs);
    if (all > words) words /= 4;  // those of a head have no room: a few are kept for rows alike
    start = memory.of(words);
  }

  // Empties the shelf for rows from `first` on, as many as have room, or a few; returns their end.
  int64_t clear(int64_t first, int64_t end) {
    int64_t used = 0, row = first;
    rooms.clear();
    first_pair = first / call.query_blocks;
    for (bool fits = true; row < end; row++) {
      const int64_t pair = row / call.query_blocks;
      rooms.resize((pair - first_pair + 1) * spots);
      for (Walk walk(call, row); fits && !walk.over(); walk.next()) {
        float*& room = rooms[number(pair, walk.spot)];
        if (room) continue;
        fits = used + size(walk.keys()) <= words;
        if (fits) room = start + std::exchange(used, used + size(walk.keys()));
      }
      if (!fits && row - first >= (row % call.query_blocks ? FEW : LEAST) * call.threads) break;
    }
    slots = std::vector<Slot>(rooms.size());
    return row;
  }

  // What lies there, or is put there now; where there is no room, or another thread is about to
  // put it there, as laid out for this thread alone.
  Piece take(Scratch<Mode>& scratch, int64_t pair, const Spot& spot) {
    if (const Piece* known = find(pair, spot)) return *known;
    float* const room = this->room(pair, spot);
    Slot& slot = slots[number(pair, spot)];
    Layout<Mode, Element> layout(call, scratch, pair);
    State state = EMPTY;
    if (!room || !slot.state.compare_exchange_strong(state, BEGUN))
      return layout.make(spot, scratch.own);
    slot.piece = layout.make(spot, room);
    slot.state.store(READY, std::memory_order_release);
    return slot.piece;
  }

  // Where it lies, or will; null where there is no room.
  float* room(int64_t pair, const Spot& spot) const { return rooms[number(pair, spot)]; }

  // Null if it does not lie there yet.
  const Piece* find(int64_t pair, const Spot& spot) const {
    const Slot& slot = slots[number(pair, spot)];
    return slot.state.load(std::memory_order_acquire) == READY ? &slot.piece : nullptr;
  }

 private:
  static constexpr int64_t PART = 16;
  // Rows of a group for each thread, which wait for each other: within a head, at its end.
  static constexpr int64_t FEW = 32, LEAST = 2;

  int64_t size(int64_t keys) const {
    return padded(piece_words<Mode>((int)std::min<int64_t>(keys, PIECE), depth, width), LANES);
  }
  int64_t number(int64_t pair, const Spot& spot) const {
    return (pair - first_pair) * spots + before[spot.level][spot.block] + spot.part;
  }
};
