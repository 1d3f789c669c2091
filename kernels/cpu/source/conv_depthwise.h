// Convolutions of each channel by a kernel of its own.
#pragma once

#include "conv_parts.h"

namespace quantlab {
namespace {

inline void plan_depthwise(const Conv& a, ConvPlan& p) {
  const int64_t c = a.channels;
  // With few channels several pixels fill a vector: the lanes of the kernel
  // repeat after the least common multiple.
  p.span = c;
  while (c < kWidth && p.span % kWidth) p.span += c;
  p.strips = ceil_div(p.span, kWidth);
  p.lanes = p.strips * kWidth;
  p.taps = round_up(a.kh * a.kw, 4);
  p.phases = a.stride_w;
  p.pixels = a.out_w + (a.kw - 1) * a.dilation_w / a.stride_w;
  p.panel_bytes = p.lanes * p.taps;
}

// The first lane of strip i: the last of many channels begins within the one
// before it.
QL_INLINE int64_t lane_at(const ConvPlan& plan, int64_t i) {
  return plan.span < kWidth ? 0 : min_(i * kWidth, plan.span - kWidth);
}

// Four vectors to [lanes][4], in the order of to_lanes.
QL_INLINE void interleave4(const uint8_t* p0, const uint8_t* p1,
                           const uint8_t* p2, const uint8_t* p3, I (&v)[4]) {
  const I a = load(p0), b = load(p1), c = load(p2), d = load(p3);
  I ab = low8(a, b), cd = low8(c, d);
  v[0] = low16(ab, cd), v[1] = high16(ab, cd);
  ab = high8(a, b), cd = high8(c, d);
  v[2] = low16(ab, cd), v[3] = high16(ab, cd);
}

inline void pack_depthwise(const Conv& a, const ConvPlan& plan, int64_t i,
                           int8_t* panel, const Columns& by) {
  const int64_t c = a.channels, first = lane_at(plan, i);
  const int64_t many = a.kh * a.kw;
  int8_t* out = panel + i * kWidth * plan.taps;
  I sum[4] = {zeros(), zeros(), zeros(), zeros()};
  for (int64_t t = 0; t < plan.taps; t += 4) {
    alignas(64) uint8_t rows[4][kWidth] = {};
    for (int64_t r = 0; r < 4 && t + r < many; ++r)
      for (int64_t j = 0, at = first % c; j < kWidth; ++j) {
        rows[r][j] = static_cast<uint8_t>(a.w[(t + r) * c + at]);
        if (++at == c) at = 0;
      }
    I v[4];
    interleave4(rows[0], rows[1], rows[2], rows[3], v);
    for (int j = 0; j < 4; ++j, out += kWidth) {
      store(out, v[j]);
      sum[j] = dot(sum[j], bytes(1), signed_bytes(v[j]));
    }
  }
  from_lanes(sum);
  for (int j = 0; j < 4; ++j) store(by.sum + i * kWidth + j * kLanes, sum[j]);
  for (int64_t j = 0; j < kWidth; ++j)
    by.set(a, i * kWidth + j, (first + j) % c);
}

// The lanes of one row of the output.
template <bool kZero>
__attribute__((noinline)) void convolve_lanes(
    const Conv& a, const ConvPlan& plan, const uint8_t* x,
    const int64_t* offset, const int8_t* panel, int32_t taken,
    const int32_t* start, const Columns& by, float x_scale, char* y) {
  const int64_t lanes = a.out_w * a.channels, taps = a.kh * a.kw;
  for (int64_t base = 0; base < lanes; base += plan.span)
    for (int64_t i = 0; i < plan.strips; ++i) {
      const int64_t at = base + lane_at(plan, i);
      if (at >= lanes) break;
      const int8_t* w = panel + i * kWidth * plan.taps;
      const uint8_t* const p = x + at;
      I sum[4] = {zeros(), zeros(), zeros(), zeros()};
      I window[4] = {zeros(), zeros(), zeros(), zeros()};
      for (int64_t t = 0; t < plan.taps; t += 4, w += 4 * kWidth) {
        I v[4];
        const int64_t* const o = offset + t;
        interleave4(p + o[0], p + o[1], p + o[2], p + o[3], v);
        each<4>([&](auto j) QL_NOW {
          sum[j] = dot(sum[j], v[j], signed_bytes(load(w + j * kWidth)));
        });
        if (!kZero) continue;
        const int64_t left = taps - t;
        const int absent = left < 4 ? static_cast<int>(4 - left) : 0;
        const X one = spread(0x01010101 >> 8 * absent);
        each<4>([&](auto j) QL_NOW { window[j] = dot(window[j], v[j], one); });
      }
      from_lanes(sum);
      if (kZero) from_lanes(window);
      const bool partial = lanes - at < kWidth;
      alignas(64) char padded[4 * kWidth];
      const Result to{nullptr,
                      kZero ? by.zero + i * kWidth : nullptr,
                      nullptr,
                      a.y ? by.scale + i * kWidth : nullptr,
                      x_scale,
                      partial ? padded : y + 4 * at,
                      0};
      const int32_t* const from = start + i * kWidth;
      each<4>([&](auto j) QL_NOW {
        const I all = kZero ? sub(window[j], words(taken)) : zeros();
        finish(to, 0, j * kLanes, add(sum[j], load(from + j * kLanes)), all);
      });
      if (partial) memcpy(y + 4 * at, padded, 4 * (lanes - at));
    }
}

inline int64_t depthwise_bytes(const ConvPlan& plan) {
  return 4 * plan.lanes + 8 * plan.taps + 64;
}

// Rows [o0, o1) of one image, of which x are the padded rows.
inline void run_depthwise(const Conv& a, const ConvPlan& plan,
                          const int8_t* panel, const Columns& by,
                          const uint8_t* x, int64_t image, int64_t o0,
                          int64_t o1, int32_t offset, int32_t* start,
                          int64_t* offsets) {
  const int64_t taps = a.kh * a.kw, c = a.channels;
  for (int64_t t = 0; t < plan.taps; ++t) {
    const int64_t tap = min_(t, taps - 1);
    const int64_t column = tap % a.kw * a.dilation_w;
    const int64_t pixel =
        column % plan.phases * plan.pixels + column / plan.phases;
    offsets[t] = tap / a.kw * a.dilation_h * plan.row + pixel * c;
  }
  begin_columns(by, plan.lanes, offset, start);
  char* const y = result_of(a);
  auto* lanes = a.zero ? convolve_lanes<true> : convolve_lanes<false>;
  for (int64_t o = o0; o < o1; ++o)
    lanes(a, plan, x + (o - o0) * a.stride_h * plan.row, offsets, panel,
          times(static_cast<int32_t>(taps), offset), start, by,
          a.x_scale ? a.x_scale[image] : 1.0f,
          y + 4 * (image * a.out_h + o) * a.out_w * c);
}

}  // namespace
}  // namespace quantlab
