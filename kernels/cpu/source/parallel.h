// Tasks shared among the threads of a pool and the caller.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
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

// Waits for a short while without going to sleep; whether `done` came true. By
// the clock: a pause takes 11 to 50 nanoseconds, as the processor likes it.
template <typename Done>
bool spin(const Done& done) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kWhile(200);
  const Clock::time_point end = Clock::now() + kWhile;
  for (int i = 1; !done(); ++i) {
    __builtin_ia32_pause();
    if (i % 64) continue;
    sched_yield();  // whoever else has work may have this core
    if (Clock::now() > end) return false;
  }
  return true;
}

// Threads of the pool that work for us, and wait a moment for more to do.
//
// To wake one takes some 30 microseconds, now and then on the caller's own
// core: a tenth of a large product. The next product of a model mostly comes
// sooner than a thread that waits gives up. One that has not finished yet is
// given the next job as well: were another woken in its place, both would
// wait, and there would be more threads than cores.
class Helpers {
 public:
  static constexpr int kMost = 64;
  struct Job {
    std::function<void()> work;
    const void* caller;
  };
  // What was given, by helper.
  struct Given {
    int64_t count = 0;
    int helper[kMost];
    Job* job[kMost];
  };

  // Gives jobs to helpers that wait, or still work for this caller, up to
  // `count`.
  template <typename Work>
  void give(const Work& work, int64_t count, Given& given) {
    for (int i = 0; i < kMost && given.count < count; ++i) {
      Slot& s = slots_[i];
      if (!s.taken.load() || s.job.load()) continue;
      const void* const busy = s.works_for.load();
      if (busy && busy != caller()) continue;
      auto* const mine = new Job{work, caller()};
      Job* none = nullptr;
      if (s.job.compare_exchange_strong(none, mine)) {
        given.helper[given.count] = i;
        given.job[given.count++] = mine;
      } else {
        delete mine;
      }
    }
  }

  // Takes back jobs that no helper has begun.
  void withdraw(const Given& given) {
    for (int64_t i = 0; i < given.count; ++i) {
      Job* job = given.job[i];
      if (slots_[given.helper[i]].job.compare_exchange_strong(job, nullptr))
        delete given.job[i];
    }
  }

  // A thread of the pool works for a caller, and stays for a while.
  template <typename Work>
  void stay(const Work& work, const void* caller) {
    Slot* mine = nullptr;
    for (int i = 0; i < kMost && !mine; ++i)
      if (!slots_[i].taken.exchange(true)) mine = &slots_[i];
    if (!mine) return work();
    mine->works_for.store(caller);
    work();
    mine->works_for.store(nullptr);
    while (spin([&] { return mine->job.load(std::memory_order_relaxed); })) {
      mine->works_for.store(mine);  // so that no other caller finds it free
      Job* const job = mine->job.exchange(nullptr);
      if (job) {
        mine->works_for.store(job->caller);
        job->work();
        delete job;
      }
      mine->works_for.store(nullptr);
    }
    delete mine->job.exchange(nullptr);
    mine->taken.store(false);
  }

  // Tells callers apart.
  static const void* caller() {
    thread_local const char mine = 0;
    return &mine;
  }

 private:
  struct Slot {
    std::atomic<bool> taken{false};
    std::atomic<const void*> works_for{nullptr};
    std::atomic<Job*> job{nullptr};
  };
  Slot slots_[kMost];
};
inline Helpers helpers;

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
  Helpers::Given given;
  helpers.give(work, threads - 1, given);
  for (int64_t i = 1 + given.count; i < threads; ++i)
    pool.Schedule([work, caller = Helpers::caller()] {
      helpers.stay(work, caller);
    });
  work();
  helpers.withdraw(given);
  spin([&] { return state->done.load() >= count; });
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() >= count; });
}

}  // namespace quantlab
