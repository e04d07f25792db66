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

// Rows are cut into tiles as even as can be: 32 pixels at 14 a tile are 11 + 11 + 10.
struct Cut {
  long tiles, least, longer;  // so many tiles have one row more than the least
  INLINE Cut(long width, long most) : tiles((width + most - 1) / most), least(tiles ? width / tiles : 0), longer(width - least * tiles) {}
  INLINE long at(long i) const { return i * least + (i < longer ? i : longer); }
};

// Lines of some rows that will be written, asked for a few at a time: many at once would hold up the loads behind them.
template <class T>
struct LinesAhead {
  const T* row;  // null = none
  long rows, ld, length, at;
  INLINE LinesAhead(const T* row, long rows, long ld, long length) : row(row), rows(row ? rows : 0), ld(ld), length(length), at(0) {}
  INLINE void fetch(long lines) {
    for (; rows && lines > 0; --lines) {
      __builtin_prefetch(row + at, 1);
      at += 64 / sizeof(T);
      if (at < length) continue;
      at = 0;
      row += ld;
      --rows;
    }
  }
};

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

// Vectors of B taken at once for m rows: enough accumulators to hide the latency of an FMA, few enough for the registers.
template <class T>
constexpr int vectors_for(int m) {
#if CONVFAST_BYTES == 64
  return m <= 2 ? 8 : m <= 6 ? 4 : 2;
#else
  return m == 1 ? 8 : m == 2 ? 4 : 2;
#endif
}

// out[m, :] = init[m, :] + sum over both operands' runs of a[m, k] b[k, :] for NV vectors, two of a panel; rows of B lie `ldb` apart,
// panels `panel`. Or the relu of that.
template <class T, int M, int NV>
static void few_rows_gemm(const T* const* operand, const Runs* operand_runs, const T* b, long ldb, long panel, const T* init, long ld_init, T* out, long ldo,
                          bool relu) {
  typedef Simd<T> S;
  typedef typename S::V V;
  enum { kEach = NV > 1 ? 2 : 1 };
  V acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = init ? S::load(init + m * ld_init + n * S::W) : V{};
  for (int o = 0; o < 2; ++o) {
    if (!operand[o]) continue;
    const Runs runs = operand_runs[o];
    for (long i = 0; i < runs.count; ++i) {
      const T* p[(M + 2) / 3];
      for (int j = 0; j < (M + 2) / 3; ++j) p[j] = operand[o] + runs.offset[i] + 3 * j * runs.stride;
      for (const T* end = b + runs.length * ldb; b != end; b += ldb) {
        V bv[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
          const long at = n / kEach * panel + n % kEach * S::W;
          bv[n] = S::load(b + at);
          if (M > 2) __builtin_prefetch(b + 12 * ldb + at);  // L2 does not keep up by itself; fewer rows wait for its bandwidth alone
        }
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
          const V av = S::set1(p[m / 3][(m % 3) * runs.stride]);
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) acc[m][n] += av * bv[n];
        }
        for (int j = 0; j < (M + 2) / 3; ++j) ++p[j];
      }
    }
  }
  for (int m = 0; relu && m < M; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = relu_of(acc[m][n]);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) S::store(out + m * ldo + n * S::W, acc[m][n]);
}

// Columns [begin, end) of M rows.
template <class T, int M>
static void few_rows_columns(const Gemm<T>& g, long row, long begin, long end) {
  enum { W = Simd<T>::W, kMost = vectors_for<T>(M) };
  const T* a[2] = {g.a[0] ? g.a[0] + row * g.runs[0].stride : 0, g.a[1] ? g.a[1] + row * g.runs[1].stride : 0};
  const long column = g.ldb ? 1 : g.k, ldb = g.ldb ? g.ldb : 2 * W, panel = column * 2 * W;
  const T *b = g.b + begin * column, *init = g.init ? g.init + row * g.ld_init + begin : 0;
  T* out = g.out + row * g.ldo + begin;
  for (long n = begin; n < end;) {
    const long left = (end - n + W - 1) / W, step = left >= kMost ? (long)kMost : left >= 4 && kMost > 4 ? 4 : left >= 2 ? 2 : 1;
    if (step == kMost) few_rows_gemm<T, M, kMost>(a, g.runs, b, ldb, panel, init, g.ld_init, out, g.ldo, g.relu);
    else if (kMost > 4 && step == 4) few_rows_gemm<T, M, (kMost > 4 ? 4 : kMost)>(a, g.runs, b, ldb, panel, init, g.ld_init, out, g.ldo, g.relu);
    else if (step == 2) few_rows_gemm<T, M, 2>(a, g.runs, b, ldb, panel, init, g.ld_init, out, g.ldo, g.relu);
    else few_rows_gemm<T, M, 1>(a, g.runs, b, g.ldb ? g.ldb : (long)W, panel, init, g.ld_init, out, g.ldo, g.relu);
    n += step * W;
    b += step * W * column;
    if (init) init += step * W;
    out += step * W;
  }
}

// Tiles that gemm_columns sums one after another; few rows are one.
template <class T>
static INLINE long tiles_of(long rows, long columns) {
  const Cut cut(rows, Tile<T>::kPixels);
  return cut.tiles <= 1 ? 1 : cut.tiles * ((columns + Tile<T>::kPanel - 1) / Tile<T>::kPanel);
}

// Columns [begin, end), from the first of a panel on; before(row, rows, column, end) is called before each tile. Nothing of g is
// copied: its fields may still be on their way to the cache, behind stores that wait for another core.
template <class T, class F>
static INLINE void gemm_columns(const Gemm<T>& g, long begin, long end, const F& before) {
  typedef void (*Columns)(const Gemm<T>&, long, long, long);
  static const Columns table[] = {
      few_rows_columns<T, 1>, few_rows_columns<T, 2>, few_rows_columns<T, 3>, few_rows_columns<T, 4>, few_rows_columns<T, 5>, few_rows_columns<T, 6>,
#if CONVFAST_BYTES == 64
      few_rows_columns<T, 7>, few_rows_columns<T, 8>, few_rows_columns<T, 9>, few_rows_columns<T, 10>, few_rows_columns<T, 11>,
      few_rows_columns<T, 12>, few_rows_columns<T, 13>, few_rows_columns<T, 14>,
#endif
  };
  enum { kPanel = Tile<T>::kPanel };
  const Cut cut(g.rows, Tile<T>::kPixels);
  if (cut.tiles <= 1) {
    if (!g.rows) return;
    before(0, g.rows, begin, end);
    return table[g.rows - 1](g, 0, begin, end);
  }
  // One panel after another stays in L1 while the rows pass by.
  for (long n = begin; n < end; n += kPanel)
    for (long i = 0; i < cut.tiles; ++i) {
      const long row = cut.at(i), rows = cut.at(i + 1) - row, last = n + kPanel < end ? n + kPanel : end;
      before(row, rows, n, last);
      table[rows - 1](g, row, n, last);
    }
}

template <class T>
static void gemm(const Gemm<T>& g) {
  gemm_columns(g, 0, g.columns, [&](long row, long rows, long column, long end) {
    LinesAhead<T>(g.far ? g.out + row * g.ldo + column : 0, rows, g.ldo, end - column).fetch(rows * (end - column));  // all
  });
}

// dw[k, n] += sum over rows of window(row)[k] g[row, n]
template <class T>
static void outer_sum(const OuterSum<T>& p) {
  enum { W = Simd<T>::W, kPanel = Tile<T>::kPanel, kRows = 128 };  // so many rows of a panel of g stay in L1
  const Cut cut(p.runs.length, Tile<T>::kPixels);
  for (long row = 0; row < p.rows; row += kRows) {
    const long rows = p.rows - row < kRows ? p.rows - row : (long)kRows;
    for (long n = 0; n < p.columns; n += kPanel) {
      const T* g = p.g + row * p.ldg + n;
      for (long run = 0; run < p.runs.count; ++run)
        for (long i = 0; i < cut.tiles; ++i) {
          const long k = cut.at(i), m = cut.at(i + 1) - k;
          const T* a = p.a + row * p.runs.stride + p.runs.offset[run] + k;
          T* dw = p.dw + (p.at ? p.at[run] : run * p.runs.length * p.ldw) + k * p.ldw + n;
          if (p.columns - n > W) TileTable<T>::template weight_grad<2>(m, 1, &a, p.runs.stride, &g, p.ldg, &rows, dw, p.ldw);
          else TileTable<T>::template weight_grad<1>(m, 1, &a, p.runs.stride, &g, p.ldg, &rows, dw, p.ldw);
        }
    }
  }
}
