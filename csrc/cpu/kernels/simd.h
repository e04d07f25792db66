// The few vector operations that the kernels use, for the instruction set of the including file
// (CONVFAST_BYTES = 64, 32 or 16; CONVFAST_NEON: 16, on Arm). Compiler vector types carry + - *; only what they lack is an intrinsic.
// min and max keep a NaN in the second argument, as x86 does.

#if CONVFAST_BYTES == 16 && defined(__aarch64__)
#define CONVFAST_NEON
#endif

template <class T>
struct Simd;

// Stores that do not fetch the line first, for aligned vectors; ordinary ones where there are none.
template <class V>
static INLINE void stream_vector(V* p, V v) {
#if CONVFAST_BYTES > 16
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
#if CONVFAST_BYTES == 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
  *p = v;
}

static INLINE void stream_fence() {
#if CONVFAST_BYTES > 16
  _mm_sfence();
#endif
}

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(CONVFAST_BYTES)));
  typedef float U __attribute__((vector_size(CONVFAST_BYTES), aligned(4), may_alias));
  typedef int I __attribute__((vector_size(CONVFAST_BYTES)));
  enum { W = CONVFAST_BYTES / 4 };
  static INLINE V load(const float* p) { return *(const U*)p; }
  static INLINE void store(float* p, V v) { *(U*)p = v; }
  // p 2^floor(n), with n, a multiple of 1 / kParts, also in the low bits of t.
  enum { kParts = CONVFAST_BYTES == 64 ? 16 : 1 };
#if CONVFAST_BYTES == 64
  static INLINE V scale(V p, V n, V) { return (V)_mm512_scalef_ps((__m512)p, (__m512)n); }
  // 2^(n - floor(n)).
  static INLINE V power_of_sixteenths(V t) {
    const __m512 powers = _mm512_setr_ps(1.f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f,
                                         1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
    return (V)_mm512_permutexvar_ps((__m512i)t, powers);
  }
#else
  static INLINE V scale(V p, V, V t) { return p * (V)(((I)t << 23) + 0x3f800000); }
#endif
  static INLINE void stream(float* p, V v) { stream_vector((V*)p, v); }
  static INLINE void fence() { stream_fence(); }
  // 16 bits a number, of a bfloat16 the upper half; narrowed to the nearest, of two to the even one.
  typedef unsigned Bits __attribute__((vector_size(CONVFAST_BYTES)));
  typedef unsigned short Halves __attribute__((vector_size(CONVFAST_BYTES / 2), aligned(2), may_alias));
  static INLINE Halves load(const unsigned short* p) { return *(const Halves*)p; }
  static INLINE void store(unsigned short* p, Halves h) { *(Halves*)p = h; }
  static INLINE void stream(unsigned short* p, Halves h) { stream_vector((Halves*)p, h); }
  // The compiler makes two of a conversion between vectors of unlike size.
#if CONVFAST_BYTES == 64
  static INLINE Bits upper(Halves h) { return (Bits)_mm512_cvtepu16_epi32((__m256i)h) << 16; }
  static INLINE Halves lower(Bits b) { return (Halves)_mm512_cvtepi32_epi16((__m512i)b); }
#else
  static INLINE Bits upper(Halves h) { return __builtin_convertvector(h, Bits) << 16; }
  static INLINE Halves lower(Bits b) { return __builtin_convertvector(b, Halves); }
#endif
  static INLINE V widen(Halves h, Format format) {
    if (format == kHalf) return widen_half(h);
    return (V)upper(h);
  }
  static INLINE Halves narrow(V v, Format format) {
    if (format == kHalf) return narrow_half(v);
#if defined(CONVFAST_BFLOAT16) && defined(CONVFAST_NEON)
    return (Halves)vcvt_bf16_f32((float32x4_t)v);
#elif defined(CONVFAST_BFLOAT16)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const Bits b = (Bits)v, rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return lower(v == v ? rounded : Bits{} + 0x7fc0);
#endif
  }
#if CONVFAST_BYTES == 64
  static INLINE V widen_half(Halves h) { return (V)_mm512_cvtph_ps((__m256i)h); }
  static INLINE Halves narrow_half(V v) { return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static INLINE Halves loadn(const unsigned short* p, long n) { return (Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p); }
  static INLINE void storen(unsigned short* p, Halves h, long n) { _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h); }
#else
#if defined(CONVFAST_NEON)
  static INLINE V widen_half(Halves h) { return (V)vcvt_f32_f16((float16x4_t)h); }
  static INLINE Halves narrow_half(V v) { return (Halves)vcvt_f16_f32((float32x4_t)v); }
#else
  // Both after torch (c10/util/Half.h). The exponent moves by a product with a power of two; numbers below its range by a sum with one
  // that has the last bit where they have it.
  static INLINE V widen_half(Halves h) {
    const Bits all = upper(h), sign = all & 0x80000000u, rest = all + all;
    const V normal = (V)((rest >> 4) + (0xe0u << 23)) * 0x1p-112f, small = (V)((rest >> 17) | (126u << 23)) - .5f;
    return (V)(sign | (rest < (1u << 27) ? (Bits)small : (Bits)normal));
  }
  static INLINE Halves narrow_half(V v) {
    const Bits all = (Bits)v, sign = all & 0x80000000u, twice = all + all, exponent = twice & 0xff000000u;
    const V scaled = (V)(all & 0x7fffffffu) * 0x1p+112f * 0x1p-110f;  // infinite past the range
    const Bits sum = (Bits)((V)(((exponent < 0x71000000u ? Bits{} + 0x71000000u : exponent) >> 1) + 0x07800000u) + scaled);
    const Bits finite = (sum >> 13 & 0x7c00u) + (sum & 0xfffu);
    return lower(sign >> 16 | (twice > 0xff000000u ? Bits{} + 0x7e00u : finite));
  }
#endif
  static INLINE Halves loadn(const unsigned short* p, long n) {
    if (n >= W) return load(p);
    Halves h = {};
    for (long i = 0; i < n; ++i) h[i] = p[i];
    return h;
  }
  static INLINE void storen(unsigned short* p, Halves h, long n) {
    if (n >= W) return store(p, h);
    for (long i = 0; i < n; ++i) p[i] = h[i];
  }
#endif
#if CONVFAST_BYTES == 64
  static INLINE V set1(float x) { return (V)_mm512_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static INLINE V loadn(const float* p, long n) { return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
  static INLINE void storen(float* p, V v, long n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
  static INLINE V min(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
  static INLINE V max(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
  // To 2 ulp in a fraction of a division's time: a reciprocal of 14 bits, then one Newton step for the quotient.
  static INLINE V divide(V n, V d) {
    const V y = (V)_mm512_rcp14_ps((__m512)d), q = n * y;
    return q + y * (n - d * q);
  }
#else
#if CONVFAST_BYTES == 32
  static INLINE V set1(float x) { return (V)_mm256_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static INLINE V min(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
  static INLINE V max(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(CONVFAST_NEON)
  static INLINE V set1(float x) { return (V)vdupq_n_f32(x); }
  static INLINE V fma(V a, V b, V c) { return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
  static INLINE V min(V a, V b) { return (V)vminq_f32((float32x4_t)a, (float32x4_t)b); }
  static INLINE V max(V a, V b) { return (V)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
#else
  static INLINE V set1(float x) { return V{x, x, x, x}; }
  static INLINE V fma(V a, V b, V c) { return a * b + c; }
  static INLINE V min(V a, V b) { return a < b ? a : b; }
  static INLINE V max(V a, V b) { return a > b ? a : b; }
#endif
  static INLINE V loadn(const float* p, long n) {
    if (n >= W) return load(p);
    V v = {};
    for (long i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static INLINE void storen(float* p, V v, long n) {
    if (n >= W) return store(p, v);
    for (long i = 0; i < n; ++i) p[i] = v[i];
  }
#if defined(CONVFAST_NEON)
  // To 2 ulp, as above, from a reciprocal of 8 bits.
  static INLINE V divide(V n, V d) {
    const float32x4_t rough = vrecpeq_f32((float32x4_t)d);
    const V y = (V)vmulq_f32(rough, vrecpsq_f32((float32x4_t)d, rough)), q = n * y;
    return q + y * (n - d * q);
  }
#else
  static INLINE V divide(V n, V d) { return n / d; }
#endif
#endif
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(CONVFAST_BYTES)));
  typedef double U __attribute__((vector_size(CONVFAST_BYTES), aligned(8), may_alias));
  enum { W = CONVFAST_BYTES / 8 };
  static INLINE V load(const double* p) { return *(const U*)p; }
  static INLINE void store(double* p, V v) { *(U*)p = v; }
  static INLINE void stream(double* p, V v) { stream_vector((V*)p, v); }
  static INLINE void fence() { stream_fence(); }
#if CONVFAST_BYTES == 64
  static INLINE V set1(double x) { return (V)_mm512_set1_pd(x); }
#elif CONVFAST_BYTES == 32
  static INLINE V set1(double x) { return (V)_mm256_set1_pd(x); }
#else
  static INLINE V set1(double x) { return V{x, x}; }
#endif
  static INLINE V loadn(const double* p, long n) {
    if (n >= W) return load(p);
    V v = {};
    for (long i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static INLINE void storen(double* p, V v, long n) {
    if (n >= W) return store(p, v);
    for (long i = 0; i < n; ++i) p[i] = v[i];
  }
};

// Keeps a NaN.
template <class V>
static INLINE V relu_of(V x) {
  return x <= V{} ? V{} : x;
}

// The vector at `at` of what is kept, `lanes` of it.
template <class T>
static INLINE typename Simd<T>::V load_kept(const Kept<T>& from, long at, long lanes) {
  typedef Simd<T> S;
  const bool whole = lanes >= S::W;
  if constexpr (sizeof(T) == sizeof(float)) {
    const unsigned short* p = (const unsigned short*)from.data + at;
    if (from.format != kFull) return S::widen(whole ? S::load(p) : S::loadn(p, lanes), from.format);
  }
  const T* p = (const T*)from.data + at;
  return whole ? S::load(p) : S::loadn(p, lanes);
}

template <class T>
static INLINE void store_kept(const Kept<T>& to, long at, typename Simd<T>::V v, long lanes) {
  typedef Simd<T> S;
  const bool whole = lanes >= S::W;
  if constexpr (sizeof(T) == sizeof(float)) {
    unsigned short* p = (unsigned short*)to.data + at;
    if (to.format != kFull) return whole ? S::store(p, S::narrow(v, to.format)) : S::storen(p, S::narrow(v, to.format), lanes);
  }
  T* p = (T*)to.data + at;
  whole ? S::store(p, v) : S::storen(p, v, lanes);
}

// Whole vectors at aligned addresses.
template <class T>
static INLINE void stream_kept(const Kept<T>& to, long at, typename Simd<T>::V v) {
  typedef Simd<T> S;
  if constexpr (sizeof(T) == sizeof(float))
    if (to.format != kFull) return S::stream((unsigned short*)to.data + at, S::narrow(v, to.format));
  S::stream((T*)to.data + at, v);
}

// N vectors at once, each operation for all of them before the next: what depends on itself alone would leave the processor waiting.
template <class T, int N>
struct Several {
#define CONVFAST_EACH(expression)                                        \
  Several result;                                                        \
  _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) result.v[i] = expression; \
  return result
  typename Simd<T>::V v[N];
  friend INLINE Several operator+(Several a, Several b) { CONVFAST_EACH(a.v[i] + b.v[i]); }
  friend INLINE Several operator-(Several a, Several b) { CONVFAST_EACH(a.v[i] - b.v[i]); }
  friend INLINE Several operator*(Several a, Several b) { CONVFAST_EACH(a.v[i] * b.v[i]); }
  friend INLINE Several operator-(Several a) { CONVFAST_EACH(-a.v[i]); }
  friend INLINE void operator+=(Several& a, Several b) { a = a + b; }
  static INLINE Several set1(T x) { CONVFAST_EACH(Simd<T>::set1(x)); }
  static INLINE Several min(Several a, Several b) { CONVFAST_EACH(Simd<T>::min(a.v[i], b.v[i])); }
  static INLINE Several max(Several a, Several b) { CONVFAST_EACH(Simd<T>::max(a.v[i], b.v[i])); }
  static INLINE Several fma(Several a, Several b, Several c) { CONVFAST_EACH(Simd<T>::fma(a.v[i], b.v[i], c.v[i])); }
  static INLINE Several divide(Several n, Several d) { CONVFAST_EACH(Simd<T>::divide(n.v[i], d.v[i])); }
  enum { kParts = Simd<T>::kParts };
  static INLINE Several scale(Several p, Several n, Several t) { CONVFAST_EACH(Simd<T>::scale(p.v[i], n.v[i], t.v[i])); }
  static INLINE Several power_of_sixteenths(Several t) { CONVFAST_EACH(Simd<T>::power_of_sixteenths(t.v[i])); }
  // Of N places, `apart` elements from one to the next.
  static INLINE Several load(const T* p, long apart) { CONVFAST_EACH(Simd<T>::load(p + i * apart)); }
  INLINE void store(T* p, long apart) const {
    _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) Simd<T>::store(p + i * apart, v[i]);
  }
  INLINE void keep(const Kept<T>& to, long at, long apart, bool streams) const {
    _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) streams ? stream_kept(to, at + i * apart, v[i]) : store_kept(to, at + i * apart, v[i], Simd<T>::W);
  }
  INLINE void stream(T* p, long apart) const {
    _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) Simd<T>::stream(p + i * apart, v[i]);
  }
  typedef Several V;
#undef CONVFAST_EACH
};
