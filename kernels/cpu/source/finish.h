// From integer sums of a strip to the product: corrected, scaled, in order.
#pragma once

#include <string.h>

#include "product.h"
#include "tiles.h"

namespace quantlab {
namespace {

// The rows of bytes that hold the codes of a group.
struct Group {
  int64_t k0, k1, row0, rows;  // rows of bytes, or of unpacked codes
};

QL_INLINE Group group_at(const Product& a, const Plan& plan, int64_t g) {
  Group r;
  r.k0 = g * a.group;
  r.k1 = min_(r.k0 + a.group, a.k);
  r.row0 = r.k0 / plan.planes;
  r.rows = ceil_div(r.k1, plan.planes) - r.row0;
  return r;
}

// What unsigned bytes are more than the values they stand for.
QL_INLINE int offset_of(const Product& a) {
  return a.table ? 128 : a.is_signed ? 1 << (a.bits - 1) : 0;
}

// Whether the product takes the codes as they lie.
QL_INLINE bool is_ready(const Product& a) { return a.panels && a.bits == 8; }

// The bits to flip in a byte of signed codes.
QL_INLINE int flip_of(const Product& a, const Plan& plan) {
  const int bits = static_cast<int>(a.bits);
  return a.table || !a.is_signed || is_ready(a) ? 0
         : plan.unpack           ? 1 << (bits - 1)
         : bits == 8             ? 0x80
         : bits == 4             ? 0x88
                                 : 0xAA;
}

inline void table_of(const Product& a, uint8_t (&table)[16]) {
  for (int i = 0; a.table && i < 16; ++i)
    table[i] = static_cast<uint8_t>(a.table[i & ((1 << a.bits) - 1)] + 128);
}

// The rows of bytes, or of unpacked codes, of one strip; see decode.h.
inline Codes codes_at(const Product& a, const Plan& plan, int64_t row,
                      int64_t count, int64_t n, int64_t columns,
                      uint8_t* copied, uint8_t* unpacked) {
  if (a.panels) {
    const uint8_t* const panel =
        a.codes + n / kPanelColumns * kPanelColumns * a.code_rows;
    return {panel + row * kPanelColumns + n % kPanelColumns, kPanelColumns,
            count, flip_of(a, plan), nullptr};
  }
  Codes c = rows_of_codes(a.codes, a.n, static_cast<int>(a.bits), plan.unpack,
                          row, count, n, columns, copied, unpacked);
  c.flip = flip_of(a, plan);
  return c;
}

// A group's sums are y as they are, times one scale a column.
QL_INLINE bool is_simple(const Product& a) {
  return a.scale && a.y && !a.x_zero && !(a.x_scale && a.x_scales > 1);
}

// Words of the columns of a strip, in the order of the lanes.
QL_INLINE void lanes_of(const void* p, int64_t columns, I (&v)[4]) {
  alignas(64) int32_t padded[kWidth];
  if (columns < kWidth) {
    memset(padded, 0, sizeof padded);
    memcpy(padded, p, 4 * columns);
    p = padded;
  }
  for (int j = 0; j < 4; ++j)
    v[j] = load(static_cast<const int32_t*>(p) + j * kWidth / 4);
  to_lanes(v);
}

// What a group's columns are corrected and scaled by.
struct Columns {
  int offset;
  I zero[4], scale[4];
};

inline Columns columns_of(const Product& a, int64_t g, int64_t n,
                          int64_t columns) {
  Columns c{};
  c.offset = offset_of(a);
  if (a.scale) lanes_of(a.scale + g * a.n + n, columns, c.scale);
  if (!a.zero) return c;
  lanes_of(a.zero + g * a.n + n, columns, c.zero);
  for (int j = 0; j < 4; ++j) c.zero[j] = add(c.zero[j], words(c.offset));
  return c;
}

// Sums of rows [r0, r1) of one group, corrected and scaled, onto y.
inline void scale_onto(const Product& a, const int32_t* x_sums, int64_t g,
                       const Columns& by, int64_t r0, int64_t r1, bool first,
                       const int32_t* ones, const int32_t* in, float* out) {
  const bool apart = a.x_scale && a.x_scales > 1;
  for (int64_t r = r0; r < r1; ++r, in += kWidth, out += kWidth) {
    const int32_t x_sum = x_sums[r * a.groups + g];
    const int32_t z =
        a.x_zero ? a.x_zero[r * a.x_zeros + (a.x_zeros > 1 ? g : 0)] : 0;
    const F s = spread_f(apart ? a.x_scale[r * a.x_scales + g] : 1.0f);
    each<4>([&](auto j) QL_NOW {
      I v = load(in + j * kWidth / 4);
      if (a.zero)
        v = sub(v, mul(by.zero[j], words(x_sum)));
      else
        v = sub(v, words(times(by.offset, x_sum)));
      if (a.x_zero) v = sub(v, mul(words(z), load(ones + j * kWidth / 4)));
      float* const o = out + j * kWidth / 4;
      if (a.sums) return store(o, v);
      F f = floats(v);
      if (apart && a.scale) f = mul_f(f, cast_f(by.scale[j]));
      const F t = apart || !a.scale ? s : cast_f(by.scale[j]);
      store_f(o, first ? mul_f(f, t) : fma_f(f, t, load_f(o)));
    });
  }
}

// Rows [r0, r1) of a finished strip, in the order of its columns.
inline void write(const Product& a, int64_t n, int64_t columns, int64_t r0,
                  int64_t r1, const float* in) {
  float* const y = a.sums ? reinterpret_cast<float*>(a.sums) : a.y;
  alignas(64) float padded[kWidth];
  const bool shared = a.x_scale && a.x_scales == 1;
  for (int64_t r = r0; r < r1; ++r, in += kWidth) {
    I v[4];
    for (int j = 0; j < 4; ++j) v[j] = load(in + j * kWidth / 4);
    from_lanes(v);
    float* out = y + r * a.n + n;
    float* const o = columns < kWidth ? padded : out;
    const F s = spread_f(shared ? a.x_scale[r] : 1.0f);
    for (int j = 0; j < 4; ++j) {
      if (shared)
        store_f(o + j * kWidth / 4, mul_f(cast_f(v[j]), s));
      else
        store(o + j * kWidth / 4, v[j]);
    }
    if (o == padded) memcpy(out, padded, 4 * columns);
  }
}

}  // namespace
}  // namespace quantlab
