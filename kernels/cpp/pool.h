// Pool: the mean of the tokens of a block, and how alike they are.
#pragma once

#include "row.h"

// The tokens of queries or of keys, and where they are cut into blocks.
struct Side {
  Operand operand;
  const int64_t *permutation, *offsets;
  int64_t blocks;
};

// One block of one head of one sample, padded text left out, each token less `center`, if there
// is one. Writes the mean and, as `cosine`, the mean cosine of all pairs of tokens: the square of
// the mean direction. A block without tokens has zeros.
template <class Mode, class Element>
struct Pool : Reader<Mode, Element> {
  using Reader<Mode, Element>::call, Reader<Mode, Element>::scratch;

  Pool(const Call& call, Scratch<Mode>& scratch, int64_t sample, int64_t head, const Side& side,
       int64_t block, const float* center, float* mean, float* cosine)
      : Reader<Mode, Element>(call, scratch, sample, head) {
    const uint8_t* hidden = call.hidden ? call.hidden + sample * call.keys : nullptr;
    // Rows of the scratch end in zeros, up to whole vectors.
    const int width = scratch.width, size = (int)call.head_dim;
    float *token = scratch.rows, *middle = token + width, *sum = middle + width,
          *direction = sum + width;
    memset(token, 0, 4 * width * sizeof(float));
    if (center) memcpy(middle, center, size * sizeof(float));
    int64_t count = 0;
    for (int64_t i = side.offsets[block]; i < side.offsets[block + 1]; i++) {
      if (hidden && hidden[side.permutation[i]]) continue;
      const Element* from = this->at(side.operand, side.permutation[i]);
      for (int d = 0; d < size; d++) token[d] = widened(from[d]);
      Vector squares = all(0.f);
      for (int d = 0; d < width; d += LANES) {
        const Vector x = load(token + d) - load(middle + d);
        store(token + d, x);
        squares += x * x;
      }
      const Vector inverse = all(1.f / std::max(std::sqrt(total(squares)), SHORTEST));
      for (int d = 0; d < width; d += LANES) {
        const Vector x = load(token + d);
        store(sum + d, load(sum + d) + x);
        store(direction + d, load(direction + d) + x * inverse);
      }
      count++;
    }
    const Vector part = all(1.f / (float)std::max<int64_t>(count, 1));
    Vector squares = all(0.f);
    for (int d = 0; d < width; d += LANES) {
      const Vector x = load(direction + d) * part;
      squares += x * x;
      store(sum + d, load(sum + d) * part);
    }
    memcpy(mean, sum, size * sizeof(float));
    *cosine = total(squares);
  }

  static constexpr float SHORTEST = 1e-12f;  // of torch.nn.functional.normalize
};
