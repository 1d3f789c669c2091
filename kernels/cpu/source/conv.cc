// Convolutions with one instruction set; compiled once for each.
//
// No header of the C++ library here, as in kernel.cc.
#include "conv.h"

#include "conv_depthwise.h"
#include "conv_direct.h"

namespace quantlab {
namespace {

constexpr int64_t kBlock = 48 * 1024;  // bytes of padded rows of one task

ConvPlan plan(const Conv& a, int64_t threads) {
  ConvPlan p{};
  p.depthwise = is_depthwise(a);
  (p.depthwise ? plan_depthwise : plan_direct)(a, p);
  p.row = p.phases * p.pixels * a.channels;
  // Rows as they fit, and enough tasks for all threads.
  p.rows = 1;
  if (p.row * rows_read(a, 2) <= kBlock)
    p.rows += (kBlock / p.row - rows_read(a, 1)) / a.stride_h;
  const int64_t blocks = threads > 1 ? ceil_div(2 * threads, a.batch) : 1;
  p.rows = min_(p.rows, ceil_div(a.out_h, blocks));
  p.rows = ceil_div(a.out_h, ceil_div(a.out_h, p.rows));
  p.column_bytes = 3 * 4 * p.lanes;
  const int64_t rest = p.depthwise ? depthwise_bytes(p) : direct_bytes(p);
  // Padded rows, one row before it is split, and what vectors reach over.
  p.work_bytes = p.row * (rows_read(a, p.rows) + 1) + 4 * kWidth + rest + 64;
  return p;
}

void pack(const Conv& a, const ConvPlan& plan, int64_t i, int8_t* panel,
          void* columns) {
  (plan.depthwise ? pack_depthwise : pack_direct)(a, plan, i, panel,
                                                  Columns(columns, plan.lanes));
}

void task(const Conv& a, const ConvPlan& plan, const int8_t* panel,
          const void* columns, int64_t image, int64_t o0, int64_t o1,
          void* work) {
  const Columns by(const_cast<void*>(columns), plan.lanes);
  const int32_t offset = 128 + (a.x_zero ? a.x_zero[image] : 0);
  char* p = static_cast<char*>(work);
  auto* const start = reinterpret_cast<int32_t*>(p);
  p += round_up(4 * plan.lanes, 64);
  auto* const other = p;
  p += plan.depthwise ? 8 * plan.taps : kNarrow;
  auto* const whole = reinterpret_cast<uint8_t*>(p);
  uint8_t* const x = whole + plan.row + 2 * kWidth;
  pad(a, plan, image, o0, o1, x, whole);
  if (plan.depthwise)
    return run_depthwise(a, plan, panel, by, x, image, o0, o1, offset, start,
                         reinterpret_cast<int64_t*>(other));
  DirectTask{a, plan, panel, by, x, image, o0, o1, start, other}.run(offset);
}

constexpr ConvKernels kKernels{plan, pack, task};

}  // namespace

#if defined(__AVX512VNNI__)
const ConvKernels& avx512vnni_conv() { return kKernels; }
#elif defined(__AVXVNNI__)
const ConvKernels& avxvnni_conv() { return kKernels; }
#else
const ConvKernels& avx2_conv() { return kKernels; }
#endif

}  // namespace quantlab
