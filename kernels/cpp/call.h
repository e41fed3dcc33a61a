// Call: what native.py asks for. Its structures there must match these.
#pragma once

#include <cstdint>

struct Operand {
  const void* data;
  int64_t batch, token, head;  // strides in elements; head_dim is contiguous
};

// A pattern as kernels/windows.py describes it; the same for every head that has it.
struct Windows {
  int64_t axes;
  const int32_t *low, *size;  // [axes][queries], in the order of the tensors' rows
  const int32_t* place;       // [axes][keys]
};

struct Call {
  Operand query, key, value, output;
  float* lse;                    // [batch][heads][queries]
  const int64_t *permutation, *key_permutation;  // position of a query, of a key -> its row
  const int64_t *query_offsets, *key_offsets;
  const int32_t *row_pointer, *key_block;
  const int8_t* tag;
  const Windows* windows;        // of every head
  const int64_t* mask_first;     // [entries]: where in `masks`, -1 where windows decide; or null
  const uint64_t* masks;         // of kernels/bitmasks.py
  const uint8_t* hidden;         // [batch][keys], or null if no text is padded
  int64_t batch, queries, keys, heads, head_dim, query_blocks, key_blocks, threads;
  double scale;
  double pv_skip;                // -infinity to leave no values out
  void* parallel;                // GOMP_parallel of the OpenMP that PyTorch runs on, or null
};

constexpr int8_t PARTIAL = -1;

