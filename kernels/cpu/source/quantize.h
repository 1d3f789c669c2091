// Rows of floats to int8 codes, bit for bit as the definition does it.
#pragma once

#include "product.h"
#include "vec.h"

namespace quantlab {
namespace {

constexpr float kTiny = 0x1p-126f;  // smallest normal float32

struct Range {
  float largest, low, high;  // largest is NaN where there is a NaN
};

QL_INLINE float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// Without kSigned only `largest`.
template <bool kSigned>
inline Range range_of(const float* x, int64_t k) {
  constexpr int64_t kLanes = kWidth / 4;
  // As integers NaN is beyond infinity, and infinity beyond all else.
  const I magnitude = words(0x7fffffff);
  // Four chains, or each waits for itself.
  I top[4];
  F low[4], high[4];
  for (int j = 0; j < 4; ++j)
    top[j] = zeros(), low[j] = high[j] = spread_f(0);
  auto take = [&](auto j, const float* p) QL_NOW {
    top[j] = max_i(top[j], and_(load(p), magnitude));
    if (!kSigned) return;
    const F v = load_f(p);
    low[j] = min_f(v, low[j]);  // the second where v is NaN
    high[j] = max_f(v, high[j]);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes)
    each<4>([&](auto j) QL_NOW { take(j, x + i + j * kLanes); });
  for (; i + kLanes <= k; i += kLanes) take(Index<0>{}, x + i);
  for (int j = 1; j < 4; ++j) {
    top[0] = max_i(top[0], top[j]);
    low[0] = min_f(low[0], low[j]), high[0] = max_f(high[0], high[j]);
  }
  uint32_t tops[kLanes], most = 0;
  float lows[kLanes], highs[kLanes];
  store(tops, top[0]), store_f(lows, low[0]), store_f(highs, high[0]);
  Range r{0, 0, 0};
  auto widen_to = [&](uint32_t bits, float down, float up) {
    if (bits > most) most = bits;
    if (down < r.low) r.low = down;
    if (up > r.high) r.high = up;
  };
  for (int j = 0; j < kLanes; ++j) widen_to(tops[j], lows[j], highs[j]);
  for (; i < k; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    widen_to(bits & 0x7fffffff, x[i], x[i]);
  }
  r.largest = float_of(most);
  if (r.largest != r.largest) r.low = r.high = r.largest;
  return r;
}

QL_INLINE float even(float v) { return __builtin_rintf(v); }

void quantize(const Quantize& a, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = kWidth / 4;
  const float most = static_cast<float>(a.high);
  const float least = static_cast<float>(a.low);
  for (int64_t r = begin; r < end; ++r) {
    const float* const x = a.x + r * a.k;
    int8_t* const out = a.codes + r * a.k;
    const Range found =
        a.symmetric ? range_of<false>(x, a.k) : range_of<true>(x, a.k);
    float scale, zero = 0;
    if (a.scale) {
      scale = found.largest - found.largest == 0 ? a.scale[r]
                                                 : __builtin_nanf("");
      if (a.zero) zero = static_cast<float>(a.zero[r]);
    } else {
      const float span = a.symmetric ? found.largest : found.high - found.low;
      scale = span * (1.0f / (a.symmetric ? most : most - least));
      if (scale < kTiny) scale = kTiny;
      if (!a.symmetric) {
        zero = even(-found.low * (1.0f / scale)) + least;
        zero = zero != zero ? 0 : zero < least ? least : zero > most ? most : zero;
      }
    }
    a.scale_out[r] = scale;
    a.zero_out[r] = static_cast<int32_t>(zero);
    const float by = 1.0f / scale;
    int64_t i = 0;
    // Where nothing is NaN, bounds may come first, and numbers are whole once
    // they are integers.
    const bool known = found.largest - found.largest == 0 && by - by == 0 &&
                       zero > -65536 && zero < 65536;
    const F low = spread_f(least - zero), high = spread_f(most - zero);
    const I shift = words(static_cast<int32_t>(zero));
    for (; known && i + kWidth <= a.k; i += kWidth) {
      I v[4];
      each<4>([&](auto j) QL_NOW {
        const F f = mul_f(load_f(x + i + j * kLanes), spread_f(by));
        v[j] = add(integers(max_f(min_f(f, high), low)), shift);
      });
      store_bytes(out + i, v);
    }
    for (; i + kLanes <= a.k; i += kLanes) {
      F v = mul_f(load_f(x + i), spread_f(by));
      v = known_f(add_f(round_f(v), spread_f(zero)));
      v = max_f(min_f(v, spread_f(most)), spread_f(least));
      store_bytes(out + i, v);
    }
    for (; i < a.k; ++i) {
      const float v = even(x[i] * by) + zero;
      out[i] = static_cast<int8_t>(v != v      ? 0
                                   : v < least ? least
                                   : v > most  ? most
                                               : v);
    }
  }
}

}  // namespace
}  // namespace quantlab
