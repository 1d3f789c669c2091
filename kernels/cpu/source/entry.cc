// What XLA calls.
#include <cstdint>
#include <iterator>
#include <string>

#include "isas.h"
#include "run.h"
#include "run_conv.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace quantlab {
namespace {

const Kernels* kernels_of(int64_t isa) {
  switch (isa) {
    case kAvx2:
      return &avx2_kernels();
    case kAvxVnni:
      return &avxvnni_kernels();
    case kAvx512Vnni:
      return &avx512vnni_kernels();
    case kAmx:
      return &amx_kernels();
  }
  return nullptr;
}

const ConvKernels* conv_of(int64_t isa) {
  switch (isa) {
    case kAvx2:
      return &avx2_conv();
    case kAvxVnni:
      return &avxvnni_conv();
    case kAvx512Vnni:
    case kAmx:
      return &avx512vnni_conv();
  }
  return nullptr;
}

// Operand number `b` of a batch (1 or batch, rows, columns); null when empty.
struct Operand {
  explicit Operand(const ffi::AnyBuffer& buffer) : data(buffer.untyped_data()) {
    const auto d = buffer.dimensions();
    if (d.size() != 3) return;
    batch = d[0], rows = d[1], columns = d[2];
    width = ffi::ByteWidth(buffer.element_type());
  }
  bool empty() const { return batch * rows * columns == 0; }
  template <typename T>
  T* at(int64_t b) const {
    if (empty()) return nullptr;
    auto* p = static_cast<char*>(data);
    return reinterpret_cast<T*>(p + (batch > 1 ? b : 0) * rows * columns * width);
  }
  bool is(int64_t b, int64_t r, int64_t c) const {
    return (batch == 1 || batch == b) && rows == r && columns == c;
  }
  std::string text() const {
    return "(" + std::to_string(batch) + ", " + std::to_string(rows) + ", " +
           std::to_string(columns) + ") of " + std::to_string(width) +
           " bytes each";
  }

  void* data;
  int64_t batch = 0, rows = 0, columns = 0, width = 0;
};

ffi::Error unfit(const Operand& x, const Operand& w, const Operand& y,
                 int64_t bits, int64_t group) {
  return ffi::Error(
      ffi::ErrorCode::kInvalidArgument,
      "quantlab: operands of a product do not fit: rows " + x.text() +
          ", codes " + w.text() + ", result " + y.text() + ", of " +
          std::to_string(bits) + " bits in groups of " + std::to_string(group) +
          "; were the codes of a weight cast or reshaped?");
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x_, ffi::AnyBuffer w_,
                    ffi::AnyBuffer scale_, ffi::AnyBuffer zero_,
                    ffi::AnyBuffer x_scale_, ffi::AnyBuffer x_zero_,
                    ffi::AnyBuffer table_, ffi::Result<ffi::AnyBuffer> y_,
                    int64_t bits, int64_t group, bool is_signed, bool panels,
                    int64_t isa) {
  const Operand x(x_), w(w_), scale(scale_), zero(zero_), x_scale(x_scale_),
      x_zero(x_zero_), table(table_), y(*y_);
  const Kernels* const kernels = kernels_of(isa);
  const int64_t groups = group > 0 ? (x.columns + group - 1) / group : 0;
  const int64_t batch = y.batch;
  auto per_column = [&](const Operand& o) {
    return o.empty() || o.is(batch, groups, y.columns);
  };
  auto per_row = [&](const Operand& o) {
    return o.empty() || o.is(batch, x.rows, o.columns > 1 ? groups : 1);
  };
  // Rows of bytes: in panels those of four make a word, and groups are whole.
  const int64_t word = bits > 0 ? 32 / bits : 1;
  const int64_t rows = panels ? (x.columns + word - 1) / word * 4 : w.rows;
  const bool packs = bits == 8 ? table.empty() : bits == 4 || bits == 2;
  const bool holds =
      panels ? packs && (groups == 1 || group % word == 0) &&
                   w.is(batch, (y.columns + kPanelColumns - 1) / kPanelColumns,
                        kPanelColumns * rows)
             : w.is(batch, rows, y.columns) && rows * 8 >= x.columns * bits;
  // Panels say what their weight is of, whatever their codes have become.
  const ffi::DataType coded = w_.element_type();
  const bool bytes =
      coded == ffi::DataType::U8 || coded == ffi::DataType::S8;
  const bool fits =
      kernels && groups > 0 && bits >= 1 && bits <= 8 && bytes &&
      x.is(batch, y.rows, x.columns) && holds && per_column(scale) &&
      per_column(zero) && per_row(x_scale) && per_row(x_zero) &&
      (table.empty() || table.is(batch, 1, int64_t{1} << bits));
  if (!fits)
    return unfit(x, w, y, bits, group);
  Product a{};
  a.m = x.rows, a.k = x.columns, a.n = y.columns;
  a.group = group, a.groups = groups;
  a.bits = bits, a.is_signed = is_signed;
  a.code_rows = rows, a.panels = panels;
  a.x_scales = x_scale.columns, a.x_zeros = x_zero.columns;
  const bool floats = y_->element_type() == ffi::DataType::F32;
  const int64_t threads = pool.num_threads();
  for (int64_t b = 0; b < batch; ++b) {
    a.x = x.at<int8_t>(b), a.codes = w.at<uint8_t>(b);
    a.table = table.at<int8_t>(b);
    a.scale = scale.at<float>(b), a.zero = zero.at<int32_t>(b);
    a.x_scale = x_scale.at<float>(b), a.x_zero = x_zero.at<int32_t>(b);
    a.y = floats ? y.at<float>(b) : nullptr;
    a.sums = floats ? nullptr : y.at<int32_t>(b);
    multiply(*kernels, a, pool, threads);
  }
  return ffi::Error::Success();
}

ffi::Error MultiplyFloats(ffi::ThreadPool pool, ffi::AnyBuffer x_,
                          ffi::AnyBuffer w_, ffi::AnyBuffer scale_,
                          ffi::AnyBuffer zero_, ffi::AnyBuffer values_,
                          ffi::Result<ffi::AnyBuffer> y_, int64_t bits,
                          int64_t group, bool is_signed, int64_t isa) {
  const Operand x(x_), w(w_), scale(scale_), zero(zero_), values(values_),
      y(*y_);
  const Kernels* const kernels = kernels_of(isa);
  const int64_t groups = group > 0 ? (x.columns + group - 1) / group : 0;
  auto per_column = [&](const Operand& o) {
    return o.empty() || o.is(y.batch, groups, y.columns);
  };
  const bool dense = bits == 2 || bits == 4;
  const bool fits = kernels && groups > 0 && bits >= 1 && bits <= 8 &&
                    (!dense || groups == 1 || group % (8 / bits) == 0) &&
                    x.is(y.batch, y.rows, x.columns) &&
                    w.is(y.batch, w.rows, y.columns) &&
                    w.rows * 8 >= x.columns * bits && per_column(scale) &&
                    per_column(zero) &&
                    (bits > 4 ? values.empty() : values.is(y.batch, 1, 16));
  if (!fits)
    return unfit(x, w, y, bits, group);
  FloatProduct a{};
  a.m = x.rows, a.k = x.columns, a.n = y.columns;
  a.group = group, a.groups = groups;
  a.bits = bits, a.is_signed = is_signed;
  a.code_rows = w.rows;
  const int64_t threads = pool.num_threads();
  for (int64_t b = 0; b < y.batch; ++b) {
    a.x = x.at<float>(b), a.codes = w.at<uint8_t>(b);
    a.values = values.at<float>(b);
    a.scale = scale.at<float>(b), a.zero = zero.at<float>(b);
    a.y = y.at<float>(b);
    multiply_floats(*kernels, a, pool, threads);
  }
  return ffi::Error::Success();
}

ffi::Error QuantizeRows(ffi::ThreadPool pool, ffi::AnyBuffer x,
                        ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                        ffi::Result<ffi::AnyBuffer> codes,
                        ffi::Result<ffi::AnyBuffer> scale_out,
                        ffi::Result<ffi::AnyBuffer> zero_out, bool symmetric,
                        int64_t low, int64_t high, int64_t isa) {
  const Kernels* const kernels = kernels_of(isa);
  const int64_t rows = scale_out->element_count();
  const int64_t k = rows ? x.element_count() / rows : 0;
  auto per_row = [&](const ffi::AnyBuffer& b) {
    const int64_t n = b.element_count();
    return n == 0 || n == rows;
  };
  if (!kernels || x.element_count() != rows * k || !per_row(scale) ||
      codes->element_count() != rows * k || !per_row(zero) ||
      zero_out->element_count() != rows)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "quantlab: shapes of a quantizer do not fit");
  auto given = [](const ffi::AnyBuffer& b) {
    return b.element_count() ? b.untyped_data() : nullptr;
  };
  const Quantize a{rows,
                   k,
                   symmetric,
                   static_cast<int>(low),
                   static_cast<int>(high),
                   static_cast<const float*>(x.untyped_data()),
                   static_cast<const float*>(given(scale)),
                   static_cast<const int32_t*>(given(zero)),
                   static_cast<int8_t*>(codes->untyped_data()),
                   static_cast<float*>(scale_out->untyped_data()),
                   static_cast<int32_t*>(zero_out->untyped_data())};
  quantize_rows(*kernels, a, pool, pool.num_threads());
  return ffi::Error::Success();
}

// What is static of a convolution, in the order of Window in int8_conv/cpu.py.
bool read_window(ffi::Span<const int64_t> w, Conv& a) {
  int64_t* const fields[] = {
      &a.height,     &a.width, &a.channels, &a.kh,    &a.kw,
      &a.groups,     &a.stride_h, &a.stride_w, &a.dilation_h,
      &a.dilation_w, &a.top,   &a.left,     &a.out_h, &a.out_w};
  if (w.size() != std::size(fields)) return false;
  for (size_t i = 0; i < w.size(); ++i) {
    *fields[i] = w[i];
    const bool may_be_negative = fields[i] == &a.top || fields[i] == &a.left;
    if (w[i] < 1 && !may_be_negative) return false;
  }
  return a.channels % a.groups == 0;
}

ffi::Error Convolve(ffi::ThreadPool pool, ffi::AnyBuffer x_, ffi::AnyBuffer w_,
                    ffi::AnyBuffer scale_, ffi::AnyBuffer zero_,
                    ffi::AnyBuffer x_scale_, ffi::AnyBuffer x_zero_,
                    ffi::Result<ffi::AnyBuffer> y_,
                    ffi::Span<const int64_t> window, int64_t isa) {
  const Operand x(x_), w(w_), scale(scale_), zero(zero_), x_scale(x_scale_),
      x_zero(x_zero_), y(*y_);
  const ConvKernels* const kernels = conv_of(isa);
  Conv a{};
  a.batch = x.rows, a.n = w.columns;
  const int64_t batch = y.batch;
  auto each = [&](const Operand& o, int64_t rows, int64_t columns) {
    return o.empty() || o.is(batch, rows, columns);
  };
  const bool fits =
      kernels && read_window(window, a) && a.n % a.groups == 0 &&
      x.is(batch, a.batch, a.height * a.width * a.channels) &&
      w.is(batch, a.kh * a.kw * (a.channels / a.groups), a.n) &&
      y.is(batch, a.batch, a.out_h * a.out_w * a.n) && each(scale, 1, a.n) &&
      each(zero, 1, a.n) && each(x_scale, a.batch, 1) &&
      each(x_zero, a.batch, 1);
  if (!fits)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "quantlab: shapes of a convolution do not fit");
  const bool floats = y_->element_type() == ffi::DataType::F32;
  for (int64_t b = 0; b < batch; ++b) {
    a.x = x.at<int8_t>(b), a.w = w.at<int8_t>(b);
    a.scale = scale.at<float>(b), a.zero = zero.at<int32_t>(b);
    a.x_scale = x_scale.at<float>(b), a.x_zero = x_zero.at<int32_t>(b);
    a.y = floats ? y.at<float>(b) : nullptr;
    a.sums = floats ? nullptr : y.at<int32_t>(b);
    convolve(*kernels, a, pool, pool.num_threads());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace quantlab

XLA_FFI_DEFINE_HANDLER_SYMBOL(quantlab_convolve, quantlab::Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("window")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quantlab_multiply, quantlab::Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("is_signed")
                                  .Attr<bool>("panels")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quantlab_multiply_floats,
                              quantlab::MultiplyFloats,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("is_signed")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quantlab_quantize, quantlab::QuantizeRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("symmetric")
                                  .Attr<int64_t>("low")
                                  .Attr<int64_t>("high")
                                  .Attr<int64_t>("isa"));

// The instruction sets of this machine, as bits.
extern "C" int64_t quantlab_isas() { return quantlab::isas(); }
