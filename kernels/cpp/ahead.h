// Ahead: memory that is read or written soon, asked for while there is work to do. No processor
// foresees where a list of blocks goes on, and none waits for many lines at a time.
#pragma once

#include <cstdint>

// Pieces of memory, asked for a few lines at a time.
class Ahead {
  static constexpr int MOST = 512, LINE = 64;
  // Lines at a time that go to the first cache. More would push out what is at work there; asked
  // for the second one alone, some processors let them go where memory is busy.
  static constexpr int FEW = 16;
  struct Piece {
    const char *next, *end;
  } pieces[MOST];
  int count = 0, done = 0;
  int64_t lines = 0, each = 0;

 public:
  void clear() { count = done = 0, lines = 0; }

  // What does not fit is waited for when it is read.
  void add(const void* piece, int64_t bytes) {
    if (count == MOST) return;
    pieces[count++] = {(const char*)piece, (const char*)piece + bytes};
    lines += (bytes + LINE - 1) / LINE;
  }

  // So many bytes of each of these rows.
  template <class Rows>
  void add(const Rows& rows, const int64_t* tokens, int64_t count, int64_t bytes) {
    for (int64_t i = 0; i < count; i++) add(rows.at(tokens[i]), bytes);
  }

  // `some` will be called so many times.
  void spread(int64_t calls) { each = (lines + calls - 1) / calls; }

  void some() { each <= FEW ? ask<3>() : ask<2>(); }

 private:
  template <int LOCALITY>
  void ask() {
    for (int64_t left = each; left > 0 && done < count; left--) {
      Piece& piece = pieces[done];
      __builtin_prefetch(piece.next, 0, LOCALITY);
      piece.next += LINE;
      if (piece.next >= piece.end) done++;
    }
  }
};
