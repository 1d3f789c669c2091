// From rows of codes to vectors of unsigned bytes [columns][4 along k].
//
// Signed codes of b bits become unsigned by flipping their top bit, which adds
// 2^(b-1); entries of a table are kept plus 128. The product takes it back.
#pragma once

#include <string.h>

#include "product.h"
#include "vec.h"

namespace {

// Rows of bytes may be packed ahead, into panels of 64 columns: words of four
// rows each, as `interleave` makes them of vectors of 64 bytes (those of 32 are
// their halves), so that memory is read in one run. Signed codes of 8 bits have
// their top bits flipped there, and need no decoding. Rows and columns are
// filled up; groups are of whole words.
constexpr int64_t kPanelWord = 4 * quantlab::kPanelColumns;
constexpr int64_t kPanelAhead = 3072;  // bytes fetched ahead of their use

// Rows of bytes of one strip, and what the codes mean.
struct Codes {
  const uint8_t* p;
  int64_t stride;
  int64_t rows;
  int flip;
  const uint8_t* table;
};

// Addresses to fetch ahead of their use, row by row: memory likes long runs,
// the product walks columns of one line each.
struct Ahead {
  const uint8_t* p = nullptr;
  int64_t stride = 0, lines = 0, left = 0, rows = 0;

  QL_INLINE_MEMBER void fetch() {
    if (rows <= 0) return;
    for (int i = 0; i < 4; ++i)
      __builtin_prefetch(p + 64 * (lines - left + i), 0, 2);
    left -= 4;
    if (left <= 0) {
      left = lines;
      p += stride;
      --rows;
    }
  }
};

// Four rows of one strip, interleaved. Rows past the last repeat it: the
// activations there are zero.
QL_INLINE void interleave(const uint8_t* p, int64_t stride, int64_t rows,
                          I (&v)[4]) {
  const uint8_t* p1 = p + (rows > 1 ? stride : 0);
  const uint8_t* p2 = p1 + (rows > 2 ? stride : 0);
  const uint8_t* p3 = p2 + (rows > 3 ? stride : 0);
  I a = load(p), b = load(p1), c = load(p2), d = load(p3);
  I ab = low8(a, b), cd = low8(c, d);
  v[0] = low16(ab, cd), v[1] = high16(ab, cd);
  ab = high8(a, b), cd = high8(c, d);
  v[2] = low16(ab, cd), v[3] = high16(ab, cd);
}

// Four rows of one strip: interleaved, or a word of a panel, in which what
// follows is fetched.
template <bool kPanels>
QL_INLINE void read(const uint8_t* p, int64_t stride, int64_t rows, I (&v)[4]) {
  if constexpr (!kPanels) return interleave(p, stride, rows, v);
  each<4>([&](auto j) QL_NOW { v[j] = load(p + kPanelWord / 4 * j); });
  for (int j = 0; j < 4; ++j)
    __builtin_prefetch(p + kPanelAhead + kPanelWord / 4 * j, 0, 2);
}

// Plane p of P codes to a byte.
template <int P, bool kTable>
QL_INLINE I plane(I v, int p, I flip, I table) {
  constexpr int kBits = 8 / P;
  if (p > 0) v = right(v, kBits * p);
  if (kTable) return look_up(table, P > 1 ? and_(v, bytes((1 << kBits) - 1)) : v);
  return pick(v, bytes((1 << kBits) - 1), flip);
}

// Writes the planes of all rows, step by step, to `out`.
template <int P, bool kTable, bool kPanels>
__attribute__((noinline)) void decode(Codes c, Ahead& ahead, uint8_t* out) {
  const I flip = bytes(c.flip & ((1 << (8 / P)) - 1));
  const I table = kTable ? table16(c.table) : zeros();
  Ahead fetch = ahead;
  for (; c.rows > 0; c.rows -= 4, c.p += 4 * c.stride) {
    I v[4];
    read<kPanels>(c.p, c.stride, c.rows, v);
    fetch.fetch();
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < 4; ++j, out += kWidth)
        store(out, plane<P, kTable>(v[j], p, flip, table));
  }
  ahead = fetch;
}

// The same of several strips, row by row: memory is fastest in long runs. Each
// strip is written `apart` bytes behind the one before.
template <int P, bool kTable>
__attribute__((noinline)) void decode_strips(Codes c, int64_t strips,
                                             uint8_t* out, int64_t apart) {
  const I flip = bytes(c.flip & ((1 << (8 / P)) - 1));
  const I table = kTable ? table16(c.table) : zeros();
  for (; c.rows > 0; c.rows -= 4, c.p += 4 * c.stride, out += 4 * P * kWidth) {
    uint8_t* to = out;
    for (int64_t i = 0; i < strips; ++i, to += apart) {
      I v[4];
      interleave(c.p + i * kWidth, c.stride, c.rows, v);
      each<P>([&](auto p) QL_NOW {
        each<4>([&](auto j) QL_NOW {
          store(to + (4 * p + j) * kWidth,
                plane<P, kTable>(v[j], p, flip, table));
        });
      });
    }
  }
}

// Unpacks `rows` codes of a width that straddles bytes, from the unit of eight
// codes at p on, to one byte each.
inline void unpack(const uint8_t* p, int64_t stride, int bits, int64_t skip,
                   int64_t rows, uint8_t* out) {
  const int mask = (1 << bits) - 1;
  for (int64_t k = skip; k < skip + rows; ++k, out += kWidth) {
    const int64_t bit = k % 8 * bits;
    const int shift = bit % 8;
    const uint8_t* q = p + (k / 8 * bits + bit / 8) * stride;
    I v = and_(right(load(q), shift), bytes((255 >> shift) & mask));
    if (shift + bits > 8)
      v = or_(v, and_(left(load(q + stride), 8 - shift),
                      bytes((255 << (8 - shift)) & mask)));
    store(out, v);
  }
}

// The rows of bytes of one strip: in place, or copied where it is narrow, and
// unpacked where codes straddle bytes (`row` and `count` are of codes then).
inline Codes rows_of_codes(const uint8_t* codes, int64_t stride, int bits,
                           bool straddle, int64_t row, int64_t count, int64_t n,
                           int64_t columns, uint8_t* copied,
                           uint8_t* unpacked) {
  const int64_t unit = straddle ? row / 8 : 0;
  const int64_t first = straddle ? unit * bits : row;
  const int64_t size =
      straddle ? ((row + count + 7) / 8 - unit) * bits : count;
  Codes c{codes + first * stride + n, stride, count, 0, nullptr};
  if (columns < kWidth) {
    for (int64_t r = 0; r < size; ++r) {
      memcpy(copied + r * kWidth, c.p + r * stride, columns);
      memset(copied + r * kWidth + columns, 0, kWidth - columns);
    }
    c.p = copied, c.stride = kWidth;
  }
  if (straddle) {
    unpack(c.p, c.stride, bits, row - 8 * unit, count, unpacked);
    c.p = unpacked, c.stride = kWidth;
  }
  return c;
}

}  // namespace
