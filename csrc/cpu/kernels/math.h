// sigmoid and tanh for vectors, as Math policies of common/cell.h. Errors are bounded in tests/test_kernels.py.

template <class T>
struct VectorMath;

// S: Simd<float>, or Several of its vectors.
template <class S>
struct FloatMath {
  typedef typename S::V Number;
  static INLINE Number one() { return S::set1(1.f); }
  static INLINE Number zero() { return Number{}; }
  static INLINE Number fma(Number a, Number b, Number c) { return S::fma(a, b, c); }

  // e^-x = 2^n e^-r with n = -x / ln 2, rounded to a multiple of 1 / kParts, and |r| <= ln 2 / (2 kParts). e^-r by its Taylor polynomial:
  // of degree 7 (2e-9) with whole numbers n, of degree 3 (9e-9) with sixteenths, whose powers of two are in a register.
  // x is held to +-87, inside the normal numbers; a NaN passes through r.
  static INLINE Number exp_minus(Number x) {
    constexpr int kParts = S::kParts;
    x = S::max(S::set1(-87.f), S::min(S::set1(87.f), x));
    const Number magic = S::set1(12582912.f / kParts);  // 1.5 * 2^23 / kParts: adding it rounds, and the low bits count the parts
    const Number t = magic - x * S::set1(1.44269504f);
    const Number n = t - magic;
    const Number r = (x + n * S::set1(0.693359375f)) - n * S::set1(2.12194440e-4f);
    if constexpr (kParts == 16) {
      const Number power = S::power_of_sixteenths(t);
      const Number p = ((S::set1(.5f) - S::set1(1.f / 6) * r) * r - S::set1(1.f)) * r;
      return S::scale(power + power * p, n, t);
    }
    Number p = S::set1(-1.f / 5040);
    p = p * r + S::set1(1.f / 720);
    p = p * r - S::set1(1.f / 120);
    p = p * r + S::set1(1.f / 24);
    p = p * r - S::set1(1.f / 6);
    p = p * r + S::set1(.5f);
    p = p * r - S::set1(1.f);
    p = p * r + S::set1(1.f);
    return S::scale(p, n, t);
  }

  static INLINE Number sigmoid(Number x) { return S::divide(one(), one() + exp_minus(x)); }

  // x P(x^2) / Q(x^2), minimax in relative error (2e-8) on [0, 9.02], past which tanh rounds to 1.
  static INLINE Number tanh(Number x) {
    const Number u = S::min(S::set1(9.02f * 9.02f), x * x);  // past it the product grows with x, and is cut at 1
    Number p = S::set1(1.331856669e-08f);
    p = p * u + S::set1(2.058313033e-05f);
    p = p * u + S::set1(3.494014023e-03f);
    p = p * u + S::set1(1.337970095e-01f);
    p = p * u + S::set1(9.999999790e-01f);
    Number q = S::set1(7.761816343e-07f);
    q = q * u + S::set1(3.283058664e-04f);
    q = q * u + S::set1(2.587099600e-02f);
    q = q * u + S::set1(4.671301619e-01f);
    q = q * u + S::set1(1.f);
    const Number r = x * S::divide(p, q);  // the quotient is positive: the sign of a zero comes through
    return S::max(S::set1(-1.f), S::min(S::set1(1.f), r));
  }

  // x P(x^2) / Q(x^2) on [-4, 4], past which erf rounds to 1; the coefficients are Eigen's (generic_erf).
  static INLINE Number erf(Number x) {
    x = S::max(S::set1(-4.f), S::min(S::set1(4.f), x));
    const Number u = x * x;
    Number p = S::set1(-2.72614225801306e-10f);
    p = p * u + S::set1(2.77068142495902e-08f);
    p = p * u + S::set1(-2.10102402082508e-06f);
    p = p * u + S::set1(-5.69250639462346e-05f);
    p = p * u + S::set1(-7.34990630326855e-04f);
    p = p * u + S::set1(-2.95459980854025e-03f);
    p = p * u + S::set1(-1.60960333262415e-02f);
    Number q = S::set1(-1.45660718464996e-05f);
    q = q * u + S::set1(-2.13374055278905e-04f);
    q = q * u + S::set1(-1.68282697438203e-03f);
    q = q * u + S::set1(-7.37332916720468e-03f);
    q = q * u + S::set1(-1.42647390514189e-02f);
    const Number r = x * S::divide(p, q);
    return S::max(S::set1(-1.f), S::min(S::set1(1.f), r));
  }
};

template <>
struct VectorMath<float> : FloatMath<Simd<float>> {};

template <>
struct VectorMath<double> {
  typedef Simd<double> S;
  typedef S::V Number;
  static INLINE Number one() { return S::set1(1.); }
  static INLINE Number zero() { return Number{}; }
  static INLINE Number fma(Number a, Number b, Number c) { return a * b + c; }
  static INLINE Number sigmoid(Number x) {
    Number r;
    for (int i = 0; i < S::W; ++i) r[i] = ScalarMath<double>::sigmoid(x[i]);
    return r;
  }
  static INLINE Number tanh(Number x) {
    Number r;
    for (int i = 0; i < S::W; ++i) r[i] = ScalarMath<double>::tanh(x[i]);
    return r;
  }
  static INLINE Number exp_minus(Number x) {
    Number r;
    for (int i = 0; i < S::W; ++i) r[i] = ::exp(-x[i]);
    return r;
  }
  static INLINE Number erf(Number x) {
    Number r;
    for (int i = 0; i < S::W; ++i) r[i] = ::erf(x[i]);
    return r;
  }
};
