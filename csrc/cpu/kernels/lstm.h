// One LSTM layer, some rows (samples) at a time.

template <class T, bool kWhole>
static INLINE typename Simd<T>::V load_lanes(const T* p, long lanes) {
  return kWhole ? Simd<T>::load(p) : Simd<T>::loadn(p, lanes);
}

template <class T, bool kWhole>
static INLINE void store_lanes(T* p, typename Simd<T>::V v, long lanes) {
  kWhole ? Simd<T>::store(p, v) : Simd<T>::storen(p, v, lanes);
}

// From one vector of cells to the next: rows of a block, or blocks of a row.
struct CellStep {
  long z, c_prev, c, h, y, gates;
};

// N times a row of a whole block, from `row` and `block` on. kGates: 0 not kept, 1 in T, 2 in 16 bits.
template <class T, int N, int kGates>
static INLINE void lstm_cells_together(const LstmCells<T>& p, long row, long block, const CellStep& next) {
  typedef Several<T, N> S;
  for (long j = 0; j < kBlock; j += Simd<T>::W) {
    const long at = block * kBlock + j, gate_at = 4 * block * kBlock + j;
    const T* z = p.z + row * p.ldz + gate_at;
    const S c_prev = p.c_prev ? S::load(p.c_prev + row * p.ldc_prev + at, next.c_prev) : S::set1(0);
    const CellForward<S> cell = lstm_cell_forward<FloatMath<S>, false>(S::load(z, next.z), S::load(z + kBlock, next.z), S::load(z + 2 * kBlock, next.z),
                                                                       S::load(z + 3 * kBlock, next.z), c_prev, Peephole<S>{});
    cell.c.store(p.c + row * p.ldc + at, next.c);
    cell.h.store(p.h + row * p.ldh + at, next.h);
    if (p.y) cell.h.store(p.y + row * p.ldy + at, next.y);
    const S gates[4] = {cell.i, cell.f, cell.g, cell.o};
    for (int k = 0; kGates && k < 4; ++k) {
      const Kept<T> to = {p.gates.data, kGates == 1 ? kFull : p.gates.format};
      gates[k].keep(to, row * p.ldg + gate_at + k * kBlock, next.gates, p.stream_gates);
    }
  }
}

// Rows of a whole block from `row` on, N at a time: the first that is left.
template <class T, int N, int kGates>
static INLINE long lstm_rows_together(const LstmCells<T>& p, long row, long block) {
  const CellStep next = {p.ldz, p.ldc_prev, p.ldc, p.ldh, p.ldy, p.ldg};
  for (; row + N <= p.rows; row += N) lstm_cells_together<T, N, kGates>(p, row, block, next);
  return row;
}

// All rows of whole blocks [begin, end): the first block that is left.
template <class T, int kGates>
static INLINE long lstm_blocks_together(const LstmCells<T>& p, long begin, long end) {
  if (p.rows == 1)
    for (; begin + 4 <= end; begin += 4) lstm_cells_together<T, 4, kGates>(p, 0, begin, {4 * kBlock, kBlock, kBlock, kBlock, kBlock, 4 * kBlock});
  for (; begin < end; ++begin) {
    long row = 0;
    if (!kGates) row = lstm_rows_together<T, 4, kGates>(p, row, begin);  // kept, they would be too many streams of stores at once
    lstm_rows_together<T, 1, kGates>(p, row, begin);
  }
  return begin;
}

// All rows of a block.
template <class T, bool kPeephole>
static INLINE void lstm_block_forward(const LstmCells<T>& p, long block) {
  typedef Simd<T> S;
  typedef typename S::V V;
  const long ch = block * kBlock, n = p.channels - ch > kBlock ? (long)kBlock : p.channels - ch;
  for (long j = 0; j < n; j += S::W) {
    const long lanes = n - j > S::W ? (long)S::W : n - j, at = ch + j;
    const Peephole<V> pe = kPeephole ? load_peephole(p.peephole + at, p.channels, lanes) : Peephole<V>{};
    for (long r = 0; r < p.rows; ++r) {
      const T* z = p.z + r * p.ldz + 4 * ch + j;
      const CellForward<V> cell = lstm_cell_forward<VectorMath<T>, kPeephole>(S::load(z), S::load(z + n), S::load(z + 2 * n), S::load(z + 3 * n),
                                                                              p.c_prev ? S::loadn(p.c_prev + r * p.ldc_prev + at, lanes) : V{}, pe);
      S::storen(p.c + r * p.ldc + at, cell.c, lanes);
      S::storen(p.h + r * p.ldh + at, cell.h, lanes);
      if (p.y) S::storen(p.y + r * p.ldy + at, cell.h, lanes);
      if (!p.gates.data) continue;
      const V gates[4] = {cell.i, cell.f, cell.g, cell.o};
      for (int k = 0; k < 4; ++k) store_kept(p.gates, r * p.ldg + 4 * ch + k * n + j, gates[k], lanes);
    }
  }
}

// Blocks [begin, end). A cell is a chain of operations that wait for each other: where nothing is in the way several of them go together.
template <class T>
static void lstm_cells_forward(const LstmCells<T>& p, long begin, long end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!p.peephole) {
      const long whole = p.channels / kBlock < end ? p.channels / kBlock : end;
      if (!p.gates.data) begin = lstm_blocks_together<T, 0>(p, begin, whole);
      else if (p.gates.format == kFull) begin = lstm_blocks_together<T, 1>(p, begin, whole);
      else begin = lstm_blocks_together<T, 2>(p, begin, whole);
    }
  }
  for (; begin < end; ++begin) {
    if (p.peephole) lstm_block_forward<T, true>(p, begin);
    else lstm_block_forward<T, false>(p, begin);
  }
  if (p.stream_gates) Simd<T>::fence();
}

// Pre-activations by GEMM into p.z, then the cell, a few blocks at a time while they are in cache: as many as fill the widest tiles. One
// row stays there, and its cells wait for nothing but each other.
template <class T>
static void lstm_step(const Gemm<T>& sum, const LstmCells<T>& p) {
  const long together = sum.rows == 1 ? p.end - p.begin : sum.rows == 2 ? 2 : in_triples<T>(sum.rows, sum.k) ? 3 : 1, columns = sum.columns;
  for (long block = p.begin; block < p.end; block += together) {
    const long end = block + together < p.end ? block + together : p.end, first = block * kSlab, last = end * kSlab < columns ? end * kSlab : columns;
    LinesAhead<T> y(p.y ? p.y + block * kBlock : 0, p.rows, p.ldy, (end - block) * kBlock);
    // y has an element for every four columns.
    if (sum.a[0]) gemm_columns(sum, first, last, [&](long rows, long columns) { y.fetch((rows * columns * (long)sizeof(T) / 4 + 63) / 64); });
    lstm_cells_forward(p, block, end);
  }
}

// What the backward of a step reads of a row, one vector from `at` of its block's first channel ch on: kept since the forward, it is far.
template <class T>
static INLINE void ask_for_kept(const LstmCells<T>& p, long row, long ch, long n, long at) {
  if (at * sizeof(T) % 64) return;  // asked for with the vector before
  const long gate = row * p.ldg + 4 * ch + at, size = p.gates.format == kFull ? sizeof(T) : 2;
  for (long k = 0; k < 4; ++k) __builtin_prefetch((const char*)p.gates.data + (gate + k * n) * size, 0, 2);
  if (p.c_prev) __builtin_prefetch(p.c_prev + row * p.ldc_prev + ch + at, 0, 2);
  if (p.dy) __builtin_prefetch(p.dy[row] + ch + at, 0, 2);
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
      if (p.next) ask_for_kept(*p.next, r, ch, n, j);
      V dh = p.dh ? load_lanes<T, kWhole>(p.dh + r * p.ldh + ch + j, lanes) : V{};
      if (p.dy && p.dy[r]) dh += load_lanes<T, kWhole>(p.dy[r] + ch + j, lanes);
      T* dc = p.dc + r * p.ld_dc + ch + j;
      const V c_prev = p.c_prev ? load_lanes<T, kWhole>(p.c_prev + r * p.ldc_prev + ch + j, lanes) : V{}, c = load_lanes<T, kWhole>(p.c + r * p.ldc + ch + j, lanes);
      V gates[4];
      for (int k = 0; k < 4; ++k) gates[k] = load_kept(p.gates, r * p.ldg + 4 * ch + k * n + j, kWhole ? (long)S::W : lanes);
      const CellBackward<V> cell = lstm_cell_backward<VectorMath<T>, kPeephole>(gates[0], gates[1], gates[2], gates[3], c_prev, c, dh, load_lanes<T, kWhole>(dc, lanes), pe);
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
