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

// R rows of activations by words that are decoded, or of 8 bits in panels; no
// call in here, or the compiler spills the sums.
template <int R, bool kPanels>
QL_INLINE void accumulate(I (&sum)[R][4], const uint8_t* w, int64_t words,
                          const int32_t* x, int64_t stride, Ahead& ahead) {
  constexpr int64_t kWord = kPanels ? kPanelWord : 4 * kWidth;
  Ahead fetch = ahead;
  for (int64_t i = 0; i < words; ++i, w += kWord) {
    if (i & 1) fetch.fetch();
    I v[4];
    if constexpr (kPanels)
      read<true>(w, 0, 4, v);
    else
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
template <int R, int P, bool kPanels>
QL_INLINE void decode_accumulate(I (&sum)[R][4], const Codes& c, uint8_t* out,
                                 const int32_t* x, int64_t stride,
                                 Ahead& ahead) {
  const I flip = bytes(c.flip & ((1 << (8 / P)) - 1));
  const int64_t codes_stride = c.stride;
  const uint8_t* p = c.p;
  Ahead fetch = ahead;
  for (int64_t rows = c.rows; rows > 0; rows -= 4, p += 4 * codes_stride) {
    I u[4];
    read<kPanels>(p, codes_stride, rows, u);
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

template <int R, bool kPanels>
__attribute__((noinline)) void tile(const uint8_t* w, int64_t words,
                                    const int32_t* x, int64_t stride,
                                    int32_t* out, bool more, Ahead& ahead) {
  I sum[R][4];
  begin<R>(sum, out, more);
  accumulate<R, kPanels>(sum, w, words, x, stride, ahead);
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

template <int R, bool kPanels, bool kZero>
__attribute__((noinline)) void tile_onto(const uint8_t* w, int64_t words,
                                         const int32_t* x, int64_t stride,
                                         const int32_t* sums, bool more,
                                         Ahead& ahead, const Onto& to) {
  I sum[R][4];
  begin<R>(sum, sums, more);
  accumulate<R, kPanels>(sum, w, words, x, stride, ahead);
  add_onto<R, kZero>(sum, to);
}

// The first of several tiles. `to` is null where the sums stay integers.
template <int P, bool kPanels>
__attribute__((noinline)) void first_tile(const Codes& c, uint8_t* decoded,
                                          const int32_t* x, int64_t stride,
                                          int32_t* sums, bool more,
                                          Ahead& ahead, const Onto* to) {
  I sum[kTile][4];
  begin<kTile>(sum, sums, more);
  decode_accumulate<kTile, P, kPanels>(sum, c, decoded, x, stride, ahead);
  if (to == nullptr)
    keep<kTile>(sum, sums);
  else if (to->zero != nullptr)
    add_onto<kTile, true>(sum, *to);
  else
    add_onto<kTile, false>(sum, *to);
}
using FirstTile = void (*)(const Codes&, uint8_t*, const int32_t*, int64_t,
                           int32_t*, bool, Ahead&, const Onto*);
template <bool kPanels>
FirstTile first_tile_of(int64_t planes) {
  return planes == 1   ? first_tile<1, kPanels>
         : planes == 2 ? first_tile<2, kPanels>
                       : first_tile<4, kPanels>;
}

using Tile = void (*)(const uint8_t*, int64_t, const int32_t*, int64_t,
                      int32_t*, bool, Ahead&);
using Decode = void (*)(Codes, Ahead&, uint8_t*);

template <int R, bool P>
constexpr Tile tile_or_last = tile<(R <= kTile ? R : kTile), P>;
template <bool P>
constexpr Tile kTilesOf[] = {tile_or_last<1, P>, tile_or_last<2, P>,
                             tile_or_last<3, P>, tile_or_last<4, P>,
                             tile_or_last<5, P>, tile_or_last<6, P>};
// The product of so many rows.
inline Tile tile_of(int64_t rows, bool panels) {
  return (panels ? kTilesOf<true> : kTilesOf<false>)[rows - 1];
}

using TileOnto = void (*)(const uint8_t*, int64_t, const int32_t*, int64_t,
                          const int32_t*, bool, Ahead&, const Onto&);
template <int R, bool P, bool Z>
constexpr TileOnto onto_or_last = tile_onto<(R <= kTile ? R : kTile), P, Z>;
template <bool P, bool Z>
constexpr TileOnto kOntoOf[] = {onto_or_last<1, P, Z>, onto_or_last<2, P, Z>,
                                onto_or_last<3, P, Z>, onto_or_last<4, P, Z>,
                                onto_or_last<5, P, Z>, onto_or_last<6, P, Z>};
inline TileOnto onto_of(int64_t rows, bool panels, bool zero) {
  return (panels ? zero ? kOntoOf<true, true> : kOntoOf<true, false>
          : zero ? kOntoOf<false, true>
                 : kOntoOf<false, false>)[rows - 1];
}

template <int P, bool kPanels>
Decode decode_of(bool table) {
  return table ? decode<P, true, kPanels> : decode<P, false, kPanels>;
}
template <bool kPanels>
Decode decode_of(int64_t planes, bool table) {
  return planes == 1   ? decode_of<1, kPanels>(table)
         : planes == 2 ? decode_of<2, kPanels>(table)
                       : decode_of<4, kPanels>(table);
}

using DecodeStrips = void (*)(Codes, int64_t, uint8_t*, int64_t);
template <int P>
DecodeStrips decode_strips_of(bool table) {
  return table ? decode_strips<P, true> : decode_strips<P, false>;
}
}  // namespace
}  // namespace quantlab
