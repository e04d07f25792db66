// GEMMs of numbers split into bfloat16, by matrix tiles (kernels/amx.cpp) or dot products (kernels/avx512_bf16.cpp, neon_bf16.cpp): what there is here,
// and their packed operand.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "frames.h"

namespace convfast {
namespace cpu {

using Part = unsigned short;

enum { kTileRows = 16 };  // what rows are rounded up to

// Parts that numbers of type A are split into; all its bits are in them.
template <class A>
constexpr long kSplitParts = std::is_same_v<A, BFloat16> ? 1 : std::is_same_v<A, Half> ? 2 : 3;

// Whether the processor rounds to bfloat16 and multiplies it by dot products.
inline bool has_bfloat16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kOfBfloat16 = 1u << 5;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kOfBfloat16);
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kOfBfloat16 = 1ul << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & kOfBfloat16;
#elif defined(__aarch64__) && defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}

// Where the processor has tiles, the system lets this process use them and ATEN_CPU_CAPABILITY asks for nothing less; else null.
inline const SplitKernels* tile_kernels() {
  static const SplitKernels* const chosen = []() -> const SplitKernels* {
#if defined(__x86_64__) && defined(__linux__)
    if (std::getenv("ATEN_CPU_CAPABILITY") || std::strcmp(kernels<float>().name, "avx512") != 0) return nullptr;
#if defined(CONVFAST_EMULATE_TILES)
    return amx_kernels();
#endif
    constexpr unsigned kTiles = 1u << 24, kOfBfloat16 = 1u << 22;
    constexpr long kAskFor = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!has_bfloat16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kOfBfloat16)) return nullptr;
    if (syscall(SYS_arch_prctl, kAskFor, kTileData) == 0) return amx_kernels();
#endif
    return nullptr;
  }();
  return chosen;
}

// Those for activations A: tiles, or dot products of numbers that are one part.
template <class A>
const SplitKernels* split_kernels() {
  static const SplitKernels* const chosen = []() -> const SplitKernels* {
    if (std::is_same_v<A, double>) return nullptr;
    if (tile_kernels()) return tile_kernels();
    if (kSplitParts<A> > 1 || std::getenv("ATEN_CPU_CAPABILITY") || !has_bfloat16()) return nullptr;
    const char* const name = kernels<float>().name;
    return std::strcmp(name, "avx512") == 0 || std::strcmp(name, "neon") == 0 ? dot_kernels() : nullptr;
  }();
  return chosen;
}

inline long split_size(long columns, long k, long parts) { return round_up(columns, kSlab) * k * parts; }

// What a number of type A is given to pack_split as: a bfloat16 as it is.
template <class A>
using Unsplit = std::conditional_t<std::is_same_v<A, BFloat16>, Part, float>;
template <class A>
const auto* unsplit(const A* numbers) {
  return reinterpret_cast<const std::conditional_t<std::is_same_v<A, BFloat16>, Part, A>*>(numbers);
}

// The second operand of a SplitGemm: fill(column, to) writes the k numbers of a column (k whole depths); columns from `columns` on are zero.
template <class N, class F>
void pack_split(const SplitKernels& by, long columns, long k, long parts, Part* packed, const F& fill) {
  constexpr long kWide = 16, kTile = kWide * kSplitDepth;
  parallel(round_up(columns, kSlab) / kWide, [&](long begin, long end) {
    constexpr bool kSplits = std::is_same_v<N, float>;
    std::vector<float> rows(kSplits ? kWide * k : 0);
    std::vector<Part> split(parts * kWide * k);
    N* numbers;
    if constexpr (kSplits) numbers = rows.data();
    else numbers = split.data();
    for (long tile = begin; tile < end; ++tile) {
      for (long j = 0; j < kWide; ++j) {
        N* to = numbers + j * k;
        if (tile * kWide + j < columns) fill(tile * kWide + j, to);
        else std::fill(to, to + k, N(0));
      }
      if (kSplits) by.split({kWide, k, parts, rows.data(), k, split.data(), kWide * k, k});
      Part* to = packed + (tile / 2 * 2 * kWide * k * parts) + tile % 2 * kTile;
      for (long at = 0; at < k; at += kSplitDepth)
        for (long part = 0; part < parts; ++part, to += 2 * kTile)  // a pair of k is the size of a float
          kernels<float>().transpose(kWide, kSplitDepth / 2, reinterpret_cast<const float*>(split.data() + part * kWide * k + at), k / 2,
                                     reinterpret_cast<float*>(to), kWide);
    }
  });
}

// Depths [begin, end) of the same of one part, from `rows` rows of n bfloat16 each; `zeros` (as many) follow them to the next whole depth.
inline void pair_split(const Part* const* row, long rows, const Part* zeros, long n, Part* packed, long begin, long end) {
  for (long depth = begin; depth < end; ++depth) {
    const Part* of_depth[kSplitDepth];
    for (long i = 0; i < kSplitDepth; ++i) of_depth[i] = depth * kSplitDepth + i < rows ? row[depth * kSplitDepth + i] : zeros;
    kernels<float>().pair_rows(n, of_depth, packed + depth * 32 * kSplitDepth, 32 * round_up(rows, kSplitDepth));
  }
}

// The first operand, [n][ld], that is the transpose of what pair_split made of k rows, whole depths.
inline void transpose_split(const Part* packed, long k, long n, Part* to, long ld) {
  constexpr long kWide = 16;
  for (long c = 0; c < n; c += kWide)
    for (long at = 0; at < k; at += kSplitDepth)
      kernels<float>().transpose(kWide, kWide, reinterpret_cast<const float*>(packed + c / 32 * 32 * k + at * 32 + c % 32 * kSplitDepth), kWide,
                                 reinterpret_cast<float*>(to + c * ld + at), ld / 2);
}

}  // namespace cpu
}  // namespace convfast
