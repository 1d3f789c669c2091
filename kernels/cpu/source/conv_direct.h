// Windows of pixels times strips of the kernel.
#pragma once

#include "conv_parts.h"

namespace quantlab {
namespace {

constexpr int kUnit = 16;  // columns, of four bytes along a run
constexpr int kUnitBytes = 4 * kUnit;
constexpr int kVectors = kUnitBytes / kWidth;  // of one unit
constexpr int kUnits = kWidth == 64 ? 4 : kTile == 3 ? 2 : 1;  // of one strip
constexpr int kPixels = 8;  // of one tile, at most
template <int U>
constexpr int kMost =
    4 * kTile / (U * kVectors) < kPixels ? 4 * kTile / (U * kVectors) : kPixels;

// The windows of pixels of one row, and a strip.
struct Windows {
  const uint8_t* x;
  int64_t step;  // bytes from one pixel to the next
  int64_t rows, row, runs, run, quads;
  const int8_t* w;
};

// R pixels by V vectors of columns; no call in here, or the compiler spills.
template <int R, int V>
__attribute__((noinline)) void convolve_tile(const Windows& a,
                                             const Result& to) {
  I sum[R][V];
  each<V>([&](auto j) QL_NOW {
    const I start = load(to.start + j * kLanes);
    each<R>([&](auto r) QL_NOW { sum[r][j] = start; });
  });
  const int8_t* w = a.w;
  const int64_t step = a.step;
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.runs; ++j) {
      const uint8_t* p = a.x + i * a.row + j * a.run;
      for (int64_t q = 0; q < a.quads; ++q, p += 4, w += V * kWidth) {
        X v[V];
        each<V>([&](auto j) QL_NOW {
          v[j] = signed_bytes(load(w + j * kWidth));
        });
        // Three pixels to a base: as many as an address can name.
        const uint8_t* const base[] = {p, p + 3 * step, p + 6 * step};
        each<R>([&](auto r) QL_NOW {
          int32_t four;
          memcpy(&four, base[r / 3] + r % 3 * step, 4);
          const I x = words(four);
          each<V>([&](auto j) QL_NOW { sum[r][j] = dot(sum[r][j], x, v[j]); });
        });
      }
    }
  }
  each<R>([&](auto r) QL_NOW {
    const I window = to.zero ? words(to.window[r]) : zeros();
    each<V>([&](auto j) QL_NOW {
      finish(to, r, j * kLanes, sum[r][j], window);
    });
  });
}

using ConvTile = void (*)(const Windows&, const Result&);
template <int U, int R>
constexpr ConvTile conv_or_last =
    convolve_tile<(R < kMost<U> ? R : kMost<U>), U * kVectors>;
template <int U>
constexpr ConvTile kConvTiles[] = {
    conv_or_last<U, 1>, conv_or_last<U, 2>, conv_or_last<U, 3>,
    conv_or_last<U, 4>, conv_or_last<U, 5>, conv_or_last<U, 6>,
    conv_or_last<U, 7>, conv_or_last<U, 8>};

// U units, or as many as a strip has.
template <int U>
constexpr int kAtMost = U < kUnits ? U : kUnits;
QL_INLINE ConvTile tile_of(int64_t units, int64_t pixels) {
  return units == 4   ? kConvTiles<kAtMost<4>>[pixels - 1]
         : units == 2 ? kConvTiles<kAtMost<2>>[pixels - 1]
                      : kConvTiles<1>[pixels - 1];
}
QL_INLINE int64_t most_of(int64_t units) {
  return units == 4   ? kMost<kAtMost<4>>
         : units == 2 ? kMost<kAtMost<2>>
                      : kMost<1>;
}

// The strips of a group's columns: as many as there are units of the widest,
// then what is left in narrower ones.
struct Strip {
  int64_t group, unit, units;  // the first unit, of all groups; how many
  int64_t column, columns;     // within the group
};

QL_INLINE int64_t strips_of(int64_t units) {
  const int64_t rest = units % kUnits;
  return units / kUnits + (rest & 1) + (rest >> 1);
}

QL_INLINE Strip strip_at(const Conv& a, const ConvPlan& plan, int64_t i) {
  const int64_t each = strips_of(plan.units), whole = plan.units / kUnits;
  Strip s;
  s.group = i / each, i %= each;
  int64_t unit = min_(i, whole) * kUnits;
  s.units = kUnits;
  if (i >= whole) {
    const int64_t rest = plan.units - unit;
    s.units = rest > 1 && i == whole ? 2 : 1;
    if (i > whole) unit += 2;
  }
  s.unit = s.group * plan.units + unit;
  s.column = unit * kUnit;
  s.columns = min_(s.units * kUnit, a.n / a.groups - s.column);
  return s;
}

QL_INLINE int64_t words_of(const Conv& a, const ConvPlan& plan) {
  return a.kh * plan.runs * plan.quads;
}

inline void plan_direct(const Conv& a, ConvPlan& p) {
  const int64_t ci = a.channels / a.groups;
  const bool together = a.groups == 1 && a.dilation_w == 1;
  p.runs = together ? 1 : a.kw;
  p.quads = ceil_div(together ? a.kw * ci : ci, 4);
  p.units = ceil_div(a.n / a.groups, kUnit);
  p.strips = a.groups * strips_of(p.units);
  p.lanes = a.groups * p.units * kUnit;
  p.phases = 1;
  p.pixels = (a.out_w - 1) * a.stride_w + (a.kw - 1) * a.dilation_w + 1;
  // One unit more, of ones: it sums windows where w has zero points.
  p.panel_bytes = (a.groups * p.units + 1) * words_of(a, p) * kUnitBytes;
}

// Four rows of 16 columns to [16 columns][4 rows].
QL_INLINE void interleave16(const int8_t* const (&row)[4], int8_t* out) {
  __m128i v[4];
  for (int i = 0; i < 4; ++i)
    v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i]));
  const __m128i ab = _mm_unpacklo_epi8(v[0], v[1]);
  const __m128i cd = _mm_unpacklo_epi8(v[2], v[3]);
  const __m128i AB = _mm_unpackhi_epi8(v[0], v[1]);
  const __m128i CD = _mm_unpackhi_epi8(v[2], v[3]);
  __m128i* const to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_unpacklo_epi16(ab, cd));
  _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(ab, cd));
  _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(AB, CD));
  _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(AB, CD));
}

// f(k, four of them, of how many): the words of a window, in order; k is the
// row of w of the first of its bytes, those past the last are padding.
template <typename Each>
QL_INLINE void each_word(const Conv& a, const ConvPlan& plan, const Each& f) {
  const int64_t ci = a.channels / a.groups;
  const int64_t bytes = plan.runs == 1 ? a.kw * ci : ci;
  for (int64_t i = 0; i < a.kh * plan.runs; ++i)
    for (int64_t q = 0; q < plan.quads; ++q)
      f(i * bytes + 4 * q, min_(bytes - 4 * q, 4));
}

inline void pack_direct(const Conv& a, const ConvPlan& plan, int64_t i,
                        int8_t* panel, const Columns& by) {
  const Strip s = strip_at(a, plan, i);
  const int64_t words = words_of(a, plan), n = a.n;
  const int64_t first = s.group * (n / a.groups) + s.column;
  int8_t* const strip = panel + s.unit * words * kUnitBytes;
  int8_t* out = strip;
  each_word(a, plan, [&](int64_t k, int64_t count) QL_NOW {
    for (int64_t u = 0; u < s.units; ++u, out += kUnitBytes) {
      alignas(16) int8_t padded[4][kUnit] = {};
      const int64_t columns = min_(s.columns - u * kUnit, kUnit);
      const int8_t* row[4];
      for (int r = 0; r < 4; ++r) {
        const int8_t* w = a.w + (k + r) * n + first + u * kUnit;
        if (r < count && columns < kUnit) memcpy(padded[r], w, columns);
        row[r] = r < count && columns == kUnit ? w : padded[r];
      }
      interleave16(row, out);
    }
  });
  const int64_t lane = s.unit * kUnit;
  for (int64_t v = 0; v < s.units * kVectors; ++v) {
    I sum = zeros();
    for (int64_t k = 0; k < words; ++k) {
      const int8_t* w = strip + k * s.units * kUnitBytes + v * kWidth;
      sum = dot(sum, bytes(1), signed_bytes(load(w)));
    }
    store(by.sum + lane + v * kLanes, sum);
  }
  for (int64_t c = 0; c < s.units * kUnit; ++c)
    by.set(a, lane + c, first + min_(c, s.columns - 1));
  if (i != 0 || !a.zero) return;
  int8_t* ones = panel + a.groups * plan.units * words * kUnitBytes;
  each_word(a, plan, [&](int64_t, int64_t count) QL_NOW {
    for (int64_t b = 0; b < kUnitBytes; ++b) *ones++ = b % 4 < count;
  });
}

// What a task keeps: what sums begin with, and results of a narrow strip.
constexpr int64_t kNarrow = 4 * kPixels * kUnits * kUnit;

inline int64_t direct_bytes(const ConvPlan& plan) {
  return 4 * plan.lanes + kNarrow + 64;
}

struct DirectTask {
  const Conv& a;
  const ConvPlan& plan;
  const int8_t* panel;
  Columns by;
  const uint8_t* x;  // padded rows, from that of output row o0 on
  int64_t image, o0, o1;
  int32_t* start;
  char* narrow;

  // Sums of (x - x_zero) over the windows of some pixels.
  void sum_windows(Windows at, int64_t pixels, int32_t offset,
                   int32_t (&out)[kPixels]) const {
    const int32_t none[kUnit] = {};
    int32_t sums[kPixels * kUnit];
    at.w = panel + a.groups * plan.units * words_of(a, plan) * kUnitBytes;
    const Result to{none, nullptr, nullptr, nullptr, 0,
                    reinterpret_cast<char*>(sums), kUnitBytes};
    const int64_t taps = a.kh * a.kw * (a.channels / a.groups);
    tile_of(1, pixels)(at, to);
    for (int64_t r = 0; r < pixels; ++r)
      out[r] = minus(sums[r * kUnit],
                     times(static_cast<int32_t>(taps), offset));
  }

  void run(int32_t offset) {
    begin_columns(by, plan.lanes, offset, start);
    for (int64_t i = 0; i < plan.strips; ++i)
      strip(strip_at(a, plan, i), offset);
  }

  void strip(const Strip& s, int32_t offset) {
    const int64_t n = a.n / a.groups, step = a.stride_w * a.channels;
    const int64_t tiles = ceil_div(a.out_w, most_of(s.units));
    const int64_t pixels = ceil_div(a.out_w, tiles);
    const bool partial = s.columns < s.units * kUnit;
    const ConvTile tile = tile_of(s.units, pixels);
    const int64_t lane = s.unit * kUnit;
    char* const y = result_of(a);
    int32_t windows[kPixels];
    for (int64_t o = o0; o < o1; ++o) {
      const uint8_t* row = x + (o - o0) * a.stride_h * plan.row +
                           s.group * (a.channels / a.groups);
      // The last tile begins within the one before it.
      for (int64_t p = 0; p < a.out_w; p += pixels) {
        const int64_t first = min_(p, a.out_w - pixels);
        const Windows at{row + first * step,
                         step,
                         a.kh,
                         a.dilation_h * plan.row,
                         plan.runs,
                         a.dilation_w * a.channels,
                         plan.quads,
                         panel + s.unit * words_of(a, plan) * kUnitBytes};
        if (a.zero) sum_windows(at, pixels, offset, windows);
        char* const out =
            y + 4 * (((image * a.out_h + o) * a.out_w + first) * a.n +
                     s.group * n + s.column);
        const Result to{start + lane,
                        a.zero ? by.zero + lane : nullptr,
                        windows,
                        a.y ? by.scale + lane : nullptr,
                        a.x_scale ? a.x_scale[image] : 1.0f,
                        partial ? narrow : out,
                        4 * (partial ? s.units * kUnit : a.n)};
        tile(at, to);
        for (int64_t r = 0; partial && r < pixels; ++r)
          memcpy(out + 4 * r * a.n, narrow + r * to.stride, 4 * s.columns);
      }
    }
  }
};

}  // namespace
}  // namespace quantlab
