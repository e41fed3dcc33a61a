// Reader: one head of one sample, a pair, and how its tensors are read.
#pragma once

#include <cmath>

#include "call.h"
#include "scratch.h"

constexpr float LEAST = 1e-17f;  // factor of scores: as good as none, and HIDDEN stays so
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

template <class Mode, class Element>
struct Reader {
  const Call& call;
  Scratch<Mode>& scratch;
  const int64_t pair, sample, head;
  const float scale;   // of float32 queries, to scores in powers of two
  const float factor;  // of scores, where queries stay as they are but for their sign
  const Half sign;

  // Pairs are numbered by sample and head.
  Reader(const Call& call, Scratch<Mode>& scratch, int64_t pair)
      : call(call),
        scratch(scratch),
        pair(pair),
        sample(pair / call.heads),
        head(pair % call.heads),
        scale((float)call.scale * LOG2_E),
        factor(Mode::PACKED == 2 ? std::max(std::fabs(scale), LEAST) : 1.f),
        sign(call.scale < 0 ? 0x8000 : 0) {}

  int words() const { return (call.head_dim + Mode::PACKED - 1) / Mode::PACKED; }

  const Element* at(const Operand& operand, int64_t token) const {
    return (const Element*)operand.data + sample * operand.batch + token * operand.token +
           head * operand.head;
  }

  // The queries of `count` tokens (-1: none) as columns.
  void queries(Tile& tile, const int64_t* tokens, int count) {
    for (int i = 0; i < TILE; i++) {
      float* row = scratch.rows + i * scratch.width;
      memset(row, 0, scratch.width * sizeof(float));
      if (i >= count || tokens[i] < 0) continue;
      const Element* query = at(call.query, tokens[i]);
      if constexpr (Mode::PACKED == 2)
        for (int d = 0; d < call.head_dim; d++) ((Half*)row)[d] = query[d].bits ^ sign;
      else
        for (int d = 0; d < call.head_dim; d++) row[d] = widened(query[d]) * scale;
    }
    for (int d = 0; d < scratch.depth; d += LANES)
      for (int i = 0; i < TILE; i += LANES)
        transpose(scratch.rows + i * scratch.width + d, scratch.width,
                  tile.queries + scratch.place(i, d, scratch.depth), Mode::PANEL);
  }

  void copy(const Element* from, float* to) const {
    const int size = (int)call.head_dim;  // here, no store can be thought to change it
    if constexpr (Mode::PACKED == 1 && sizeof(Element) == 2) {
      for (int d = 0; d < size; d++) to[d] = widened(from[d]);
    } else {
      constexpr int GRAIN = sizeof(Vector) / sizeof(Element);  // of known size, no call
      Element* elements = (Element*)to;
      int d = 0;
      for (; d + GRAIN <= size; d += GRAIN)
        memcpy(elements + d, from + d, GRAIN * sizeof(Element));
      for (; d < size; d++) elements[d] = from[d];
    }
  }

  // The mean of so many tokens, as `words` words that end in zeros.
  void read(const Operand& operand, const int64_t* tokens, int64_t count, float* to, int words) {
    if (count != 1 || words * Mode::PACKED != call.head_dim) memset(to, 0, words * sizeof(float));
    if (count == 1)
      copy(at(operand, tokens[0]), to);
    else if (count > 1)
      mean(operand, tokens, count, to);
  }

  void mean(const Operand& operand, const int64_t* tokens, int64_t count, float* to) {
    float* sum = Mode::PACKED == 2 ? scratch.rows : to;
    for (int d = 0; d < call.head_dim; d++) sum[d] = 0.f;
    for (int64_t i = 0; i < count; i++) {
      const Element* next = at(operand, tokens[i]);
      for (int d = 0; d < call.head_dim; d++) sum[d] += widened(next[d]);
    }
    for (int d = 0; d < call.head_dim; d++) sum[d] /= count;
    if constexpr (Mode::PACKED == 2)
      for (int d = 0; d < call.head_dim; d++) narrow(sum[d], ((Element*)to)[d]);
  }
};
