// One LSTM layer, some rows (samples) at a time, and the GEMMs over few rows that it and conv1d need.

// Vectors of B taken at once for m rows: enough accumulators to hide the latency of an FMA, few enough for the registers.
template <class T>
constexpr int vectors_for(int m) {
#if CONVFAST_BYTES == 64
  return m <= 2 ? 8 : m <= 6 ? 4 : 2;
#else
  return m == 1 ? 8 : m == 2 ? 4 : 2;
#endif
}

// out[m, :] = init[m, :] + sum over both operands' runs of a[m, k] b[k, :] for NV vectors, two of a panel; panels of B lie `panel` apart.
template <class T, int M, int NV>
static void few_rows_gemm(const T* const* operand, const Runs* operand_runs, const T* b, long panel, const T* init, long ld_init, T* out, long ldo) {
  typedef Simd<T> S;
  typedef typename S::V V;
  enum { kWidth = (NV > 1 ? 2 : 1) * S::W, kPanels = NV > 1 ? NV / 2 : 1, kEach = NV > 1 ? 2 : 1 };
  V acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = init ? S::load(init + m * ld_init + n * S::W) : V{};
  for (int o = 0; o < 2; ++o) {
    if (!operand[o]) continue;
    const Runs runs = operand_runs[o];
    for (long i = 0; i < runs.count; ++i) {
      const T* p[(M + 2) / 3];
      for (int j = 0; j < (M + 2) / 3; ++j) p[j] = operand[o] + runs.offset[i] + 3 * j * runs.stride;
      for (const T* end = b + runs.length * kWidth; b != end; b += kWidth) {
        V bv[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
          const T* q = b + n / kEach * panel + n % kEach * S::W;
          bv[n] = S::load(q);
          __builtin_prefetch(q + 12 * kWidth);  // L2 does not keep up by itself
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
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NV; ++n) S::store(out + m * ldo + n * S::W, acc[m][n]);
}

template <class T, int M>
static void few_rows_columns(const Gemm<T>& g, long row) {
  enum { W = Simd<T>::W, kMost = vectors_for<T>(M) };
  const T* a[2] = {g.a[0] ? g.a[0] + row * g.runs[0].stride : 0, g.a[1] ? g.a[1] + row * g.runs[1].stride : 0};
  const T *b = g.b, *init = g.init ? g.init + row * g.ld_init : 0;
  T* out = g.out + row * g.ldo;
  const long panel = g.k * 2 * W;
  for (long n = 0; n < g.columns;) {
    const long left = (g.columns - n + W - 1) / W, step = left >= kMost ? (long)kMost : left >= 2 ? 2 : 1;
    if (step == kMost) few_rows_gemm<T, M, kMost>(a, g.runs, b, panel, init, g.ld_init, out, g.ldo);
    else if (step == 2) few_rows_gemm<T, M, 2>(a, g.runs, b, panel, init, g.ld_init, out, g.ldo);
    else few_rows_gemm<T, M, 1>(a, g.runs, b, panel, init, g.ld_init, out, g.ldo);
    n += step * W;
    b += step * W * g.k;
    if (init) init += step * W;
    out += step * W;
  }
}

template <class T>
static void gemm(const Gemm<T>& g) {
  typedef void (*Columns)(const Gemm<T>&, long);
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
    if (g.rows) table[g.rows - 1](g, 0);
    return;
  }
  // One panel after another stays in L1 while the rows pass by.
  for (long n = 0; n < g.columns; n += kPanel) {
    Gemm<T> part = g;
    part.columns = g.columns - n < kPanel ? g.columns - n : (long)kPanel;
    part.b = g.b + n * g.k;
    part.init = g.init ? g.init + n : 0;
    part.out = g.out + n;
    for (long i = 0; i < cut.tiles; ++i) table[cut.at(i + 1) - cut.at(i) - 1](part, cut.at(i));
  }
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
          T* dw = p.dw + (run * p.runs.length + k) * p.ldw + n;
          if (p.columns - n > W) TileTable<T>::template weight_grad<2>(m, 1, &a, p.runs.stride, &g, p.ldg, &rows, dw, p.ldw);
          else TileTable<T>::template weight_grad<1>(m, 1, &a, p.runs.stride, &g, p.ldg, &rows, dw, p.ldw);
        }
    }
  }
}

template <class T, bool kWhole>
static INLINE typename Simd<T>::V load_lanes(const T* p, long lanes) {
  return kWhole ? Simd<T>::load(p) : Simd<T>::loadn(p, lanes);
}

template <class T, bool kWhole>
static INLINE void store_lanes(T* p, typename Simd<T>::V v, long lanes) {
  kWhole ? Simd<T>::store(p, v) : Simd<T>::storen(p, v, lanes);
}

// kWhole: the block is.
template <class T, bool kPeephole, bool kWhole>
static INLINE void lstm_block_forward(const LstmCells<T>& p, long block) {
  typedef Simd<T> S;
  typedef typename S::V V;
  const long ch = block * kBlock, n = kWhole || p.channels - ch > kBlock ? (long)kBlock : p.channels - ch;
  for (long j = 0; j < n; j += S::W) {
    const long lanes = kWhole || n - j > S::W ? (long)S::W : n - j, at = ch + j;
    const Peephole<V> pe = kPeephole ? load_peephole(p.peephole + at, p.channels, lanes) : Peephole<V>{};
    const T *z = p.z + 4 * ch + j, *c_prev = p.c_prev ? p.c_prev + at : 0;
    T *c = p.c + at, *h = p.h + at, *y = p.y ? p.y + at : 0, *gates = p.gates ? p.gates + 4 * ch + j : 0;
    for (long r = 0; r < p.rows; ++r) {
      const CellForward<V> cell = lstm_cell_forward<VectorMath<T>, kPeephole>(S::load(z), S::load(z + n), S::load(z + 2 * n), S::load(z + 3 * n),
                                                                              c_prev ? load_lanes<T, kWhole>(c_prev, lanes) : V{}, pe);
      store_lanes<T, kWhole>(c, cell.c, lanes);
      store_lanes<T, kWhole>(h, cell.h, lanes);
      z += p.ldz;
      c += p.ldc;
      h += p.ldh;
      if (c_prev) c_prev += p.ldc_prev;
      if (y) {
        store_lanes<T, kWhole>(y, cell.h, lanes);
        y += p.ldy;
      }
      if (gates) {
        store_lanes<T, kWhole>(gates, cell.i, lanes);
        store_lanes<T, kWhole>(gates + n, cell.f, lanes);
        store_lanes<T, kWhole>(gates + 2 * n, cell.g, lanes);
        store_lanes<T, kWhole>(gates + 3 * n, cell.o, lanes);
        gates += p.ldg;
      }
    }
  }
}

// Pre-activations by GEMM into p.z, then the cell, block by block while they are in cache.
template <class T>
static void lstm_step(const Gemm<T>& sum, const LstmCells<T>& p) {
  const long together = sum.rows <= 2 ? 2 : 1, columns = sum.columns;
  for (long block = p.begin; block < p.end; block += together) {
    const long end = block + together < p.end ? block + together : p.end, first = block * kSlab, last = end * kSlab < columns ? end * kSlab : columns;
    if (sum.a[0] || sum.a[1] || sum.init != sum.out) {
      Gemm<T> g = sum;
      g.b += first * g.k;
      g.columns = last - first;
      g.init = g.init ? g.init + first : 0;
      g.out += first;
      gemm(g);
    }
    for (long b = block; b < end; ++b) {
      if (p.peephole) lstm_block_forward<T, true, false>(p, b);
      else if (p.channels - b * kBlock >= kBlock) lstm_block_forward<T, false, true>(p, b);
      else lstm_block_forward<T, false, false>(p, b);
    }
  }
}

template <class T, bool kPeephole, bool kWhole>
static INLINE void lstm_block_backward(const LstmCells<T>& p, long block) {
  typedef Simd<T> S;
  typedef typename S::V V;
  const long ch = block * kBlock, n = p.channels - ch < kBlock ? p.channels - ch : (long)kBlock;
  for (long j = 0; j < n; j += S::W) {
    const long lanes = kWhole || n - j > S::W ? (long)S::W : n - j;
    const Peephole<V> pe = kPeephole ? load_peephole(p.peephole + ch + j, p.channels, lanes) : Peephole<V>{};
    Peephole<V> sum = {};
    for (long r = 0; r < p.rows; ++r) {
      const T* a = p.gates + r * p.ldg + 4 * ch + j;
      V dh = p.dh ? load_lanes<T, kWhole>(p.dh + r * p.ldh + ch + j, lanes) : V{};
      if (p.dy && p.dy[r]) dh += load_lanes<T, kWhole>(p.dy[r] + ch + j, lanes);
      T* dc = p.dc + r * p.ld_dc + ch + j;
      const V c_prev = p.c_prev ? load_lanes<T, kWhole>(p.c_prev + r * p.ldc_prev + ch + j, lanes) : V{}, c = load_lanes<T, kWhole>(p.c + r * p.ldc + ch + j, lanes);
      const CellBackward<V> cell = lstm_cell_backward<VectorMath<T>, kPeephole>(load_lanes<T, kWhole>(a, lanes), load_lanes<T, kWhole>(a + n, lanes), load_lanes<T, kWhole>(a + 2 * n, lanes),
                                                                                load_lanes<T, kWhole>(a + 3 * n, lanes), c_prev, c, dh, load_lanes<T, kWhole>(dc, lanes), pe);
      store_lanes<T, kWhole>(dc, cell.dc, lanes);
      T* z = p.z + r * p.ldz + 4 * ch + j;
      store_lanes<T, kWhole>(z, cell.di, lanes);
      store_lanes<T, kWhole>(z + n, cell.df, lanes);
      store_lanes<T, kWhole>(z + 2 * n, cell.dg, lanes);
      store_lanes<T, kWhole>(z + 3 * n, cell.d_o, lanes);
      sum.i += cell.di * c_prev;
      sum.f += cell.df * c_prev;
      sum.o += cell.d_o * c;
    }
    if (!p.dpeephole) continue;
    T* q = p.dpeephole + ch + j;
    const V sums[3] = {sum.i, sum.f, sum.o};
    for (int i = 0; i < 3; ++i, q += p.channels) S::storen(q, S::loadn(q, lanes) + sums[i], lanes);
  }
}

template <class T>
static void lstm_cells_backward(const LstmCells<T>& p) {
  for (long b = p.begin; b < p.end; ++b) {
    if (p.peephole) lstm_block_backward<T, true, false>(p, b);
    else if (p.channels - b * kBlock >= kBlock) lstm_block_backward<T, false, true>(p, b);
    else lstm_block_backward<T, false, false>(p, b);
  }
}
