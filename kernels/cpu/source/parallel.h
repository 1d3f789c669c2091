// Tasks shared among the threads of a pool and the caller.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>

namespace quantlab {

// Memory of the calling thread, kept from call to call; slots are apart.
inline void* scratch(int slot, int64_t size) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[4];
  Buffer& b = buffers[slot];
  if (b.size < size) {
    std::free(b.data);
    b.size = (size + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(4096, b.size);
    if (!b.data) std::abort();
  }
  return b.data;
}

// Threads of the pool that have just worked and wait a moment for more.
//
// To wake one takes some 30 microseconds, now and then on the caller's own
// core: a tenth of a large product. The next product of a model mostly comes
// sooner than a thread that waits gives up.
class Waiting {
 public:
  // Gives a job to a thread that waits, or null: none does.
  template <typename Work>
  const void* give(const Work& work) {
    if (threads_.load() == 0) return nullptr;
    auto* const mine = new std::function<void()>(work);
    Job none = nullptr;
    if (job_.compare_exchange_strong(none, mine)) return mine;
    delete mine;
    return nullptr;
  }

  // Takes back a job that no thread has begun.
  void withdraw(const void* given) {
    Job job = job_.load();
    if (job == given && job_.compare_exchange_strong(job, nullptr)) delete job;
  }

  void wait() {
    for (bool worked = true; worked;) {
      threads_.fetch_add(1);
      Job job = nullptr;
      for (int i = 0; i < kPauses && !job; ++i) {
        __builtin_ia32_pause();
        if (job_.load(std::memory_order_relaxed)) job = job_.exchange(nullptr);
      }
      threads_.fetch_sub(1);
      if (!job) job = job_.exchange(nullptr);
      if ((worked = job != nullptr)) (*job)();
      delete job;
    }
  }

 private:
  using Job = std::function<void()>*;
  static constexpr int kPauses = 2000;
  std::atomic<int> threads_{0};
  std::atomic<Job> job_{nullptr};
};
inline Waiting waiting;

// Runs task(i) for i in [0, count) on the pool and the calling thread.
//
// The caller takes tasks too and waits for those that others have begun, never
// for a thread to begin: one that comes late finds nothing left, and touches
// only the shared state, which it holds.
template <typename Pool, typename Task>
void parallel(Pool& pool, int64_t threads, int64_t count, const Task& task) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  auto state = std::make_shared<State>();
  const Task* const t = &task;
  auto work = [state, t, count] {
    int64_t mine = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++mine) (*t)(i);
    if (mine && state->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->all.notify_all();
    }
  };
  const void* const given = waiting.give(work);
  for (int64_t i = given ? 2 : 1; i < threads; ++i)
    pool.Schedule([work] {
      work();
      waiting.wait();
    });
  work();
  if (given) waiting.withdraw(given);
  for (int i = 0; i < 4096 && state->done.load() < count; ++i)
    __builtin_ia32_pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() >= count; });
}

}  // namespace quantlab
