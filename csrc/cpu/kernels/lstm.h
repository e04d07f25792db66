// One LSTM layer, some rows (samples) at a time.

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

template <class T>
static void lstm_cells_forward(const LstmCells<T>& p, long block) {
  if (p.peephole) lstm_block_forward<T, true, false>(p, block);
  else if (p.channels - block * kBlock >= kBlock) lstm_block_forward<T, false, true>(p, block);
  else lstm_block_forward<T, false, false>(p, block);
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
    for (long b = block; b < end; ++b) lstm_cells_forward(p, b);
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
