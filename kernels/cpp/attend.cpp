// Attend: all rows of a call, on all threads. Never with -ffast-math, which would undo `exp2`.

#include <atomic>
#include <thread>

#include "row.h"

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

template <class Mode, class Element>
static void attend(const Call& call) {
  const int64_t rows = call.heads * call.query_blocks;
  int64_t block_q = 0;
  for (int64_t i = 0; i < call.query_blocks; i++)
    block_q = std::max(block_q, call.query_offsets[i + 1] - call.query_offsets[i]);
  std::vector<std::unique_ptr<Scratch<Mode>>> scratches;
  for (int64_t i = 0; i < call.threads; i++)
    scratches.emplace_back(new Scratch<Mode>((int)call.head_dim, block_q));
  std::atomic<int64_t> next{0}, thread{0};
  auto work = [&] {
    [[maybe_unused]] const typename Mode::Session session;
    Scratch<Mode>& scratch = *scratches[thread++];
    for (int64_t item; (item = next++) < call.batch * rows;)
      Row<Mode, Element>(call, scratch, item % call.batch,
                         call.longest_first[item / call.batch]);
  };
  on_threads(call, work);
}

static void attend_bfloat(const Call& call) {
#if defined(__AMX_BF16__)
  if (Tiles::granted()) return attend<Tiles, Bfloat>(call);
#endif
#if defined(__AVX512BF16__)
  attend<Pairs, Bfloat>(call);
#else
  attend<Single, Bfloat>(call);
#endif
}

// 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 if memory ran out.
extern "C" int dit_sparse_attend(const Call* call, int dtype) {
  try {
    if (dtype == 0) attend<Single, float>(*call);
    if (dtype == 1) attend_bfloat(*call);
    if (dtype == 2) attend<Single, Float16>(*call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
