// Winograd F(m×m, r×r): m×m output pixels from r×r taps by (m + r - 1)² products in place of m² r² (Lavin & Gray 2015,
// https://arxiv.org/abs/1509.09308).
//
// Forward y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, summed over channels and pieces of the kernel: one GEMM for each of the products ("planes"). Its gradients:
// of d the same with g turned round, of g  Gᵀ[(A dy Aᵀ) ⊙ (Bᵀ d B)]G, summed over tiles.

// One dimension of each transform.
template <class T, int kM, int kR>
struct Points;

// m + r = 7 at 0, ±√½, ±√2, ∞: six points, which round 2 to 3 times less than the usual 0, ±1, ±2. F(4, 5) would take eight: faster,
// but its error is some 20 times the direct one's.
template <class T>
struct SixPoints {
  typedef Simd<T> S;
  typedef typename S::V V;
  static INLINE V a() { return S::set1(T(0.70710678118654752440)); }
  static INLINE V b() { return S::set1(T(1.41421356237309504880)); }
  static INLINE V set(double x) { return S::set1(T(x)); }

  // Values at x and -x.
  static INLINE void pair(V even, V odd, V* t) {
    t[0] = even + odd;
    t[1] = even - odd;
  }

  // t = Bᵀ d
  static INLINE void input(const V* d, V* t) {
    t[0] = d[0] + d[4] - set(2.5) * d[2];
    pair(d[4] - set(2) * d[2], a() * (d[3] - set(2) * d[1]), t + 1);
    pair(d[4] - set(.5) * d[2], b() * (d[3] - set(.5) * d[1]), t + 3);
    t[5] = d[1] + d[5] - set(2.5) * d[3];
  }
};

template <class T>
struct Points<T, 4, 3> : SixPoints<T> {
  typedef SixPoints<T> P;
  typedef typename P::V V;

  // y = Aᵀ t
  static INLINE void output(const V* t, V* y) {
    const V s1 = t[1] + t[2], s2 = t[3] + t[4], d1 = P::a() * (t[1] - t[2]), d2 = P::b() * (t[3] - t[4]);
    y[0] = t[0] + s1 + s2;
    y[1] = d1 + d2;
    y[2] = P::set(.5) * s1 + P::set(2) * s2;
    y[3] = P::set(.5) * d1 + P::set(2) * d2 + t[5];
  }

  // u = A y
  static INLINE void output_gradient(const V* y, V* u) {
    u[0] = y[0];
    P::pair(y[0] + P::set(.5) * y[2], P::a() * (y[1] + P::set(.5) * y[3]), u + 1);
    P::pair(y[0] + P::set(2) * y[2], P::b() * (y[1] + P::set(2) * y[3]), u + 3);
    u[5] = y[3];
  }

  // u = G g
  static INLINE void filter(const V* g, V* u) {
    const V n1 = P::set(-2. / 3), n2 = P::set(1. / 6);
    u[0] = g[0];
    P::pair(n1 * (g[0] + P::set(.5) * g[2]), n1 * P::a() * g[1], u + 1);
    P::pair(n2 * (g[0] + P::set(2) * g[2]), n2 * P::b() * g[1], u + 3);
    u[5] = g[2];
  }

  // g = Gᵀ u
  static INLINE void filter_gradient(const V* u, V* g) {
    const V n1 = P::set(-2. / 3), n2 = P::set(1. / 6);
    const V s1 = n1 * (u[1] + u[2]), s2 = n2 * (u[3] + u[4]);
    g[0] = u[0] + s1 + s2;
    g[1] = n1 * P::a() * (u[1] - u[2]) + n2 * P::b() * (u[3] - u[4]);
    g[2] = P::set(.5) * s1 + P::set(2) * s2 + u[5];
  }
};

template <class T>
struct Points<T, 2, 5> : SixPoints<T> {
  typedef SixPoints<T> P;
  typedef typename P::V V;

  static INLINE void output(const V* t, V* y) {
    y[0] = t[0] + (t[1] + t[2]) + (t[3] + t[4]);
    y[1] = P::a() * (t[1] - t[2]) + P::b() * (t[3] - t[4]) + t[5];
  }

  static INLINE void output_gradient(const V* y, V* u) {
    u[0] = y[0];
    P::pair(y[0], P::a() * y[1], u + 1);
    P::pair(y[0], P::b() * y[1], u + 3);
    u[5] = y[1];
  }

  static INLINE void filter(const V* g, V* u) {
    const V n1 = P::set(-2. / 3), n2 = P::set(1. / 6);
    u[0] = g[0];
    P::pair(n1 * (g[0] + P::set(.5) * g[2] + P::set(.25) * g[4]), n1 * P::a() * (g[1] + P::set(.5) * g[3]), u + 1);
    P::pair(n2 * (g[0] + P::set(2) * g[2] + P::set(4) * g[4]), n2 * P::b() * (g[1] + P::set(2) * g[3]), u + 3);
    u[5] = g[4];
  }

  static INLINE void filter_gradient(const V* u, V* g) {
    const V n1 = P::set(-2. / 3), n2 = P::set(1. / 6);
    const V s1 = n1 * (u[1] + u[2]), s2 = n2 * (u[3] + u[4]);
    const V d1 = n1 * P::a() * (u[1] - u[2]), d2 = n2 * P::b() * (u[3] - u[4]);
    g[0] = u[0] + s1 + s2;
    g[1] = d1 + d2;
    g[2] = P::set(.5) * s1 + P::set(2) * s2;
    g[3] = P::set(.5) * d1 + P::set(2) * d2;
    g[4] = P::set(.25) * s1 + P::set(4) * s2 + u[5];
  }
};

// F along columns, then along rows, of [kIn][kIn] vectors at `from` to [kOut][kOut] at `to`, each rows and columns apart as given;
// store(place, y, x, value) puts one down. Pointers run along, hidden from the compiler: it would keep one for every vector, on the stack.
template <class T, int kIn, int kOut, void (*F)(const typename Simd<T>::V*, typename Simd<T>::V*), class Store>
static INLINE void transform(const T* from, long from_row, long from_column, T* to, long to_row, long to_column, const Store& store) {
  typedef typename Simd<T>::V V;
  V half[kOut][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x, from += from_column) {
    V in[kIn], out[kOut];
    const T* p = from;
    asm("" : "+r"(p));
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y, p += from_row) in[y] = Simd<T>::load(p);
    F(in, out);
#pragma GCC unroll 6
    for (int y = 0; y < kOut; ++y) half[y][x] = out[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kOut; ++y, to += to_row) {
    V out[kOut];
    F(half[y], out);
    T* p = to;
    asm("" : "+r"(p));
#pragma GCC unroll 6
    for (int x = 0; x < kOut; ++x, p += to_column) store(p, y, x, out[x]);
  }
}

template <class T>
struct PlainStore {
  INLINE void operator()(T* p, int, int, typename Simd<T>::V v) const { Simd<T>::store(p, v); }
};

// The same for n columns (whole vectors) of [kIn * kIn][ld_from] to [kOut * kOut][ld_to].
template <class T, int kIn, int kOut, void (*F)(const typename Simd<T>::V*, typename Simd<T>::V*)>
static INLINE void transform_columns(long n, const T* from, long ld_from, T* to, long ld_to) {
  for (long j = 0; j < n; j += Simd<T>::W)
    transform<T, kIn, kOut, F>(from + j, kIn * ld_from, ld_from, to + j, kOut * ld_to, ld_to, PlainStore<T>());
}

#define CONVFAST_LAMBDA __attribute__((always_inline))

// Where tile i of a step lies.
struct TilePlace {
  long sample, index, d, y, x;  // index among the samples that take part; d, y, x of its first output pixel
  template <class T>
  INLINE TilePlace(const Winograd<T>& w, long i, int m) {
    const long of_frame = w.down * w.across, t = i % of_frame, deep = w.rows.rows / w.rows.height;
    index = i / of_frame / deep;
    sample = w.rows.sample[index];
    d = i / of_frame % deep;
    y = t / w.across * m;
    x = t % w.across * m;
  }
};

// Bᵀ d B of tiles [begin, end): v is [plane][tile][k]. Vectors run over the end of their channels, and what follows
// (the next piece or input, the next tile, the slack of a plane) is written after.
template <class T, int kM, int kR>
static void winograd_input(const Winograd<T>& w, long begin, long end, T* v) {
  typedef Simd<T> S;
  enum { kA = kM + kR - 1 };
  const long ld = winograd_ld(w.k), plane = winograd_plane(w.block, ld);
  for (long i = begin; i < end; ++i) {
    const TilePlace at(w, i, kM);
    T* to = v + (i - begin) * ld;
    for (int o = 0; o < 2; ++o) {
      const WinogradInput<T>& a = w.a[o];
      if (!a.frames) continue;
      const T* tile = a.frames + at.sample * a.frame + at.d * a.depth + at.y * a.row + at.x * a.pixel;
      const long row = a.row, pixel = a.pixel;
      for (long piece = 0; piece < w.pieces; ++piece) {
        const T* patch = tile + w.piece[piece] * pixel;
        for (long b = 0; b < a.blocks; ++b, to += a.channels)
          for (long c = 0; c < a.channels; c += S::W) {
            const T* from = patch + b * a.block + c;
            T* out = to + c;
            transform<T, kA, kA, Points<T, kM, kR>::input>(from, row, pixel, out, kA * plane, plane, PlainStore<T>());
          }
      }
    }
  }
}

template <class T>
static INLINE long winograd_depth(const Winograd<T>& w) {
  long k = 0;
  for (int o = 0; o < 2; ++o)
    if (w.a[o].frames) k += w.pieces * w.a[o].blocks * w.a[o].channels;
  return k;
}

// Slab s of `all` columns: its n columns, ld of them with those that fill the last vector.
template <class T>
struct Slab {
  long first, n, ld;
  INLINE Slab(long s, long all) : first(s * kSlab), n(all - first < kSlab ? all - first : (long)kSlab) {
    ld = (n + Simd<T>::W - 1) / Simd<T>::W * Simd<T>::W;
  }
};

// Products [slab][plane][tile][ld] of `tiles` tiles with the weights of slabs [first, last): plane by plane, so that its transforms are
// read once for all of them. Long sums are taken in parts: what a running sum of n terms loses grows with sqrt(n), and the output
// transform would multiply it.
template <class T>
static void winograd_products(const Winograd<T>& w, long planes, long tiles, const T* v, long columns, long first_slab, long last_slab, T* products) {
  enum { kPanel = Tile<T>::kPanel, W = Simd<T>::W, kLongest = 128 };
  const long ldv = winograd_ld(w.k), plane_v = winograd_plane(w.block, ldv), zero = 0;
  const Cut cut(tiles, Tile<T>::kPixels), depth(winograd_depth(w), kLongest);
  for (long p = 0; p < planes; ++p)
    for (long s = first_slab; s < last_slab; ++s) {
      const Slab<T> slab(s, columns);
      const long ld = slab.ld, plane = winograd_plane(w.block, ld);
      T* to = products + (s - first_slab) * planes * winograd_plane(w.block, kSlab) + p * plane;
      for (long j = 0; j == 0 || j < depth.tiles; ++j) {
        const long first = j ? depth.at(j) : 0;
        const Runs run = {&zero, 1, depth.tiles ? depth.at(j + 1) - first : 0, ldv};
        const Runs* runs[2] = {&run, &run};
        alignas(64) T part[Tile<T>::kPixels * kPanel];
        for (long n = 0; n < slab.n; n += kPanel) {
          const long width = slab.n - n > W ? (long)kPanel : (long)W;
          const T* b = w.weights + (slab.first * planes + p * ld + n) * w.k + first * width;
          for (long i = 0; i < cut.tiles; ++i) {
            const long x = cut.at(i), m = cut.at(i + 1) - x;
            const T* a[2] = {depth.tiles ? v + p * plane_v + x * ldv + first : 0, 0};
            T* out = to + x * ld + n;
            tile_all_columns<T, true>(m, a, runs, b, w.k, 0, width, first ? part : out, first ? width : ld);
            if (!first) continue;
            for (long row = 0; row < m; ++row)
              for (long c = 0; c < width; c += W) Simd<T>::store(out + row * ld + c, Simd<T>::load(out + row * ld + c) + Simd<T>::load(part + row * width + c));
          }
        }
      }
    }
}

// All slabs of a range for all its tiles, block by block. finish(tile, slab, products, plane) takes each result: [plane][slab.ld].
template <class T, int kM, int kR, class Finish>
static INLINE void winograd_convolution(const Winograd<T>& w, long columns, const WinogradRange& range, T* scratch, const Finish& finish) {
  enum { kPlanes = (kM + kR - 1) * (kM + kR - 1) };
  T* products = scratch + winograd_plane(w.block, winograd_ld(w.k)) * kPlanes;
  for (long begin = range.tile; begin < range.tile_end; begin += w.block) {
    const long end = begin + w.block < range.tile_end ? begin + w.block : range.tile_end;
    winograd_input<T, kM, kR>(w, begin, end, scratch);
    for (long first = range.slab; first < range.slab_end; first += w.group) {
      const long last = first + w.group < range.slab_end ? first + w.group : range.slab_end;
      winograd_products(w, kPlanes, end - begin, scratch, columns, first, last, products);
      for (long s = first; s < last; ++s) {
        const Slab<T> slab(s, columns);
        const T* of_slab = products + (s - first) * kPlanes * winograd_plane(w.block, kSlab);
        for (long i = begin; i < end; ++i) finish(i, slab, of_slab + (i - begin) * slab.ld, winograd_plane(w.block, slab.ld));
      }
    }
  }
}

// Aᵀ t A of one tile and slab into z [m * m][ldz], plus `bias`.
template <class T, int kM, int kR>
static INLINE void winograd_output(const T* products, long plane, long columns, const T* bias, T* z, long ldz) {
  typedef Simd<T> S;
  enum { kA = kM + kR - 1 };
  for (long j = 0; j < columns; j += S::W) {
    const typename S::V b = S::load(bias + j);
    const T* from = products + j;
    T* out = z + j;
    transform<T, kA, kM, Points<T, kM, kR>::output>(from, kA * plane, plane, out, kM * ldz, ldz,
                                                    [&](T* p, int, int, typename S::V v) CONVFAST_LAMBDA { S::store(p, v + b); });
  }
}

template <class T, int kM, int kR>
static void winograd_step(const ConvLSTMStep<T>& p, const Winograd<T>& w, const WinogradRange& range, T* scratch) {
  enum { W = Simd<T>::W };
  alignas(64) T z[kM * kM * kSlab + 2 * W];
  for (long i = 0; i < (long)(sizeof(z) / sizeof(T)); ++i) z[i] = 0;
  const long height = p.rows.height, width = p.rows.width;
  winograd_convolution<T, kM, kR>(w, 4 * p.channels, range, scratch, [&](long i, const Slab<T>& slab, const T* products, long plane) {
    winograd_output<T, kM, kR>(products, plane, slab.n, p.bias + slab.first, z, slab.ld);
    const TilePlace at(w, i, kM);
    const long ch = slab.first / 4, rows = height - at.y < kM ? height - at.y : (long)kM, m = width - at.x < kM ? width - at.x : (long)kM;
    const long pixel = (at.d * height + at.y) * width + at.x;
    T* h_frame = p.h_frames ? p.h_frames + at.sample * p.h_frame + at.d * p.h_map.depth + at.y * p.h_map.height + at.x * p.channels + ch : 0;
    T* h = p.out ? p.out + p.out_sample[at.index] + pixel * p.channels + ch : 0;
    cell_tile(p, CellTile<T>{rows, m, slab.n / 4, ch, pixel, at.sample, z, slab.ld, kM * slab.ld, h_frame, h});
  });
  if (p.stream_gates || p.stream_out) Simd<T>::fence();
}

// out[row, n] = convolution, as RowsGemm's; its operands and weights are those of w.
template <class T, int kM, int kR>
static void winograd_rows(const RowsGemm<T>& p, const Winograd<T>& w, const WinogradRange& range, T* scratch) {
  typedef Simd<T> S;
  enum { kA = kM + kR - 1 };
  const long height = p.rows.height, width = p.rows.width;
  winograd_convolution<T, kM, kR>(w, p.columns, range, scratch, [&](long i, const Slab<T>& slab, const T* products, long plane) {
    const TilePlace at(w, i, kM);
    T* tile = p.out + ((at.sample * p.rows.rows + at.d * height + at.y) * width + at.x) * p.ldo + slab.first;
    const bool whole = at.y + kM <= height && at.x + kM <= width;
    for (long j = 0; j < slab.n; j += S::W) {
      const T* from = products + j;
      T* out = tile + j;
      if (whole)
        transform<T, kA, kM, Points<T, kM, kR>::output>(from, kA * plane, plane, out, width * p.ldo, p.ldo, PlainStore<T>());
      else
        transform<T, kA, kM, Points<T, kM, kR>::output>(from, kA * plane, plane, out, width * p.ldo, p.ldo,
                                                        [&](T* q, int y, int x, typename S::V v) CONVFAST_LAMBDA {
                                                          if (at.y + y < height && at.x + x < width) S::store(q, v);
                                                        });
    }
  });
}

// sums [slab][plane][k][ld] += over tiles of (Bᵀ d B)ᵀ (A dy Aᵀ), dy being the gates' gradients. Beyond the frame dy is its
// border, zero.
template <class T, int kM, int kR>
static void winograd_weight_grad(const Winograd<T>& w, const GateFrames<T>& dgates, const WinogradRange& range, T* scratch, T* sums) {
  typedef Simd<T> S;
  enum { W = S::W, kPanel = Tile<T>::kPanel, kA = kM + kR - 1, kPlanes = kA * kA };
  const long ldv = winograd_ld(w.k), plane_v = winograd_plane(w.block, ldv), depth = winograd_depth(w);
  const Cut cut(depth, Tile<T>::kPixels);
  T* gradients = scratch + plane_v * kPlanes;
  for (long begin = range.tile; begin < range.tile_end; begin += w.block) {
    const long end = begin + w.block < range.tile_end ? begin + w.block : range.tile_end, tiles = end - begin;
    winograd_input<T, kM, kR>(w, begin, end, scratch);
    for (long s = range.slab; s < range.slab_end; ++s) {
      const Slab<T> slab(s, 4 * dgates.channels);
      const long n = slab.n, ld = slab.ld, plane = winograd_plane(w.block, ld);
      for (long i = begin; i < end; ++i) {
        const TilePlace at(w, i, kM);
        const T* tile = dgates.frames + at.sample * dgates.frame + slab.first * dgates.pixels + (dgates.origin + at.d * dgates.depth + at.y * dgates.width + at.x) * n;
        const long row = dgates.width * n;
        for (long j = 0; j < n; j += W) {
          const T* from = tile + j;
          T* out = gradients + (i - begin) * ld + j;
          transform<T, kM, kA, Points<T, kM, kR>::output_gradient>(from, row, n, out, kA * plane, plane, PlainStore<T>());
        }
      }
      T* sum = sums + slab.first * kPlanes * w.k;
      for (long p = 0; p < kPlanes; ++p, sum += w.k * ld)
        for (long c = 0; c < n; c += kPanel) {
          const T* g = gradients + p * plane + c;
          for (long i = 0; i < cut.tiles; ++i) {
            const long k = cut.at(i), m = cut.at(i + 1) - k;
            const T* a = scratch + p * plane_v + k;
            T* to = sum + k * ld + c;
            TileTable<T>::weight_grad(n - c > W ? 2 : 1, m, 1, &a, ldv, &g, ld, &tiles, to, ld);
          }
        }
    }
  }
}

// u[plane * stride + column] = G g Gᵀ for n columns (whole vectors) of g [tap][kSlab].
template <class T, int kM, int kR>
static void winograd_filter(const T* g, long n, T* u, long stride) {
  transform_columns<T, kR, kM + kR - 1, Points<T, kM, kR>::filter>(n, g, kSlab, u, stride);
}

// g [tap][kSlab] = Gᵀ u G for n columns (whole vectors) of u [plane][kSlab].
template <class T, int kM, int kR>
static void winograd_filter_gradient(const T* u, long n, T* g) {
  transform_columns<T, kM + kR - 1, kR, Points<T, kM, kR>::filter_gradient>(n, u, kSlab, g, kSlab);
}

// F of n columns (whole vectors): from kIn rows, of which `in` are there and the others zero, to kOut rows, of which `out` are wanted.
template <class T, int kIn, int kOut, void (*F)(const typename Simd<T>::V*, typename Simd<T>::V*), bool kWhole, class Store>
static INLINE void transform_rows(long n, const T* from, long ld_from, long in, T* to, long ld_to, long out, const Store& store) {
  typedef typename Simd<T>::V V;
  for (long j = 0; j < n; j += Simd<T>::W) {
    V before[kIn], after[kOut];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) before[i] = kWhole || i < in ? Simd<T>::load(from + i * ld_from + j) : V{};
    F(before, after);
#pragma GCC unroll 6
    for (int i = 0; i < kOut; ++i)
      if (kWhole || i < out) store(to + i * ld_to + j, after[i], j);
  }
}

template <class T, int kIn, int kOut, void (*F)(const typename Simd<T>::V*, typename Simd<T>::V*), class Store>
static INLINE void transform_rows(long n, const T* from, long ld_from, long in, T* to, long ld_to, long out, const Store& store) {
  if (in >= kIn && out >= kOut) transform_rows<T, kIn, kOut, F, true>(n, from, ld_from, in, to, ld_to, out, store);
  else transform_rows<T, kIn, kOut, F, false>(n, from, ld_from, in, to, ld_to, out, store);
}

template <class T>
struct PlainRow {
  INLINE void operator()(T* p, typename Simd<T>::V v, long) const { Simd<T>::store(p, v); }
};

template <class T, int kM, int kR>
static void winograd_1d_input(long rows, long n, const T* x, long ldx, T* v, long plane, long ldv) {
  enum { kA = kM + kR - 1 };
  for (; rows > 0; rows -= kM, x += kM * ldx, v += ldv)
    transform_rows<T, kA, kA, Points<T, kM, kR>::input>(n, x, ldx, rows + kR - 1, v, plane, kA, PlainRow<T>());
}

template <class T, int kM, int kR>
static void winograd_1d_output_gradient(long rows, long n, const T* g, long ldg, T* v, long plane, long ldv) {
  enum { kA = kM + kR - 1 };
  for (; rows > 0; rows -= kM, g += kM * ldg, v += ldv)
    transform_rows<T, kM, kA, Points<T, kM, kR>::output_gradient>(n, g, ldg, rows, v, plane, kA, PlainRow<T>());
}

template <class T, int kM, int kR>
static void winograd_1d_output(long rows, long n, const T* v, long plane, long ldv, const T* bias, bool relu, T* out, long ldo) {
  typedef Simd<T> S;
  enum { kA = kM + kR - 1 };
  for (; rows > 0; rows -= kM, v += ldv, out += kM * ldo)
    transform_rows<T, kA, kM, Points<T, kM, kR>::output>(n, v, plane, kA, out, ldo, rows, [&](T* p, typename S::V sum, long column) CONVFAST_LAMBDA {
      if (bias) sum += S::load(bias + column);
      S::store(p, relu ? relu_of(sum) : sum);
    });
}

template <class T, int kM, int kR>
static void winograd_1d_filter(long n, const T* g, long ldg, T* u, long plane) {
  transform_rows<T, kR, kM + kR - 1, Points<T, kM, kR>::filter>(n, g, ldg, kR, u, plane, kM + kR - 1, PlainRow<T>());
}

template <class T, int kM, int kR>
static void winograd_1d_filter_gradient(long n, const T* u, long plane, T* g, long ldg) {
  transform_rows<T, kM + kR - 1, kR, Points<T, kM, kR>::filter_gradient>(n, u, plane, kM + kR - 1, g, ldg, kR, PlainRow<T>());
}

template <class T, int kM, int kR>
static const WinogradKernels<T>* winograd_table() {
  static const WinogradKernels<T> kernels = {kM,
                                             kR,
                                             (kM + kR - 1) * (kM + kR - 1),
                                             winograd_step<T, kM, kR>,
                                             winograd_rows<T, kM, kR>,
                                             winograd_weight_grad<T, kM, kR>,
                                             winograd_filter<T, kM, kR>,
                                             winograd_filter_gradient<T, kM, kR>};
  return &kernels;
}

template <class T, int kM, int kR>
static const Winograd1d<T>* winograd_1d_table() {
  static const Winograd1d<T> kernels = {kM,
                                        kR,
                                        kM + kR - 1,
                                        winograd_1d_input<T, kM, kR>,
                                        winograd_1d_output_gradient<T, kM, kR>,
                                        winograd_1d_output<T, kM, kR>,
                                        winograd_1d_filter<T, kM, kR>,
                                        winograd_1d_filter_gradient<T, kM, kR>};
  return &kernels;
}

template <>
const WinogradKernels<double>* winograd_table<double, 4, 3>() { return 0; }
template <>
const WinogradKernels<double>* winograd_table<double, 2, 5>() { return 0; }
template <>
const Winograd1d<double>* winograd_1d_table<double, 4, 3>() { return 0; }
template <>
const Winograd1d<double>* winograd_1d_table<double, 2, 5>() { return 0; }
