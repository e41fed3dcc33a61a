// Ahead: memory that is read or written soon, asked for while there is work to do. No processor
// foresees where a list of blocks goes on, and none waits for many lines at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"

// Pieces of memory of one size, asked for a few at a time.
class Ahead {
  static constexpr int MOST = 256, LINE = 64;
  const int bytes;
  int count = 0, done = 0, each = 0;
  const char* pieces[MOST];

 public:
  explicit Ahead(int64_t bytes) : bytes((int)bytes) {}

  void clear() { count = done = 0; }

  // What does not fit is waited for when it is read.
  void add(const void* piece) {
    if (count < MOST) pieces[count++] = (const char*)piece;
  }

  // `some` will be called so many times.
  void spread(int calls) { each = (count + calls - 1) / calls; }

  void some() {
    for (const int end = std::min(done + each, count); done < end; done++)
      for (int at = 0; at < bytes; at += LINE) __builtin_prefetch(pieces[done] + at, 0, 2);
  }
};

// The keys of a row in the order in which they are visited, padded text among them.
struct Walk {
  const Call& call;
  int64_t entry, end, position = 0, keys = 0;

  Walk(const Call& call, int64_t row)
      : call(call), entry(call.row_pointer[row]), end(call.row_pointer[row + 1]) {
    enter();
  }

  void enter() {
    if (entry < end) position = call.key_offsets[call.key_block[entry]];
  }

  // Up to key number `to`, with the token, or those that are pooled, of each.
  template <class Each>
  void on(int64_t to, const Each& each) {
    while (keys < to && entry < end) {
      const int64_t stop = call.key_offsets[call.key_block[entry] + 1];
      const int64_t run = call.tag[entry] > 0 ? 1 << call.tag[entry] : 1;
      for (; keys < to && position < stop; keys++)
        for (const int64_t last = std::min(position + run, stop); position < last; position++)
          each(call.key_permutation[position]);
      if (position == stop) {
        entry++;
        enter();
      }
    }
  }
};
