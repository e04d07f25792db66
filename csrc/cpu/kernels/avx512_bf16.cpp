// GEMM by dot products of two bfloat16 (AVX512-BF16), for activations that are bfloat16 themselves: twice the operations of an FMA.
//
// A tile is up to 14 rows by two vectors of columns, or few rows by four, and stays in registers over all of k, as in gemm.h; what is
// broadcast is a pair of neighbours in k. Its floor is that of the dot products: 64 operations a vector and cycle and port.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#define CONVFAST_ISA avx512_bf16
#define CONVFAST_BYTES 64
#define CONVFAST_BFLOAT16

#include "../../common/cell.h"
#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace convfast {
namespace cpu {
namespace CONVFAST_ISA {
namespace {

#include "parts.inc"

typedef int Pair __attribute__((aligned(2), may_alias));

// Rows [row, row + M) by columns [n, n + 16 NV).
template <int M, int NV>
static void tile(const SplitGemm& g, long row, long n) {
  enum { kPairs = kSplitDepth / 2, kVector = 2 * 16, kHalf = kPairs * kVector, kAhead = 8 };
  const long panel = 2 * kHalf / kSplitDepth * g.k;
  const Part* b = g.b + n / 32 * panel;
  float* out = g.out + row * g.ldo + n;
  const float* const start = g.init ? g.init + n : out;
  const long ld_start = g.init ? 0 : g.ldo;
  __m512 acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_loadu_ps(start + m * ld_start + 16 * v);
  // One pointer for three rows, no loop without a turn: as in gemm.h.
  const long stride = g.lda;
  const Part* p[(M + 2) / 3];
  for (int j = 0; j < (M + 2) / 3; ++j) p[j] = g.a + (row + 3 * j) * stride;
  const Part* const end = b + panel;
  do {
    const Part* const half = b + kHalf;
    do {
      __m512bh bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Part* at = b + v / 2 * panel + v % 2 * kHalf;
        bv[v] = (__m512bh)_mm512_loadu_si512(at);
        __builtin_prefetch(at + kAhead * kVector);  // L2 does not keep up by itself
      }
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        const __m512bh av = (__m512bh)_mm512_set1_epi32(*(const Pair*)(p[m / 3] + m % 3 * stride));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], av, bv[v]);
      }
      for (int j = 0; j < (M + 2) / 3; ++j) p[j] += 2;
      b += kVector;
    } while (b != half);
    b += kHalf;
  } while (b != end);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + m * g.ldo + 16 * v, acc[m][v]);
}

#define CONVFAST_FEW(f) f(1), f(2), f(3), f(4), f(5), f(6)
#include "dots.inc"

}  // namespace
}  // namespace CONVFAST_ISA

const SplitKernels* dot_kernels() { return &avx512_bf16::kDots; }

}  // namespace cpu
}  // namespace convfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#elif !defined(__aarch64__)
#include "kernels.h"

namespace convfast {
namespace cpu {
const SplitKernels* dot_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace convfast
#endif
