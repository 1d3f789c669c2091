// Float rows by packed codes, decoded to float32 exactly as the definition
// does: w = (value - zero) scale. Only the order of the sums is ours.
#pragma once

#include "decode.h"
#include "product.h"

namespace quantlab {
namespace {

constexpr int64_t kFloatRows = 24;       // rows of x of one task, times tiles
constexpr int64_t kFloatCodes = 64;      // codes of a column decoded at a time
constexpr int64_t kFloatPanel = 2048;    // columns of one task, at most
constexpr int64_t kFloatFetched = 128 * 1024;

enum Values { kTableOf16, kSignedBytes, kIntegers };

struct Decoding {
  int flip, top;  // two's complement is (code ^ flip) - top
  const float* values;
  const float *zero, *scale;  // of one group, kWidth each
  bool has_zero, has_scale;
};

// Plane p of bytes at q: (value - zero) scale of kWidth / 4 columns.
template <int P, Values V>
QL_INLINE F weight(const uint8_t* q, int p, int j, const Decoding& d) {
  const I c = V == kSignedBytes ? widen_signed(q) : widen(q);
  F v;
  if (V == kTableOf16)
    v = look_up_f(d.values, right32(c, 8 / P * p));
  else if (V == kSignedBytes)
    v = floats(c);
  else
    v = floats(sub(xor_(c, words(d.flip)), words(d.top)));
  if (d.has_zero) v = sub_f(v, load_f(d.zero + j * kWidth / 4));
  if (d.has_scale) v = mul_f(v, load_f(d.scale + j * kWidth / 4));
  return v;
}

template <int R>
QL_INLINE void begin_f(F (&sum)[R][4], const float* y) {
  each<R * 4>([&](auto i) QL_NOW {
    sum[i / 4][i % 4] = load_f(y + i * kWidth / 4);
  });
}

template <int R>
QL_INLINE void end_f(const F (&sum)[R][4], float* y) {
  each<R * 4>([&](auto i) QL_NOW {
    store_f(y + i * kWidth / 4, sum[i / 4][i % 4]);
  });
}

template <int R, int P, Values V>
__attribute__((noinline)) void direct_f(Codes c, Ahead& ahead,
                                        const Decoding& d, const float* x,
                                        int64_t stride, float* y) {
  F sum[R][4];
  begin_f<R>(sum, y);
  Ahead fetch = ahead;
  for (int64_t row = 0; row < c.rows; ++row, c.p += c.stride, x += P) {
    if (row % 4 == 0) fetch.fetch();
    each<4>([&](auto j) QL_NOW {
      each<P>([&](auto p) QL_NOW {
        const F w = weight<P, V>(c.p + j * kWidth / 4, p, j, d);
        each<R>([&](auto r) QL_NOW {
          sum[r][j] = fma_f(w, spread_f(x[r * stride + p]), sum[r][j]);
        });
      });
    });
  }
  ahead = fetch;
  end_f<R>(sum, y);
}

template <int P, Values V>
__attribute__((noinline)) void decode_f(Codes c, Ahead& ahead,
                                        const Decoding& d, float* out) {
  Ahead fetch = ahead;
  for (int64_t row = 0; row < c.rows; ++row, c.p += c.stride) {
    if (row % 4 == 0) fetch.fetch();
    each<4 * P>([&](auto i) QL_NOW {
      constexpr int j = i % 4, p = i / 4;
      store_f(out + p * kWidth + j * kWidth / 4,
              weight<P, V>(c.p + j * kWidth / 4, p, j, d));
    });
    out += P * kWidth;
  }
  ahead = fetch;
}

template <int R>
__attribute__((noinline)) void tile_f(const float* w, int64_t rows,
                                      const float* x, int64_t stride,
                                      float* y) {
  F sum[R][4];
  begin_f<R>(sum, y);
  for (int64_t i = 0; i < rows; ++i, w += kWidth) {
    F v[4];
    each<4>([&](auto j) QL_NOW { v[j] = load_f(w + j * kWidth / 4); });
    each<R>([&](auto r) QL_NOW {
      const F a = spread_f(x[r * stride + i]);
      each<4>([&](auto j) QL_NOW { sum[r][j] = fma_f(v[j], a, sum[r][j]); });
    });
  }
  end_f<R>(sum, y);
}

using DirectF = void (*)(Codes, Ahead&, const Decoding&, const float*, int64_t,
                         float*);
using DecodeF = void (*)(Codes, Ahead&, const Decoding&, float*);
using TileF = void (*)(const float*, int64_t, const float*, int64_t, float*);

template <int P, Values V>
constexpr DirectF kDirectF[] = {
    direct_f<1, P, V>, direct_f<2, P, V>,
    direct_f<(3 <= kDirect ? 3 : kDirect), P, V>,
    direct_f<(4 <= kDirect ? 4 : kDirect), P, V>};
template <int R>
constexpr TileF tile_f_or_last = tile_f<(R <= kTile ? R : kTile)>;
constexpr TileF kTilesF[] = {tile_f_or_last<1>, tile_f_or_last<2>,
                             tile_f_or_last<3>, tile_f_or_last<4>,
                             tile_f_or_last<5>, tile_f_or_last<6>};

struct FloatWork {
  DirectF direct;
  DecodeF decode;
};

template <int P>
FloatWork float_work(int64_t rows, Values v) {
  if constexpr (P == 1)
    if (v != kTableOf16)
      return v == kSignedBytes
                 ? FloatWork{kDirectF<1, kSignedBytes>[rows - 1],
                             decode_f<1, kSignedBytes>}
                 : FloatWork{kDirectF<1, kIntegers>[rows - 1],
                             decode_f<1, kIntegers>};
  return {kDirectF<P, kTableOf16>[rows - 1], decode_f<P, kTableOf16>};
}

FloatPlan float_plan(const FloatProduct& a, int64_t threads) {
  FloatPlan p;
  p.unpack = a.bits != 8 && a.bits != 4 && a.bits != 2;
  p.planes = p.unpack ? 1 : 8 / a.bits;
  p.direct = a.m <= kDirect;
  p.stride = (a.k + 15) / 16 * 16 + 16;
  p.rows = p.direct ? a.m : kFloatRows * kTile;
  const int64_t widest = p.direct ? kFloatPanel : 4 * kWidth;
  int64_t panels = (a.n + widest - 1) / widest;
  panels = (panels + threads - 1) / threads * threads;
  p.panel = ((a.n + panels - 1) / panels + kWidth - 1) / kWidth * kWidth;
  p.block = kFloatCodes / p.planes;
  if (p.direct && p.block < kFloatFetched / p.panel && !p.unpack)
    p.block = kFloatFetched / p.panel;
  p.x_bytes = 4 * p.stride * a.m;
  p.work_bytes = 4 * kWidth * (p.block * p.planes + 2) +
                 2 * kWidth * (p.block + 32) + 4 * p.panel * p.rows + 256;
  return p;
}

void float_task(const FloatProduct& a, const FloatPlan& plan, const float* x,
                int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* work) {
  char* at = static_cast<char*>(work);
  at += 63 & -reinterpret_cast<uintptr_t>(at);
  auto take = [&](int64_t bytes) {
    char* p = at;
    at += bytes;
    return p;
  };
  auto* y = reinterpret_cast<float*>(take(4 * plan.panel * plan.rows));
  auto* decoded =
      reinterpret_cast<float*>(take(4 * kWidth * plan.block * plan.planes));
  auto* zero = reinterpret_cast<float*>(take(4 * kWidth));
  auto* scale = reinterpret_cast<float*>(take(4 * kWidth));
  auto* copied = reinterpret_cast<uint8_t*>(take(kWidth * (plan.block + 32)));
  auto* unpacked = reinterpret_cast<uint8_t*>(take(kWidth * (plan.block + 32)));
  const int64_t rows = m1 - m0, P = plan.planes;
  memset(y, 0, 4 * plan.panel * rows);
  const int bits = static_cast<int>(a.bits);
  const Values kind = a.values                ? kTableOf16
                      : bits == 8 && a.is_signed ? kSignedBytes
                                                 : kIntegers;
  const int64_t directs = plan.direct ? rows : 1;
  const FloatWork f = P == 1   ? float_work<1>(directs, kind)
                      : P == 2 ? float_work<2>(directs, kind)
                               : float_work<4>(directs, kind);
  const int top = a.is_signed ? 1 << (bits - 1) : 0;
  Decoding d{top, top, a.values, zero, scale, a.zero != nullptr,
             a.scale != nullptr};
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t k1 = a.k < (g + 1) * a.group ? a.k : (g + 1) * a.group;
    const int64_t end = (k1 + P - 1) / P;
    for (int64_t row = g * a.group / P; row < end; row += plan.block) {
      const int64_t count = plan.block < end - row ? plan.block : end - row;
      Ahead ahead;
      if (!plan.unpack) {
        ahead.p = a.codes + (row + count) * a.n + n0;
        ahead.stride = a.n;
        ahead.lines = ahead.left = (n1 - n0 + 63) / 64;
        ahead.rows = a.code_rows - row - count;
        if (ahead.rows > count) ahead.rows = count;
      }
      for (int64_t n = n0; n < n1; n += kWidth) {
        const int64_t columns = n1 - n < kWidth ? n1 - n : kWidth;
        float* const to = y + (n - n0) * rows;
        if (a.zero) memcpy(zero, a.zero + g * a.n + n, 4 * columns);
        if (a.scale) memcpy(scale, a.scale + g * a.n + n, 4 * columns);
        const Codes c = rows_of_codes(a.codes, a.n, bits, plan.unpack, row,
                                      count, n, columns, copied, unpacked);
        const float* const from = x + m0 * plan.stride + row * P;
        if (plan.direct) {
          f.direct(c, ahead, d, from, plan.stride, to);
          continue;
        }
        f.decode(c, ahead, d, decoded);
        const int64_t codes = k1 - row * P < count * P ? k1 - row * P : count * P;
        for (int64_t r = 0; r < rows; r += kTile)
          kTilesF[(rows - r < kTile ? rows - r : kTile) - 1](
              decoded, codes, from + r * plan.stride, plan.stride,
              to + r * kWidth);
      }
    }
  }
  for (int64_t n = n0; n < n1; n += kWidth)
    for (int64_t r = 0; r < rows; ++r)
      memcpy(a.y + (m0 + r) * a.n + n, y + (n - n0) * rows + r * kWidth,
             4 * (n1 - n < kWidth ? n1 - n : kWidth));
}

}  // namespace
}  // namespace quantlab
