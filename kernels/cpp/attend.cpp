// Attend: all rows of a call, on all threads; and what blocks are ranked by. Never with -ffast-math,
// which would undo `exp2`.

#include <atomic>
#include <numeric>
#include <thread>

#include "mass.h"
#include "peak.h"
#include "pool.h"
#include "sampled.h"

template <class Work>
static void on_threads(const Call& call, Work& work) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  if (call.parallel && call.threads > 1)
    return ((Parallel)call.parallel)([](void* w) { (*(Work*)w)(); }, &work, call.threads, 0);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < call.threads; i++) others.emplace_back([&] { work(); });
  work();
  for (auto& thread : others) thread.join();
}

// Of the thread that asks, the same at every call.
static int64_t own_number() {
  static std::atomic<int64_t> known{0};
  static thread_local const int64_t number = known++;
  return number;
}

// Threads, each with a scratch that holds `more` words beside.
template <class Mode>
struct Crew {
  const Call& call;
  std::vector<std::unique_ptr<Scratch<Mode>>> scratches;

  Crew(const Call& call, int64_t block_q, int64_t more = 0) : call(call) {
    for (int64_t i = 0; i < call.threads; i++)
      scratches.emplace_back(new Scratch<Mode>((int)call.head_dim, block_q, more));
  }

  // Lets all threads take items until none is left. They are numbered, in parts that end there;
  // every thread begins with another part and goes round.
  template <class Item>
  void share_out(const std::vector<int64_t>& ends, const Item& item) {
    const int64_t parts = ends.size();
    std::vector<std::atomic<int64_t>> next(parts);
    for (int64_t part = 1; part < parts; part++) next[part] = ends[part - 1];
    std::atomic<int64_t> thread{0};
    auto work = [&] {
      [[maybe_unused]] const typename Mode::Session session;
      Scratch<Mode>& scratch = *scratches[thread++];
      const int64_t first = own_number() % call.threads * parts / call.threads;
      for (int64_t i = first; i < first + parts; i++)
        for (int64_t number; (number = next[i % parts]++) < ends[i % parts];) item(scratch, number);
    };
    on_threads(call, work);
  }
};

struct Attend {
  // Of the shelf, in elements: keys and values of 20,480 tokens with a head_dim of 128.
  int64_t room = 5 << 20;

  template <class Mode, class Element>
  void run(const Call& call) const {
    int64_t block_q = 0;
    for (int64_t i = 0; i < call.query_blocks; i++)
      block_q = std::max(block_q, call.query_offsets[i + 1] - call.query_offsets[i]);
    Crew<Mode> crew(call, block_q);
    Shelf<Mode, Element> shelf(call, *crew.scratches[0], room);
    const int64_t rows = call.batch * call.heads * call.query_blocks;
    auto pair = [&](int64_t row) { return row / call.query_blocks; };
    auto length = [&](int64_t row) {
      const int64_t list = list_of(call, row);
      return call.row_pointer[list + 1] - call.row_pointer[list];
    };
    // The rows of each pair, the longest first. What lies on the shelf for a pair is then made and
    // read by few threads: from the cache of another it comes late, of another chip very late. They
    // begin at different tokens as well: rows of many heads share a page of the outputs, and who
    // writes to a new page while another does waits for it.
    std::vector<int64_t> order, ends;
    for (int64_t row = 0; row < rows;) {
      const int64_t first = row, end = shelf.clear(row, rows);
      order.resize(end - first), ends.clear();
      std::iota(order.begin(), order.end(), first);
      for (; row < end; row = std::min(end, (pair(row) + 1) * call.query_blocks))
        if (row > first) ends.push_back(row - first);
      ends.push_back(end - first);
      const int64_t parts = ends.size();
      for (int64_t part = 0; part < parts; part++) {
        const auto from = order.begin() + (part ? ends[part - 1] : 0);
        const auto to = order.begin() + ends[part];
        std::rotate(from, from + part * (to - from) / parts, to);
        std::stable_sort(from, to, [&](int64_t a, int64_t b) { return length(a) > length(b); });
      }
      const int64_t last = order.size() - 1, step = 1 + (call.threads - 1) / parts;
      crew.share_out(ends, [&](Scratch<Mode>& scratch, int64_t i) {
        Row<Mode, Element>(call, scratch, shelf, order[i], order[std::min(i + step, last)]);
      });
    }
  }
};

constexpr int64_t TILES = 8;  // of queries, that share a copy of the keys

struct FindLargest {
  const Samples samples;
  const bool each;  // whether every sample of the batch has `samples` of its own
  float* out;       // [batch][heads][query_blocks][key_blocks]

  template <class Mode, class Element>
  void run(const Call& call) const {
    const int64_t step = TILES * TILE / samples.lanes();
    const int64_t groups = (samples.query_blocks + step - 1) / step;
    const int64_t blocks = samples.query_blocks * samples.key_blocks;
    auto item = [&](Scratch<Mode>& scratch, int64_t number) {
      const int64_t pair = number / groups, sample = pair / call.heads;
      Samples own = samples;
      if (each) {
        own.rows += sample * samples.query_blocks * samples.each;
        own.columns += sample * samples.key_blocks * samples.each;
      }
      Sampled<Mode, Element>(call, scratch, pair, own, number % groups * step, out + pair * blocks);
    };
    Crew<Mode>(call, TILES * TILE, TILES * TILE * samples.key_blocks)
        .share_out({call.batch * call.heads * groups}, item);
  }
};

struct RankMeans {
  const Side queries, keys;
  const float similarity;
  float* weight;
  uint8_t* forced;

  template <class Mode, class Element>
  void run(const Call& call) const {
    const int64_t pairs = call.batch * call.heads, of_queries = pairs * queries.blocks;
    auto pool = [&](Scratch<Mode>& scratch, int64_t number) {
      const Side& side = number < of_queries ? queries : keys;
      number -= number < of_queries ? 0 : of_queries;
      Pool<Mode, Element>(call, scratch, number / side.blocks, side, number % side.blocks);
    };
    Crew<Mode> crew(call, 0);
    crew.share_out({of_queries + pairs * keys.blocks}, pool);
    crew.share_out({call.heads * queries.blocks}, [&](Scratch<Mode>&, int64_t number) {
      rank(call, queries, keys, similarity, number / queries.blocks, number % queries.blocks,
           weight, forced);
    });
  }
};

// Tiles of slots come in groups that share no query block, so that no two items add to one place.
struct AddMass {
  const int64_t *slots, *block;  // [tiles][TILE]
  const int64_t* group;          // [groups + 1]: tiles of each
  int64_t groups;
  float* out;

  template <class Mode, class Element>
  void run(const Call& call) const {
    const int64_t each = call.query_blocks * call.key_blocks, parts = (groups + TILES - 1) / TILES;
    const int64_t items = call.batch * call.heads * parts;
    auto item = [&](Scratch<Mode>& scratch, int64_t number) {
      const int64_t first = number % parts * TILES, pair = number / parts;
      const int64_t end = group[std::min(first + TILES, groups)];
      for (int64_t tile = group[first]; tile < end; tile += TILES)
        Mass<Mode, Element>(call, scratch, pair, slots + tile * TILE, block + tile * TILE,
                            (int)std::min(TILES, end - tile), out + pair * each);
    };
    Crew<Mode>(call, TILES * TILE).share_out({items}, item);
  }
};

struct FindPeak {
  double* operations;

  template <class Mode, class Element>
  void run(const Call& call) const {
    const int64_t items = 8 * call.threads;
    auto item = [&](Scratch<Mode>& scratch, int64_t number) {
      const double done = burn(scratch);
      if (number == 0) *operations = done * items;
    };
    Crew<Mode>(call, 0).share_out({items}, item);
  }
};

// 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 if memory ran out.
template <class Task>
static int with_dtype(const Call& call, int dtype, const Task& task) {
  try {
    if (dtype == 0) task.template run<Single, float>(call);
    if (dtype == 2) task.template run<Single, Float16>(call);
    if (dtype != 1) return 0;
#if defined(__AMX_BF16__)
    if (Tiles::granted()) {
      task.template run<Tiles, Bfloat>(call);
      return 0;
    }
#endif
#if defined(__AVX512BF16__)
    task.template run<Pairs, Bfloat>(call);
#else
    task.template run<Single, Bfloat>(call);
#endif
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

extern "C" int dit_sparse_attend(const Call* call, int dtype) {
  return with_dtype(*call, dtype, Attend{});
}

extern "C" int dit_sparse_mass(const Call* call, int dtype, const int64_t* slots,
                               const int64_t* block, const int64_t* group, int64_t groups,
                               float* out) {
  return with_dtype(*call, dtype, AddMass{slots, block, group, groups, out});
}

extern "C" int dit_sparse_largest(const Call* call, int dtype, const int64_t* rows,
                                  const int64_t* columns, int64_t each, int64_t own,
                                  float* out) {
  const Samples samples{rows, columns, each, call->query_blocks, call->key_blocks};
  return with_dtype(*call, dtype, FindLargest{samples, own != 0, out});
}

extern "C" int dit_sparse_means(const Call* call, int dtype, const Side* queries, const Side* keys,
                                float similarity, float* weight, uint8_t* forced) {
  return with_dtype(*call, dtype, RankMeans{*queries, *keys, similarity, weight, forced});
}

extern "C" int dit_sparse_peak(const Call* call, int dtype, double* operations) {
  return with_dtype(*call, dtype, FindPeak{operations});
}
