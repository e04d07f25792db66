// What conv1d needs beside GEMMs: activations, and convolutions of one channel each.

template <class T>
struct Activate {
  typedef Simd<T> S;
  typedef typename S::V V;
  typedef VectorMath<T> M;

  static INLINE V slope() { return S::set1(T(0.01)); }
  static INLINE V relu(V x) { return relu_of(x); }
  static INLINE V leaky_relu(V x) { return x > V{} ? x : slope() * x; }
  // Beyond it a sigmoid or a density is zero, but is computed as no less than the smallest normal number: a factor of 1e38 would
  // make something of that. A NaN passes.
  static INLINE V far() { return S::set1(T(sizeof(T) == 4 ? 100 : 750)); }
  static INLINE V not_below(V x) { return x < -far() ? -far() : x; }
  static INLINE V not_above(V x) { return x > far() ? far() : x; }
  static INLINE V silu(V x) { return not_below(x) * M::sigmoid(x); }
  static INLINE V normal_cdf(V x) { return S::set1(T(.5)) * (M::one() + M::erf(x * S::set1(T(0.70710678118654752440)))); }
  static INLINE V gelu(V x) { return x * normal_cdf(x); }

  // Gradients from y, the activation's result.
  static INLINE V relu_backward(V dy, V y) { return y <= V{} ? V{} : dy; }
  static INLINE V leaky_relu_backward(V dy, V y) { return y > V{} ? dy : slope() * dy; }
  static INLINE V sigmoid_backward(V dy, V y) { return dy * y * (M::one() - y); }
  static INLINE V tanh_backward(V dy, V y) { return dy * (M::one() - y * y); }
  // From the pre-activation.
  static INLINE V silu_backward(V dy, V x) {
    const V s = M::sigmoid(x);
    return dy * s * (M::one() + not_below(x) * (M::one() - s));
  }
  static INLINE V gelu_backward(V dy, V x) {
    return dy * (normal_cdf(x) + not_below(not_above(x)) * S::set1(T(0.39894228040143267794)) * M::exp_minus(S::set1(T(.5)) * x * x));
  }
};

template <class T, typename Simd<T>::V (*F)(typename Simd<T>::V)>
static void map_row(long n, const T* x, T* y) {
  typedef Simd<T> S;
  long i = 0;
  for (; i + S::W <= n; i += S::W) S::store(y + i, F(S::load(x + i)));
  if (i < n) S::storen(y + i, F(S::loadn(x + i, n - i)), n - i);
}

template <class T, typename Simd<T>::V (*F)(typename Simd<T>::V, typename Simd<T>::V)>
static void map_rows(long n, const T* dy, const T* x, T* out) {
  typedef Simd<T> S;
  long i = 0;
  for (; i + S::W <= n; i += S::W) S::store(out + i, F(S::load(dy + i), S::load(x + i)));
  if (i < n) S::storen(out + i, F(S::loadn(dy + i, n - i), S::loadn(x + i, n - i)), n - i);
}

// R rows by NV vectors of channels, the last one's `lanes`.
template <class T, int R, int NV>
static INLINE void depthwise_tile(const T* x, const Runs& runs, const T* w, const T* bias, T* out, long ldo, long lanes) {
  typedef Simd<T> S;
  typename S::V sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = bias ? S::load(bias + v * S::W) : typename S::V{};
  for (long i = 0; i < runs.count; ++i, w += runs.length) {
    const T* const from = x + runs.offset[i];
    for (int v = 0; v < NV; ++v) {
      const typename S::V weight = S::load(w + v * S::W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][v] += S::load(from + r * runs.stride + v * S::W) * weight;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) {
      if (v + 1 < NV || lanes == S::W) S::store(out + r * ldo + v * S::W, sum[r][v]);
      else S::storen(out + r * ldo + v * S::W, sum[r][v], lanes);
    }
}

template <class T, int R, int NV>
static INLINE void depthwise_columns(long rows, const T* x, const Runs& runs, const T* w, const T* bias, T* out, long ldo, long lanes) {
  long r = 0;
  for (; r + R <= rows; r += R) depthwise_tile<T, R, NV>(x + r * runs.stride, runs, w, bias, out + r * ldo, ldo, lanes);
  for (; r < rows; ++r) depthwise_tile<T, 1, NV>(x + r * runs.stride, runs, w, bias, out + r * ldo, ldo, lanes);
}

// out[row, c] = bias[c] + sum over runs i of x[row * stride + offset[i] + c] w[i, c]; whole vectors are read. As many sums at once as hide
// the latency of an FMA.
template <class T>
static void depthwise(long rows, const T* x, const Runs& runs, const T* w, const T* bias, T* out, long ldo) {
  enum { W = Simd<T>::W };
  for (long c = 0; c < runs.length; c += 2 * W) {
    const long left = runs.length - c, lanes = left > W ? (left < 2 * W ? left - W : (long)W) : left;
    if (left > W) depthwise_columns<T, 4, 2>(rows, x + c, runs, w + c, bias ? bias + c : 0, out + c, ldo, lanes);
    else depthwise_columns<T, 8, 1>(rows, x + c, runs, w + c, bias ? bias + c : 0, out + c, ldo, lanes);
  }
}

// N taps, R rows at a time.
template <class T, int N, int R>
static void depthwise_sums(long rows, const T* x, const long* offset, long stride, const T* g, long ldg, T* dw, long ldw, long lanes) {
  typedef Simd<T> S;
  typename S::V sum[R][N] = {};
  long row = 0;
  for (; row + R <= rows; row += R)
    for (int r = 0; r < R; ++r) {
      const typename S::V gradient = S::load(g + (row + r) * ldg);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] += S::load(x + (row + r) * stride + offset[n]) * gradient;
    }
  for (; row < rows; ++row)
    for (int n = 0; n < N; ++n) sum[0][n] += S::load(x + row * stride + offset[n]) * S::load(g + row * ldg);
  for (int n = 0; n < N; ++n) {
    typename S::V all = sum[0][n];
    for (int r = 1; r < R; ++r) all += sum[r][n];
    T* const to = dw + n * ldw;
    S::storen(to, S::loadn(to, lanes) + all, lanes);
  }
}

// dw[i, c] += sum over rows of x[row * stride + offset[i] + c] g[row, c]; whole vectors of x and g are read.
template <class T>
static void depthwise_weight_grad(long rows, const T* x, const Runs& runs, const T* g, long ldg, T* dw) {
  typedef void (*Sums)(long, const T*, const long*, long, const T*, long, T*, long, long);
  static const Sums sums[] = {depthwise_sums<T, 1, 4>, depthwise_sums<T, 2, 4>, depthwise_sums<T, 3, 2>, depthwise_sums<T, 4, 2>,
                              depthwise_sums<T, 5, 2>, depthwise_sums<T, 6, 1>, depthwise_sums<T, 7, 1>, depthwise_sums<T, 8, 1>};
  enum { W = Simd<T>::W, kMost = 8 };
  for (long i = 0; i < runs.count; i += kMost) {
    const long taps = runs.count - i < kMost ? runs.count - i : (long)kMost;
    for (long c = 0; c < runs.length; c += W)
      sums[taps - 1](rows, x + c, runs.offset + i, runs.stride, g + c, ldg, dw + i * runs.length + c, runs.length, runs.length - c < W ? runs.length - c : (long)W);
  }
}
