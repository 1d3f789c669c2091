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
constexpr int64_t kPage = 4096;  // of memory, in bytes
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
    // What is decoded, and what more than a few rows use, lies in L1.
    const bool few = p.rows <= 2 * kMany, whole = few && is_ready(a);
    const int64_t inner = few ? kInner / 2 : kInner;
    p.block = whole ? p.steps : inner / (kPanelWord * p.planes);
    p.decoded = is_ready(a) ? 0 : 4 * kWidth * p.planes;
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
    Codes c = codes_at(a, plan, row, count, n, columns, copied, unpacked);
    c.table = table;
    return c;
  }

  // One block of one strip: integer sums of every row, and, where it is the
  // last of its group, what they add to y.
  void block(const Block& b, Codes c, const Columns& by, int32_t* sums,
             float* y) {
    const bool t = a.table != nullptr;
    const int64_t words = ceil_div(c.rows, 4) * plan.planes;
    const bool ready = is_ready(a);
    const uint8_t* const w = ready ? c.p : decoded;
    // With several tiles there is time to fetch in each, else while decoding;
    // which the first of several does itself, but for tables.
    const bool several = ready || rows() > kTile;
    const bool at_once = !ready && several && !t && !plan.ones;
    Ahead none;
    Ahead& later = several ? ahead : none;
    if (!ready && !at_once) decode(c, several ? none : ahead);
    if (plan.ones)
      tile_of(1, ready)(w, words, b.x, plan.stride, sums, b.more, none);
    const FirstTile first = a.panels ? first_tile_of<true>(plan.planes)
                                     : first_tile_of<false>(plan.planes);
    const int32_t* x = b.x + (plan.ones + m0) * plan.stride;
    int32_t* out = sums + ones();
    // Else the sums of a tile end in y, which lies elsewhere.
    const bool keeps = b.more || !b.last || a.groups == 1;
    const bool simple = is_simple(a);
    for (int64_t r = 0; r < rows(); r += kTile, x += kTile * plan.stride) {
      const int64_t many = min_(rows() - r, kTile);
      const bool decodes = r == 0 && at_once;
      // What a later tile reads is in L2 by then, and need not be fetched: in
      // vectors of 64 bytes a panel is read as decoded words are.
      const bool fetches = ready && (r == 0 || kWidth != kPanelColumns);
      if (b.last && simple) {
        const Onto to{x_sums + (m0 + r) * a.groups + b.group, a.groups,
                      by.offset, a.zero ? by.zero : nullptr, by.scale,
                      y + r * kWidth, b.group == 0};
        if (decodes)
          first(c, decoded, x, plan.stride, out, b.more, later, &to);
        else
          onto_of(many, fetches, a.zero != nullptr)(
              w, words, x, plan.stride, out, b.more, later, to);
        out += kTile * kWidth;
        continue;
      }
      if (decodes)
        first(c, decoded, x, plan.stride, out, b.more, later, nullptr);
      else
        tile_of(many, fetches)(w, words, x, plan.stride, out, b.more, later);
      if (b.last)
        scale_onto(a, x_sums, b.group, by, m0 + r, m0 + r + many, b.group == 0,
                   sums, out, y + r * kWidth);
      if (keeps) out += kTile * kWidth;
    }
  }

  void decode(const Codes& c, Ahead& later) {
    const bool t = a.table != nullptr;
    const Decode f = a.panels ? decode_of<true>(plan.planes, t)
                              : decode_of<false>(plan.planes, t);
    f(c, later, decoded);
  }

  // The same on the matrix unit, of a strip that has been decoded, or lies in a
  // panel. As many lines from `later` on as the block has are fetched meanwhile.
  void matrix(const Block& b, const uint8_t* w, const Columns& by,
              int32_t* sums, float* y, const uint8_t* later = nullptr) {
    const int64_t words = ceil_div(b.rows, 4) * plan.planes;
    Ahead none;
    if (plan.ones)
      tile_of(1, is_ready(a))(w, words, b.x, plan.stride, sums, b.more, none);
    const int32_t* x = b.tiles + m0 * plan.stride;
    int32_t* out = sums + ones();
    const int64_t tiles = 4 * ceil_div(words, 16);
    const int64_t lines =
        later ? ceil_div(b.rows, tiles * ceil_div(rows(), kMany)) : 0;
    const MatrixTile f = matrix_tile_of(lines);
    const bool keeps = b.more || !b.last || a.groups == 1;
    for (int64_t r = 0; r < rows(); r += kMany, x += kMany * plan.stride) {
      const int64_t many = min_(rows() - r, kMany);
      f(w, words, x, out, b.more, shapes, later);
      later += 64 * tiles * lines;
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
      float* const to =
          a.groups > 1 ? y : reinterpret_cast<float*>(sums + ones());
      for (int64_t g = 0; g < a.groups; ++g) {
        const Group group = group_at(a, plan, g);
        const Columns by = columns_of(a, g, n, columns);
        for (int64_t s = 0; 4 * s < group.rows; s += plan.block) {
          const Block b = block_at(group, g, s);
          const Codes c = codes(group.row0 + 4 * s, b.rows, n, columns);
          if (!kMatrix) {
            block(b, c, by, sums, to);
            continue;
          }
          const bool ready = is_ready(a), whole = plan.block == plan.steps;
          if (!ready) decode(c, ahead);
          matrix(b, ready ? c.p : decoded, by, sums, to,
                 c.p + (ready && whole ? kPage : kPanelColumns * b.rows));
        }
      }
      write(a, n, columns, m0, m1, to);
    }
  }

  // Steps [s, s + block) of group g, or up to its end.
  Block block_at(const Group& group, int64_t g, int64_t s) const {
    const int64_t count = min_(4 * plan.block, group.rows - 4 * s);
    const int64_t word = g * plan.words + s * plan.planes;
    return {g, x + word,
            x + plan.ones * plan.stride + word / 16 * kTileWords,
            count, s > 0, 4 * s + count == group.rows};
  }

  void run() {
    if (a.panels) return run_panels();
    const int64_t all = round_up(rows(), kMany);
    const int64_t strip = kWidth * (all + plan.ones);
    const bool apart = plan.steps > plan.block;
    for (int64_t g = 0; g < a.groups; ++g) {
      const Group group = group_at(a, plan, g);
      for (int64_t s = 0; 4 * s < group.rows; s += plan.block) {
        const Block b = block_at(group, g, s);
        const int64_t row = group.row0 + 4 * s;
        fetch_after(row + b.rows);
        const int64_t bytes = 4 * kWidth * plan.block * plan.planes;
        if (kMatrix) decode_block(row, b.rows, bytes);
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
            block(b, codes(row, b.rows, n, columns), by, from, to);
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
