// What both ways of convolving share: padded images, columns, results.
#pragma once

#include <string.h>

#include "conv.h"
#include "ints.h"

namespace quantlab {
namespace {

constexpr int kLanes = kWidth / 4;  // words of one vector

// Of each column of the panel: the sum of its weights, its zero point, scale.
struct Columns {
  Columns(void* p, int64_t lanes)
      : sum(static_cast<int32_t*>(p)),
        zero(sum + lanes),
        scale(reinterpret_cast<float*>(zero + lanes)) {}
  void set(const Conv& a, int64_t lane, int64_t column) const {
    zero[lane] = a.zero ? a.zero[column] : 0;
    scale[lane] = a.scale ? a.scale[column] : 1.0f;
  }
  int32_t* sum;
  int32_t* zero;
  float* scale;
};

// Where sums of some pixels go, and what they are corrected and scaled by.
struct Result {
  const int32_t* start;   // of the columns: what sums begin with
  const int32_t* zero;    // of the columns, or null
  const int32_t* window;  // of the pixels: sums of x, where there is `zero`
  const float* scale;     // of the columns, or null: the sums are stored
  float x_scale;
  char* y;
  int64_t stride;  // bytes from pixel to pixel
};

QL_INLINE char* result_of(const Conv& a) {
  return a.y ? reinterpret_cast<char*>(a.y) : reinterpret_cast<char*>(a.sums);
}

// One vector of sums of pixel r, at `lane` of the columns.
QL_INLINE void finish(const Result& to, int64_t r, int64_t lane, I sum,
                      I window) {
  if (to.zero) sum = sub(sum, mul(load(to.zero + lane), window));
  char* const y = to.y + r * to.stride + 4 * lane;
  if (!to.scale) return store(y, sum);
  const F f = mul_f(floats(sum), load_f(to.scale + lane));
  store_f(y, mul_f(f, spread_f(to.x_scale)));
}

// Codes as unsigned bytes.
QL_INLINE void flip(const int8_t* x, int64_t count, uint8_t* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    store(out + i, xor_(load(x + i), bytes(0x80)));
  for (; i < count; ++i) out[i] = static_cast<uint8_t>(x[i] ^ 0x80);
}

// From one padded row to its phases: column p to column p / phases of its own.
// Pixels are copied whole vectors at a time, each over what is too much of the
// one before; there is room past the last.
inline void split(const Conv& a, const ConvPlan& plan, const uint8_t* row,
                  uint8_t* out) {
  for (int64_t p = 0; p < plan.phases; ++p)
    for (int64_t i = 0; i < plan.pixels; ++i, out += a.channels) {
      const uint8_t* from = row + (i * plan.phases + p) * a.channels;
      for (int64_t c = 0; c < a.channels; c += 16)
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(out + c),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c)));
    }
}

QL_INLINE int64_t rows_read(const Conv& a, int64_t outputs) {
  return (outputs - 1) * a.stride_h + (a.kh - 1) * a.dilation_h + 1;
}

// The rows of x that rows [o0, o1) of the output read, padded.
inline void pad(const Conv& a, const ConvPlan& plan, int64_t image, int64_t o0,
                int64_t o1, uint8_t* out, uint8_t* whole) {
  const int fill = 0x80 + (a.x_zero ? a.x_zero[image] : 0);
  const int64_t width = plan.pixels * plan.phases, c = a.channels;
  const int64_t left = min_(max_(a.left, 0), width), skip = max_(-a.left, 0);
  const int64_t some = max_(min_(a.width - skip, width - left), 0);
  const int64_t first = o0 * a.stride_h - a.top;
  for (int64_t r = 0; r < rows_read(a, o1 - o0); ++r, out += plan.row) {
    const int64_t y = first + r;
    if (y < 0 || y >= a.height) {
      memset(out, fill, plan.row);
      continue;
    }
    uint8_t* const to = plan.phases > 1 ? whole : out;
    const int8_t* x = a.x + ((image * a.height + y) * a.width + skip) * c;
    memset(to, fill, left * c);
    if (some > 0) flip(x, some * c, to + left * c);
    memset(to + (left + some) * c, fill, (width - left - some) * c);
    if (plan.phases > 1) split(a, plan, whole, out);
  }
}

// What sums begin with: 128 and the zero point of x, taken out of all codes.
inline void begin_columns(const Columns& by, int64_t lanes, int32_t offset,
                          int32_t* start) {
  for (int64_t i = 0; i < lanes; i += kLanes)
    store(start + i, mul(load(by.sum + i), words(-offset)));
}

}  // namespace
}  // namespace quantlab
