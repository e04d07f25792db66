// What conv1d needs beside GEMMs: activations, and convolutions of one channel each.

template <class T>
struct Activate {
  typedef Simd<T> S;
  typedef typename S::V V;
  typedef VectorMath<T> M;

  static INLINE V slope() { return S::set1(T(0.01)); }
  static INLINE V relu(V x) { return relu_of(x); }
  static INLINE V leaky_relu(V x) { return x > V{} ? x : slope() * x; }
  static INLINE V silu(V x) { return x * M::sigmoid(x); }
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
    return dy * s * (M::one() + x * (M::one() - s));
  }
  static INLINE V gelu_backward(V dy, V x) {
    return dy * (normal_cdf(x) + x * S::set1(T(0.39894228040143267794)) * M::exp_minus(S::set1(T(.5)) * x * x));
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

// out[row, c] = bias[c] + sum over runs i of x[row * stride + offset[i] + c] w[i, c]
template <class T>
static void depthwise(long rows, const T* x, const Runs& runs, const T* w, const T* bias, T* out, long ldo) {
  typedef Simd<T> S;
  for (long c = 0; c < runs.length; c += S::W) {
    const long lanes = runs.length - c < S::W ? runs.length - c : (long)S::W;
    for (long r = 0; r < rows; ++r) {
      typename S::V sum = bias ? S::loadn(bias + c, lanes) : typename S::V{};
      for (long i = 0; i < runs.count; ++i) sum += S::loadn(x + r * runs.stride + runs.offset[i] + c, lanes) * S::loadn(w + i * runs.length + c, lanes);
      S::storen(out + r * ldo + c, sum, lanes);
    }
  }
}

// dw[i, c] += sum over rows of x[row * stride + offset[i] + c] g[row, c]
template <class T>
static void depthwise_weight_grad(long rows, const T* x, const Runs& runs, const T* g, long ldg, T* dw) {
  typedef Simd<T> S;
  for (long i = 0; i < runs.count; ++i)
    for (long c = 0; c < runs.length; c += S::W) {
      const long lanes = runs.length - c < S::W ? runs.length - c : (long)S::W;
      typename S::V sum = {};
      for (long r = 0; r < rows; ++r) sum += S::loadn(x + r * runs.stride + runs.offset[i] + c, lanes) * S::loadn(g + r * ldg + c, lanes);
      T* q = dw + i * runs.length + c;
      S::storen(q, S::loadn(q, lanes) + sum, lanes);
    }
}
