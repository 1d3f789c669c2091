// The convolution of int8 images by an int8 kernel: its operands, and what the
// kernels of one instruction set do with them.
#pragma once

#include <stdint.h>

namespace quantlab {

// I[b, p, o] = sum over the window of (x - x_zero[b]) (w - zero[o])
// y[b, p, o] = x_scale[b] (scale[o] I[b, p, o])
//
// Channels are last. Padding is the code x_zero[b]; `top` and `left` are rows
// and columns of it, negative ones crop. A null scale is 1, a null zero point
// 0. Where y is null `sums` receives I itself.
struct Conv {
  int64_t batch, height, width, channels;  // of x
  int64_t kh, kw, groups, n;     // w is (kh, kw, channels / groups, n)
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t top, left;
  int64_t out_h, out_w;  // y is (batch, out_h, out_w, n)
  const int8_t* x;
  const int8_t* w;
  const float* scale;     // (n)
  const int32_t* zero;    // (n)
  const float* x_scale;   // (batch)
  const int32_t* x_zero;  // (batch)
  float* y;
  int32_t* sums;
};

// How the operands are walked. A task copies the rows of x that its rows of
// the output read, padded, and as unsigned bytes: code + 128.
//
// Direct: a pixel's window is, for each row of the kernel, `runs` runs of
// bytes that lie together, padded to `quads` words. Columns of the kernel are
// packed in units of 16, up to four of which make a strip.
//
// Depthwise: pixels and channels of a row are one run of lanes; those of the
// kernel repeat every `span` lanes. Columns of a padded row are kept in
// `phases`, by their remainder under the stride, so that lanes lie together.
struct ConvPlan {
  bool depthwise;
  int64_t runs, quads;  // direct
  int64_t units;        // of one group's columns
  int64_t span, taps;   // depthwise; taps in fours
  int64_t phases;
  int64_t pixels;  // of one phase of a padded row
  int64_t row;     // bytes of a padded row
  int64_t rows;    // of the output, of one task
  int64_t strips;  // of the panel, packed one by one
  int64_t lanes;   // columns of the panel
  int64_t panel_bytes, column_bytes, work_bytes;
};

struct ConvKernels {
  ConvPlan (*plan)(const Conv&, int64_t threads);
  // Packs strip i, and what its columns are corrected and scaled by.
  void (*pack)(const Conv&, const ConvPlan&, int64_t i, int8_t* panel,
               void* columns);
  // Computes rows [o0, o1) of the output of one image.
  void (*task)(const Conv&, const ConvPlan&, const int8_t* panel,
               const void* columns, int64_t image, int64_t o0, int64_t o1,
               void* work);
};

const ConvKernels& avx2_conv();
const ConvKernels& avxvnni_conv();
const ConvKernels& avx512vnni_conv();

// Below this many products of bytes one thread is as fast.
constexpr int64_t kConvAlone = 2 * 1024 * 1024;

inline bool is_depthwise(const Conv& a) {
  return a.groups > 1 && a.groups == a.channels && a.n == a.channels;
}

}  // namespace quantlab
