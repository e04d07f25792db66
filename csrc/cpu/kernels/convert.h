// Numbers of 16 bits.

template <Format kFormat>
static INLINE void widen_all(long n, const unsigned short* __restrict from, float* __restrict to) {
  typedef Simd<float> S;
  long i = 0;
#pragma GCC unroll 4
  for (; i + S::W <= n; i += S::W) S::store(to + i, S::widen(S::load(from + i), kFormat));
  if (i < n) S::storen(to + i, S::widen(S::loadn(from + i, n - i), kFormat), n - i);
}

template <Format kFormat>
static INLINE void narrow_all(long n, const float* __restrict from, unsigned short* __restrict to) {
  typedef Simd<float> S;
  long i = 0;
#pragma GCC unroll 4
  for (; i + S::W <= n; i += S::W) S::store(to + i, S::narrow(S::load(from + i), kFormat));
  if (i < n) S::storen(to + i, S::narrow(S::loadn(from + i, n - i), kFormat), n - i);
}

static void widen(long n, const unsigned short* from, Format format, float* to) {
  format == kHalf ? widen_all<kHalf>(n, from, to) : widen_all<kBfloat16>(n, from, to);
}

static void narrow(long n, const float* from, Format format, unsigned short* to) {
  format == kHalf ? narrow_all<kHalf>(n, from, to) : narrow_all<kBfloat16>(n, from, to);
}

// 32 rows of n bfloat16 as a depth of the second operand of a SplitGemm: neighbouring rows side by side. `panel`: from 32 columns to the next.
static void pair_rows(long n, const unsigned short* const* row, unsigned short* to, long panel) {
  typedef Simd<float> S;
  enum { kWide = 16 };
  unsigned short last[2][kWide] = {};
  for (long c = 0; c < n; c += kWide) {
    float* tile = (float*)(to + c / 32 * panel + c % 32 * kSplitDepth);
    const long width = n - c < kWide ? n - c : kWide;
    for (long pair = 0; pair < kSplitDepth / 2; ++pair) {
      const unsigned short *even = row[2 * pair] + c, *odd = row[2 * pair + 1] + c;
      if (width < kWide) {
        for (long i = 0; i < width; ++i) last[0][i] = even[i], last[1][i] = odd[i];
        even = last[0];
        odd = last[1];
      }
      for (long i = 0; i < kWide; i += S::W) S::store(tile + pair * kWide + i, (S::V)(S::upper(S::load(even + i)) >> 16 | S::upper(S::load(odd + i))));
    }
  }
}
