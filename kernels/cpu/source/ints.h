// Integers, as the kernels compute with them.
#pragma once

#include "vec.h"

namespace quantlab {
namespace {

QL_INLINE int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
QL_INLINE int64_t max_(int64_t a, int64_t b) { return a > b ? a : b; }
QL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
QL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Modulo 2^32, as the vectors are.
QL_INLINE int32_t times(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) *
                              static_cast<uint32_t>(b));
}
QL_INLINE int32_t minus(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) -
                              static_cast<uint32_t>(b));
}

}  // namespace
}  // namespace quantlab
