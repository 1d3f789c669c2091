// Random products against plain loops, to be run under the sanitizers.
//
// Every operand is an allocation of its own, at an odd address and of exactly
// its size, so that a read or write past an end is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "check.h"
#include "check_conv.h"
#include "isas.h"
#include "run.h"

namespace {

using quantlab::Kernels;
using quantlab::Product;

struct Case {
  std::mt19937 random;
  int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }

  bool run(const Kernels& kernels) {
    static const int kRows[] = {1, 2, 3, 4, 5, 6, 7, 12, 13, 37, 70};
    Product a{};
    a.m = kRows[pick(0, 10)], a.k = pick(1, 200), a.n = pick(1, 200);
    if (pick(0, 15) == 0) a.k = 1100, a.n = 530;
    a.bits = pick(0, 3) ? pick(1, 8) : 8;
    a.is_signed = pick(0, 1);
    a.group = pick(0, 2) ? pick(1, a.k) : a.k;
    const int64_t word = 32 / a.bits;  // codes of a word of a panel
    if (pick(0, 1)) a.group = (a.group + word - 1) / word * word;
    a.groups = (a.k + a.group - 1) / a.group;
    const bool floats = a.groups > 1 || pick(0, 2);
    const bool tabled = a.bits <= 4 && pick(0, 2) == 0;
    const int64_t unit = a.bits == 3 || a.bits > 4 ? 8 : 8 / a.bits;
    const int64_t size = a.bits == 8 ? 1 : unit == 8 ? a.bits : 1;
    a.code_rows = (a.k + (a.bits == 8 ? 1 : unit) - 1) /
                  (a.bits == 8 ? 1 : unit) * size;
    Exact<int8_t> x(a.m * a.k, pick(0, 3)), table(1 << a.bits, 1);
    Exact<uint8_t> codes(a.code_rows * a.n, pick(0, 63));
    Exact<float> scale(a.groups * a.n, 0), y(a.m * a.n, 0);
    Exact<int32_t> zero(a.groups * a.n, 0), sums(a.m * a.n, 0);
    a.x_scales = pick(0, 1) ? a.groups : 1;
    a.x_zeros = pick(0, 1) ? a.groups : 1;
    Exact<float> x_scale(a.m * a.x_scales, 0);
    Exact<int32_t> x_zero(a.m * a.x_zeros, 0);
    const bool extreme = pick(0, 7) == 0;
    for (int64_t i = 0; i < x.count; ++i)
      x.set(i, extreme ? -128 : pick(-128, 127));
    for (int64_t i = 0; i < codes.count; ++i)
      codes.set(i, extreme ? 0x80 : pick(0, 255));
    for (int64_t i = 0; i < table.count; ++i) table.set(i, pick(-128, 127));
    for (int64_t i = 0; i < scale.count; ++i) scale.set(i, pick(1, 2));
    for (int64_t i = 0; i < x_scale.count; ++i) x_scale.set(i, pick(1, 2));
    for (int64_t i = 0; i < zero.count; ++i) zero.set(i, pick(-128, 255));
    for (int64_t i = 0; i < x_zero.count; ++i) x_zero.set(i, pick(-128, 127));
    a.x = x.p, a.codes = codes.p;
    const bool packs = a.bits == 8 ? !tabled : a.bits == 4 || a.bits == 2;
    const bool whole = a.groups == 1 || a.group % word == 0;
    a.panels = packs && whole && pick(0, 1);
    const int64_t code_rows = a.code_rows;
    const int64_t words = (a.n + 63) / 64 * ((code_rows + 3) / 4);
    const int flip = a.bits == 8 && a.is_signed ? 0x80 : 0;
    Exact<uint8_t> panels(256 * words, pick(0, 63));
    if (a.panels) {
      for (int64_t i = 0; i < panels.count; ++i) panels.set(i, pick(0, 255));
      for (int64_t k = 0; k < code_rows; ++k)
        for (int64_t n = 0; n < a.n; ++n)
          panels.set(in_panels(code_rows, k, n), codes.get(k * a.n + n) ^ flip);
      a.codes = panels.p, a.code_rows = (code_rows + 3) / 4 * 4;
    }
    a.table = tabled ? table.p : nullptr;
    a.scale = floats && pick(0, 3) ? scale.p : nullptr;
    a.zero = pick(0, 1) ? zero.p : nullptr;
    a.x_scale = floats && pick(0, 1) ? x_scale.p : nullptr;
    a.x_zero = pick(0, 2) ? nullptr : x_zero.p;
    a.y = floats ? y.p : nullptr;
    a.sums = floats ? nullptr : sums.p;

    Pool pool;
    pool.late = pick(0, 3) == 0;
    quantlab::multiply(kernels, a, pool, pick(1, 3));
    // What starts after the end must touch nothing of the call.
    for (auto& f : pool.held) f->run();

    for (int64_t m = 0; m < a.m; ++m)
      for (int64_t n = 0; n < a.n; ++n) {
        double want = 0;
        int64_t last = 0;
        for (int64_t g = 0; g < a.groups; ++g) {
          int64_t sum = 0;
          const int64_t end = std::min(a.k, (g + 1) * a.group);
          const int64_t zx =
              a.x_zero ? x_zero.get(m * a.x_zeros + (a.x_zeros > 1) * g) : 0;
          const int64_t zw = a.zero ? zero.get(g * a.n + n) : 0;
          for (int64_t k = g * a.group; k < end; ++k)
            sum += (x.get(m * a.k + k) - zx) * (code(a, codes, table, k, n) - zw);
          double s = a.scale ? scale.get(g * a.n + n) : 1;
          if (a.x_scale) s *= x_scale.get(m * a.x_scales + (a.x_scales > 1) * g);
          want += s * sum;
          last = sum;
        }
        const double got = floats ? y.get(m * a.n + n) : sums.get(m * a.n + n);
        if (!floats) want = static_cast<int32_t>(last);
        if (std::abs(got - want) > 2e-6 * (1e5 + std::abs(want))) {
          std::printf("m=%ld k=%ld n=%ld bits=%ld group=%ld: %g, not %g\n",
                      static_cast<long>(a.m), static_cast<long>(a.k),
                      static_cast<long>(a.n), static_cast<long>(a.bits),
                      static_cast<long>(a.group), got, want);
          return false;
        }
      }
    return true;
  }

  bool run_floats(const Kernels& kernels) {
    quantlab::FloatProduct a{};
    a.m = pick(1, 9), a.k = pick(1, 90), a.n = pick(1, 150);
    a.bits = pick(1, 8), a.is_signed = pick(0, 1);
    const int64_t planes = a.bits == 4 ? 2 : a.bits == 2 ? 4 : 1;
    a.group = pick(0, 1) ? a.k : planes * pick(1, 20);
    if (a.group > a.k) a.group = a.k;
    a.groups = (a.k + a.group - 1) / a.group;
    const bool straddle = a.bits != 8 && planes == 1;
    a.code_rows = straddle ? (a.k + 7) / 8 * a.bits : (a.k + planes - 1) / planes;
    Exact<float> x(a.m * a.k, 0), values(16, 0), y(a.m * a.n, 0);
    Exact<float> scale(a.groups * a.n, 0), zero(a.groups * a.n, 0);
    Exact<uint8_t> codes(a.code_rows * a.n, pick(0, 63));
    for (int64_t i = 0; i < codes.count; ++i) codes.set(i, pick(0, 255));
    for (int64_t i = 0; i < x.count; ++i) x.set(i, pick(-9, 9));
    for (int64_t i = 0; i < 16; ++i)
      values.set(i, i < 1 << a.bits ? pick(-9, 9) : values.get(i % (1 << a.bits)));
    for (int64_t i = 0; i < scale.count; ++i)
      scale.set(i, pick(1, 2)), zero.set(i, pick(-5, 5));
    a.x = x.p, a.codes = codes.p, a.y = y.p;
    a.values = a.bits <= 4 ? values.p : nullptr;
    a.scale = pick(0, 2) ? scale.p : nullptr;
    a.zero = pick(0, 1) ? zero.p : nullptr;
    Pool pool;
    quantlab::multiply_floats(kernels, a, pool, pick(1, 3));
    for (int64_t i = 0; i < a.m * a.n; ++i) {
      const int64_t m = i / a.n, n = i % a.n;
      double want = 0;
      for (int64_t k = 0; k < a.k; ++k) {
        const int64_t c = bits_at(codes, a.bits, a.n, k, n), g = k / a.group;
        double w = a.values ? values.get(c) : signed_of(a, c);
        if (a.zero) w -= zero.get(g * a.n + n);
        if (a.scale) w *= scale.get(g * a.n + n);
        want += w * x.get(m * a.k + k);
      }
      if (y.get(i) != want) {
        std::printf("floats m=%ld k=%ld n=%ld bits=%ld group=%ld: %g not %g\n",
                    static_cast<long>(a.m), static_cast<long>(a.k),
                    static_cast<long>(a.n), static_cast<long>(a.bits),
                    static_cast<long>(a.group), y.get(i), want);
        return false;
      }
    }
    return true;
  }

  bool run_quantize(const Kernels& kernels) {
    const int64_t rows = pick(1, 5), k = pick(1, 70);
    Exact<float> x(rows * k, 0), scale(rows, 0);
    Exact<int8_t> codes(rows * k, pick(0, 3));
    Exact<int32_t> zero(rows, 0);
    for (int64_t i = 0; i < rows * k; ++i) x.set(i, 0.37f * pick(-99, 99));
    const quantlab::Quantize a{rows,    k,       true,    -128,   127, x.p,
                               nullptr, nullptr, codes.p, scale.p, zero.p};
    Pool pool;
    quantlab::quantize_rows(kernels, a, pool, 2);
    for (int64_t i = 0; i < rows * k; ++i) {
      const float s = scale.get(i / k);
      if (codes.get(i) != std::nearbyint(x.get(i) * (1 / s))) return false;
    }
    return true;
  }

  // Where row k of column n lies: see quantlab_kernels/panels.py.
  static int64_t in_panels(int64_t rows, int64_t k, int64_t n) {
    const int64_t c = n % 64, word = n / 64 * ((rows + 3) / 4) + k / 4;
    return 256 * word + 64 * (c % 16 / 4) + 16 * (c / 16) + 4 * (c % 4) + k % 4;
  }

  template <typename A>
  static int64_t signed_of(const A& a, int64_t v) {
    return a.is_signed && v >> (a.bits - 1) ? v - (int64_t{1} << a.bits) : v;
  }

  static int64_t bits_at(const Exact<uint8_t>& codes, int64_t bits, int64_t n,
                         int64_t k, int64_t column) {
    int64_t v = 0;
    for (int64_t b = 0; b < bits; ++b) {
      const int64_t bit = k * bits + b;
      v |= static_cast<int64_t>(codes.get(bit / 8 * n + column) >> bit % 8 & 1)
           << b;
    }
    return v;
  }

  static int64_t code(const Product& a, const Exact<uint8_t>& codes,
                      const Exact<int8_t>& table, int64_t k, int64_t n) {
    const int64_t v = bits_at(codes, a.bits, a.n, k, n);
    if (a.table) return table.get(v);
    return signed_of(a, v);
  }
};

bool all(const Kernels& kernels, const quantlab::ConvKernels& conv,
         unsigned seed) {
  Case c{std::mt19937(seed)};
  return c.run(kernels) && c.run_floats(kernels) && c.run_quantize(kernels) &&
         check_conv(conv, c.random);
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100;
  const int64_t isas = quantlab::isas();
  bool good = true;
  for (int i = 0; i < count && good; ++i) {
    const unsigned seed = static_cast<unsigned>(i);
#ifdef QL_AVX512VNNI
    if (isas & quantlab::kAvx512Vnni)
      good = all(quantlab::avx512vnni_kernels(), quantlab::avx512vnni_conv(), seed);
#endif
#ifdef QL_AMX
    if (good && isas & quantlab::kAmx)
      good = all(quantlab::amx_kernels(), quantlab::avx512vnni_conv(), seed);
#endif
#ifdef QL_AVX2
    if (good && isas & quantlab::kAvx2)
      good = all(quantlab::avx2_kernels(), quantlab::avx2_conv(), seed);
#endif
    if (!good) std::printf("seed %u\n", seed);
  }
  std::printf(good ? "good\n" : "bad\n");
  return !good;
}
