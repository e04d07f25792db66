// The cell over rows of neighbouring elements: one pass over memory each way.

template <class T>
static INLINE Peephole<typename Simd<T>::V> load_peephole(const T* p, long stride, long lanes) {
  typedef Simd<T> S;
  return {S::loadn(p, lanes), S::loadn(p + stride, lanes), S::loadn(p + 2 * stride, lanes)};
}

template <class T, bool kPeephole>
static void cell_forward_rows(const CellSpan<T>& p) {
  typedef Simd<T> S;
  typedef typename S::V V;
  for (long r = 0; r < p.rows; ++r)
    for (long j = 0; j < p.n; j += S::W) {
      const long lanes = p.n - j < S::W ? p.n - j : (long)S::W, at = r * p.n + j;
      const T* z = p.z + r * p.z_next + j;
      const CellForward<V> cell = lstm_cell_forward<VectorMath<T>, kPeephole>(
          S::loadn(z, lanes), S::loadn(z + p.z_stride, lanes), S::loadn(z + 2 * p.z_stride, lanes), S::loadn(z + 3 * p.z_stride, lanes),
          p.c_prev ? S::loadn(p.c_prev + at, lanes) : V{},
          kPeephole ? load_peephole(p.peephole + at, p.peephole_stride, lanes) : Peephole<V>{});
      S::storen(p.c + at, cell.c, lanes);
      S::storen(p.h + at, cell.h, lanes);
      if (!p.activated.data) continue;
      const V gates[4] = {cell.i, cell.f, cell.g, cell.o};
      for (int k = 0; k < 4; ++k) store_kept(p.activated, r * p.activated_next + k * p.activated_stride + j, gates[k], lanes);
    }
}

template <class T, bool kPeephole>
static void cell_backward_rows(const CellSpan<T>& p) {
  typedef Simd<T> S;
  typedef typename S::V V;
  for (long r = 0; r < p.rows; ++r)
    for (long j = 0; j < p.n; j += S::W) {
      const long lanes = p.n - j < S::W ? p.n - j : (long)S::W, at = r * p.n + j;
      V gates[4];
      for (int k = 0; k < 4; ++k) gates[k] = load_kept(p.activated, r * p.activated_next + k * p.activated_stride + j, lanes);
      const V c_prev = p.c_prev ? S::loadn(p.c_prev + at, lanes) : V{}, c = S::loadn(p.c + at, lanes);
      const CellBackward<V> cell = lstm_cell_backward<VectorMath<T>, kPeephole>(
          gates[0], gates[1], gates[2], gates[3], c_prev, c, p.dh ? S::loadn(p.dh + at, lanes) : V{},
          p.dc ? S::loadn(p.dc + at, lanes) : V{},
          kPeephole ? load_peephole(p.peephole + at, p.peephole_stride, lanes) : Peephole<V>{});
      T* dz = p.dz + r * p.dz_next + j;
      S::storen(dz, cell.di, lanes);
      S::storen(dz + p.dz_stride, cell.df, lanes);
      S::storen(dz + 2 * p.dz_stride, cell.dg, lanes);
      S::storen(dz + 3 * p.dz_stride, cell.d_o, lanes);
      S::storen(p.dc_prev + at, cell.dc, lanes);
      if (kPeephole && p.dpeephole) {
        T* q = p.dpeephole + at;
        S::storen(q, S::loadn(q, lanes) + cell.di * c_prev, lanes);
        q += p.peephole_stride;
        S::storen(q, S::loadn(q, lanes) + cell.df * c_prev, lanes);
        q += p.peephole_stride;
        S::storen(q, S::loadn(q, lanes) + cell.d_o * c, lanes);
      }
    }
}

template <class T>
static void cell_forward(const CellSpan<T>& p) {
  p.peephole ? cell_forward_rows<T, true>(p) : cell_forward_rows<T, false>(p);
}

template <class T>
static void cell_backward(const CellSpan<T>& p) {
  p.peephole ? cell_backward_rows<T, true>(p) : cell_backward_rows<T, false>(p);
}
