// The product of int8 rows by packed codes: its operands, and what the
// kernels of one instruction set do with them.
#pragma once

#include <stdint.h>

namespace quantlab {

constexpr int64_t kPanelColumns = 64;  // of codes packed ahead, see decode.h

// I[g, m, n] = sum_{k in g} (x[m, k] - x_zero[m, g]) (w[k, n] - zero[g, n])
// y[m, n]    = sum_g x_scale[m, g] scale[g, n] I[g, m, n]
//
// w are integers read from bit streams along k, or looked up in `table` by
// their codes. A null scale is 1, a null zero point 0. With one group and no
// scales `sums` receives I itself.
struct Product {
  int64_t m, k, n;
  int64_t group, groups;
  int64_t bits;
  bool is_signed;
  const int8_t* x;       // (m, k)
  const uint8_t* codes;  // (code_rows, n)
  int64_t code_rows;
  bool panels;  // codes of 8, 4 or 2 bits lie in panels, see decode.h
  const int8_t* table;     // (2^bits) or null
  const float* scale;      // (groups, n)
  const int32_t* zero;     // (groups, n)
  const float* x_scale;    // (m, x_scales), x_scales 1 or groups
  const int32_t* x_zero;   // (m, x_zeros), x_zeros 1 or groups
  int64_t x_scales, x_zeros;
  float* y;       // (m, n)
  int32_t* sums;  // (m, n) where y is null
};

// How the operands are walked. Codes lie `planes` to a byte: a step is four
// rows of bytes, which makes `planes` words of four activations for each row
// of x. Widths that straddle bytes are first unpacked to one code a byte.
struct Plan {
  bool unpack;
  bool direct;  // few rows, decoded within the product: see few.h
  int64_t planes;
  int64_t steps;       // of one group, at most
  int64_t words;       // of a group of prepared activations
  int64_t stride;      // words from one row of prepared activations to the next
  int64_t ones;        // rows before the first: one, of ones, with x_zero
  bool tiled;          // prepared activations lie in tiles of 16 x 16 words
  int64_t block;       // steps decoded at a time
  int64_t decoded;     // bytes of one of them
  int64_t copied;      // bytes of a block of one strip, copied or unpacked
  int64_t panel;       // columns of one task
  int64_t rows;        // rows of x of one task
  int64_t x_bytes;     // of the prepared activations, (ones + m, stride)
  int64_t sum_bytes;   // of their sums, (m, groups)
  int64_t work_bytes;  // of the scratch space of one task
  // Of few rows: how K is shared, rows fetched ahead, bytes of all sums.
  int64_t slabs, shares, least, ahead, few_bytes;
};

// y[m, n] = sum_k x[m, k] (value[k, n] - zero[g, n]) scale[g, n]
//
// Values are integers read from bit streams along k, or, up to four bits,
// entries of `values` by the lowest four bits at the code (so the 2^bits
// entries are repeated to 16). A group is a multiple of the codes in a byte.
struct FloatProduct {
  int64_t m, k, n;
  int64_t group, groups;
  int64_t bits;
  bool is_signed;
  const float* x;
  const uint8_t* codes;
  int64_t code_rows;
  const float* values;  // (16) or null
  const float* scale;   // (groups, n) or null
  const float* zero;
  float* y;
};

struct FloatPlan {
  bool unpack, direct;
  int64_t planes, stride, rows, panel, block;
  int64_t x_bytes, work_bytes;
};

// Rows of floats to codes in [low, high]; see quantize_activation.
struct Quantize {
  int64_t rows, k;
  bool symmetric;
  int low, high;
  const float* x;
  const float* scale;   // (rows), given, or null: measured
  const int32_t* zero;  // (rows), with scale, or null
  int8_t* codes;
  float* scale_out;   // (rows)
  int32_t* zero_out;  // (rows)
};

struct Kernels {
  Plan (*plan)(const Product&, int64_t threads);
  // Orders rows [begin, end) of the activations as the codes lie.
  void (*prepare)(const Product&, const Plan&, int64_t begin, int64_t end,
                  int32_t* x, int32_t* sums);
  // Computes rows [m0, m1) of columns [n0, n1).
  void (*task)(const Product&, const Plan&, const int32_t* x,
               const int32_t* sums, int64_t m0, int64_t m1, int64_t n0,
               int64_t n1, void* work);
  // Of few rows: computes columns [n0, n1) of one slab of K, adds the slabs.
  void (*few_task)(const Product&, const Plan&, const int32_t* x,
                   const int32_t* sums, int64_t slab, int64_t n0, int64_t n1,
                   float* few, void* work);
  void (*few_finish)(const Product&, const Plan&, const int32_t* sums,
                     int64_t n0, int64_t n1, float* few);
  FloatPlan (*float_plan)(const FloatProduct&, int64_t threads);
  void (*float_task)(const FloatProduct&, const FloatPlan&, const float* x,
                     int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                     void* work);
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);
};

const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512vnni_kernels();
const Kernels& amx_kernels();

}  // namespace quantlab
