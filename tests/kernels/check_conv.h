// A random convolution against plain loops.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>

#include "check.h"
#include "run_conv.h"

namespace {

inline bool check_conv(const quantlab::ConvKernels& kernels,
                       std::mt19937& random) {
  auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  quantlab::Conv a{};
  a.batch = pick(1, 3);
  a.kh = pick(1, 4), a.kw = pick(1, 4);
  a.stride_h = pick(1, 3), a.stride_w = pick(1, 3);
  a.dilation_h = pick(1, 2), a.dilation_w = pick(1, 2);
  a.height = pick(1, 9), a.width = pick(1, 20);
  a.top = pick(-1, 3), a.left = pick(-1, 3);
  a.out_h = pick(1, 6), a.out_w = pick(1, 18);
  const bool depthwise = pick(0, 2) == 0;
  a.groups = depthwise ? pick(2, 90) : pick(0, 2) ? 1 : pick(2, 3);
  const int64_t ci = depthwise ? 1 : pick(1, 9);
  a.channels = ci * a.groups;
  a.n = depthwise ? a.groups : a.groups * pick(1, pick(0, 1) ? 20 : 130);
  Exact<int8_t> x(a.batch * a.height * a.width * a.channels, pick(0, 3));
  Exact<int8_t> w(a.kh * a.kw * ci * a.n, pick(0, 63));
  Exact<float> scale(a.n, 0), x_scale(a.batch, 0);
  Exact<int32_t> zero(a.n, 0), x_zero(a.batch, 0);
  const int64_t size = a.batch * a.out_h * a.out_w * a.n;
  Exact<float> y(size, 0);
  Exact<int32_t> sums(size, 0);
  const bool extreme = pick(0, 7) == 0;
  for (int64_t i = 0; i < x.count; ++i)
    x.set(i, extreme ? -128 : pick(-128, 127));
  for (int64_t i = 0; i < w.count; ++i)
    w.set(i, extreme ? -128 : pick(-128, 127));
  for (int64_t i = 0; i < a.n; ++i)
    scale.set(i, pick(1, 2)), zero.set(i, pick(-128, 127));
  for (int64_t i = 0; i < a.batch; ++i)
    x_scale.set(i, pick(1, 2)), x_zero.set(i, pick(-128, 127));
  const bool floats = pick(0, 1);
  a.x = x.p, a.w = w.p;
  a.scale = floats && pick(0, 1) ? scale.p : nullptr;
  a.zero = pick(0, 1) ? zero.p : nullptr;
  a.x_scale = floats && pick(0, 1) ? x_scale.p : nullptr;
  a.x_zero = pick(0, 1) ? x_zero.p : nullptr;
  a.y = floats ? y.p : nullptr;
  a.sums = floats ? nullptr : sums.p;
  Pool pool;
  pool.late = pick(0, 3) == 0;
  quantlab::convolve(kernels, a, pool, pick(1, 3));
  for (auto& f : pool.held) f->run();

  const int64_t co = a.n / a.groups;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t n = i % a.n, column = i / a.n % a.out_w;
    const int64_t row = i / a.n / a.out_w % a.out_h;
    const int64_t b = i / a.n / a.out_w / a.out_h;
    const int64_t zx = a.x_zero ? x_zero.get(b) : 0;
    const int64_t zw = a.zero ? zero.get(n) : 0;
    int64_t sum = 0;
    for (int64_t t = 0; t < a.kh * a.kw * ci; ++t) {
      const int64_t h = row * a.stride_h - a.top + t / ci / a.kw * a.dilation_h;
      const int64_t v =
          column * a.stride_w - a.left + t / ci % a.kw * a.dilation_w;
      if (h < 0 || h >= a.height || v < 0 || v >= a.width) continue;
      const int64_t c = n / co * ci + t % ci;
      sum += (x.get(((b * a.height + h) * a.width + v) * a.channels + c) - zx) *
             (w.get(t * a.n + n) - zw);
    }
    double want = sum;
    if (a.scale) want *= scale.get(n);
    if (a.x_scale) want *= x_scale.get(b);
    const double got = floats ? y.get(i) : sums.get(i);
    if (got != want) {
      std::printf("convolution, entry %ld: %g, not %g\n", static_cast<long>(i),
                  got, want);
      return false;
    }
  }
  return true;
}

}  // namespace
