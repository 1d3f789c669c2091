// A product on the threads of a pool.
#pragma once

#include <cstring>

#include "pages.h"
#include "parallel.h"
#include "product.h"

namespace quantlab {

// Below this many bytes of codes times rows one thread is as fast.
constexpr int64_t kAlone = 256 * 1024;

template <typename Pool>
void multiply(const Kernels& kernels, Product a, Pool& pool, int64_t threads) {
  if (a.code_rows * a.n * (a.m < 8 ? 8 : a.m) < 8 * kAlone) threads = 1;
  const int64_t width = a.panels ? kPanelColumns : 1;
  use_large_pages(a.codes, a.code_rows * ((a.n + width - 1) / width * width));
  const Plan plan = kernels.plan(a, threads);
  auto* x = static_cast<int32_t*>(scratch(0, plan.x_bytes));
  auto* sums = static_cast<int32_t*>(scratch(1, plan.sum_bytes));
  const int64_t share = a.m * a.k < kAlone ? a.m : (a.m + 15) / 16;
  parallel(pool, threads, (a.m + share - 1) / share, [&](int64_t i) {
    const int64_t end = (i + 1) * share;
    kernels.prepare(a, plan, i * share, end < a.m ? end : a.m, x, sums);
  });
  const int64_t panels = (a.n + plan.panel - 1) / plan.panel;
  if (plan.direct) {
    auto* few = static_cast<float*>(scratch(3, plan.few_bytes));
    auto finish = [&](int64_t i) {
      const int64_t n0 = i * plan.panel, n1 = n0 + plan.panel;
      kernels.few_finish(a, plan, sums, n0, n1 < a.n ? n1 : a.n, few);
    };
    parallel(pool, threads, panels * plan.slabs, [&](int64_t i) {
      const int64_t n0 = i % panels * plan.panel, n1 = n0 + plan.panel;
      kernels.few_task(a, plan, x, sums, i / panels, n0, n1 < a.n ? n1 : a.n,
                       few, scratch(2, plan.work_bytes));
      if (plan.slabs == 1) finish(i);
    });
    if (plan.slabs > 1) parallel(pool, threads, panels, finish);
    return;
  }
  const int64_t chunks = (a.m + plan.rows - 1) / plan.rows;
  parallel(pool, threads, panels * chunks, [&](int64_t i) {
    const int64_t n0 = i % panels * plan.panel, m0 = i / panels * plan.rows;
    const int64_t n1 = n0 + plan.panel, m1 = m0 + plan.rows;
    kernels.task(a, plan, x, sums, m0, m1 < a.m ? m1 : a.m, n0,
                 n1 < a.n ? n1 : a.n, scratch(2, plan.work_bytes));
  });
}

template <typename Pool>
void multiply_floats(const Kernels& kernels, const FloatProduct& a, Pool& pool,
                     int64_t threads) {
  if (a.k * a.n * (a.m < 8 ? 8 : a.m) < 8 * kAlone) threads = 1;
  use_large_pages(a.codes, a.code_rows * a.n);
  const FloatPlan plan = kernels.float_plan(a, threads);
  // Zeros follow each row: the last byte may hold more codes than there are.
  auto* x = static_cast<float*>(scratch(0, plan.x_bytes));
  for (int64_t r = 0; r < a.m; ++r) {
    float* const row = x + r * plan.stride;
    std::memcpy(row, a.x + r * a.k, 4 * a.k);
    std::memset(row + a.k, 0, 4 * (plan.stride - a.k));
  }
  const int64_t panels = (a.n + plan.panel - 1) / plan.panel;
  const int64_t chunks = (a.m + plan.rows - 1) / plan.rows;
  parallel(pool, threads, panels * chunks, [&](int64_t i) {
    const int64_t n0 = i % panels * plan.panel, m0 = i / panels * plan.rows;
    const int64_t n1 = n0 + plan.panel, m1 = m0 + plan.rows;
    kernels.float_task(a, plan, x, m0, m1 < a.m ? m1 : a.m, n0,
                       n1 < a.n ? n1 : a.n, scratch(2, plan.work_bytes));
  });
}

template <typename Pool>
void quantize_rows(const Kernels& kernels, const Quantize& a, Pool& pool,
                   int64_t threads) {
  // Sixteen parts of many rows; few are done before a thread has woken.
  const int64_t share = a.rows * a.k < kAlone ? a.rows : (a.rows + 15) / 16;
  parallel(pool, threads, (a.rows + share - 1) / share, [&](int64_t i) {
    const int64_t end = (i + 1) * share;
    kernels.quantize(a, i * share, end < a.rows ? end : a.rows);
  });
}

}  // namespace quantlab
