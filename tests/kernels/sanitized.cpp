// Sanitized: the C++ kernels over ragged calls, every operand in memory of its own of exactly its
// size, for a compiler that watches what is read and written. Prints how many calls were made.

#include <cstdio>
#include <random>

#include "attend.cpp"

static std::mt19937 random_bits(7);

static int64_t below(int64_t count) { return random_bits() % count; }

// Blocks of 1 to `largest` tokens.
static std::vector<int64_t> cuts(int64_t tokens, int64_t largest) {
  std::vector<int64_t> offsets{0};
  while (offsets.back() < tokens)
    offsets.push_back(std::min(tokens, offsets.back() + 1 + below(largest)));
  return offsets;
}

static std::vector<int32_t> integers(int64_t count, int64_t low, int64_t high) {
  std::vector<int32_t> made(count);
  for (auto& x : made) x = (int32_t)(low + below(high - low));
  return made;
}

template <class Element>
static std::vector<Element> operand(int64_t count) {
  std::vector<Element> made(count);
  std::normal_distribution<float> normal;
  for (auto& x : made) narrow(normal(random_bits), x);
  return made;
}

static void require(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "%s\n", what);
  exit(1);
}

struct Shape {
  int64_t batch, queries, keys, heads, head_dim, block_q, block_k, threads;
};

template <class Element>
static void attend(const Shape& shape, int dtype, double scale, double pv_skip) {
  const auto [batch, queries, keys, heads, head_dim, block_q, block_k, threads] = shape;
  const int64_t size = batch * queries * heads * head_dim;
  const int64_t key_size = batch * keys * heads * head_dim;
  const auto query = operand<Element>(size), key = operand<Element>(key_size),
             value = operand<Element>(key_size);
  std::vector<Element> output(size);
  for (auto& x : output) narrow(NAN, x);
  std::vector<float> lse(batch * heads * queries, NAN);
  std::vector<int64_t> permutation(queries), key_permutation(keys);
  for (int64_t i = 0; i < queries; i++) permutation[i] = i;
  for (int64_t i = 0; i < keys; i++) key_permutation[i] = i;
  std::shuffle(permutation.begin(), permutation.end(), random_bits);
  std::shuffle(key_permutation.begin(), key_permutation.end(), random_bits);
  const auto query_offsets = cuts(queries, block_q), key_offsets = cuts(keys, block_k);
  const int64_t query_blocks = query_offsets.size() - 1, key_blocks = key_offsets.size() - 1;
  std::vector<int32_t> row_pointer{0}, key_block;
  std::vector<int8_t> tag;
  std::vector<int64_t> mask_first;
  std::vector<uint64_t> masks;
  for (int64_t row = 0; row < heads * query_blocks; row++) {
    for (int64_t block = 0; row % 5 && block < key_blocks; block++)
      if (below(3)) {
        key_block.push_back((int32_t)block);
        tag.push_back((int8_t)(below(2) ? below(2) - 1 : below(8)));
        const int64_t own = row % query_blocks, width = key_offsets[block + 1] - key_offsets[block];
        const bool masked = tag.back() == PARTIAL && below(2);
        mask_first.push_back(masked ? masks.size() : -1);
        for (int64_t word = (query_offsets[own + 1] - query_offsets[own] + TILE - 1) / TILE * width;
             masked && word; word--)
          masks.push_back(random_bits() | (uint64_t)random_bits() << 32);
      }
    row_pointer.push_back((int32_t)key_block.size());
  }
  std::vector<std::vector<int32_t>> tables;
  std::vector<Windows> windows;
  for (int64_t head = 0; head < heads; head++) {
    const int64_t axes = head % (AXES + 1);
    tables.push_back(integers(axes * queries, -keys, keys));
    tables.push_back(integers(axes * queries, 0, 2 * keys));
    tables.push_back(integers(axes * keys, -2, keys));
    const auto* last = &tables.back();
    windows.push_back({axes, last[-2].data(), last[-1].data(), last[0].data()});
  }
  std::vector<uint8_t> hidden(batch * keys);
  for (auto& x : hidden) x = below(4) == 0;

  auto whole = [&](const std::vector<Element>& x) {
    return Operand{x.data(), (int64_t)x.size() / batch, heads * head_dim, head_dim};
  };
  masks.shrink_to_fit();
  Call call{};
  call.query = whole(query);
  call.key = whole(key);
  call.value = whole(value);
  call.output = whole(output);
  call.lse = lse.data();
  call.permutation = permutation.data();
  call.key_permutation = key_permutation.data();
  call.query_offsets = query_offsets.data();
  call.key_offsets = key_offsets.data();
  call.row_pointer = row_pointer.data();
  call.key_block = key_block.data();
  call.tag = tag.data();
  call.windows = windows.data();
  call.mask_first = heads > 1 ? mask_first.data() : nullptr;
  call.masks = masks.data();
  call.hidden = batch > 1 ? hidden.data() : nullptr;
  call.batch = batch;
  call.queries = queries;
  call.keys = keys;
  call.heads = heads;
  call.head_dim = head_dim;
  call.query_blocks = query_blocks;
  call.key_blocks = key_blocks;
  call.threads = threads;
  call.scale = scale;
  call.pv_skip = pv_skip;
  require(!dit_sparse_attend(&call, dtype), "no memory");
  for (auto x : output) require(std::isfinite(widened(x)), "an output is missing");
  for (auto x : lse) require(!std::isnan(x), "a sum is missing");
  // Where the shelf has hardly any room.
  const auto expected = output;
  const auto expected_lse = lse;
  for (auto& x : output) narrow(NAN, x);
  require(!with_dtype(call, dtype, Attend{0}), "no memory");
  require(!memcmp(output.data(), expected.data(), size * sizeof(Element)), "the shelf matters");
  require(lse == expected_lse, "the shelf matters to a sum");

  const int64_t tiles = (queries + TILE - 1) / TILE;
  std::vector<int64_t> slots(tiles * TILE, -1), block(tiles * TILE, -1), group;
  for (int64_t i = 0, own = 0; i < queries; i++) {
    own = std::min(query_blocks - 1, own + (below(8) == 0));
    if (below(6)) slots[i] = permutation[i], block[i] = own;
  }
  // One group, or one for each tile if all have the same block.
  for (int64_t i = 0; i <= tiles; i += heads > 2 ? tiles : 1) group.push_back(i);
  std::vector<float> mass(batch * heads * query_blocks * key_blocks);
  if (heads <= 2) call.threads = 1;
  require(!dit_sparse_mass(&call, dtype, slots.data(), block.data(), group.data(),
                           group.size() - 1, mass.data()),
          "no memory");
  for (auto x : mass) require(x >= 0, "a mass is no number");
  call.threads = threads;

  const int64_t each = 1 + below(64), own = batch > 1 && below(2);
  std::vector<int64_t> rows((own ? batch : 1) * query_blocks * each, -1);
  std::vector<int64_t> columns((own ? batch : 1) * key_blocks * each, -1);
  for (size_t i = 0; i < rows.size(); i++)
    if (below(4)) rows[i] = below(queries);
  for (size_t i = 0; i < columns.size(); i++)
    if (i % (key_blocks * each) == 0 || below(4)) columns[i] = below(keys);
  std::vector<float> missed(batch * heads * query_blocks * key_blocks, NAN);
  require(!dit_sparse_largest(&call, dtype, rows.data(), columns.data(), each, own,
                              missed.data()),
          "no memory");
  for (auto x : missed) require(x <= 0, "a largest is no number");

  const auto center = operand<float>(batch * heads * head_dim);
  struct Room {
    std::vector<float> mean, cosine;
    std::vector<int64_t> count;
    Room(int64_t blocks, int64_t width)
        : mean(blocks * width, NAN), cosine(blocks, NAN), count(blocks, -1) {}
  } of_queries(batch * heads * query_blocks, Side::width(call)),
      of_keys(batch * heads * key_blocks, Side::width(call));
  auto side = [&](Room& room, const Operand& tokens, const std::vector<int64_t>& places,
                  const std::vector<int64_t>& offsets, const float* middle) {
    return Side{tokens, places.data(), offsets.data(), (int64_t)offsets.size() - 1, middle,
                room.mean.data(), room.cosine.data(), room.count.data()};
  };
  const Side left = side(of_queries, call.query, permutation, query_offsets, nullptr);
  const Side right = side(of_keys, call.key, key_permutation, key_offsets, center.data());
  std::vector<float> weight(batch * heads * query_blocks * key_blocks, NAN);
  std::vector<uint8_t> forced(heads * query_blocks * key_blocks, 7);
  if (queries != keys) call.hidden = nullptr;
  require(!dit_sparse_means(&call, dtype, &left, &right, 0.1f, weight.data(), forced.data()),
          "no memory");
  for (auto x : of_keys.cosine) require(x >= 0 && x < 1.001f, "a cosine is missing");
  for (auto x : weight) require(x >= 0 && x <= 1, "a weight is missing");
  for (auto x : forced) require(x <= 1, "nothing is said of a block");
}

int main() {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, 1, 1},         {1, 63, 63, 2, 13, 64, 64, 2},
      {2, 131, 90, 6, 40, 100, 48, 2},  {2, 97, 97, 5, 88, 7, 130, 3},
      {1, 30, 200, 3, 128, 130, 65, 2}, {1, 70, 1, 2, 256, 33, 200, 1},
      {3, 65, 130, 1, 16, 65, 1, 4},    {2, 40, 700, 2, 24, 40, 400, 3},
  };
  int calls = 0;
  for (const auto& shape : shapes)
    for (double pv_skip : {-(double)INFINITY, -1.0}) {
      attend<float>(shape, 0, 0.3, pv_skip);
      attend<Bfloat>(shape, 1, -0.3, pv_skip);
      attend<Float16>(shape, 2, 0.0, pv_skip);
      calls += 3;
    }
  for (int dtype : {0, 1, 2}) {
    Call call{};
    call.threads = 2;
    call.head_dim = TILE;
    double done = 0;
    require(!dit_sparse_peak(&call, dtype, &done) && done > 0, "nothing was multiplied");
  }
  printf("%d calls\n", calls);
}
