// Integer products of sixteen rows of activations by one strip of the weight,
// on the matrix unit of a core (AMX): a tile is sixteen rows of 64 bytes.
//
// Decoded words lie as the unit wants them, sixteen words, each four bytes along
// k, of sixteen columns; activations are prepared in tiles, one after the other.
#pragma once

#include "tiles.h"

namespace quantlab {
namespace {

constexpr int64_t kTileWords = 16 * 16;  // of a tile of activations

#if defined(__AMX_INT8__)

// Shapes of the tiles of the thread. Numbers 0 to 3 are the sums of a strip,
// 4 activations and 6 weights; 5 and 7 are those of the last words, which may
// be fewer than sixteen. Other code of the thread may use the unit too, so
// that a task sets the shapes when it begins, and lets go at its end.
class Shapes {
 public:
  ~Shapes() {
    if (last_ >= 0) _tile_release();
  }
  void set(int64_t last) {
    if (last == last_) return;
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
    config.row_bytes[5] = static_cast<uint16_t>(4 * last);
    config.rows[7] = static_cast<uint8_t>(last);
    // The compiler thinks that eight bytes of it are read.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    last_ = last;
  }

 private:
  int64_t last_ = -1;
};

// Fetches lines number kLines t on of what is used later, so that memory does
// not rest while tile t is multiplied.
template <int kLines>
QL_INLINE void fetch(const uint8_t* p, int t) {
  for (int i = 0; i < kLines; ++i)
    __builtin_prefetch(p + 64 * (kLines * t + i), 0, 3);
}

// sums (16, kWidth) of `words` words, more than none; they are added to what
// is there if there is `more`.
template <int kLines>
__attribute__((noinline)) void matrix_tile(const uint8_t* w, int64_t words,
                                           const int32_t* x, int32_t* sums,
                                           bool more, Shapes& shapes,
                                           const uint8_t* later) {
  constexpr int kRow = 4 * kWidth;  // bytes of a word of all columns
  const int64_t last = (words - 1) % 16 + 1;
  shapes.set(last);
  asm volatile("" : : : "memory");  // what is loaded has been stored
  if (more) {
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + 16, kRow);
    _tile_loadd(2, sums + 32, kRow);
    _tile_loadd(3, sums + 48, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; words > 16; words -= 16, w += 16 * kRow, x += kTileWords) {
    _tile_loadd(4, x, 64);
    fetch<kLines>(later, 0);
    _tile_loadd(6, w, kRow);
    _tile_dpbsud(0, 4, 6);
    fetch<kLines>(later, 1);
    _tile_loadd(6, w + 64, kRow);
    _tile_dpbsud(1, 4, 6);
    fetch<kLines>(later, 2);
    _tile_loadd(6, w + 128, kRow);
    _tile_dpbsud(2, 4, 6);
    fetch<kLines>(later, 3);
    _tile_loadd(6, w + 192, kRow);
    _tile_dpbsud(3, 4, 6);
    later += 4 * 64 * kLines;
  }
  _tile_loadd(5, x, 64);
  fetch<kLines>(later, 0);
  _tile_loadd(7, w, kRow);
  _tile_dpbsud(0, 5, 7);
  fetch<kLines>(later, 1);
  _tile_loadd(7, w + 64, kRow);
  _tile_dpbsud(1, 5, 7);
  fetch<kLines>(later, 2);
  _tile_loadd(7, w + 128, kRow);
  _tile_dpbsud(2, 5, 7);
  fetch<kLines>(later, 3);
  _tile_loadd(7, w + 192, kRow);
  _tile_dpbsud(3, 5, 7);
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + 16, kRow);
  _tile_stored(2, sums + 32, kRow);
  _tile_stored(3, sums + 48, kRow);
}

// The product that fetches so many lines with each tile, or somewhat more.
using MatrixTile = void (*)(const uint8_t*, int64_t, const int32_t*, int32_t*,
                            bool, Shapes&, const uint8_t*);
inline MatrixTile matrix_tile_of(int64_t lines) {
  return lines > 8   ? matrix_tile<16>
         : lines > 4 ? matrix_tile<8>
         : lines > 2 ? matrix_tile<4>
         : lines > 1 ? matrix_tile<2>
         : lines > 0 ? matrix_tile<1>
                     : matrix_tile<0>;
}

// Sums of `rows` rows onto y.
template <bool kZero>
inline void matrix_onto(const int32_t* sums, int64_t rows, Onto to) {
  for (int64_t r = 0; r < rows; ++r, sums += kWidth) {
    I sum[1][4];
    begin<1>(sum, sums, true);
    add_onto<1, kZero>(sum, to);
    to.x_sums += to.groups, to.y += kWidth;
  }
}

#else

// Never called: `kMatrix` is false.
struct Shapes {};
using MatrixTile = void (*)(const uint8_t*, int64_t, const int32_t*, int32_t*,
                            bool, Shapes&, const uint8_t*);
inline MatrixTile matrix_tile_of(int64_t) { return nullptr; }
template <bool kZero>
inline void matrix_onto(const int32_t*, int64_t, const Onto&) {}

#endif

}  // namespace
}  // namespace quantlab
