// The phases of a ConvLSTM step, each over a range of rows, so that the caller can spread them over threads.
// A range writes only its own rows (weight_grad: its own part of dw; gates' gradients: the caller's own sums, too); the caller's barrier between phases is the only order needed.

// Rows are taken in groups whose operands stay in L2 while the panels of B pass by, each streamed once a group.
template <class T>
static INLINE long group_rows(const Operand<T>& a, const Operand<T>& b) {
  enum { kBytes = 512 << 10, kLeast = 4 };
  const long bytes = ((a.frames ? a.map.height : 0) + (b.frames ? b.map.height : 0)) * (long)sizeof(T);
  const long rows = kBytes / (bytes > 0 ? bytes : 1);
  return rows > kLeast ? rows : (long)kLeast;
}

template <class T>
static void rows_gemm(const RowsGemm<T>& p, long begin, long end) {
  const Runs* runs[2] = {&p.a[0].runs, &p.a[1].runs};
  const Cut cut(p.rows.width, Tile<T>::kPixels);
  enum { W = Simd<T>::W, kPanel = Tile<T>::kPanel };
  const long group = group_rows(p.a[0], p.a[1]);
  for (long first = begin; first < end; first += group) {
    const long last = first + group < end ? first + group : end;
    for (long n = 0; n < p.columns; n += kPanel) {
      const long columns = p.columns - n < kPanel ? p.columns - n : (long)kPanel;
      for (long r = first; r < last; ++r) {
        const long s = p.rows.sample[r / p.rows.rows], row = r % p.rows.rows;
        const T* start[2];
        for (int o = 0; o < 2; ++o)
          start[o] = p.a[o].frames ? row_start(p.a[o], s, row / p.rows.height, row % p.rows.height) : 0;
        T* out = p.out + (s * p.rows.rows + row) * p.rows.width * p.ldo + n;
        for (long i = 0; i < cut.tiles; ++i) {
          const long x = cut.at(i), m = cut.at(i + 1) - x;
          const T* a[2] = {start[0] ? start[0] + x * runs[0]->stride : 0, start[1] ? start[1] + x * runs[1]->stride : 0};
          tile_all_columns<T>(m, a, runs, p.b + p.k * n, p.k, 0, columns, out + x * p.ldo, p.ldo);
        }
      }
    }
  }
}

// The cells of a row's stretch, with every option.
template <class T, bool kPeephole>
static INLINE void any_cells(const ConvLSTMStep<T>& p, const T* z, long ldz, long m, long n, long ch, long pixel, long sample, T* h_frame,
                             T* h) {
  typedef Simd<T> S;
  typedef typename S::V V;
  typedef VectorMath<T> M;
  const long c4 = 4 * p.channels, plane = p.rows.rows * p.rows.width * p.channels;
  const T* c_prev = p.c_prev ? p.c_prev + sample * p.c_prev_frame + pixel * p.channels + ch : 0;
  T* c = p.c ? p.c + sample * p.c_frame + pixel * p.channels + ch : 0;
  const T* gx = p.gates_x ? p.gates_x + sample * p.gates_x_frame + pixel * c4 + ch : 0;
  Kept<T> gates = p.gates;
  long kept = sample * p.gates_frame + pixel * c4 + 4 * ch, next = c4;
  if (p.blocked_gates) {
    const long row = pixel / p.rows.width, d = row / p.rows.height, y = row % p.rows.height;
    const long at = p.gates_origin + d * p.gates_map.depth + y * p.gates_map.height + pixel % p.rows.width;
    gates = {p.blocked_gates, kFull};
    kept = sample * p.gates_frame + 4 * (p.gates_pixels * ch + at * n);
    next = 4 * n;
  }
  const T* peephole = kPeephole ? p.peephole + pixel * p.channels + ch : 0;
  for (long i = 0; i < m; ++i) {
    for (long j = 0; j < n; j += S::W) {
      const long lanes = n - j;  // of the vector; loads of z may run into the next gate, stores may not
      V zi = S::load(z + i * ldz + j), zf = S::load(z + i * ldz + n + j), zg = S::load(z + i * ldz + 2 * n + j),
        zo = S::load(z + i * ldz + 3 * n + j);
      const bool whole = lanes >= S::W;
      if (gx) {
        const T* q = gx + i * c4 + j;
        zi += whole ? S::load(q) : S::loadn(q, lanes);
        zf += whole ? S::load(q + p.channels) : S::loadn(q + p.channels, lanes);
        zg += whole ? S::load(q + 2 * p.channels) : S::loadn(q + 2 * p.channels, lanes);
        zo += whole ? S::load(q + 3 * p.channels) : S::loadn(q + 3 * p.channels, lanes);
      }
      const long at = i * p.channels + j;
      const V cp = !c_prev ? V{} : whole ? S::load(c_prev + at) : S::loadn(c_prev + at, lanes);
      Peephole<V> pe = {};
      if (kPeephole) {
        pe.i = S::loadn(peephole + at, whole ? (long)S::W : lanes);
        pe.f = S::loadn(peephole + plane + at, whole ? (long)S::W : lanes);
        pe.o = S::loadn(peephole + 2 * plane + at, whole ? (long)S::W : lanes);
      }
      const CellForward<V> r = lstm_cell_forward<M, kPeephole>(zi, zf, zg, zo, cp, pe);
      if (whole) {
        if (c) S::store(c + at, r.c);
        if (h_frame) S::store(h_frame + at, r.h);
        if (h && p.stream_out) S::stream(h + at, r.h);
        else if (h) S::store(h + at, r.h);
      } else {
        if (c) S::storen(c + at, r.c, lanes);
        if (h_frame) S::storen(h_frame + at, r.h, lanes);
        if (h) S::storen(h + at, r.h, lanes);
      }
      if (!gates.data) continue;
      const V values[4] = {r.i, r.f, r.g, r.o};
      for (int k = 0; k < 4; ++k) {
        const long to = kept + i * next + k * n + j;
        if (p.stream_gates) stream_kept(gates, to, values[k]);
        else store_kept(gates, to, values[k], lanes);
      }
    }
  }
}

// A tile of the step: rows x m pixels from `pixel` on, n channels from `ch` on.
template <class T>
struct CellTile {
  long rows, m, n, ch, pixel, sample;
  const T* z;            // pre-activations: pixels ldz apart, rows z_next apart, [i | f | g | o][n]
  long ldz, z_next;
  T *h_frame, *h;        // null = not wanted
};

// N neighbouring pixels from the `i`th of a row of a whole block; the arrays begin at the row's first. kGates: 0 not kept, 1 in T,
// 2 in 16 bits.
template <class T, int N, int kGates, bool kStream>
static INLINE void plain_cells_together(const CellTile<T>& t, long i, long channels, const T* z, const T* c_prev, T* c, T* h, T* h_frame, const Kept<T>& gates, long kept,
                                        bool stream_out) {
  typedef Several<T, N> S;
  for (long j = 0; j < kBlock; j += Simd<T>::W) {
    const T* q = z + i * t.ldz + j;
    const long at = i * channels + j;
    const CellForward<S> r = lstm_cell_forward<FloatMath<S>, false>(S::load(q, t.ldz), S::load(q + kBlock, t.ldz), S::load(q + 2 * kBlock, t.ldz),
                                                                    S::load(q + 3 * kBlock, t.ldz), S::load(c_prev + at, channels), Peephole<S>{});
    r.c.store(c + at, channels);
    r.h.store(h_frame + at, channels);
    if (stream_out) r.h.stream(h + at, channels);
    else r.h.store(h + at, channels);
    if (kGates) {
      const S values[4] = {r.i, r.f, r.g, r.o};
      for (int k = 0; k < 4; ++k) {
        const Kept<T> to = {gates.data, kGates == 1 ? kFull : gates.format};
        values[k].keep(to, kept + 4 * i * channels + k * kBlock + j, 4 * channels, kStream);
      }
    }
  }
}

// What most cells are: a whole block, no peepholes, nothing to add. A cell is a chain of operations that wait for each other: pixels go
// together, but where gates are kept, whose stores make it slower.
template <class T, int kGates, bool kStream>
static INLINE void plain_cells(const ConvLSTMStep<T>& p, const CellTile<T>& t) {
  enum { kTogether = kGates ? 1 : 4 };
  const long channels = p.channels, next = p.rows.width * channels, first = t.pixel * channels + t.ch;
  const T *z = t.z, *c_prev = p.c_prev + t.sample * p.c_prev_frame + first;
  T *c = p.c + t.sample * p.c_frame + first, *h = t.h, *h_frame = t.h_frame;
  long kept = t.sample * p.gates_frame + 4 * first;
  for (long y = 0; y < t.rows; ++y) {
    long i = 0;
    for (; i + kTogether <= t.m; i += kTogether) plain_cells_together<T, kTogether, kGates, kStream>(t, i, channels, z, c_prev, c, h, h_frame, p.gates, kept, p.stream_out);
    for (; i < t.m; ++i) plain_cells_together<T, 1, kGates, kStream>(t, i, channels, z, c_prev, c, h, h_frame, p.gates, kept, p.stream_out);
    z += t.z_next;
    c_prev += next;
    c += next;
    h += next;
    h_frame += p.h_map.height;
    kept += 4 * next;
  }
}

// Fewer channels than a block: gate by gate the pixels of a row lie side by side, so that vectors are full.
template <class T>
static INLINE void narrow_cells(const ConvLSTMStep<T>& p, const CellTile<T>& t) {
  typedef Simd<T> S;
  typedef VectorMath<T> M;
  const Peephole<typename S::V> none = {};
  const long n = p.channels, next = p.rows.width * n;
  T gates[4][Tile<T>::kPixels * kBlock + S::W];
  for (long y = 0; y < t.rows; ++y) {
    const T* z = t.z + y * t.z_next;
    for (int g = 0; g < 4; ++g)
      for (long i = 0; i < t.m; ++i)  // vectors run over the end, the next pixel is written after
        for (long j = 0; j < n; j += S::W) S::store(gates[g] + i * n + j, S::load(z + i * t.ldz + g * n + j));
    const T* c_prev = p.c_prev + t.sample * p.c_prev_frame + t.pixel * n + y * next;
    T *c = p.c + t.sample * p.c_frame + t.pixel * n + y * next, *h = t.h + y * next, *h_frame = t.h_frame + y * p.h_map.height;
    for (long i = 0; i < t.m * n; i += S::W) {
      const long lanes = t.m * n - i < S::W ? t.m * n - i : (long)S::W;
      const CellForward<typename S::V> r = lstm_cell_forward<M, false>(S::load(gates[0] + i), S::load(gates[1] + i), S::load(gates[2] + i),
                                                                       S::load(gates[3] + i), S::loadn(c_prev + i, lanes), none);
      S::storen(c + i, r.c, lanes);
      S::storen(h_frame + i, r.h, lanes);
      S::storen(h + i, r.h, lanes);
    }
  }
}

template <class T>
static INLINE void cell_tile(const ConvLSTMStep<T>& p, const CellTile<T>& t) {
  if (!p.peephole && !p.gates_x && !p.blocked_gates && p.c_prev && p.c && t.h_frame && t.h) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (t.n == kBlock && !p.gates.data) return plain_cells<T, 0, false>(p, t);
      if (t.n == kBlock && p.gates.format == kFull) return p.stream_gates ? plain_cells<T, 1, true>(p, t) : plain_cells<T, 1, false>(p, t);
      if (t.n == kBlock) return p.stream_gates ? plain_cells<T, 2, true>(p, t) : plain_cells<T, 2, false>(p, t);
    }
    if (p.channels < kBlock && !p.gates.data) return narrow_cells(p, t);
  }
  for (long y = 0; y < t.rows; ++y) {
    const long pixel = t.pixel + y * p.rows.width;
    T* h_frame = t.h_frame ? t.h_frame + y * p.h_map.height : 0;
    T* h = t.h ? t.h + y * p.rows.width * p.channels : 0;
    const T* z = t.z + y * t.z_next;
    if (p.peephole) any_cells<T, true>(p, z, t.ldz, t.m, t.n, t.ch, pixel, t.sample, h_frame, h);
    else any_cells<T, false>(p, z, t.ldz, t.m, t.n, t.ch, pixel, t.sample, h_frame, h);
  }
}

// The tiles of one row, for the block of n channels from ch on; z is room for a tile of pre-activations.
template <class T>
static INLINE void step_row(const ConvLSTMStep<T>& p, const T* weights, long ch, long n, long s, long row, const long* out_sample, T* z, long ldz) {
  const Cut cut(p.rows.width, Tile<T>::kPixels);
  const Runs* runs[2] = {&p.x.runs, &p.h.runs};
  const long d = row / p.rows.height, y = row % p.rows.height;
  const T* start[2] = {p.x.frames ? row_start(p.x, s, d, y) : 0, p.h.frames ? row_start(p.h, s, d, y) : 0};
  T* h_row = p.h_frames ? p.h_frames + s * p.h_frame + d * p.h_map.depth + y * p.h_map.height + ch : 0;
  T* out_row = p.out ? p.out + *out_sample + row * p.rows.width * p.channels + ch : 0;
  for (long i = 0; i < cut.tiles; ++i) {
    const long x = cut.at(i), m = cut.at(i + 1) - x, pixel = row * p.rows.width + x;
    const T* a[2] = {start[0] ? start[0] + x * runs[0]->stride : 0, start[1] ? start[1] + x * runs[1]->stride : 0};
    T* h_tile = h_row ? h_row + x * p.channels : 0;
    T* out_tile = out_row ? out_row + x * p.channels : 0;
    tile_all_columns<T>(m, a, runs, weights, p.k, p.bias + 4 * ch, 4 * n, z, ldz);
    cell_tile(p, CellTile<T>{1, m, n, ch, pixel, s, z, ldz, 0, h_tile, out_tile});
  }
}

template <class T>
static void conv_lstm_step(const ConvLSTMStep<T>& p, long begin, long end) {
  enum { W = Simd<T>::W };
  // The slack holds what the last vector of a narrow block loads past its end.
  alignas(64) T z[Tile<T>::kPixels * 4 * kBlock + W];
  for (long i = 0; i < (long)(sizeof(z) / sizeof(T)); ++i) z[i] = 0;
  const long group = group_rows(p.x, p.h);
  for (long first = begin; first < end; first += group) {
    const long last = first + group < end ? first + group : end;
    const T* weights = p.weights;
    for (long ch = 0; ch < p.channels; ch += kBlock) {
      const long n = p.channels - ch < kBlock ? p.channels - ch : (long)kBlock, ldz = (4 * n + W - 1) / W * W;
      for (long r = first; r < last; ++r)
        step_row(p, weights, ch, n, p.rows.sample[r / p.rows.rows], r % p.rows.rows, p.out_sample + r / p.rows.rows, z, ldz);
      weights += p.k * ldz;
    }
  }
  if (p.stream_gates || p.stream_out) Simd<T>::fence();
}

// A vector of cells, from channel ch + j of a block of n on, of pixel x of a row; -> the gates' gradients.
template <class T, bool kPeephole>
static INLINE void gates_backward_cells(const GatesBackward<T>& p, long s, long row, long frame_pixel, long x, long ch, long n, long j,
                                        typename Simd<T>::V* gradients) {
  typedef Simd<T> S;
  typedef typename S::V V;
  const long c1 = p.channels, pixel = row * p.rows.width + x, at = pixel * c1 + ch + j, plane = p.rows.rows * p.rows.width * c1;
  const long lanes = n - j < S::W ? n - j : (long)S::W;
  T *dgates = p.dgates + s * p.dgates_frame + 4 * (p.dgates_pixels * ch + (frame_pixel + x) * n) + j, *dc = p.dc + s * p.dc_frame + at;
  const Kept<T> kept = p.gates.data ? p.gates : Kept<T>{dgates, kFull};
  const long first = p.gates.data ? s * p.gates_frame + 4 * (pixel * c1 + ch) + j : 0;
  V dh = {};
  for (int k = 0; k < 2; ++k)
    if (p.dh[k]) dh += S::loadn(p.dh[k] + s * p.dh_frame[k] + pixel * p.dh_stride[k] + ch + j, lanes);
  const V c_prev = p.c_prev ? S::loadn(p.c_prev + s * p.c_prev_frame + at, lanes) : V{};
  Peephole<V> pe = {};
  if (kPeephole) {
    pe.i = S::loadn(p.peephole + at, lanes);
    pe.f = S::loadn(p.peephole + plane + at, lanes);
    pe.o = S::loadn(p.peephole + 2 * plane + at, lanes);
  }
  const V c = S::loadn(p.c + s * p.c_frame + at, lanes);
  V gates[4];
  for (int k = 0; k < 4; ++k) gates[k] = load_kept(kept, first + k * n, lanes);
  const CellBackward<V> r = lstm_cell_backward<VectorMath<T>, kPeephole>(gates[0], gates[1], gates[2], gates[3], c_prev, c, dh, S::loadn(dc, lanes), pe);
  S::storen(dc, r.dc, lanes);
  gradients[0] = r.di;
  gradients[1] = r.df;
  gradients[2] = r.dg;
  gradients[3] = r.d_o;
  for (int k = 0; k < 4; ++k) S::storen(dgates + k * n, gradients[k], lanes);
  if (kPeephole && p.dpeephole) {
    T* q = p.dpeephole + at;
    S::storen(q, S::loadn(q, lanes) + r.di * c_prev, lanes);
    q += plane;
    S::storen(q, S::loadn(q, lanes) + r.df * c_prev, lanes);
    q += plane;
    S::storen(q, S::loadn(q, lanes) + r.d_o * c, lanes);
  }
}

template <class T>
static INLINE void add_to_bias(const GatesBackward<T>& p, long ch, long n, long j, const typename Simd<T>::V* gradients) {
  typedef Simd<T> S;
  if (!p.dbias) return;
  const long lanes = n - j < S::W ? n - j : (long)S::W;
  T* sum = p.dbias_part + 4 * ch + j;
  for (int k = 0; k < 4; ++k, sum += n) S::storen(sum, S::loadn(sum, lanes) + gradients[k], lanes);
}

// The bias' sums of few channels stay in registers along the row; those of more are added to pixel by pixel, as memory lies.
template <class T, bool kPeephole>
static void gates_backward_row(const GatesBackward<T>& p, long s, long row) {
  typedef Simd<T> S;
  typedef typename S::V V;
  const long c1 = p.channels, width = p.rows.width, d = row / p.rows.height, y = row % p.rows.height;
  const long frame_pixel = p.origin + d * p.map.depth + y * p.map.height;
  V gradients[4];
  if (c1 <= (long)S::W) {
    V sums[4] = {};
    for (long x = 0; x < width; ++x) {
      gates_backward_cells<T, kPeephole>(p, s, row, frame_pixel, x, 0, c1, 0, gradients);
      for (int k = 0; k < 4; ++k) sums[k] += gradients[k];
    }
    return add_to_bias(p, 0, c1, 0, sums);
  }
  for (long x = 0; x < width; ++x)
    for (long ch = 0; ch < c1; ch += kBlock) {
      const long n = c1 - ch < kBlock ? c1 - ch : (long)kBlock;
      for (long j = 0; j < n; j += S::W) {
        gates_backward_cells<T, kPeephole>(p, s, row, frame_pixel, x, ch, n, j, gradients);
        add_to_bias(p, ch, n, j, gradients);
      }
    }
}

template <class T>
static void gates_backward(const GatesBackward<T>& p, long begin, long end) {
  enum { kPixels = 128 };  // of a part of the bias' sum: what a running sum of n terms loses grows with sqrt(n)
  long pixels = 0;
  const auto row = [&](long s, long row, bool last) {
    if (p.peephole) gates_backward_row<T, true>(p, s, row);
    else gates_backward_row<T, false>(p, s, row);
    pixels += p.rows.width;
    if (!p.dbias || (pixels < kPixels && !last)) return;
    pixels = 0;
    for (long i = 0; i < 4 * p.channels; i += Simd<T>::W) {
      Simd<T>::store(p.dbias + i, Simd<T>::load(p.dbias + i) + Simd<T>::load(p.dbias_part + i));
      Simd<T>::store(p.dbias_part + i, typename Simd<T>::V{});
    }
  };
  const long samples = p.rows.samples;
  if (p.dpeephole) {  // a row of the map belongs to one thread, for all samples: their sum has one order
    for (long r = begin; r < end; ++r)
      for (long i = 0; i < samples; ++i) row(p.rows.sample[i], r, r + 1 == end && i + 1 == samples);
    return;
  }
  for (long r = begin; r < end; ++r) row(p.rows.sample[r / p.rows.rows], r % p.rows.rows, r + 1 == end);
}

// Tasks of weight_grad: the K range in pieces of a tile's height, run after run.
template <class T>
static long weight_grad_tasks(const Runs& runs) {
  return runs.count * Cut(runs.length, Tile<T>::kPixels).tiles;
}

template <class T>
static void weight_grad(const WeightGrad<T>& p, long begin, long end) {
  enum { W = Simd<T>::W, kPanel = Tile<T>::kPanel, kSegments = 32, kPixels = 128 };
  const Cut cut(p.a.runs.length, Tile<T>::kPixels);
  const Cut across(p.rows.width, kPixels);
  const long ldw = (p.columns + W - 1) / W * W, last = p.row_end * across.tiles;
  // A chunk of pixels is read by every tile of dw; its panel of dgates is made dense first, so that it stays in L1.
  alignas(64) T panel[2 * kPixels * kPanel];
  const bool dense = end - begin > 2;
  const T *row_a[kSegments], *a[kSegments], *row_g[kSegments], *g[kSegments];
  long pixels[kSegments];
  for (long at = p.row * across.tiles; at < last;) {
    long segments = 0, count = 0;
    for (; at < last && segments < kSegments && count < kPixels; ++at, ++segments) {
      const long r = at / across.tiles, x = across.at(at % across.tiles);
      const long s = p.rows.sample[r / p.rows.rows], row = r % p.rows.rows;
      const long d = row / p.rows.height, y = row % p.rows.height;
      row_a[segments] = row_start(p.a, s, d, y) + x * p.a.runs.stride;
      row_g[segments] = p.dgates + s * p.dgates_frame + d * p.dgates_map.depth + y * p.dgates_map.height + x * p.columns;
      pixels[segments] = across.at(at % across.tiles + 1) - x;
      count += pixels[segments];
    }
    for (long n = 0; n < p.columns; n += kPanel) {
      const long width = p.columns - n > W ? (long)kPanel : (long)W;
      T* to = panel;
      for (long i = 0; i < segments; ++i) {
        g[i] = row_g[i] + n;
        if (!dense) continue;
        for (long x = 0; x < pixels[i]; ++x)
          for (long j = 0; j < width; j += W) Simd<T>::store(to + x * width + j, Simd<T>::load(g[i] + x * p.columns + j));
        g[i] = to;
        to += pixels[i] * width;
      }
      for (long task = begin; task < end; ++task) {
        const long run = task / cut.tiles, k = cut.at(task % cut.tiles), m = cut.at(task % cut.tiles + 1) - k;
        for (long i = 0; i < segments; ++i) a[i] = row_a[i] + p.a.runs.offset[run] + k;
        T* dw = p.dw + (run * p.a.runs.length + k) * ldw + n;
        TileTable<T>::weight_grad(width / W, m, segments, a, p.a.runs.stride, g, dense ? width : p.columns, pixels, dw, ldw);
      }
    }
  }
}

template <class T>
static INLINE void transpose_scalars(long rows, long columns, const T* src, long ld_src, T* dst, long ld_dst) {
  for (long j = 0; j < columns; ++j)
    for (long i = 0; i < rows; ++i) dst[j * ld_dst + i] = src[i * ld_src + j];
}

template <class T>
static void transpose(long rows, long columns, const T* src, long ld_src, T* dst, long ld_dst) {
  transpose_scalars(rows, columns, src, ld_src, dst, ld_dst);
}

#if defined(__SSE2__) || defined(CONVFAST_NEON)
#if defined(__SSE2__)
typedef __m128 Four;
static INLINE Four load_four(const float* p) { return _mm_loadu_ps(p); }
static INLINE void store_four(float* p, Four v) { _mm_storeu_ps(p, v); }
static INLINE void transpose_square(Four& a, Four& b, Four& c, Four& d) { _MM_TRANSPOSE4_PS(a, b, c, d); }
#else
typedef float32x4_t Four;
static INLINE Four load_four(const float* p) { return vld1q_f32(p); }
static INLINE void store_four(float* p, Four v) { vst1q_f32(p, v); }
static INLINE void transpose_square(Four& a, Four& b, Four& c, Four& d) {
  const float64x2_t even_ab = (float64x2_t)vtrn1q_f32(a, b), odd_ab = (float64x2_t)vtrn2q_f32(a, b);
  const float64x2_t even_cd = (float64x2_t)vtrn1q_f32(c, d), odd_cd = (float64x2_t)vtrn2q_f32(c, d);
  a = (Four)vtrn1q_f64(even_ab, even_cd);
  b = (Four)vtrn1q_f64(odd_ab, odd_cd);
  c = (Four)vtrn2q_f64(even_ab, even_cd);
  d = (Four)vtrn2q_f64(odd_ab, odd_cd);
}
#endif

template <>
void transpose<float>(long rows, long columns, const float* src, long ld_src, float* dst, long ld_dst) {
  const long i4 = rows & ~3l, j4 = columns & ~3l;
  for (long i0 = 0; i0 < i4; i0 += 16)  // four squares side by side fill a cache line of dst
    for (long j = 0; j < j4; j += 4)
      for (long i = i0; i < i4 && i < i0 + 16; i += 4) {
        const float* s = src + i * ld_src + j;
        Four a = load_four(s), b = load_four(s + ld_src), c = load_four(s + 2 * ld_src), d = load_four(s + 3 * ld_src);
        transpose_square(a, b, c, d);
        float* t = dst + j * ld_dst + i;
        store_four(t, a);
        store_four(t + ld_dst, b);
        store_four(t + 2 * ld_dst, c);
        store_four(t + 3 * ld_dst, d);
      }
  transpose_scalars(rows - i4, j4, src + i4 * ld_src, ld_src, dst + i4, ld_dst);
  transpose_scalars(rows, columns - j4, src + j4, ld_src, dst + j4 * ld_dst, ld_dst);
}
#endif

template <class T>
static void sum_rows(long rows, const T* const* row, long n, T* out) {
  typedef Simd<T> S;
  for (long i = 0; i < n; i += S::W) {
    const long lanes = n - i < S::W ? n - i : (long)S::W;
    typename S::V sum = {};
    for (long r = 0; r < rows; ++r) sum += S::loadn(row[r] + i, lanes);
    S::storen(out + i, sum, lanes);
  }
}
