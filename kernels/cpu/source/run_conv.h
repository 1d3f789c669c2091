// A convolution on the threads of a pool.
#pragma once

#include "conv.h"
#include "parallel.h"

namespace quantlab {

template <typename Pool>
void convolve(const ConvKernels& kernels, const Conv& a, Pool& pool,
              int64_t threads) {
  const int64_t outputs = a.batch * a.out_h * a.out_w * a.n;
  const int64_t taps = a.kh * a.kw * (a.channels / a.groups);
  if (outputs * taps < kConvAlone) threads = 1;
  const ConvPlan plan = kernels.plan(a, threads);
  auto* panel = static_cast<int8_t*>(scratch(0, plan.panel_bytes));
  void* columns = scratch(1, plan.column_bytes);
  const bool small = plan.panel_bytes < 128 * 1024;
  parallel(pool, small ? 1 : threads, plan.strips, [&](int64_t i) {
    kernels.pack(a, plan, i, panel, columns);
  });
  const int64_t blocks = (a.out_h + plan.rows - 1) / plan.rows;
  parallel(pool, threads, a.batch * blocks, [&](int64_t i) {
    const int64_t o0 = i % blocks * plan.rows, o1 = o0 + plan.rows;
    kernels.task(a, plan, panel, columns, i / blocks, o0,
                 o1 < a.out_h ? o1 : a.out_h, scratch(2, plan.work_bytes));
  });
}

}  // namespace quantlab
