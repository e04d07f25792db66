// The LSTM cell, forward and backward, for one element or one vector of elements: the one place where its
// arithmetic is written. Shi et al. 2015, https://arxiv.org/abs/1506.04214, eq. 3; without peepholes,
// Hochreiter & Schmidhuber 1997 with a forget gate.
//
//   i = sigmoid(zi + pi c)    f = sigmoid(zf + pf c)    g = tanh(zg)
//   c' = f c + i g            o = sigmoid(zo + po c')   h = o tanh(c')
//
// A Math policy names the number type and brings sigmoid, tanh and fma, so that a scalar, a SIMD vector and a device
// thread run the same lines.
#pragma once
#include <math.h>

#ifdef __CUDACC__
#define CONVFAST_CELL __host__ __device__ __forceinline__
#else
#define CONVFAST_CELL inline __attribute__((always_inline))
#endif

namespace convfast {

template <class T>
struct ScalarMath {
  using Number = T;
  static CONVFAST_CELL T one() { return T(1); }
  static CONVFAST_CELL T zero() { return T(0); }
  static CONVFAST_CELL T sigmoid(T x) { return T(1) / (T(1) + ::exp(-x)); }
  static CONVFAST_CELL T tanh(T x) { return ::tanh(x); }
  static CONVFAST_CELL T fma(T a, T b, T c) { return a * b + c; }
};

template <class N>
struct Peephole {
  N i, f, o;
};

template <class N>
struct CellForward {
  N i, f, g, o, c, h;
};

template <class N>
struct CellBackward {
  N di, df, dg, d_o, dc;  // of the pre-activations, and of the previous cell state
};

template <class Math, bool kPeephole, class N = typename Math::Number>
CONVFAST_CELL CellForward<N> lstm_cell_forward(N zi, N zf, N zg, N zo, N c_prev, const Peephole<N>& p) {
  if (kPeephole) {
    zi += p.i * c_prev;
    zf += p.f * c_prev;
  }
  CellForward<N> r;
  r.i = Math::sigmoid(zi);
  r.f = Math::sigmoid(zf);
  r.g = Math::tanh(zg);
  r.c = Math::fma(r.f, c_prev, r.i * r.g);  // of two products the compiler would round now one first, now the other
  if (kPeephole) zo += p.o * r.c;
  r.o = Math::sigmoid(zo);
  r.h = r.o * Math::tanh(r.c);
  return r;
}

// a: the activated gates and the new c; dh, dc: gradients of h and of the new c from all that follows.
template <class Math, bool kPeephole, class N = typename Math::Number>
CONVFAST_CELL CellBackward<N> lstm_cell_backward(N i, N f, N g, N o, N c_prev, N c, N dh, N dc, const Peephole<N>& p) {
  const N one = Math::one();
  const N tc = Math::tanh(c);
  CellBackward<N> r;
  r.d_o = dh * tc * o * (one - o);
  dc += dh * o * (one - tc * tc);
  if (kPeephole) dc += r.d_o * p.o;
  r.di = dc * g * i * (one - i);
  r.df = dc * c_prev * f * (one - f);
  r.dg = dc * i * (one - g * g);
  r.dc = dc * f;
  if (kPeephole) r.dc += r.di * p.i + r.df * p.f;
  return r;
}

}  // namespace convfast
