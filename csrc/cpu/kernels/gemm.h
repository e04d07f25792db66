// GEMM micro-kernels. A tile is up to kPixels pixels of one row by one panel of B (kPanel columns), or kTriple by three vectors, and lives
// in registers for the whole K axis: per step of k the vector loads of B, one broadcast of A per pixel, no store. B streams from L2 once
// per tile (bytes per k / tile pixels = 9 bytes a cycle at full FMA rate with AVX-512, 14 in threes), A lies in L1.

template <class T>
struct Tile {
  // 28 accumulators + 2 of B + 1 of A fill 32 registers; 12 + 2 + 1 fit in 16; 18 + 2 + 9, one for each row of A, in NEON's 32.
#if defined(CONVFAST_NEON)
  enum { kPixels = 9 };
#else
  enum { kPixels = CONVFAST_BYTES == 64 ? 14 : 6 };
#endif
  enum { kVectors = 2, W = Simd<T>::W, kPanel = kVectors * W };
  // So many rows of three vectors, 27 + 3 + 1: fewer loads and broadcasts to an FMA than in a low tile of two. 0: no such tiles.
  enum { kTriple = CONVFAST_BYTES == 64 ? 9 : 0, kLeastTriple = CONVFAST_BYTES == 64 ? 6 : 1 };
};

// f of every height of a tile.
#if CONVFAST_BYTES == 64
#define CONVFAST_TILES(f) f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14)
#define CONVFAST_TRIPLES(f) f(6), f(7), f(8), f(9)
#elif defined(CONVFAST_NEON)
#define CONVFAST_TILES(f) f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9)
#define CONVFAST_TRIPLES(f) 0
#else
#define CONVFAST_TILES(f) f(1), f(2), f(3), f(4), f(5), f(6)
#define CONVFAST_TRIPLES(f) 0
#endif

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

#if defined(CONVFAST_NEON)
// As many whole vectors of k as there are, each row's by one load. b, ldb apart from one k to the next, has its NV vectors
// at apart[]; p: one pointer for three rows, as in tile_gemm.
template <class T, int M, int NV>
static INLINE void turns_by_lane(typename Simd<T>::V (&acc)[M][NV], const T* (&p)[(M + 2) / 3], long stride, const T*& b, const T* end,
                                 long ldb, const long* apart) {
  typedef Simd<T> S;
  typedef typename S::V V;
  enum { kAhead = 12 };
  if (end - b < S::W * ldb) return;
  do {
    V av[M];
    for (int m = 0; m < M; ++m) av[m] = S::load(p[m / 3] + (m % 3) * stride);
    for (int j = 0; j < (M + 2) / 3; ++j) p[j] += S::W;
#pragma GCC unroll 4
    for (int lane = 0; lane < S::W; ++lane) {
      V bv[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        bv[n] = S::load(b + apart[n]);
        if (n % 2 == 0) __builtin_prefetch(b + kAhead * ldb + apart[n]);
      }
#pragma GCC unroll 9
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] += bv[n] * av[m][lane];
      b += ldb;
    }
  } while (end - b >= S::W * ldb);
}
#endif

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
#if defined(CONVFAST_NEON)
    const long apart[] = {0, S::W};
    turns_by_lane<T, M, NV>(acc, p, stride, b, end, NV * S::W, apart);
    if (b != end)
#endif
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
  enum { kAhead = NV == 3 ? 4 : 8 };  // every pixel of a is on other cache lines
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
#if defined(CONVFAST_NEON)
      enum { kFirst = M / S::W * S::W };  // before it rows by lanes
#pragma GCC unroll 9
      for (int m = 0; m < kFirst; ++m) {
        const V av = S::load(p + m / S::W * S::W);
        for (int n = 0; n < NV; ++n) acc[m][n] += gv[n] * av[m % S::W];
      }
#else
      enum { kFirst = 0 };
#endif
#pragma GCC unroll 14
      for (int m = kFirst; m < M; ++m) {
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
#define CONVFAST_TILE(M) tile_gemm<T, M, NV, kNext>
    static const Gemm table[] = {CONVFAST_TILES(CONVFAST_TILE)};
#undef CONVFAST_TILE
    table[m - 1](a, runs, b, init, out, ldo);
  }

  static INLINE void weight_grad(long vectors, long m, long segments, const T* const* a, long a_stride, const T* const* g, long g_stride,
                                 const long* pixels, T* dw, long ldw) {
#define CONVFAST_TRIPLE(M) tile_weight_grad<T, M, 3>
#define CONVFAST_PAIR(M) tile_weight_grad<T, M, 2>
#define CONVFAST_VECTOR(M) tile_weight_grad<T, M, 1>
    static const WeightGradTile triples[] = {CONVFAST_TRIPLES(CONVFAST_TRIPLE)}, pairs[] = {CONVFAST_TILES(CONVFAST_PAIR)}, single[] = {CONVFAST_TILES(CONVFAST_VECTOR)};
#undef CONVFAST_TRIPLE
#undef CONVFAST_PAIR
#undef CONVFAST_VECTOR
    const WeightGradTile tile = vectors == 3 ? triples[m - Tile<T>::kLeastTriple] : vectors == 2 ? pairs[m - 1] : single[m - 1];
    tile(segments, a, a_stride, g, g_stride, pixels, dw, ldw);
  }
};

// How many of `left` vectors, from the `at`th of a row on, the next tile takes where three can be: two such tiles share three panels, what
// is left over goes in pairs.
static INLINE long triple_or_less(long at, long left) { return at % 2 || left >= 6 ? 3 : left >= 2 ? 2 : 1; }

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
  return m <= 2 ? 8 : m <= 6 ? 4 : m <= Tile<T>::kTriple ? 3 : 2;
#elif defined(CONVFAST_NEON)
  return m <= 2 ? 8 : m <= 4 ? 4 : 2;
#else
  return m == 1 ? 8 : m == 2 ? 4 : 2;
#endif
}

// Whether a GEMM of so many rows is done in tiles of three vectors. Their columns of B are read again for every few rows: where L1 cannot
// keep even half of them only against low tiles.
template <class T>
static INLINE bool in_triples(long rows, long k) {
  enum { kBytes = 64 << 10, kHigh = 11, kPixels = Tile<T>::kPixels };
  if (!Tile<T>::kTriple || (rows <= kPixels && vectors_for<T>(rows) != 3)) return false;
  return k * 3 * Simd<T>::W * (long)sizeof(T) <= kBytes || (rows > kPixels && Cut(rows, kPixels).least < kHigh);
}

// GCC tunes for processors in general by keeping integers in vector registers, whose way back waits behind the FMAs.
#if defined(__x86_64__) && !defined(__clang__)
#define CONVFAST_NO_VECTOR_SPILLS __attribute__((target("tune=haswell")))
#else
#define CONVFAST_NO_VECTOR_SPILLS
#endif

// Rows [row, row + M) by NV vectors of columns from n on, which is where a panel begins or, of three, its second vector. `ahead`: M rows
// of results, g.ldo apart, that are not in cache; their lines are asked for one row after another, so that no load waits behind them.
// kPlain: operands of one run, no relu, nothing asked for ahead. The way from one tile to the next is then so short that FMAs which still
// wait hide it.
template <class T, int M, int NV, bool kPlain>
CONVFAST_NO_VECTOR_SPILLS static void few_rows_gemm(const Gemm<T>& g, long row, long n, const T* ahead) {
  typedef Simd<T> S;
  typedef typename S::V V;
  enum { kEach = NV > 1 ? 2 : 1, kAhead = NV == 3 ? 8 : 12 };
  static const T zeros[NV * S::W] = {};
  const long column = g.ldb ? 1 : g.k, ldb = g.ldb ? g.ldb : (long)(kEach * S::W), panel = column * 2 * S::W;
  const long second = NV == 3 ? n / S::W & 1 : 0;  // 1: b begins with the second vector of a panel
  const T *b = g.b + (n - second * S::W) * column + second * S::W, *init = g.init ? g.init + row * g.ld_init + n : zeros;
  const long ld_init = g.init ? g.ld_init : 0;
  long apart[NV];  // of each vector from the first
  for (int v = 0; v < NV; ++v) apart[v] = (second + v) / kEach * panel + ((second + v) % kEach - second) * S::W;
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
      if (!kPlain && left > 0) {
        for (int v = 0; v < NV; ++v) __builtin_prefetch(ahead + v * S::W, 1);
        ahead += g.ldo;
        --left;
        const long part = (g.k + M - 1) / M * ldb;
        if (last - b > part) end = b + part;
      }
#if defined(CONVFAST_NEON)
      turns_by_lane<T, M, NV>(acc, p, stride, b, end, ldb, apart);
      if (b != end)
#endif
      do {
        V bv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          bv[v] = S::load(b + apart[v]);
          if (M > 2) __builtin_prefetch(b + kAhead * ldb + apart[v]);  // L2 does not keep up by itself; fewer rows wait for its bandwidth alone
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
    } while (!kPlain && b != last);
    if (kPlain || ++run == runs.count) {
      run = 0;
      ++operand;
    }
  } while (operand < 2 && g.a[operand]);
  T* out = g.out + row * g.ldo + n;
  const long ldo = g.ldo;
  if (!kPlain && g.relu) {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < NV; ++v) S::store(out + m * ldo + v * S::W, relu_of(acc[m][v]));
  } else {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < NV; ++v) S::store(out + m * ldo + v * S::W, acc[m][v]);
  }
}

// Columns [begin, end) of the only M rows, as many vectors at once as M rows are fastest with.
template <class T, int M, bool kPlain>
static void few_rows_columns(const Gemm<T>& g, long begin, long end) {
  enum { W = Simd<T>::W, kMost = vectors_for<T>(M) };
  const bool triples = kMost == 3 && in_triples<T>(M, g.k);
  for (long n = begin; n < end;) {
    const long left = (end - n + W - 1) / W;
    long step = left >= 4 && kMost > 4 ? 4 : left >= 2 ? 2 : 1;
    if (triples) step = triple_or_less(n / W, left);
    else if (kMost != 3 && left >= kMost) step = kMost;
    if (step == kMost) few_rows_gemm<T, M, kMost, kPlain>(g, 0, n, 0);
    else if (kMost > 4 && step == 4) few_rows_gemm<T, M, (kMost > 4 ? 4 : kMost), kPlain>(g, 0, n, 0);
    else if (step == 2) few_rows_gemm<T, M, 2, kPlain>(g, 0, n, 0);
    else few_rows_gemm<T, M, 1, kPlain>(g, 0, n, 0);
    n += step * W;
  }
}

// Columns [begin, end), from the first of a panel on; before(rows, columns) is called before each tile. Nothing of g is copied: its
// fields may still be on their way to the cache, behind stores that wait for another core.
template <class T, bool kPlain, class F>
static INLINE void gemm_columns_by(const Gemm<T>& g, long begin, long end, const F& before) {
  typedef void (*Columns)(const Gemm<T>&, long, long);
  typedef void (*TileOf)(const Gemm<T>&, long, long, const T*);
#define CONVFAST_COLUMNS(M) few_rows_columns<T, M, kPlain>
#define CONVFAST_TRIPLE(M) few_rows_gemm<T, M, 3, kPlain>
#define CONVFAST_PAIR(M) few_rows_gemm<T, M, 2, kPlain>
#define CONVFAST_VECTOR(M) few_rows_gemm<T, M, 1, kPlain>
  static const Columns columns[] = {CONVFAST_TILES(CONVFAST_COLUMNS)};
  static const TileOf triples[] = {CONVFAST_TRIPLES(CONVFAST_TRIPLE)}, pairs[] = {CONVFAST_TILES(CONVFAST_PAIR)}, single[] = {CONVFAST_TILES(CONVFAST_VECTOR)};
#undef CONVFAST_COLUMNS
#undef CONVFAST_TRIPLE
#undef CONVFAST_PAIR
#undef CONVFAST_VECTOR
  enum { W = Simd<T>::W, kPixels = Tile<T>::kPixels, kTriple = Tile<T>::kTriple };
  if (g.rows <= kPixels) {
    if (!g.rows) return;
    before(g.rows, end - begin);
    return columns[g.rows - 1](g, begin, end);
  }
  // The vectors of one tile after another stay in cache while the rows pass by.
  const bool in_threes = in_triples<T>(g.rows, g.k);
  for (long n = begin; n < end;) {
    const long left = (end - n + W - 1) / W, width = in_threes ? triple_or_less(n / W, left) : left >= 2 ? 2 : 1, beyond = n + width * W;
    const TileOf* const tiles = width == 3 ? triples : width == 2 ? pairs : single;
    const long least = width == 3 ? (long)Tile<T>::kLeastTriple : 1;
    const Cut cut(g.rows, width == 3 ? kTriple : kPixels);
    for (long i = 0; i < cut.tiles; ++i) {
      const long row = cut.at(i), next = cut.at(i + 1);
      before(next - row, (beyond < end ? beyond : end) - n);
      const T* ahead = 0;
      if (g.far && i + 1 < cut.tiles) ahead = g.out + next * g.ldo + n;
      else if (g.far && beyond < end) ahead = g.out + beyond;
      tiles[next - row - least](g, row, n, ahead);
    }
    n = beyond;
  }
}

template <class T, class F>
static INLINE void gemm_columns(const Gemm<T>& g, long begin, long end, const F& before) {
  if (g.far || g.relu || g.runs[0].count > 1 || (g.a[1] && g.runs[1].count > 1)) gemm_columns_by<T, false>(g, begin, end, before);
  else gemm_columns_by<T, true>(g, begin, end, before);
}

template <class T>
static void gemm(const Gemm<T>& g) {
  bool first = g.far;  // those of the other tiles are asked for by the tile before
  gemm_columns(g, 0, g.columns, [&](long rows, long columns) {
    if (first) LinesAhead<T>(g.out, rows, g.ldo, columns).fetch(rows * columns);  // all
    first = false;
  });
}

// Rows of n elements, lda apart, one behind the other, ld apart; whole vectors are written.
template <class T>
static INLINE void copy_rows(long rows, long n, const T* from, long lda, T* to, long ld) {
  typedef Simd<T> S;
  enum { kAhead = 8 };
  for (long r = 0; r < rows; ++r, from += lda, to += ld)
    for (long j = 0; j < n; j += S::W) {
      __builtin_prefetch(from + kAhead * lda + j);
      S::store(to + j, n - j >= S::W ? S::load(from + j) : S::loadn(from + j, n - j));
    }
}

// dw[k, n] += sum over rows of window(row)[k] g[row, n]
template <class T>
static void outer_sum(const OuterSum<T>& p) {
  // So many rows of a tile's columns of g stay in L1. Where columns are many, or rows of a pages apart, so do as many of some tiles of a,
  // copied there: they would come from afar for each of the columns.
  enum { W = Simd<T>::W, kRows = 64, kColumns = (16 << 10) / (kRows * sizeof(T)), ld = kColumns + W, kMany = 32, kSome = 8, kPage = 4096 };
  const Cut cut(p.runs.length, Tile<T>::kPixels);
  const bool triples = cut.least >= Tile<T>::kLeastTriple && cut.at(1) <= Tile<T>::kTriple && p.columns > 5 * W;
  const long lda = p.runs.stride, many = lda * (long)sizeof(T) >= kPage ? kSome : kMany, tiles = p.runs.count * cut.tiles;
  const bool copies = lda >= p.runs.length && p.columns >= many * Tile<T>::kPanel;
  const long together = copies ? kColumns / cut.at(1) : tiles;
  const auto column = [&](long tile) { return p.runs.offset[tile / cut.tiles] + cut.at(tile % cut.tiles); };
  const auto width_of = [&](long tile) { return cut.at(tile % cut.tiles + 1) - cut.at(tile % cut.tiles); };
  alignas(64) T block[kRows * ld];
  for (long first = 0; first < tiles; first += together) {
    const long end = first + together < tiles ? first + together : tiles;
    for (long row = 0; row < p.rows; row += kRows) {
      const long rows = p.rows - row < kRows ? p.rows - row : (long)kRows;
      const T* const a = p.a + row * lda;
      for (long tile = first, at = 0; copies && tile < end;) {  // neighbours in one go
        const long from = column(tile);
        long n = 0;
        for (; tile < end && column(tile) == from + n; ++tile) n += width_of(tile);
        copy_rows(rows, n, a + from, lda, block + at, ld);
        at += n;
      }
      for (long n = 0, width; n < p.columns; n += width * W) {
        const long left = (p.columns - n + W - 1) / W;
        width = triples ? triple_or_less(n / W, left) : left >= 2 ? 2 : 1;
        const T* g = p.g + row * p.ldg + n;
        long run = first / cut.tiles, i = first % cut.tiles, at = 0;
        for (long tile = first; tile < end; ++tile) {
          const long k = cut.at(i), m = cut.at(i + 1) - k;
          const T* from = copies ? block + at : a + p.runs.offset[run] + k;
          T* dw = p.dw + (p.at ? p.at[run] : run * p.runs.length * p.ldw) + k * p.ldw + n;
          TileTable<T>::weight_grad(width, m, 1, &from, copies ? (long)ld : lda, &g, p.ldg, &rows, dw, p.ldw);
          at += m;
          if (++i == cut.tiles) {
            i = 0;
            ++run;
          }
        }
      }
    }
  }
}
