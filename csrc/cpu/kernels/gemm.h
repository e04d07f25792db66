// GEMM micro-kernels. A tile is up to kTile pixels of one row by one panel of B (kPanel columns) and lives in registers for the
// whole K axis: per step of k one or two vector loads of B, one broadcast of A per pixel, no store. B streams from L2 once per
// tile (panel bytes per k / tile pixels = 9 bytes a cycle at full FMA rate with AVX-512), A lies in L1.

template <class T>
struct Tile {
  // 28 accumulators + 2 of B + 1 of A fill 32 registers; 12 + 2 + 1 fit in 16.
  enum { kVectors = 2, kPixels = CONVFAST_BYTES == 64 ? 14 : 6, W = Simd<T>::W, kPanel = kVectors * W };
};

template <class T>
static INLINE const T* row_start(const Operand<T>& o, long sample, long d, long y) {
  return o.frames + sample * o.frame + d * o.map.depth + y * o.map.height;
}

// out[m, :] = init + sum over both operands' runs of a[m, k] b[k, :]. kNext: a holds the next tile right behind this one, in lines
// that are not in L1 yet.
template <class T, int M, int NV, bool kNext>
static void tile_gemm(const T* const* a, const Runs* const* runs, const T* b, const T* init, T* out, long ldo) {
  typedef Simd<T> S;
  typedef typename S::V V;
  V acc[M][NV];
  for (int n = 0; n < NV; ++n) {
    const V v = init ? S::load(init + n * S::W) : V{};
    for (int m = 0; m < M; ++m) acc[m][n] = v;
  }
  for (int o = 0; o < 2; ++o) {
    if (!a[o]) continue;
    const Runs& run = *runs[o];
    const long stride = run.stride;
    for (long i = 0; i < run.count; ++i) {
      // One pointer for three pixels: base, base + stride, base + 2 stride are all addressing modes.
      const T* p[(M + 2) / 3];
      for (int j = 0; j < (M + 2) / 3; ++j) p[j] = a[o] + run.offset[i] + 3 * j * stride;
      const T* next = a[o] + run.offset[i] + M * stride;
      for (const T* end = b + run.length * NV * S::W; b != end; b += NV * S::W) {
        V bv[NV];
        for (int n = 0; n < NV; ++n) bv[n] = S::load(b + n * S::W);
        for (int n = 0; n < NV; ++n) __builtin_prefetch(b + (12 * NV + n) * S::W);  // L2 does not keep up by itself
        if (kNext) __builtin_prefetch(next);
        next += 64 / sizeof(T);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
          const V av = S::set1(p[m / 3][(m % 3) * stride]);
          for (int n = 0; n < NV; ++n) acc[m][n] += av * bv[n];
        }
        for (int j = 0; j < (M + 2) / 3; ++j) ++p[j];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) S::store(out + m * ldo + n * S::W, acc[m][n]);
}

// dw[m, :] += sum over pixels of a[pixel, m] g[pixel, :], over row segments of n pixels each.
template <class T, int M, int NV>
static void tile_weight_grad(long segments, const T* const* a, long a_stride, const T* const* g, long g_stride, const long* pixels,
                             T* dw, long ldw) {
  typedef Simd<T> S;
  typedef typename S::V V;
  enum { kAhead = 8 };  // every pixel of a is on other cache lines
  V acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = V{};
      __builtin_prefetch(dw + m * ldw + n * S::W, 1);  // read at the end
    }
  for (long s = 0; s < segments; ++s) {
    const T* p = a[s];
    const T* q = g[s];
    for (long x = 0; x < pixels[s]; ++x, p += a_stride, q += g_stride) {
      V gv[NV];
      for (int n = 0; n < NV; ++n) gv[n] = S::load(q + n * S::W);
      __builtin_prefetch(p + kAhead * a_stride);
      if (M > 1) __builtin_prefetch(p + kAhead * a_stride + M - 1);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        const V av = S::set1(p[m]);
        for (int n = 0; n < NV; ++n) acc[m][n] += av * gv[n];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) {
      T* d = dw + m * ldw + n * S::W;
      S::store(d, S::load(d) + acc[m][n]);
    }
}

template <class T>
struct TileTable {
  typedef void (*Gemm)(const T* const*, const Runs* const*, const T*, const T*, T*, long);
  typedef void (*WeightGradTile)(long, const T* const*, long, const T* const*, long, const long*, T*, long);

  template <int NV, bool kNext>
  static INLINE void gemm(long m, const T* const* a, const Runs* const* runs, const T* b, const T* init, T* out, long ldo) {
    static const Gemm table[] = {
        tile_gemm<T, 1, NV, kNext>, tile_gemm<T, 2, NV, kNext>, tile_gemm<T, 3, NV, kNext>, tile_gemm<T, 4, NV, kNext>, tile_gemm<T, 5, NV, kNext>, tile_gemm<T, 6, NV, kNext>,
#if CONVFAST_BYTES == 64
        tile_gemm<T, 7, NV, kNext>, tile_gemm<T, 8, NV, kNext>, tile_gemm<T, 9, NV, kNext>, tile_gemm<T, 10, NV, kNext>, tile_gemm<T, 11, NV, kNext>,
        tile_gemm<T, 12, NV, kNext>, tile_gemm<T, 13, NV, kNext>, tile_gemm<T, 14, NV, kNext>,
#endif
    };
    table[m - 1](a, runs, b, init, out, ldo);
  }

  template <int NV>
  static INLINE void weight_grad(long m, long segments, const T* const* a, long a_stride, const T* const* g, long g_stride,
                                 const long* pixels, T* dw, long ldw) {
    static const WeightGradTile table[] = {
        tile_weight_grad<T, 1, NV>, tile_weight_grad<T, 2, NV>, tile_weight_grad<T, 3, NV>, tile_weight_grad<T, 4, NV>,
        tile_weight_grad<T, 5, NV>, tile_weight_grad<T, 6, NV>,
#if CONVFAST_BYTES == 64
        tile_weight_grad<T, 7, NV>, tile_weight_grad<T, 8, NV>, tile_weight_grad<T, 9, NV>, tile_weight_grad<T, 10, NV>,
        tile_weight_grad<T, 11, NV>, tile_weight_grad<T, 12, NV>, tile_weight_grad<T, 13, NV>, tile_weight_grad<T, 14, NV>,
#endif
    };
    table[m - 1](segments, a, a_stride, g, g_stride, pixels, dw, ldw);
  }
};

// Pixels [x, x + m) of one row by all columns: panel after panel, the last one a single vector wide where that is enough.
template <class T, bool kNext = false>
static INLINE void tile_all_columns(long m, const T* const* a, const Runs* const* runs, const T* b, long b_rows, const T* init,
                                    long columns, T* out, long ldo) {
  enum { W = Simd<T>::W, kPanel = Tile<T>::kPanel };
  long n = 0;
  for (; columns - n > W; n += kPanel) TileTable<T>::template gemm<2, kNext>(m, a, runs, b + b_rows * n, init ? init + n : 0, out + n, ldo);
  if (n < columns) TileTable<T>::template gemm<1, kNext>(m, a, runs, b + b_rows * n, init ? init + n : 0, out + n, ldo);
}
