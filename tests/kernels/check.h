// Threads and operands of the checks.
#pragma once

#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace {

// Threads that start at once, late, or never before the caller is done.
struct Pool {
  ~Pool() {
    for (auto& t : threads) t.join();
  }
  template <typename F>
  void Schedule(F f) {
    if (late)
      held.push_back(std::make_unique<Held<F>>(std::move(f)));
    else
      threads.emplace_back(std::move(f));
  }
  struct Any {
    virtual ~Any() = default;
    virtual void run() = 0;
  };
  template <typename F>
  struct Held : Any {
    explicit Held(F f) : f(std::move(f)) {}
    void run() override { f(); }
    F f;
  };
  bool late = false;
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<Any>> held;
};

template <typename T>
struct Exact {
  Exact(int64_t count, int64_t offset)
      : bytes(new char[count * sizeof(T) + offset]),
        p(reinterpret_cast<T*>(bytes.get() + offset)),
        count(count) {}
  T get(int64_t i) const {
    T v;
    std::memcpy(&v, p + i, sizeof v);
    return v;
  }
  void set(int64_t i, T v) { std::memcpy(p + i, &v, sizeof v); }
  std::unique_ptr<char[]> bytes;
  T* p;
  int64_t count;
};

}  // namespace
