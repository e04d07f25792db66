// GEMM by dot products of two bfloat16 (FEAT_BF16, Armv8.6), for activations that are bfloat16 themselves: twice the operations of an FMA.
//
// As avx512_bf16.cpp; a vector of each row has four pairs of neighbours in k, and a lane of it multiplies.
#if defined(__aarch64__)
#if defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
#include <arm_neon.h>

#define CONVFAST_ISA neon_bf16
#define CONVFAST_BYTES 16
#define CONVFAST_BFLOAT16

#include "../../common/cell.h"
#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace convfast {
namespace cpu {
namespace CONVFAST_ISA {
namespace {

#include "parts.inc"

static INLINE bfloat16x8_t load_parts(const Part* p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }

// Four columns' sums and a pair of each row, the lane-th of a.
template <int kLane>
static INLINE float32x4_t dot(float32x4_t sum, bfloat16x8_t b, bfloat16x8_t a) {
  return vbfdotq_laneq_f32(sum, b, a, kLane);
}

template <int M, int NV, int kLane>
static INLINE void turn(float32x4_t (&acc)[M][NV], const bfloat16x8_t (&av)[M], const Part* b) {
  bfloat16x8_t bv[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) bv[v] = load_parts(b + 8 * v);
#pragma GCC unroll 9
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = dot<kLane>(acc[m][v], bv[v], av[m]);
}

// Rows [row, row + M) by columns [n, n + 4 NV).
template <int M, int NV>
static void tile(const SplitGemm& g, long row, long n) {
  enum { kPairs = kSplitDepth / 2, kVector = 2 * 16, kHalf = kPairs * kVector, kAhead = 8 };
  const long panel = 2 * kHalf / kSplitDepth * g.k;
  const Part* b = g.b + n / 32 * panel + n % 32 / 16 * kHalf + n % 16 * 2;
  float* out = g.out + row * g.ldo + n;
  const float* const start = g.init ? g.init + n : out;
  const long ld_start = g.init ? 0 : g.ldo;
  float32x4_t acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = vld1q_f32(start + m * ld_start + 4 * v);
  // One pointer for three rows, no loop without a turn: as in gemm.h.
  const long stride = g.lda;
  const Part* p[(M + 2) / 3];
  for (int j = 0; j < (M + 2) / 3; ++j) p[j] = g.a + (row + 3 * j) * stride;
  const Part* const end = b + panel;
  do {
    const Part* const half = b + kHalf;
    do {
      bfloat16x8_t av[M];
#pragma GCC unroll 9
      for (int m = 0; m < M; ++m) av[m] = load_parts(p[m / 3] + m % 3 * stride);
      for (int j = 0; j < (M + 2) / 3; ++j) p[j] += 8;
#pragma GCC unroll 4
      for (int ahead = 0; ahead < 4; ++ahead) __builtin_prefetch(b + (kAhead + ahead) * kVector);
      turn<M, NV, 0>(acc, av, b);
      turn<M, NV, 1>(acc, av, b + kVector);
      turn<M, NV, 2>(acc, av, b + 2 * kVector);
      turn<M, NV, 3>(acc, av, b + 3 * kVector);
      b += 4 * kVector;
    } while (b != half);
    b += kHalf;
  } while (b != end);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) vst1q_f32(out + m * g.ldo + 4 * v, acc[m][v]);
}

#define CONVFAST_FEW(f) f(1), f(2), f(3), f(4)
#include "dots.inc"

}  // namespace
}  // namespace CONVFAST_ISA

const SplitKernels* dot_kernels() { return &neon_bf16::kDots; }

}  // namespace cpu
}  // namespace convfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "kernels.h"

namespace convfast {
namespace cpu {
const SplitKernels* dot_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace convfast
#endif
#endif
