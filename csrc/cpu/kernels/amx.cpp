// GEMM by matrix tiles of bfloat16 (AMX), exact enough for float32: a number is the sum of three bfloat16 (8 of its 24 bits each), and
// of the nine products of parts six are taken; what the others hold is below 2^-22 of the product. Six products of 1024 operations a
// cycle each are 2.7 times what FMAs do. Activations that are narrower themselves need two parts (float16) or one (bfloat16).
//
// A tile of A is 16 rows by 32 of k, of B 16 pairs of k by 16 columns; two by two tiles of the result stay in registers over all of k,
// or one by four where there is one tile of rows.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 11)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#define CONVFAST_ISA amx
#define CONVFAST_BYTES 64

#include "../../common/cell.h"
#include "kernels.h"
#if defined(CONVFAST_EMULATE_TILES)
#include "../../testing/tiles.h"
#else
#define CONVFAST_BFLOAT16
#endif

#define INLINE inline __attribute__((always_inline))

namespace convfast {
namespace cpu {
namespace CONVFAST_ISA {
namespace {

#include "parts.inc"

// Infinities are held to the largest float32: inf - inf would make them NaN.
static INLINE __m512i finite(__m512 v) {
  const __m512 most = _mm512_set1_ps(3.40282347e38f);
  return (__m512i)_mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, v));
}

// What v has below its upper half.
static INLINE __m512i rest(__m512i v) {
  return (__m512i)_mm512_sub_ps((__m512)v, (__m512)_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)));
}

// Parts are cut off, not rounded: three hold all 24 bits either way.
template <int kParts>
static void split_rows(const Split& p) {
  alignas(64) short upper[32];
  for (int i = 0; i < 32; ++i) upper[i] = 2 * i + 1;
  const __m512i upper_halves = _mm512_load_si512(upper);
  for (long r = 0; r < p.rows; ++r) {
    const float* from = p.from + r * p.ld_from;
    Part* to = p.to + r * p.ld;
    for (long c = 0; c < p.n; c += 32) {
      const long left = p.n - c;
      const unsigned lanes = left >= 32 ? ~0u : (1u << left) - 1;
      __m512i low = finite(_mm512_maskz_loadu_ps((__mmask16)lanes, from + c)), high = finite(_mm512_maskz_loadu_ps((__mmask16)(lanes >> 16), from + c + 16));
      for (int i = 0; i < kParts; ++i) {
        _mm512_storeu_si512(to + i * p.part + c, _mm512_permutex2var_epi16(low, upper_halves, high));
        low = rest(low);
        high = rest(high);
      }
    }
  }
}

static void split(const Split& p) {
  if (p.parts == 3) split_rows<3>(p);
  else if (p.parts == 2) split_rows<2>(p);
  else round_rows(p);
}

struct alignas(64) Config {
  unsigned char palette = 1, start = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3: the result; 4 and 5: A; 6 and 7: B.
#define CONVFAST_A(part_) _tile_loadd(4, a + (part_) * g.part, lda); _tile_loadd(5, a + (part_) * g.part + 16 * g.lda, lda)
#define CONVFAST_B(part_) _tile_loadd(6, b + (part_) * 1024, 64); _tile_loadd(7, b + (part_) * 1024 + 512, 64)
#define CONVFAST_MULTIPLY() _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)

// 32 rows by 32 columns. From one product to the next one operand changes; the largest comes last.
template <int kParts>
static INLINE void two_by_two(const SplitGemm& g, long row, long n) {
  const Part *a = g.a + row * g.lda, *b = g.b + n * g.k * kParts;
  float* out = g.out + row * g.ldo + n;
  const float *start = g.init ? g.init + n : out, *start2 = g.init ? start : out + 16 * g.ldo;
  const long lda = g.lda * 2, ldo = g.ldo * 4, ld_start = g.init ? 0 : ldo;
  _tile_loadd(0, start, ld_start);
  _tile_loadd(1, start + 16, ld_start);
  _tile_loadd(2, start2, ld_start);
  _tile_loadd(3, start2 + 16, ld_start);
  for (long k = 0; k < g.k; k += kSplitDepth, a += kSplitDepth, b += kParts * 1024) {
    CONVFAST_A(0);
    if (kParts == 3) {
      CONVFAST_B(2);
      CONVFAST_MULTIPLY();
    }
    if (kParts >= 2) {
      CONVFAST_B(1);
      CONVFAST_MULTIPLY();
      CONVFAST_A(1);
      CONVFAST_MULTIPLY();
    }
    CONVFAST_B(0);
    if (kParts >= 2) {
      CONVFAST_MULTIPLY();
      if (kParts == 3) {
        CONVFAST_A(2);
        CONVFAST_MULTIPLY();
      }
      CONVFAST_A(0);
    }
    CONVFAST_MULTIPLY();
  }
  _tile_stored(0, out, ldo);
  _tile_stored(1, out + 16, ldo);
  _tile_stored(2, out + 16 * g.ldo, ldo);
  _tile_stored(3, out + 16 * g.ldo + 16, ldo);
}
#undef CONVFAST_A
#undef CONVFAST_B
#undef CONVFAST_MULTIPLY

// Tiles 0 to 3: the result; 4 to 6: the parts of A; 7: B.
#define CONVFAST_COLUMN(tile_, part_, from_) \
  _tile_loadd(7, from_ + (part_) * 1024, 64); \
  if (part_) _tile_dpbf16ps(tile_, 4, 7); \
  if (part_ < 2 && kParts >= 2) _tile_dpbf16ps(tile_, 5, 7); \
  if (!part_ && kParts == 3) _tile_dpbf16ps(tile_, 6, 7); \
  if (!part_) _tile_dpbf16ps(tile_, 4, 7)
#define CONVFAST_COLUMNS(part_) \
  CONVFAST_COLUMN(0, part_, b); \
  CONVFAST_COLUMN(1, part_, b + 512); \
  CONVFAST_COLUMN(2, part_, b2); \
  CONVFAST_COLUMN(3, part_, b2 + 512)

// 16 rows by 64 columns, products in the same order: a row's bits do not depend on how many there are.
template <int kParts>
static INLINE void one_by_four(const SplitGemm& g, long row, long n) {
  const Part *a = g.a + row * g.lda, *b = g.b + n * g.k * kParts, *b2 = b + 32 * g.k * kParts;
  float* out = g.out + row * g.ldo + n;
  const float* start = g.init ? g.init + n : out;
  const long lda = g.lda * 2, ldo = g.ldo * 4, ld_start = g.init ? 0 : ldo;
  _tile_loadd(0, start, ld_start);
  _tile_loadd(1, start + 16, ld_start);
  _tile_loadd(2, start + 32, ld_start);
  _tile_loadd(3, start + 48, ld_start);
  for (long k = 0; k < g.k; k += kSplitDepth, a += kSplitDepth, b += kParts * 1024, b2 += kParts * 1024) {
    _tile_loadd(4, a, lda);
    if (kParts >= 2) _tile_loadd(5, a + g.part, lda);
    if (kParts == 3) {
      _tile_loadd(6, a + 2 * g.part, lda);
      CONVFAST_COLUMNS(2);
    }
    if (kParts >= 2) {
      CONVFAST_COLUMNS(1);
    }
    CONVFAST_COLUMNS(0);
  }
  _tile_stored(0, out, ldo);
  _tile_stored(1, out + 16, ldo);
  _tile_stored(2, out + 32, ldo);
  _tile_stored(3, out + 48, ldo);
}
#undef CONVFAST_COLUMNS
#undef CONVFAST_COLUMN

template <int kParts>
static void tiles(const SplitGemm& g, long begin, long end) {
  const long pairs = g.rows % 32 == 0 || g.rows % 32 > 16 ? g.rows : g.rows - g.rows % 32;
  for (long n = begin; n < end; n += 32)  // its weights stay in L1 while the rows pass by
    for (long row = 0; row < pairs; row += 32) two_by_two<kParts>(g, row, n);
  if (pairs < g.rows)
    for (long n = begin; n < end; n += 64) one_by_four<kParts>(g, pairs, n);
}

static INLINE void columns(const SplitGemm& g, long begin, long end) {
  if (g.parts == 3) tiles<3>(g, begin, end);
  else if (g.parts == 2) tiles<2>(g, begin, end);
  else tiles<1>(g, begin, end);
}

static void gemm(const SplitGemm& g) {
  const Config config;
  _tile_loadconfig(&config);
  columns(g, 0, g.columns);
  _tile_release();
}

static void lstm_step(const SplitGemm& g, const LstmCells<float>& p) {
  const Config config;
  _tile_loadconfig(&config);
  for (long block = p.begin; block < p.end; ++block) {
    columns(g, block * kSlab, (block + 1) * kSlab);
    lstm_cells_forward(p, block, block + 1);
  }
  _tile_release();
}

}  // namespace
}  // namespace CONVFAST_ISA

const SplitKernels* amx_kernels() {
  static const SplitKernels kernels = {amx::split, amx::gemm, amx::lstm_step};
  return &kernels;
}

}  // namespace cpu
}  // namespace convfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "kernels.h"

namespace convfast {
namespace cpu {
const SplitKernels* amx_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace convfast
#endif
