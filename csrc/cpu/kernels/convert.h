// bfloat16 is the upper half of a float.

typedef unsigned Bits __attribute__((may_alias));

static void widen(long n, const unsigned short* __restrict from, float* __restrict to) {
  Bits* bits = (Bits*)to;
  for (long i = 0; i < n; ++i) bits[i] = (unsigned)from[i] << 16;
}

// To the nearest, of two the even one; a NaN becomes the quiet one.
static void narrow(long n, const float* __restrict from, unsigned short* __restrict to) {
  const Bits* bits = (const Bits*)from;
  for (long i = 0; i < n; ++i) {
    const unsigned b = bits[i], rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    to[i] = (unsigned short)((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
