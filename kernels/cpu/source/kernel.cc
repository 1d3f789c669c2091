// The kernels of one instruction set; compiled once for each.
//
// No header of the C++ library here: the linker keeps one copy of an inline
// function, and it might keep one with instructions the machine lacks.
#include <string.h>

#include "amx.h"
#include "few.h"
#include "floats.h"
#include "quantize.h"

namespace quantlab {
namespace {

constexpr int64_t kRows = 48 * kTile;   // rows of x of one task, at most
constexpr int64_t kAhead = 128 * 1024;  // bytes of codes of one block, at most
#if defined(__AMX_INT8__)
constexpr int64_t kMany = 16;             // rows of a tile
constexpr int64_t kDecoded = 512 * 1024;  // bytes of decoded weight at a time
constexpr int64_t kSums = 2048 * 1024;    // bytes of sums of one task
constexpr int64_t kPanel = 1024;          // columns of one task, at most
constexpr int64_t kInner = 32 * 1024;     // bytes of a block of a panel
#else
constexpr int64_t kMany = kTile;
constexpr int64_t kDecoded = 16 * 1024;
constexpr int64_t kSums = 512 * 1024;
constexpr int64_t kPanel = 512;
constexpr int64_t kInner = 16 * 1024;
#endif
constexpr int64_t kWide = 2048;  // of few rows: memory likes long runs

// ---- plan and activations --------------------------------------------------

Plan plan(const Product& a, int64_t threads) {
  Plan p{};
  p.unpack = a.bits != 8 && a.bits != 4 && a.bits != 2;
  p.planes = p.unpack ? 1 : 8 / a.bits;
  const int64_t group = min_(a.group, a.k);
  const bool whole = a.groups == 1 || group % p.planes == 0;
  p.steps = ceil_div(ceil_div(group, p.planes) + !whole, 4);
  p.ones = a.x_zero != nullptr;
  p.direct = a.m + p.ones <= kDirect;
  p.tiled = kMatrix && !p.direct;
  p.words = round_up(p.steps * p.planes, p.tiled ? 16 : 1);
  // A stride of 4096 bytes would send all rows of a tile to one set of L1.
  p.stride = round_up(a.groups * p.words, 16) + 16;
  p.rows = round_up(ceil_div(a.m, ceil_div(a.m, kRows)), kMany);
  p.x_bytes = 4 * p.stride * (round_up(a.m, kMany) + p.ones) + 64;
  p.sum_bytes = 4 * a.groups * a.m;
  if (p.direct) {
    few_plan(a, threads, p);
    return p;
  }
  const int64_t fits = kSums / (8 * (p.rows + p.ones)) / kWidth * kWidth;
  const int64_t most = p.rows <= 4 * kMany ? kWide : kPanel;
  const int64_t widest = max_(min_(most, fits), kWidth);
  const int64_t panels = round_up(ceil_div(a.n, widest), threads);
  p.panel = round_up(ceil_div(a.n, panels), kWidth);
  if (a.panels) {
    // A strip from end to end for a few rows; more find a block in L1 again.
    p.block = p.rows <= 2 * kMany ? round_up(p.steps, 16) : kInner / kPanelWord;
  } else {
    // On the matrix unit all strips of a task are decoded before they are used.
    p.decoded = 4 * (p.tiled ? p.panel : kWidth) * p.planes;
    p.block = kDecoded / p.decoded;
    if (!p.tiled) p.block = min_(p.block, kAhead / (4 * p.panel));
    p.block = ceil_div(p.steps, ceil_div(p.steps, p.block));
    if (p.tiled) p.block = round_up(p.block, 16 / p.planes);
    p.copied = kWidth * (4 * p.block + 16);
  }
  p.work_bytes = p.decoded * p.block + 2 * p.copied +
                 4 * p.panel * (2 * p.rows + p.ones) + 256;
  return p;
}

// Where a row of prepared activations begins, and byte i of it lies.
uint8_t* prepared(const Plan& plan, int32_t* x, int64_t r) {
  x += plan.ones * plan.stride;
  return reinterpret_cast<uint8_t*>(
      plan.tiled ? x + r / 16 * 16 * plan.stride + r % 16 * 16
                 : x + r * plan.stride);
}
QL_INLINE int64_t place(const Plan& plan, int64_t i) {
  return plan.tiled ? i / 64 * (4 * kTileWords) + i % 64 : i;
}

template <int P>
void prepare_row(const Product& a, const Plan& plan, const int8_t* x,
                 uint8_t* out, int32_t* sums, const int32_t* zero) {
  // Sixteen codes to words of one plane each: byte 4 p + i from code P i + p.
  uint8_t order[16];
  for (int t = 0; t < 16; ++t)
    order[t / (4 * P) * (4 * P) + t % P * 4 + t % (4 * P) / P] = t;
  const __m128i by = _mm_loadu_si128(reinterpret_cast<__m128i*>(order));
  const __m128i top = _mm_set1_epi8(-128);
  for (int64_t g = 0; g < a.groups; ++g) {
    const Group group = group_at(a, plan, g);
    const int64_t size = 4 * P * plan.steps, count = group.k1 - group.k0;
    uint8_t* const d = out + place(plan, 4 * g * plan.words);
    for (int64_t i = 0; count != size && i < size; i += 4)
      memset(d + place(plan, i), 0, 4);
    const int64_t skip = group.k0 - P * group.row0;
    int64_t i = 0, sum = 0;
    __m128i total = _mm_setzero_si128();
    for (; !skip && i + 16 <= count; i += 16) {
      const __m128i v = _mm_loadu_si128(
          reinterpret_cast<const __m128i*>(x + group.k0 + i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(d + place(plan, i)),
                       _mm_shuffle_epi8(v, by));
      total = _mm_add_epi64(
          total, _mm_sad_epu8(_mm_xor_si128(v, top), _mm_setzero_si128()));
    }
    sum = _mm_cvtsi128_si64(total) + _mm_extract_epi64(total, 1) - 128 * i;
    for (; i < count; ++i) {
      const int64_t t = i + skip;
      const int64_t at = t / (4 * P) * (4 * P) + t % P * 4 + t % (4 * P) / P;
      d[place(plan, at)] = static_cast<uint8_t>(x[group.k0 + i]);
      sum += x[group.k0 + i];
    }
    if (!sums) continue;
    sums[g] = static_cast<int32_t>(sum);
    if (zero)
      sums[g] = minus(sums[g], times(static_cast<int32_t>(count),
                                     zero[a.x_zeros > 1 ? g : 0]));
  }
}

void prepare(const Product& a, const Plan& plan, int64_t begin, int64_t end,
             int32_t* x, int32_t* sums) {
  auto row = plan.planes == 1   ? prepare_row<1>
             : plan.planes == 2 ? prepare_row<2>
                                : prepare_row<4>;
  for (int64_t r = begin; r < end; ++r) {
    row(a, plan, a.x + r * a.k, prepared(plan, x, r), sums + r * a.groups,
        a.x_zero ? a.x_zero + r * a.x_zeros : nullptr);
  }
  if (!plan.ones || begin != 0) return;
  // The row of ones, which sums the weights: a one where there is a code.
  uint8_t* out = reinterpret_cast<uint8_t*>(x);
  const int64_t size = 4 * plan.words, P = plan.planes;
  memset(out, 0, size * a.groups);
  for (int64_t g = 0; g < a.groups; ++g) {
    const Group group = group_at(a, plan, g);
    for (int64_t k = group.k0; k < group.k1; ++k) {
      const int64_t t = k - P * group.row0;
      out[g * size + t / (4 * P) * (4 * P) + t % P * 4 + t % (4 * P) / P] = 1;
    }
  }
}

// ---- one task ---------------------------------------------------------------

// A block of steps within a group.
struct Block {
  int64_t group;
  const int32_t *x, *tiles;  // of the first row, or of the first tile
  int64_t rows;     // of bytes
  bool more, last;  // not the first, the last of its group
};

struct Task {
  const Product& a;
  const Plan& plan;
  const int32_t* x;
  const int32_t* x_sums;
  int64_t m0, m1, n0, n1;
  uint8_t *decoded, *copied, *unpacked;
  int32_t* sums;  // (strips where a group is several blocks, rows, kWidth)
  float* y;       // (strips, rows, kWidth); of one group, where its sums are
  uint8_t table[16];
  Ahead ahead;
  Shapes shapes;

  int64_t rows() const { return m1 - m0; }
  int64_t ones() const { return plan.ones * kWidth; }

  Codes codes(int64_t row, int64_t count, int64_t n, int64_t columns) {
    const int bits = static_cast<int>(a.bits);
    Codes c = rows_of_codes(a.codes, a.n, bits, plan.unpack, row, count, n,
                            columns, copied, unpacked);
    c.flip = flip_of(a, plan);
    c.table = table;
    return c;
  }

  // One block of one strip: integer sums of every row, and, where it is the
  // last of its group, what they add to y. In panels it needs no decoding.
  void block(const Block& b, Codes c, const Columns& by, int32_t* sums,
             float* y) {
    const bool t = a.table != nullptr;
    const int64_t words = ceil_div(c.rows, 4) * plan.planes;
    const uint8_t* const w = a.panels ? c.p : decoded;
    // With several tiles there is time to fetch in each, else while decoding;
    // which the first of several does itself, but for tables.
    const bool several = a.panels || rows() > kTile;
    const bool apart = a.panels || t || plan.ones || !several;
    Ahead none;
    Ahead& later = several ? ahead : none;
    if (apart && !a.panels) {
      Decode f = plan.planes == 1   ? decode_of<1>(t)
                 : plan.planes == 2 ? decode_of<2>(t)
                                    : decode_of<4>(t);
      f(c, several ? none : ahead, decoded);
    }
    if (plan.ones)
      tile_of(1, a.panels)(w, words, b.x, plan.stride, sums, b.more, none);
    const FirstTile first = plan.planes == 1   ? first_tile<1>
                            : plan.planes == 2 ? first_tile<2>
                                               : first_tile<4>;
    const int32_t* x = b.x + (plan.ones + m0) * plan.stride;
    int32_t* out = sums + ones();
    // Else the sums of a tile end in y, which lies elsewhere.
    const bool keeps = b.more || !b.last || a.groups == 1;
    const bool simple = is_simple(a);
    for (int64_t r = 0; r < rows(); r += kTile, x += kTile * plan.stride) {
      const int64_t many = min_(rows() - r, kTile);
      const bool decodes = r == 0 && !apart;
      if (b.last && simple) {
        const Onto to{x_sums + (m0 + r) * a.groups + b.group, a.groups,
                      by.offset, a.zero ? by.zero : nullptr, by.scale,
                      y + r * kWidth, b.group == 0};
        if (decodes)
          first(c, decoded, x, plan.stride, out, b.more, later, &to);
        else
          onto_of(many, a.panels, a.zero != nullptr)(
              w, words, x, plan.stride, out, b.more, later, to);
        out += kTile * kWidth;
        continue;
      }
      if (decodes)
        first(c, decoded, x, plan.stride, out, b.more, later, nullptr);
      else
        tile_of(many, a.panels)(w, words, x, plan.stride, out, b.more, later);
      if (b.last)
        scale_onto(a, x_sums, b.group, by, m0 + r, m0 + r + many, b.group == 0,
                   sums, out, y + r * kWidth);
      if (keeps) out += kTile * kWidth;
    }
  }

  // The same on the matrix unit, of a strip that has been decoded, or lies in a
  // panel.
  void matrix(const Block& b, const uint8_t* w, const Columns& by,
              int32_t* sums, float* y) {
    const int64_t words = ceil_div(b.rows, 4) * plan.planes;
    Ahead none;
    if (plan.ones)
      tile_of(1, a.panels)(w, words, b.x, plan.stride, sums, b.more, none);
    const int32_t* x = b.tiles + m0 * plan.stride;
    int32_t* out = sums + ones();
    const bool keeps = b.more || !b.last || a.groups == 1;
    for (int64_t r = 0; r < rows(); r += kMany, x += kMany * plan.stride) {
      const int64_t many = min_(rows() - r, kMany);
      // What a later tile reads is in L2 by then.
      (a.panels && r == 0 ? matrix_tile<true> : matrix_tile<false>)(
          w, words, x, out, b.more, shapes);
      if (b.last && is_simple(a)) {
        const Onto to{x_sums + (m0 + r) * a.groups + b.group, a.groups,
                      by.offset, a.zero ? by.zero : nullptr, by.scale,
                      y + r * kWidth, b.group == 0};
        if (a.zero)
          matrix_onto<true>(out, many, to);
        else
          matrix_onto<false>(out, many, to);
      } else if (b.last) {
        scale_onto(a, x_sums, b.group, by, m0 + r, m0 + r + many, b.group == 0,
                   sums, out, y + r * kWidth);
      }
      if (keeps) out += kMany * kWidth;
    }
  }

  // Decodes all strips of a block, `apart` bytes from one to the next.
  void decode_block(int64_t row, int64_t count, int64_t apart) {
    const bool t = a.table != nullptr;
    const DecodeStrips f = plan.planes == 1   ? decode_strips_of<1>(t)
                           : plan.planes == 2 ? decode_strips_of<2>(t)
                                              : decode_strips_of<4>(t);
    // Narrow strips, and codes that straddle bytes, one by one.
    const int64_t whole = plan.unpack ? 0 : (n1 - n0) / kWidth;
    if (whole) f(codes(row, count, n0, kWidth), whole, decoded, apart);
    for (int64_t i = whole, n; (n = n0 + i * kWidth) < n1; ++i)
      f(codes(row, count, n, min_(kWidth, n1 - n)), 1, decoded + i * apart, 0);
  }

  // Codes in panels: strip by strip, each from its first row to its last.
  void run_panels() {
    for (int64_t n = n0; n < n1; n += kWidth) {
      const int64_t columns = min_(kWidth, n1 - n);
      const Columns by = columns_of(a, 0, n, columns);
      float* const to = reinterpret_cast<float*>(sums + ones());
      for (int64_t s = 0; s < plan.steps; s += plan.block) {
        const int64_t words = min_(plan.block, plan.steps - s);
        const Block b{0, x + s,
                      x + plan.ones * plan.stride + s / 16 * kTileWords,
                      4 * words, s > 0, s + words == plan.steps};
        const uint8_t* const w = panel_at(a, plan, n) + s * kPanelWord;
        ahead = ahead_of(w, words);
        if (kMatrix)
          matrix(b, w, by, sums, to);
        else
          block(b, Codes{w, 0, 4 * words, 0, nullptr}, by, sums, to);
      }
      write(a, n, columns, m0, m1, to);
    }
  }

  void run() {
    if (a.panels) return run_panels();
    const int64_t all = round_up(rows(), kMany);
    const int64_t strip = kWidth * (all + plan.ones);
    const bool apart = plan.steps > plan.block;
    for (int64_t g = 0; g < a.groups; ++g) {
      const Group group = group_at(a, plan, g);
      for (int64_t s = 0; 4 * s < group.rows; s += plan.block) {
        const int64_t row = group.row0 + 4 * s;
        const int64_t count = min_(4 * plan.block, group.rows - 4 * s);
        const int64_t word = g * plan.words + s * plan.planes;
        const Block b{g, x + word,
                      x + plan.ones * plan.stride + word / 16 * kTileWords,
                      count, s > 0, 4 * s + count == group.rows};
        fetch_after(row + count);
        const int64_t bytes = 4 * kWidth * plan.block * plan.planes;
        if (kMatrix) decode_block(row, count, bytes);
        for (int64_t n = n0, i = 0; n < n1; n += kWidth, ++i) {
          const int64_t columns = min_(kWidth, n1 - n);
          const Columns by = b.last ? columns_of(a, g, n, columns) : Columns{};
          int32_t* const from = sums + (apart ? i * strip : 0);
          float* const to = a.groups > 1
                                ? y + i * kWidth * rows()
                                : reinterpret_cast<float*>(from + ones());
          if (kMatrix)
            matrix(b, decoded + i * bytes, by, from, to);
          else
            block(b, codes(row, count, n, columns), by, from, to);
          if (b.last && g == a.groups - 1) write(a, n, columns, m0, m1, to);
        }
      }
    }
  }

  // Lets the next block of codes be fetched while this one is multiplied.
  void fetch_after(int64_t row) {
    ahead = Ahead{};
    if (plan.unpack || kMatrix) return;
    ahead.p = a.codes + row * a.n + n0;
    ahead.stride = a.n;
    ahead.lines = ahead.left = ceil_div(n1 - n0, 64);
    ahead.rows = min_(a.code_rows - row, 4 * plan.block);
  }
};

void task(const Product& a, const Plan& plan, const int32_t* x,
          const int32_t* x_sums, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
          void* work) {
  Task t{a, plan, x, x_sums, m0, m1, n0, n1, 0, 0, 0, 0, 0, {}, {}, {}};
  uint8_t* p = static_cast<uint8_t*>(work);
  p += 63 & -reinterpret_cast<uintptr_t>(p);
  const int64_t strips = plan.panel / kWidth;
  t.decoded = p;
  t.copied = p += plan.decoded * plan.block;
  t.unpacked = p += plan.copied;
  t.sums = reinterpret_cast<int32_t*>(p += plan.copied);
  t.y = reinterpret_cast<float*>(
      p + 4 * kWidth * strips * (plan.rows + plan.ones));
  table_of(a, t.table);
  t.run();
}

constexpr Kernels kKernels{plan,       prepare,    task,      few_task,
                           few_finish, float_plan, float_task, quantize};

}  // namespace

#if defined(__AMX_INT8__)
const Kernels& amx_kernels() { return kKernels; }
#elif defined(__AVX512VNNI__)
const Kernels& avx512vnni_kernels() { return kKernels; }
#elif defined(__AVXVNNI__)
const Kernels& avxvnni_kernels() { return kKernels; }
#else
const Kernels& avx2_kernels() { return kKernels; }
#endif

}  // namespace quantlab
