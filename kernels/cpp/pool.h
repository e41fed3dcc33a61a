// Pool: the means of blocks, how alike their tokens are, and what blocks are ranked by then.
#pragma once

#include "row.h"

// Queries or keys, where they are cut into blocks, and what is found of every block: arrays
// [batch][heads][blocks]. Means are laid out in whole vectors that end in zeros.
struct Side {
  Operand operand;
  const int64_t *permutation, *offsets;
  int64_t blocks;
  const float* center;      // [batch][heads][head_dim], taken off every token; or null
  float *mean, *cosine;     // [...][width]; the mean cosine of all pairs of tokens
  int64_t* count;           // tokens that are not padded text

  static int64_t width(const Call& call) { return padded((int)call.head_dim, 16); }
  bool differs(int64_t block, float similarity) const {
    return count[block] > 0 && !(cosine[block] > similarity);
  }
};

// One block of one head of one sample. A block without tokens has zeros.
template <class Mode, class Element>
struct Pool : Reader<Mode, Element> {
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;

  Pool(const Call& call, Scratch<Mode>& scratch, int64_t pair, const Side& side, int64_t block)
      : Reader<Mode, Element>(call, scratch, pair) {
    const uint8_t* hidden = call.hidden ? call.hidden + this->sample * call.keys : nullptr;
    const int64_t width = Side::width(call), size = call.head_dim;
    const int64_t number = pair * side.blocks + block;
    float *token = scratch.rows, *middle = token + width, *sum = middle + width,
          *direction = sum + width;
    memset(token, 0, 4 * width * sizeof(float));
    if (side.center) memcpy(middle, side.center + pair * size, size * sizeof(float));
    int64_t count = 0;
    const int64_t end = side.offsets[block + 1];
    for (int64_t i = side.offsets[block]; i < end; i++) {
      // In the order of blocks, memory is not read one piece after the other.
      const int64_t later = std::min(i + AHEAD, end - 1);
      const char* next = (const char*)this->at(side.operand, side.permutation[later]);
      for (size_t line = 0; line < size * sizeof(Element); line += 64) __builtin_prefetch(next + line);
      if (hidden && hidden[side.permutation[i]]) continue;
      const Element* from = this->at(side.operand, side.permutation[i]);
      Vector squares = all(0.f);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vector x = widened(from + d, size - d) - load(middle + d);
        store(token + d, x);
        squares += x * x;
      }
      const Vector inverse = all(1.f / std::max(std::sqrt(total(squares)), SHORTEST));
      for (int64_t d = 0; d < width; d += LANES) {
        const Vector x = load(token + d);
        store(sum + d, load(sum + d) + x);
        store(direction + d, load(direction + d) + x * inverse);
      }
      count++;
    }
    const Vector part = all(1.f / (float)std::max<int64_t>(count, 1));
    Vector squares = all(0.f);
    for (int64_t d = 0; d < width; d += LANES) {
      const Vector x = load(direction + d) * part;
      squares += x * x;
      store(sum + d, load(sum + d) * part);
    }
    memcpy(side.mean + number * width, sum, width * sizeof(float));
    // The mean of all cosines is the square of the mean direction.
    side.cosine[number] = total(squares);
    side.count[number] = count;
  }

  static constexpr int64_t AHEAD = 12;      // tokens that are fetched before they are read
  static constexpr float SHORTEST = 1e-12f;  // of torch.nn.functional.normalize
};

// One row of blocks of one head, of all samples: exp(logit - largest) of the means, 0 where blocks
// differ or are empty, to `weight` [batch][heads][query blocks][key blocks]; and which blocks are
// `forced` [heads][query blocks][key blocks], because a sample of them differs.
static void rank(const Call& call, const Side& queries, const Side& keys, float similarity,
                 int64_t head, int64_t row, float* weight, uint8_t* forced) {
  const int64_t width = Side::width(call), columns = keys.blocks;
  forced += (head * queries.blocks + row) * columns;
  std::fill_n(forced, columns, 0);
  for (int64_t sample = 0; sample < call.batch; sample++) {
    const int64_t own = sample * call.heads + head, first = own * columns;
    const int64_t query = own * queries.blocks + row;
    const bool all_forced = queries.differs(query, similarity);
    float *to = weight + query * columns, largest = -INFINITY;
    for (int64_t j = 0; j < columns; j++) {
      const bool differs = keys.differs(first + j, similarity);
      forced[j] |= all_forced || differs;
      to[j] = -INFINITY;
      if (differs || !keys.count[first + j] || !queries.count[query]) continue;
      Vector sum = all(0.f);
      for (int64_t d = 0; d < width; d += LANES)
        sum += load_anywhere(queries.mean + query * width + d) *
               load_anywhere(keys.mean + (first + j) * width + d);
      to[j] = (float)call.scale * total(sum) + std::log((float)keys.count[first + j]);
      largest = std::max(largest, to[j]);
    }
    for (int64_t j = 0; j < columns; j++)
      to[j] = to[j] == -INFINITY ? 0.f : std::exp(to[j] - largest);
  }
}
