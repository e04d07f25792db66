// bfloat16 is the upper half of a float.

typedef unsigned Bits __attribute__((may_alias));

static void widen(long n, const unsigned short* __restrict from, float* __restrict to) {
  Bits* bits = (Bits*)to;
  for (long i = 0; i < n; ++i) bits[i] = (unsigned)from[i] << 16;
}

// 32 rows of n bfloat16 as a depth of the second operand of a SplitGemm: neighbouring rows side by side. `panel`: from 32 columns to the next.
static void pair_rows(long n, const unsigned short* const* row, unsigned short* to, long panel) {
  enum { kWide = 16 };
  typedef unsigned short Wide __attribute__((vector_size(2 * kWide), aligned(2), may_alias));
  typedef unsigned Pairs __attribute__((vector_size(4 * kWide), aligned(2), may_alias));
  unsigned short last[2][kWide] = {};
  for (long c = 0; c < n; c += kWide) {
    Pairs* tile = (Pairs*)(to + c / 32 * panel + c % 32 * kSplitDepth);
    const long width = n - c < kWide ? n - c : kWide;
    for (long pair = 0; pair < kSplitDepth / 2; ++pair) {
      const unsigned short *even = row[2 * pair] + c, *odd = row[2 * pair + 1] + c;
      if (width < kWide) {
        for (long i = 0; i < width; ++i) last[0][i] = even[i], last[1][i] = odd[i];
        even = last[0];
        odd = last[1];
      }
      tile[pair] = __builtin_convertvector(*(const Wide*)even, Pairs) | __builtin_convertvector(*(const Wide*)odd, Pairs) << 16;
    }
  }
}

// To the nearest, of two the even one; a NaN becomes the quiet one.
static void narrow(long n, const float* __restrict from, unsigned short* __restrict to) {
  const Bits* bits = (const Bits*)from;
  for (long i = 0; i < n; ++i) {
    const unsigned b = bits[i], rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    to[i] = (unsigned short)((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
