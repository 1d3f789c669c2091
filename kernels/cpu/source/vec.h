// Vectors of bytes, in the few operations the kernels need, for the
// instruction set this file is compiled for.
//
// kWidth bytes make one vector, and a strip is kWidth columns. Four rows of a
// strip interleave into four vectors of [kWidth / 4 columns][4 rows]. Shuffles
// stay within 16 bytes, so that columns come out in an order of their own:
// `to_lanes` brings per-column words into it, `from_lanes` back.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define QL_INLINE static inline __attribute__((always_inline))
#define QL_INLINE_MEMBER inline __attribute__((always_inline))

// Calls f(0), ..., f(N - 1) with constants, unrolled before the compiler
// decides what lives in registers: a loop over an array of sums leaves them in
// memory (half the speed, GCC 12).
template <int N>
struct Index {
  constexpr operator int() const { return N; }
};
template <int N, typename F>
QL_INLINE void each(const F& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(Index<N - 1>{});
  }
}
#define QL_NOW __attribute__((always_inline))

#if defined(__AVX512VNNI__)

constexpr int kWidth = 64;
#ifdef QL_ROWS  // small tiles compile fast, under the sanitizers
constexpr int kTile = QL_ROWS;
constexpr int kDirect = QL_ROWS;
#else
constexpr int kTile = 6;    // rows of a register tile: 24 of 32 registers
constexpr int kDirect = 4;  // rows at most to decode within the product
#endif
#if defined(__AMX_INT8__)
constexpr bool kMatrix = true;  // tiles of sixteen rows, see amx.h
#else
constexpr bool kMatrix = false;
#endif
using I = __m512i;
using F = __m512;
struct X {
  I v;
};

QL_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
QL_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
QL_INLINE I zeros() { return _mm512_setzero_si512(); }
QL_INLINE I bytes(int b) { return _mm512_set1_epi8(static_cast<char>(b)); }
QL_INLINE I words(int32_t v) { return _mm512_set1_epi32(v); }
QL_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
QL_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
QL_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
QL_INLINE I or_(I a, I b) { return _mm512_or_si512(a, b); }
QL_INLINE I and_(I a, I b) { return _mm512_and_si512(a, b); }
// (v & mask) ^ flip
QL_INLINE I pick(I v, I mask, I flip) {
  return _mm512_ternarylogic_epi32(v, mask, flip, 0x6A);
}
QL_INLINE I right(I v, int s) { return _mm512_srli_epi16(v, s); }
QL_INLINE I left(I v, int s) { return _mm512_slli_epi16(v, s); }
template <int S>
QL_INLINE I shift_sum(I v) {
  return _mm512_srai_epi32(v, S);
}
QL_INLINE I look_up(I table, I v) { return _mm512_shuffle_epi8(table, v); }
QL_INLINE I table16(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
QL_INLINE I low8(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
QL_INLINE I high8(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
QL_INLINE I low16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
QL_INLINE I high16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
QL_INLINE X signed_bytes(I v) { return {v}; }
QL_INLINE X spread(int32_t x) { return signed_bytes(words(x)); }
// sum + the products of four unsigned and four signed bytes, exact
QL_INLINE I dot(I sum, I w, X x) { return _mm512_dpbusd_epi32(sum, w, x.v); }
QL_INLINE F floats(I v) { return _mm512_cvtepi32_ps(v); }
QL_INLINE F load_f(const void* p) { return _mm512_loadu_ps(p); }
QL_INLINE void store_f(void* p, F v) { _mm512_storeu_ps(p, v); }
QL_INLINE F spread_f(float v) { return _mm512_set1_ps(v); }
QL_INLINE F mul_f(F a, F b) { return _mm512_mul_ps(a, b); }
QL_INLINE F fma_f(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
QL_INLINE F cast_f(I v) { return _mm512_castsi512_ps(v); }
QL_INLINE F sub_f(F a, F b) { return _mm512_sub_ps(a, b); }
QL_INLINE F add_f(F a, F b) { return _mm512_add_ps(a, b); }
// The second where one is NaN.
QL_INLINE F min_f(F a, F b) { return _mm512_min_ps(a, b); }
QL_INLINE F max_f(F a, F b) { return _mm512_max_ps(a, b); }
QL_INLINE F round_f(F v) { return _mm512_roundscale_ps(v, 8); }
// v, or 0 where it is NaN.
QL_INLINE F known_f(F v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
}
QL_INLINE I integers(F v) { return _mm512_cvtps_epi32(v); }
// Whole numbers of a byte.
QL_INLINE void store_bytes(int8_t* p, const I (&v)[4]) {
  const I all = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]),
                                   _mm512_packs_epi32(v[2], v[3]));
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13,  //
                                    2, 6, 10, 14, 3, 7, 11, 15);
  store(p, _mm512_permutexvar_epi32(order, all));
}
QL_INLINE void store_bytes(int8_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
QL_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
QL_INLINE I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
QL_INLINE I right32(I v, int s) { return _mm512_srli_epi32(v, s); }
QL_INLINE I widen(const void* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
QL_INLINE I widen_signed(const void* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
// Entries of 16 floats, by the lowest four bits of each word.
QL_INLINE F look_up_f(const float* table, I v) {
  return _mm512_permutexvar_ps(v, load_f(table));
}
QL_INLINE void to_lanes(I (&v)[4]) {
  I a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
  I b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
  I c = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  I d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}
QL_INLINE void from_lanes(I (&v)[4]) { to_lanes(v); }

#else  // AVX2

constexpr int kWidth = 32;
constexpr bool kMatrix = false;
using I = __m256i;
using F = __m256;

QL_INLINE I load(const void* p) {
  return _mm256_loadu_si256(static_cast<const I*>(p));
}
QL_INLINE void store(void* p, I v) {
  _mm256_storeu_si256(static_cast<I*>(p), v);
}
QL_INLINE I zeros() { return _mm256_setzero_si256(); }
QL_INLINE I bytes(int b) { return _mm256_set1_epi8(static_cast<char>(b)); }
QL_INLINE I words(int32_t v) { return _mm256_set1_epi32(v); }
QL_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
QL_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
QL_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
QL_INLINE I or_(I a, I b) { return _mm256_or_si256(a, b); }
QL_INLINE I and_(I a, I b) { return _mm256_and_si256(a, b); }
QL_INLINE I pick(I v, I mask, I flip) {
  return _mm256_xor_si256(_mm256_and_si256(v, mask), flip);
}
QL_INLINE I right(I v, int s) { return _mm256_srli_epi16(v, s); }
QL_INLINE I left(I v, int s) { return _mm256_slli_epi16(v, s); }
template <int S>
QL_INLINE I shift_sum(I v) {
  return _mm256_srai_epi32(v, S);
}
QL_INLINE I look_up(I table, I v) { return _mm256_shuffle_epi8(table, v); }
QL_INLINE I table16(const void* p) {
  return _mm256_broadcastsi128_si256(
      _mm_loadu_si128(static_cast<const __m128i*>(p)));
}
QL_INLINE I low8(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
QL_INLINE I high8(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
QL_INLINE I low16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
QL_INLINE I high16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
QL_INLINE F floats(I v) { return _mm256_cvtepi32_ps(v); }
QL_INLINE F load_f(const void* p) {
  return _mm256_loadu_ps(static_cast<const float*>(p));
}
QL_INLINE void store_f(void* p, F v) {
  _mm256_storeu_ps(static_cast<float*>(p), v);
}
QL_INLINE F spread_f(float v) { return _mm256_set1_ps(v); }
QL_INLINE F mul_f(F a, F b) { return _mm256_mul_ps(a, b); }
QL_INLINE F fma_f(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
QL_INLINE F cast_f(I v) { return _mm256_castsi256_ps(v); }
QL_INLINE F sub_f(F a, F b) { return _mm256_sub_ps(a, b); }
QL_INLINE F add_f(F a, F b) { return _mm256_add_ps(a, b); }
QL_INLINE F min_f(F a, F b) { return _mm256_min_ps(a, b); }
QL_INLINE F max_f(F a, F b) { return _mm256_max_ps(a, b); }
QL_INLINE F round_f(F v) { return _mm256_round_ps(v, 8); }
QL_INLINE F known_f(F v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
}
QL_INLINE I integers(F v) { return _mm256_cvtps_epi32(v); }
QL_INLINE void store_bytes(int8_t* p, const I (&v)[4]) {
  const I all = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]),
                                   _mm256_packs_epi32(v[2], v[3]));
  const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  store(p, _mm256_permutevar8x32_epi32(all, order));
}
QL_INLINE void store_bytes(int8_t* p, F v) {
  const I i = _mm256_cvtps_epi32(v);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(i),
                                       _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
QL_INLINE I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
QL_INLINE I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
QL_INLINE I right32(I v, int s) { return _mm256_srli_epi32(v, s); }
QL_INLINE I widen(const void* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
QL_INLINE I widen_signed(const void* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
QL_INLINE F look_up_f(const float* table, I v) {
  const F low = _mm256_permutevar8x32_ps(load_f(table), v);
  const F high = _mm256_permutevar8x32_ps(load_f(table + 8), v);
  return _mm256_blendv_ps(low, high, cast_f(_mm256_slli_epi32(v, 28)));
}
QL_INLINE void to_lanes(I (&v)[4]) {
  I a = _mm256_permute2x128_si256(v[0], v[2], 0x20);
  I b = _mm256_permute2x128_si256(v[0], v[2], 0x31);
  I c = _mm256_permute2x128_si256(v[1], v[3], 0x20);
  I d = _mm256_permute2x128_si256(v[1], v[3], 0x31);
  v[0] = a, v[1] = b, v[2] = c, v[3] = d;
}
QL_INLINE void from_lanes(I (&v)[4]) {
  I a = _mm256_permute2x128_si256(v[0], v[1], 0x20);
  I b = _mm256_permute2x128_si256(v[2], v[3], 0x20);
  I c = _mm256_permute2x128_si256(v[0], v[1], 0x31);
  I d = _mm256_permute2x128_si256(v[2], v[3], 0x31);
  v[0] = a, v[1] = b, v[2] = c, v[3] = d;
}

#if defined(__AVXVNNI__)

constexpr int kTile = 3;
constexpr int kDirect = 3;
struct X {
  I v;
};
QL_INLINE X signed_bytes(I v) { return {v}; }
QL_INLINE X spread(int32_t x) { return signed_bytes(words(x)); }
QL_INLINE I dot(I sum, I w, X x) {
  return _mm256_dpbusd_avx_epi32(sum, w, x.v);
}

#else

// Products of bytes summed in 16 bits (vpmaddubsw) saturate: widen first.
constexpr int kTile = 2;
constexpr int kDirect = 2;
struct X {
  I even, odd;
};
QL_INLINE X signed_bytes(I v) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8),
          _mm256_srai_epi16(v, 8)};
}
QL_INLINE X spread(int32_t x) { return signed_bytes(words(x)); }
QL_INLINE I dot(I sum, I w, X x) {
  I even = _mm256_madd_epi16(and_(w, _mm256_set1_epi16(255)), x.even);
  I odd = _mm256_madd_epi16(right(w, 8), x.odd);
  return add(sum, add(even, odd));
}

#endif
#endif
