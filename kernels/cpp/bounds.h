// Bounds: what windows say of a tile of queries and a step of keys at once.
//
//     all pairs are kept  <=  on every axis: largest low <= least place, largest place < least end
//     no pair is kept     <=  on some axis:  largest place < least low or largest end <= least place
#pragma once

#include <algorithm>
#include <cstdint>

constexpr int AXES = 4;

enum class Kept { SOME, ALL, NONE };

struct Span {
  int64_t least = INT64_MAX, most = INT64_MIN;
  void add(int64_t place) {
    least = std::min(least, place);
    most = std::max(most, place);
  }
};

// Of the windows of a tile of queries.
struct Bounds {
  Span low[AXES], end[AXES];

  Kept kept(const Span* places, int64_t axes) const {
    bool all = true;
    for (int64_t axis = 0; axis < axes; axis++) {
      const Span &from = low[axis], &to = end[axis], &place = places[axis];
      if (place.most < from.least || to.most <= place.least) return Kept::NONE;
      all = all && from.most <= place.least && place.most < to.least;
    }
    return all ? Kept::ALL : Kept::SOME;
  }
};
