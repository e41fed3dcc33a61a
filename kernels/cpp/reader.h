// Reader: one head of one sample, a pair, and how its tensors are read.
#pragma once

#include <cmath>

#include "call.h"
#include "scratch.h"

constexpr float LEAST = 1e-17f;  // factor of scores: as good as none, and HIDDEN stays so
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// The rows of an operand for one pair, where no store can be thought to change what is known.
template <class Element>
struct Rows {
  const Element* first;
  int64_t stride;
  const Element* at(int64_t token) const { return first + token * stride; }
};

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

  int64_t bytes() const { return call.head_dim * sizeof(Element); }  // of a row

  Rows<Element> rows(const Operand& operand) const {
    const int64_t first = sample * operand.batch + head * operand.head;
    return {(const Element*)operand.data + first, operand.token};
  }
  const Element* at(const Operand& operand, int64_t token) const { return rows(operand).at(token); }

  // The next LANES words of a row of `left` elements, then zeros.
  Vector words(const Element* from, int64_t left) const {
    if constexpr (Mode::PACKED == 1) return widened(from, left);
    if (left >= LANES * Mode::PACKED) return load_anywhere((const float*)from);
    alignas(64) Element part[LANES * Mode::PACKED] = {};
    for (int i = 0; i < left; i++) part[i] = from[i];
    return load((const float*)part);
  }

  // The queries of `count` tokens (-1: none) as columns.
  void queries(Tile& tile, const int64_t* tokens, int count) {
    const Vector signs = (Vector)((Bits){} + (int32_t)(sign | (uint32_t)sign << 16));
    const Rows<Element> own = rows(call.query);
    for (int i = 0; i < TILE; i += LANES) {
      const Element* row[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        const int64_t token = i + lane < count ? tokens[i + lane] : -1;
        row[lane] = token < 0 ? nullptr : own.at(token);
      }
      for (int d = 0; d < scratch.depth; d += LANES) {
        const int done = d * Mode::PACKED;
        Vector part[LANES];
        for (int lane = 0; lane < LANES; lane++) {
          part[lane] = row[lane] ? words(row[lane] + done, call.head_dim - done) : all(0.f);
          if (Mode::PACKED == 2)
            part[lane] = (Vector)((Bits)part[lane] ^ (Bits)signs);
          else
            part[lane] *= all(scale);
        }
        transpose(part);
        for (int word = 0; word < LANES; word++)
          store(tile.queries + scratch.place(i, d + word, scratch.depth), part[word]);
      }
    }
  }

  void copy(const Element* from, float* to, int words) const {
    for (int d = 0; d < words; d += LANES) {
      const int done = d * Mode::PACKED;
      store(to + d, this->words(from + done, call.head_dim - done));
    }
  }

  // The mean of so many tokens, as `words` words that end in zeros.
  void read(const Rows<Element>& from, const int64_t* tokens, int64_t count, float* to, int words) {
    if (count == 1) return copy(from.at(tokens[0]), to, words);
    memset(to, 0, words * sizeof(float));
    if (count > 1) mean(from, tokens, count, to);
  }

  void mean(const Rows<Element>& from, const int64_t* tokens, int64_t count, float* to) {
    float* sum = Mode::PACKED == 2 ? scratch.rows : to;
    for (int d = 0; d < call.head_dim; d++) sum[d] = 0.f;
    for (int64_t i = 0; i < count; i++) {
      const Element* next = from.at(tokens[i]);
      for (int d = 0; d < call.head_dim; d++) sum[d] += widened(next[d]);
    }
    for (int d = 0; d < call.head_dim; d++) sum[d] /= count;
    if constexpr (Mode::PACKED == 2)
      for (int d = 0; d < call.head_dim; d++) narrow(sum[d], ((Element*)to)[d]);
  }
};
