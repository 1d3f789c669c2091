// Large pages for weights.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace quantlab {

constexpr int64_t kLargePage = 2 << 20;

// Moves a weight into large pages when it is used for the fourth time.
//
// A row of a weight fills a page of 4 KB, so that each row costs a walk of the
// page tables; in pages of 2 MB the same product reads up to half as fast
// again. To move it takes as long as some ten products, which is worth it for
// a weight that stays, not for one that a training step makes anew; what is
// seen again and again at one address most likely stays. Nothing depends on
// whether it works. QUANTLAB_LARGE_PAGES=0 leaves memory as it is.
inline void use_large_pages(const void* data, int64_t bytes) {
  static const char* const wanted = std::getenv("QUANTLAB_LARGE_PAGES");
  if (bytes < kLargePage || (wanted && *wanted == '0')) return;
#ifdef MADV_COLLAPSE
  constexpr int kCollapse = MADV_COLLAPSE;
#else
  constexpr int kCollapse = 25;  // Linux 6.1; older ones refuse it
#endif
  struct Seen {
    std::atomic<uintptr_t> at{0};
    std::atomic<int> times{0};
  };
  static Seen seen[1024];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  Seen& s = seen[(begin >> 12) * 0x9E3779B97F4A7C15u >> 54];
  if (s.at.load(std::memory_order_relaxed) != begin) {
    s.at.store(begin, std::memory_order_relaxed);
    s.times.store(0, std::memory_order_relaxed);
  }
  if (s.times.load(std::memory_order_relaxed) > 3) return;
  if (s.times.fetch_add(1, std::memory_order_relaxed) != 3) return;
  const uintptr_t from = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t to = (begin + bytes) / kLargePage * kLargePage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, kCollapse);
}

}  // namespace quantlab
