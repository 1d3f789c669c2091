// Tasks shared among the threads of a pool and the caller.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
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
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int i = 0; i < 4096 && state->done.load() < count; ++i)
    __builtin_ia32_pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() >= count; });
}

}  // namespace quantlab
