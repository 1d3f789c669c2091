// Products of few rows of activations, as fast as the weight can be read.
//
// Memory is fastest in long runs: a task walks a few whole rows of bytes from
// left to right, with the sums of all columns in L1 or L2, then the next few.
// Tasks share K as well as the columns, so that rows stay long; each has sums
// of its own, and `few_finish` adds them, always in the same order.
#pragma once

#include "finish.h"

namespace quantlab {
namespace {

constexpr int64_t kFewSums = 64 * 1024;   // of sums of one task, at most
constexpr int64_t kFewBytes = 32 * 1024;  // of codes of one task, at least
constexpr int64_t kFewAhead = 32 * 1024;  // bytes fetched ahead of their use
constexpr int64_t kFewRun = 1024 * 1024;  // of codes of one task in panels
constexpr int64_t kScalesAhead = 8;       // groups whose scales are fetched
// Steps of one pass: an upper plane adds up to 4 x 240 x 128 in each, which is
// sixteen times its part, and must stay below 2^31.
constexpr int64_t kLongest = 16384;
constexpr int64_t kRun = 8;               // steps from one pass to the next

// How far it is from one part of a pass to the next.
struct Parts {
  int64_t p, x, sums, scale, x_sums, y;
};

// One pass over parts: strips from left to right, or, of a strip that lies in a
// panel, groups from top to bottom.
struct Pass {
  const uint8_t* p;
  int64_t stride, rows, parts;
  Parts by;
  Ahead ahead;  // what a later part reads, fetched into L2
  int flip;
  const uint8_t* table;
  const int32_t* x;
  int64_t x_stride;
  bool more;      // sums of this group are there from the pass before
  int32_t* sums;  // (R, kWidth) of each strip
  // With a scale the sums end here: y (+)= scale (sum - zero x_sum).
  const float* scale;
  const int32_t* zero;
  int offset;
  const int32_t* x_sums;  // of the rows, `groups` apart
  int64_t groups;
  float* y;  // (R, kWidth) of each strip
  bool first;
};

// Scales of a strip: a whole row of them lies between one group and the next.
template <typename T>
QL_INLINE void fetch(const T* p) {
  for (int64_t j = 0; j < kWidth; j += 16) __builtin_prefetch(p + j, 0, 3);
}

template <int R>
QL_INLINE void end(const I (&sum)[R][4], const Pass& w, int64_t i) {
  I scale[4], zero[4];
  lanes_of(w.scale + i * w.by.scale, kWidth, scale);
  if (w.zero) lanes_of(w.zero + i * w.by.scale, kWidth, zero);
  float* const out = w.y + i * w.by.y;
  const bool first = w.first && (i == 0 || w.by.y);
  each<R>([&](auto r) QL_NOW {
    const int32_t x_sum = w.x_sums[r * w.groups + i * w.by.x_sums];
    const I by = words(times(w.offset, x_sum));
    each<4>([&](auto j) QL_NOW {
      I v = sub(sum[r][j], by);
      if (w.zero) v = sub(v, mul(zero[j], words(x_sum)));
      float* const y = out + r * kWidth + j * kWidth / 4;
      const F f = floats(v), s = cast_f(scale[j]);
      store_f(y, first ? mul_f(f, s) : fma_f(f, s, load_f(y)));
    });
  });
}

template <int R, int P, bool kTable, bool kPanels>
__attribute__((noinline)) void pass(const Pass& w) {
  constexpr int kBits = 8 / P;
  // With registers to spare two planes lie in four bits without a shift: the
  // upper one sums 2^kBits times its products, apart.
  constexpr bool kApart = !kTable && P > 1 && R <= (kWidth == 64 ? 2 : 1);
  constexpr bool kReady = kPanels && P == 1;
  const I table = kTable ? table16(w.table) : zeros();
  const int64_t stride = kPanels ? kPanelColumns : w.stride;
  const int64_t x_stride = w.x_stride;
  Ahead ahead = w.ahead;
  for (int64_t i = 0; i < w.parts; ++i) {
    int32_t* const sums = w.sums + i * w.by.sums;
    I sum[R][4], upper[kApart ? R : 1][4];
    begin<R>(sum, sums, w.more);
    if constexpr (kApart) begin<R>(upper, sums, false);
    if (kPanels && w.scale) {
      fetch(w.scale + (i + kScalesAhead) * w.by.scale);
      if (w.zero) fetch(w.zero + (i + kScalesAhead) * w.by.scale);
    }
    const uint8_t* p = w.p + i * w.by.p;
    const int32_t* x = w.x + i * w.by.x;
    for (int64_t rows = w.rows; rows > 0; rows -= 4, p += 4 * stride, x += P) {
      I v[4];
      read<kPanels>(p, stride, rows, v);
      ahead.fetch();
      each<P>([&](auto q) QL_NOW {
        X a[R];
        each<R>([&](auto r) QL_NOW { a[r] = spread(x[r * x_stride + q]); });
        constexpr bool kUpper = kApart && q % 2;
        constexpr int kMask = ((1 << kBits) - 1) << (kUpper ? kBits : 0);
        const I flip = bytes(w.flip & kMask);
        each<4>([&](auto j) QL_NOW {
          if (kApart && q == 2) v[j] = right(v[j], 4);
          const I b = kReady   ? v[j]
                      : kApart ? pick(v[j], bytes(kMask), flip)
                               : plane<P, kTable>(v[j], q, flip, table);
          each<R>([&](auto r) QL_NOW {
            I& s = kUpper ? upper[kApart ? r : 0][j] : sum[r][j];
            s = dot(s, b, a[r]);
          });
        });
      });
    }
    if constexpr (kApart)
      each<R * 4>([&](auto t) QL_NOW {
        I& s = sum[t / 4][t % 4];
        s = add(s, shift_sum<kBits>(upper[t / 4][t % 4]));
      });
    if (w.scale)
      end<R>(sum, w, i);
    else
      each<R * 4>([&](auto t) QL_NOW {
        store(sums + t * kWidth / 4, sum[t / 4][t % 4]);
      });
  }
}

using PassOf = void (*)(const Pass&);
template <int P, bool T, bool L>
PassOf pass_of(int64_t rows) {
  constexpr int kLast = kDirect;
  static constexpr PassOf kPasses[] = {
      pass<1, P, T, L>, pass<(2 < kLast ? 2 : kLast), P, T, L>,
      pass<(3 < kLast ? 3 : kLast), P, T, L>, pass<kLast, P, T, L>};
  return kPasses[rows - 1];
}
template <bool T, bool L>
PassOf pass_of(int64_t planes, int64_t rows) {
  return planes == 1   ? pass_of<1, T, L>(rows)
         : planes == 2 ? pass_of<2, T, L>(rows)
                       : pass_of<4, T, L>(rows);
}
inline PassOf pass_of(int64_t planes, bool table, bool panels, int64_t rows) {
  return (table ? panels ? pass_of<true, true> : pass_of<true, false>
          : panels ? pass_of<false, true>
                   : pass_of<false, false>)(planes, rows);
}

// ---- how the work is shared -------------------------------------------------

// Of the units (groups, or passes of one group) of a panel, those of a slab:
// large ones first, so that threads end together.
struct Slab {
  int64_t begin, end;
};

QL_INLINE int64_t few_units(const Product& a, const Plan& plan) {
  return a.groups > 1 ? a.groups : ceil_div(plan.steps, kRun);
}

QL_INLINE Slab slab_at(const Product& a, const Plan& plan, int64_t slab) {
  const int64_t units = few_units(a, plan);
  Slab s{0, 0};
  for (int64_t i = 0; i <= slab; ++i) {
    s.begin = s.end;
    const int64_t left = units - s.begin;
    s.end += min_(left, max_(plan.least, ceil_div(left, plan.shares)));
  }
  return s;
}

inline void few_plan(const Product& a, int64_t threads, Plan& p) {
  const int64_t rows = a.m + p.ones, units = few_units(a, p);
  if (a.panels) {
    // Runs of several panels: where one ends, memory has to begin anew.
    const int64_t panels = ceil_div(a.n, kPanelColumns);
    const int64_t runs =
        ceil_div(panels * kPanelColumns * a.code_rows, kFewRun);
    p.panel = kPanelColumns * ceil_div(panels, round_up(runs, 2 * threads));
    p.slabs = p.shares = 1;
    p.few_bytes = 4 * rows * round_up(a.n, kWidth);
    p.work_bytes = 4 * rows * kWidth;
    return;
  }
  int64_t panels = ceil_div(4 * rows * a.n, kFewSums);
  if (panels > 1) panels = round_up(panels, threads);
  p.panel = round_up(ceil_div(a.n, panels), kWidth);
  panels = ceil_div(a.n, p.panel);
  const int64_t bytes = a.code_rows * p.panel;
  p.shares = threads > 1 ? 2 * threads : 1;
  p.least = max_(ceil_div(units * panels, 8 * threads),
                 ceil_div(units * kFewBytes, bytes));
  p.slabs = 0;
  while (p.slabs == 0 || slab_at(a, p, p.slabs - 1).end < units) ++p.slabs;
  p.ahead = round_up(max_(kFewAhead / p.panel, 16), 4);
  p.few_bytes = 4 * p.slabs * rows * round_up(a.n, kWidth);
  p.work_bytes = 4 * rows * p.panel;
}

// Integer sums where there is one group, else y: (slabs, strips, rows, kWidth).
QL_INLINE float* few_at(const Product& a, const Plan& plan, float* few,
                        int64_t slab, int64_t n) {
  const int64_t rows = a.m + plan.ones;
  return few + (slab * round_up(a.n, kWidth) + n) * rows;
}

// ---- one task ---------------------------------------------------------------

struct Few {
  const Product& a;
  const Plan& plan;
  const int32_t* x;
  const int32_t* x_sums;
  int64_t n0, n1;
  int32_t* sums;
  float* y;
  uint8_t table[16];
  uint8_t copied[kWidth * (4 * kRun + 16)], unpacked[kWidth * 4 * kRun];

  // Rows [row, row + count) of group g, which may be its last; of codes in
  // panels also of the groups up to g + groups.
  void run(int64_t g, int64_t groups, int64_t step, int64_t row, int64_t count,
           bool more, bool last, bool first) {
    const int64_t rows = a.m + plan.ones;
    const bool ends = last && a.groups > 1, fused = ends && is_simple(a);
    const PassOf f = pass_of(plan.planes, a.table != nullptr, a.panels, rows);
    Pass w{};
    w.rows = count, w.table = table;
    w.x = x + (g * plan.steps + step) * plan.planes, w.x_stride = plan.stride;
    w.more = more, w.offset = offset_of(a), w.first = first;
    w.x_sums = x_sums + g, w.groups = a.groups;
    // Narrow strips, and codes that straddle bytes, one by one by way of L1.
    const int64_t whole = plan.unpack ? n0 : n0 + (n1 - n0) / kWidth * kWidth;
    const int64_t wide = rows * kWidth;
    w.by = a.panels ? Parts{count * kPanelColumns, plan.words, 0, a.n, 1, 0}
                    : Parts{kWidth, 0, wide, kWidth, 0, wide};
    for (int64_t n = n0, strips; n < n1; n += strips * kWidth) {
      strips = n < whole ? (whole - n0) / kWidth : 1;
      const int64_t columns = min_(strips * kWidth, n1 - n);
      const Codes c =
          codes_at(a, plan, row, count, n, columns, copied, unpacked);
      w.p = c.p, w.stride = c.stride, w.flip = c.flip;
      const int64_t lines = columns / 64;
      w.parts = groups * strips;
      w.ahead = {c.p + plan.ahead * c.stride, c.stride, lines, lines,
                 n < whole && !a.panels ? count : 0};
      w.sums = sums + (n - n0) * rows, w.y = y + (n - n0) * rows;
      const bool here = fused && columns % kWidth == 0;
      w.scale = here ? a.scale + g * a.n + n : nullptr;
      w.zero = here && a.zero ? a.zero + g * a.n + n : nullptr;
      f(w);
      if (!ends || here) continue;
      for (int64_t i = 0; i < columns; i += kWidth) {
        const int32_t* const s = w.sums + i * rows;
        const Columns by = columns_of(a, g, n + i, min_(kWidth, columns - i));
        scale_onto(a, x_sums, g, by, 0, a.m, first, s, s + plan.ones * kWidth,
                   w.y + i * rows);
      }
    }
  }

  void group(int64_t g, int64_t s0, int64_t s1, bool first) {
    const Group group = group_at(a, plan, g);
    s1 = min_(s1, ceil_div(group.rows, 4));
    const int64_t all = a.panels ? kLongest : kRun;
    for (int64_t s = s0; s < s1; s += all) {
      const int64_t count = min_(4 * min_(all, s1 - s), group.rows - 4 * s);
      run(g, 1, s, group.row0 + 4 * s, count, s > s0, s + all >= s1, first);
    }
  }

  // Strip by strip, of codes in panels.
  void panels() {
    const int64_t wide = (a.m + plan.ones) * kWidth;
    for (const int64_t end = n1; n0 < end; n0 += kWidth) {
      n1 = min_(n0 + kWidth, end);
      panel();
      y += wide;
      if (a.groups == 1) sums += wide;  // they are y
    }
  }

  // All groups of one strip in a panel: whole ones in one pass, where it can.
  void panel() {
    const bool fused = a.groups > 1 && is_simple(a) && n1 - n0 == kWidth &&
                       plan.steps <= kLongest;
    const int64_t whole = fused ? a.k / a.group : 0;
    if (whole)
      run(0, whole, 0, 0, group_at(a, plan, 0).rows, false, true, true);
    for (int64_t g = whole; g < a.groups; ++g)
      group(g, 0, plan.steps, g == 0);
  }
};

void few_task(const Product& a, const Plan& plan, const int32_t* x,
              const int32_t* x_sums, int64_t slab, int64_t n0, int64_t n1,
              float* few, void* work) {
  float* const out = few_at(a, plan, few, slab, n0);
  const bool one = a.groups == 1;
  Few t{a, plan, x, x_sums, n0, n1,
        one ? reinterpret_cast<int32_t*>(out) : static_cast<int32_t*>(work),
        out};
  table_of(a, t.table);
  if (a.panels) return t.panels();
  const Slab s = slab_at(a, plan, slab);
  if (one)
    t.group(0, s.begin * kRun, s.end * kRun, true);
  else
    for (int64_t g = s.begin; g < s.end; ++g)
      t.group(g, 0, plan.steps, g == s.begin);
}

// Adds what the slabs of columns [n0, n1) hold.
void few_finish(const Product& a, const Plan& plan, const int32_t* x_sums,
                int64_t n0, int64_t n1, float* few) {
  const int64_t words = (a.groups == 1 ? a.m + plan.ones : a.m) * kWidth;
  for (int64_t n = n0; n < n1; n += kWidth) {
    const int64_t columns = min_(kWidth, n1 - n);
    float* const total = few_at(a, plan, few, 0, n);
    for (int64_t slab = 1; slab < plan.slabs; ++slab) {
      const float* const part = few_at(a, plan, few, slab, n);
      for (int64_t i = 0; i < words; i += kWidth / 4) {
        if (a.groups == 1)
          store(total + i, add(load(total + i), load(part + i)));
        else
          store_f(total + i, add_f(load_f(total + i), load_f(part + i)));
      }
    }
    float* const y = total + (a.groups == 1 ? plan.ones * kWidth : 0);
    if (a.groups == 1)
      scale_onto(a, x_sums, 0, columns_of(a, 0, n, columns), 0, a.m, true,
                 reinterpret_cast<int32_t*>(total),
                 reinterpret_cast<int32_t*>(y), y);
    write(a, n, columns, 0, a.m, y);
  }
}

}  // namespace
}  // namespace quantlab
