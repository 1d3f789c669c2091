// Large pages for weights.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace quantlab {

constexpr int64_t kLargePage = 2 << 20;

// How often the memory at an address has been used, of the addresses seen last.
class Uses {
 public:
  // Counts one use more, and says how many there were before.
  int count(uintptr_t at) {
    const uint64_t mixed = (at >> 12) * 0x9E3779B97F4A7C15u;
    Entry* const set = entries_ + kWays * ((mixed ^ mixed >> 32) % kSets);
    for (int i = 0; i < kWays; ++i) {
      uintptr_t known = set[i].at.load(std::memory_order_relaxed);
      if (known == 0) set[i].at.compare_exchange_strong(known, at);
      if (known == 0 || known == at) return increment(set[i]);
    }
    // All are taken: one makes room, another each time.
    Entry& old = set[turn_.fetch_add(1, std::memory_order_relaxed) % kWays];
    old.times.store(0, std::memory_order_relaxed);
    old.at.store(at, std::memory_order_relaxed);
    return increment(old);
  }

 private:
  struct Entry {
    std::atomic<uintptr_t> at{0};
    std::atomic<int> times{0};
  };
  static int increment(Entry& e) {
    const int times = e.times.load(std::memory_order_relaxed);
    if (times > kMost) return times;
    return e.times.fetch_add(1, std::memory_order_relaxed);
  }

  static constexpr int kSets = 512, kWays = 8, kMost = 1000;
  Entry entries_[kSets * kWays];
  std::atomic<unsigned> turn_{0};
};

// Moves a weight into large pages when it is used for the fourth time.
//
// A row of a weight fills a page of 4 KB, so that each row costs a walk of the
// page tables; in pages of 2 MB the same product reads up to half as fast
// again. To move it takes as long as some ten products, which is worth it for
// a weight that stays, not for one that a training step makes anew; what is
// seen again and again at one address most likely stays. Its first and last
// pages are moved with what lies beside it: of small weights, one behind the
// other, they are half of all. Nothing depends on whether it works.
// QUANTLAB_LARGE_PAGES=0 leaves memory as it is.
inline void use_large_pages(const void* data, int64_t bytes) {
  static const char* const wanted = std::getenv("QUANTLAB_LARGE_PAGES");
  if (bytes < kLargePage || (wanted && *wanted == '0')) return;
#ifdef MADV_COLLAPSE
  constexpr int kCollapse = MADV_COLLAPSE;
#else
  constexpr int kCollapse = 25;  // Linux 6.1; older ones refuse it
#endif
  static Uses uses;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (uses.count(begin) != 3) return;
  // One by one: some may be refused, where nothing is mapped beside it.
  for (uintptr_t at = begin / kLargePage * kLargePage; at < begin + bytes;
       at += kLargePage)
    madvise(reinterpret_cast<void*>(at), kLargePage, kCollapse);
}

}  // namespace quantlab
