// Integer products of a few rows of activations by one strip of the weight.
#pragma once

#include "decode.h"
#include "ints.h"

namespace quantlab {
namespace {

template <int R>
QL_INLINE void begin(I (&sum)[R][4], const int32_t* out, bool more) {
  if (more)
    each<R * 4>([&](auto i) QL_NOW {
      sum[i / 4][i % 4] = load(out + i * kWidth / 4);
    });
  else
    each<R * 4>([&](auto i) QL_NOW { sum[i / 4][i % 4] = zeros(); });
}

// R rows of activations by decoded words; no call in here, or the compiler
// spills the sums.
template <int R>
QL_INLINE void accumulate(I (&sum)[R][4], const uint8_t* w, int64_t words,
                          const int32_t* x, int64_t stride, Ahead& ahead) {
  Ahead fetch = ahead;
  for (int64_t i = 0; i < words; ++i, w += 4 * kWidth) {
    if (i & 1) fetch.fetch();
    I v[4];
    each<4>([&](auto j) QL_NOW { v[j] = load(w + j * kWidth); });
    each<R>([&](auto r) QL_NOW {
      const X a = spread(x[r * stride + i]);
      each<4>([&](auto j) QL_NOW { sum[r][j] = dot(sum[r][j], v[j], a); });
    });
  }
  ahead = fetch;
}

// The same from rows of codes, which are kept decoded at `out` for the tiles
// that follow: shuffles and memory wait behind the products.
template <int R, int P>
QL_INLINE void decode_accumulate(I (&sum)[R][4], const Codes& c, uint8_t* out,
                                 const int32_t* x, int64_t stride,
                                 Ahead& ahead) {
  const I flip = bytes(c.flip & ((1 << (8 / P)) - 1));
  const int64_t codes_stride = c.stride;
  const uint8_t* p = c.p;
  Ahead fetch = ahead;
  for (int64_t rows = c.rows; rows > 0; rows -= 4, p += 4 * codes_stride) {
    I u[4];
    interleave(p, codes_stride, rows, u);
    fetch.fetch();
    each<P>([&](auto q) QL_NOW {
      I v[4];
      each<4>([&](auto j) QL_NOW {
        v[j] = plane<P, false>(u[j], q, flip, flip);
        store(out + j * kWidth, v[j]);
      });
      each<R>([&](auto r) QL_NOW {
        const X a = spread(x[r * stride + q]);
        each<4>([&](auto j) QL_NOW { sum[r][j] = dot(sum[r][j], v[j], a); });
      });
      out += 4 * kWidth;
    });
    x += P;
  }
  ahead = fetch;
}

template <int R>
QL_INLINE void keep(const I (&sum)[R][4], int32_t* out) {
  each<R * 4>([&](auto i) QL_NOW {
    store(out + i * kWidth / 4, sum[i / 4][i % 4]);
  });
}

template <int R>
__attribute__((noinline)) void tile(const uint8_t* w, int64_t words,
                                    const int32_t* x, int64_t stride,
                                    int32_t* out, bool more, Ahead& ahead) {
  I sum[R][4];
  begin<R>(sum, out, more);
  accumulate<R>(sum, w, words, x, stride, ahead);
  keep<R>(sum, out);
}

// Where the last sums of a group go: y (+)= scale (sum - zero x_sum).
struct Onto {
  const int32_t* x_sums;  // of the rows, `groups` apart
  int64_t groups;
  int offset;
  const I *zero, *scale;
  float* y;
  bool first;
};

template <int R, bool kZero>
QL_INLINE void add_onto(const I (&sum)[R][4], const Onto& to) {
  each<R>([&](auto r) QL_NOW {
    const int32_t x_sum = to.x_sums[r * to.groups];
    const I by = ::words(kZero ? x_sum : times(to.offset, x_sum));
    each<4>([&](auto j) QL_NOW {
      float* const y = to.y + r * kWidth + j * kWidth / 4;
      const F f = floats(sub(sum[r][j], kZero ? mul(to.zero[j], by) : by));
      const F scale = cast_f(to.scale[j]);
      store_f(y, to.first ? mul_f(f, scale) : fma_f(f, scale, load_f(y)));
    });
  });
}

template <int R, bool kZero>
__attribute__((noinline)) void tile_onto(const uint8_t* w, int64_t words,
                                         const int32_t* x, int64_t stride,
                                         const int32_t* sums, bool more,
                                         Ahead& ahead, const Onto& to) {
  I sum[R][4];
  begin<R>(sum, sums, more);
  accumulate<R>(sum, w, words, x, stride, ahead);
  add_onto<R, kZero>(sum, to);
}

// The first of several tiles. `to` is null where the sums stay integers.
template <int P>
__attribute__((noinline)) void first_tile(const Codes& c, uint8_t* decoded,
                                          const int32_t* x, int64_t stride,
                                          int32_t* sums, bool more,
                                          Ahead& ahead, const Onto* to) {
  I sum[kTile][4];
  begin<kTile>(sum, sums, more);
  decode_accumulate<kTile, P>(sum, c, decoded, x, stride, ahead);
  if (to == nullptr)
    keep<kTile>(sum, sums);
  else if (to->zero != nullptr)
    add_onto<kTile, true>(sum, *to);
  else
    add_onto<kTile, false>(sum, *to);
}
using FirstTile = void (*)(const Codes&, uint8_t*, const int32_t*, int64_t,
                           int32_t*, bool, Ahead&, const Onto*);

using Tile = void (*)(const uint8_t*, int64_t, const int32_t*, int64_t,
                      int32_t*, bool, Ahead&);
using Decode = void (*)(Codes, Ahead&, uint8_t*);

template <int R>
constexpr Tile tile_or_last = tile<(R <= kTile ? R : kTile)>;
constexpr Tile kTiles[] = {tile_or_last<1>, tile_or_last<2>, tile_or_last<3>,
                           tile_or_last<4>, tile_or_last<5>, tile_or_last<6>};

using TileOnto = void (*)(const uint8_t*, int64_t, const int32_t*, int64_t,
                          const int32_t*, bool, Ahead&, const Onto&);
template <int R, bool Z>
constexpr TileOnto onto_or_last = tile_onto<(R <= kTile ? R : kTile), Z>;
template <bool Z>
constexpr TileOnto kTilesOnto[] = {onto_or_last<1, Z>, onto_or_last<2, Z>,
                                   onto_or_last<3, Z>, onto_or_last<4, Z>,
                                   onto_or_last<5, Z>, onto_or_last<6, Z>};

template <int P>
Decode decode_of(bool table) {
  return table ? decode<P, true> : decode<P, false>;
}

using DecodeStrips = void (*)(Codes, int64_t, uint8_t*, int64_t);
template <int P>
DecodeStrips decode_strips_of(bool table) {
  return table ? decode_strips<P, true> : decode_strips<P, false>;
}
}  // namespace
}  // namespace quantlab
