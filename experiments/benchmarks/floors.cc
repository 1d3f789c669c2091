// What the machine can do: bytes read, and int8 operations, in a second.
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

template <typename Work>
double Seconds(int threads, Work work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      ++ready;
      while (!go) {
      }
      work(t);
    });
  }
  while (ready < threads) {
  }
  const auto start = Clock::now();
  go = true;
  for (auto& thread : pool) thread.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile int64_t sink;

__attribute__((target("avx512f"))) int64_t Read512(const char* p, int64_t n) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i + 256 <= n; i += 256) {
    _mm_prefetch(p + i + 4096, _MM_HINT_T0);
    _mm_prefetch(p + i + 4160, _MM_HINT_T0);
    _mm_prefetch(p + i + 4224, _MM_HINT_T0);
    _mm_prefetch(p + i + 4288, _MM_HINT_T0);
    a = _mm512_or_si512(a, _mm512_loadu_si512(p + i));
    b = _mm512_or_si512(b, _mm512_loadu_si512(p + i + 64));
    c = _mm512_or_si512(c, _mm512_loadu_si512(p + i + 128));
    d = _mm512_or_si512(d, _mm512_loadu_si512(p + i + 192));
  }
  a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
  return _mm512_reduce_or_epi64(a);
}

__attribute__((target("avx2"))) int64_t Read256(const char* p, int64_t n) {
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int64_t i = 0; i + 64 <= n; i += 64) {
    _mm_prefetch(p + i + 4096, _MM_HINT_T0);
    const auto* v = reinterpret_cast<const __m256i*>(p + i);
    a = _mm256_or_si256(a, _mm256_loadu_si256(v));
    b = _mm256_or_si256(b, _mm256_loadu_si256(v + 1));
  }
  a = _mm256_or_si256(a, b);
  return _mm256_extract_epi64(a, 0) | _mm256_extract_epi64(a, 3);
}

__attribute__((target("avx512f,avx512vnni"), noinline)) void Dot512(
    int64_t times) {
  __m512i s[16];
  for (auto& v : s) v = _mm512_setzero_si512();
  __m512i a = _mm512_set1_epi8(1), b = a;
  for (int64_t i = 0; i < times; ++i) {
    for (auto& v : s) v = _mm512_dpbusd_epi32(v, a, b);
    asm volatile("" : "+v"(a), "+v"(b));
  }
  for (auto& v : s) sink = sink + _mm512_reduce_add_epi32(v);
}

__attribute__((target("avx2"), noinline)) void Dot256(int64_t times) {
  __m256i s[8];
  for (auto& v : s) v = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi16(1), b = a;
  for (int64_t i = 0; i < times; ++i) {
    for (auto& v : s) v = _mm256_add_epi32(v, _mm256_madd_epi16(a, b));
    asm volatile("" : "+x"(a), "+x"(b));
  }
  for (auto& v : s) sink = sink + _mm256_extract_epi32(v, 0);
}

// Four tiles of sums, each of 16 x 16 x 64 products a time.
__attribute__((target("amx-tile,amx-int8"), noinline)) void DotTiles(
    int64_t times) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < times; ++i) {
    _tile_dpbsud(0, 6, 7);
    _tile_dpbsud(1, 6, 7);
    _tile_dpbsud(2, 6, 7);
    _tile_dpbsud(3, 6, 7);
  }
  _tile_release();
}

}  // namespace

extern "C" {

// Bytes read per second from n bytes by all threads.
double read_rate(const char* p, int64_t n, int threads) {
  const bool wide = __builtin_cpu_supports("avx512f");
  const double seconds = Seconds(threads, [&](int t) {
    const int64_t part = n / threads / 256 * 256;
    sink = wide ? Read512(p + t * part, part) : Read256(p + t * part, part);
  });
  return n / seconds;
}

// 8-bit multiplications and additions per second of all threads, of the matrix
// units or else of vectors.
double int8_rate(int threads, int matrix) {
  if (matrix) {
    const int64_t times = 5'000'000;
    const double seconds = Seconds(threads, [&](int) { DotTiles(times); });
    return threads * times * (4 * 16 * 16 * 64 * 2.0) / seconds;
  }
  const bool wide = __builtin_cpu_supports("avx512vnni");
  const int64_t times = 20'000'000;
  const double seconds =
      Seconds(threads, [&](int) { wide ? Dot512(times) : Dot256(times); });
  const double each = wide ? 16 * 64 * 2.0 : 8 * 16 * 2.0;
  return threads * times * each / seconds;
}
}
