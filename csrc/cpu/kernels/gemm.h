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

// out[m, :] = init + sum over both operands' runs of a[m, k] b[k, :]; one of them at least is there, and no run is empty. kNext: a holds
// the next tile right behind this one, in lines that are not in L1 yet.
template <class T, int M, int NV, bool kNext>
static void tile_gemm(const T* const* a, const Runs* const* runs, const T* b, const T* init, T* out, long ldo) {
  typedef Simd<T> S;
  typedef typename S::V V;
  static const T zeros[NV * S::W] = {};
  if (!init) init = zeros;
  V acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = S::load(init + n * S::W);
  // No loop without a turn, nothing but loops between the first and the last use of the sums: else the compiler takes them through memory.
  int o = a[0] ? 0 : 1;
  long i = 0;
  do {
    const Runs& run = *runs[o];
    const long stride = run.stride;
    // One pointer for three pixels: base, base + stride, base + 2 stride are all addressing modes.
    const T* p[(M + 2) / 3];
    for (int j = 0; j < (M + 2) / 3; ++j) p[j] = a[o] + run.offset[i] + 3 * j * stride;
    const T* next = a[o] + run.offset[i] + M * stride;
    const T* const end = b + run.length * NV * S::W;
    do {
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
      b += NV * S::W;
    } while (b != end);
    if (++i == run.count) {
      i = 0;
      ++o;
    }
  } while (o < 2 && a[o]);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) S::store(out + m * ldo + n * S::W, acc[m][n]);
}

// dw[m, :] += sum over pixels of a[pixel, m] g[pixel, :], over row segments of n pixels each, none empty; g_stride is not 0.
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
  long s = 0;
  do {
    const T* p = a[s];
    const T* q = g[s];
    const T* const end = q + pixels[s] * g_stride;
    do {
      V gv[NV];
      for (int n = 0; n < NV; ++n) gv[n] = S::load(q + n * S::W);
      __builtin_prefetch(p + kAhead * a_stride);
      if (M > 1) __builtin_prefetch(p + kAhead * a_stride + M - 1);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        const V av = S::set1(p[m]);
        for (int n = 0; n < NV; ++n) acc[m][n] += av * gv[n];
      }
      p += a_stride;
      q += g_stride;
    } while (q != end);
  } while (++s != segments);
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
  if (!a[0] && !a[1]) {
    for (long i = 0; i < m; ++i)
      for (long n = 0; n < columns; n += W) Simd<T>::store(out + i * ldo + n, init ? Simd<T>::load(init + n) : typename Simd<T>::V{});
    return;
  }
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

// Rows [row, row + M) by NV vectors of columns from n on, two of a panel. `ahead`: M rows of results, g.ldo apart, that are not in cache;
// their lines are asked for one row after another, so that no load waits behind them.
template <class T, int M, int NV>
static void few_rows_gemm(const Gemm<T>& g, long row, long n, const T* ahead) {
  typedef Simd<T> S;
  typedef typename S::V V;
  enum { kEach = NV > 1 ? 2 : 1 };
  static const T zeros[NV * S::W] = {};
  const long column = g.ldb ? 1 : g.k, ldb = g.ldb ? g.ldb : (long)(kEach * S::W), panel = column * 2 * S::W;
  const T *b = g.b + n * column, *init = g.init ? g.init + row * g.ld_init + n : zeros;
  const long ld_init = g.init ? g.ld_init : 0, ldo = g.ldo, part = (g.k + M - 1) / M * ldb;
  T* out = g.out + row * ldo + n;
  V acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = S::load(init + m * ld_init + v * S::W);
  // As in tile_gemm: no loop without a turn.
  int operand = 0, left = ahead ? M : 0;
  long run = 0;
  do {
    const Runs& runs = g.runs[operand];
    const long stride = runs.stride;
    // One pointer for three rows, as in tile_gemm.
    const T* p[(M + 2) / 3];
    for (int j = 0; j < (M + 2) / 3; ++j) p[j] = g.a[operand] + runs.offset[run] + (row + 3 * j) * stride;
    const T* const last = b + runs.length * ldb;
    do {
      const T* end = last;
      if (left > 0) {
        for (int v = 0; v < NV; ++v) __builtin_prefetch(ahead + v * S::W, 1);
        ahead += ldo;
        --left;
        if (last - b > part) end = b + part;
      }
      do {
        V bv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          const long at = v / kEach * panel + v % kEach * S::W;
          bv[v] = S::load(b + at);
          if (M > 2) __builtin_prefetch(b + 12 * ldb + at);  // L2 does not keep up by itself; fewer rows wait for its bandwidth alone
        }
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
          const V av = S::set1(p[m / 3][(m % 3) * stride]);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[m][v] += av * bv[v];
        }
        for (int j = 0; j < (M + 2) / 3; ++j) ++p[j];
        b += ldb;
      } while (b != end);
    } while (b != last);
    if (++run == runs.count) {
      run = 0;
      ++operand;
    }
  } while (operand < 2 && g.a[operand]);
  if (g.relu) {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < NV; ++v) S::store(out + m * ldo + v * S::W, relu_of(acc[m][v]));
  } else {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < NV; ++v) S::store(out + m * ldo + v * S::W, acc[m][v]);
  }
}

// Columns [begin, end) of the only M rows, as many vectors at once as M rows are fastest with.
template <class T, int M>
static void few_rows_columns(const Gemm<T>& g, long begin, long end) {
  enum { W = Simd<T>::W, kMost = vectors_for<T>(M) };
  for (long n = begin; n < end;) {
    const long left = (end - n + W - 1) / W, step = left >= kMost ? (long)kMost : left >= 4 && kMost > 4 ? 4 : left >= 2 ? 2 : 1;
    if (step == kMost) few_rows_gemm<T, M, kMost>(g, 0, n, 0);
    else if (kMost > 4 && step == 4) few_rows_gemm<T, M, (kMost > 4 ? 4 : kMost)>(g, 0, n, 0);
    else if (step == 2) few_rows_gemm<T, M, 2>(g, 0, n, 0);
    else few_rows_gemm<T, M, 1>(g, 0, n, 0);
    n += step * W;
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
  typedef void (*Columns)(const Gemm<T>&, long, long);
  typedef void (*TileOf)(const Gemm<T>&, long, long, const T*);
#if CONVFAST_BYTES == 64
#define CONVFAST_UP_TO_A_TILE(f) f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14)
#else
#define CONVFAST_UP_TO_A_TILE(f) f(1), f(2), f(3), f(4), f(5), f(6)
#endif
#define CONVFAST_COLUMNS(M) few_rows_columns<T, M>
#define CONVFAST_PANEL(M) few_rows_gemm<T, M, 2>
#define CONVFAST_VECTOR(M) few_rows_gemm<T, M, 1>
  static const Columns columns[] = {CONVFAST_UP_TO_A_TILE(CONVFAST_COLUMNS)};
  static const TileOf panels[] = {CONVFAST_UP_TO_A_TILE(CONVFAST_PANEL)}, vectors[] = {CONVFAST_UP_TO_A_TILE(CONVFAST_VECTOR)};
#undef CONVFAST_UP_TO_A_TILE
#undef CONVFAST_COLUMNS
#undef CONVFAST_PANEL
#undef CONVFAST_VECTOR
  enum { W = Simd<T>::W, kPanel = Tile<T>::kPanel };
  const Cut cut(g.rows, Tile<T>::kPixels);
  if (cut.tiles <= 1) {
    if (!g.rows) return;
    before(0, g.rows, begin, end);
    return columns[g.rows - 1](g, begin, end);
  }
  // One panel after another stays in L1 while the rows pass by.
  for (long n = begin; n < end; n += kPanel) {
    const TileOf* const tiles = end - n > W ? panels : vectors;
    for (long i = 0; i < cut.tiles; ++i) {
      const long row = cut.at(i), next = cut.at(i + 1);
      before(row, next - row, n, n + kPanel < end ? n + kPanel : end);
      const T* ahead = 0;
      if (g.far && i + 1 < cut.tiles) ahead = g.out + next * g.ldo + n;
      else if (g.far && n + kPanel < end) ahead = g.out + n + kPanel;
      tiles[next - row - 1](g, row, n, ahead);
    }
  }
}

template <class T>
static void gemm(const Gemm<T>& g) {
  gemm_columns(g, 0, g.columns, [&](long row, long rows, long column, long end) {
    // The first results; those of the other tiles are asked for by the tile before.
    if (g.far && row == 0 && column == 0) LinesAhead<T>(g.out, rows, g.ldo, end).fetch(rows * end);  // all
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
