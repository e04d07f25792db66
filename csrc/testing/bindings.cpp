// The raw kernels as a Python module over numpy arrays, for tests/test_kernels.py: no torch around them. Every function
// takes the name of an instruction set first and works in the dtype of its arrays, float32 or float64. And the threads of
// team.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <ctime>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/kernels/kernels.h"
#include "../cpu/team.h"

namespace py = pybind11;
using namespace convfast::cpu;

// noconvert() is what keeps a float32 array from being taken as float64.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using OptionalArray = std::optional<Array<T>>;

static std::vector<std::string> instruction_sets() {
  std::vector<std::string> names = {"baseline"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    names.push_back("avx512");
#endif
  return names;
}

template <class T>
static const Kernels<T>& kernels(const std::string& isa) {
  for (const std::string& usable : instruction_sets())
    if (usable == isa)
      return isa == "avx512" ? *Table<T>::avx512() : isa == "avx2" ? *Table<T>::avx2() : *Table<T>::baseline();
  throw std::invalid_argument("instruction set " + isa + " cannot run here");
}

template <class T>
static const T* data(const OptionalArray<T>& a) {
  return a ? a->data() : nullptr;
}

template <class T>
static void check(const OptionalArray<T>& a, const char* name, std::vector<py::ssize_t> shape) {
  if (a && std::vector<py::ssize_t>(a->shape(), a->shape() + a->ndim()) != shape)
    throw std::invalid_argument(std::string(name) + " has the wrong shape");
}

template <class T>
static Array<T> zeros(const std::vector<py::ssize_t>& shape) {
  Array<T> a(shape);
  std::memset(a.mutable_data(), 0, a.nbytes());
  return a;
}

template <class T, void (*Kernels<T>::*F)(long, const T*, T*)>
static Array<T> map(const std::string& isa, const Array<T>& x) {
  Array<T> y(x.size());
  (kernels<T>(isa).*F)(x.size(), x.data(), y.mutable_data());
  return y;
}

// Cells: z [rows, 4, n], c_prev [rows, n], peephole [3, rows, n] -> (c [rows, n], h [rows, n], activated [rows, 4, n])
template <class T>
static CellSpan<T> span(py::ssize_t rows, py::ssize_t n) {
  CellSpan<T> p = {};
  p.n = p.z_stride = p.activated_stride = p.dz_stride = n;
  p.rows = rows;
  p.z_next = p.activated_next = p.dz_next = 4 * n;
  p.peephole_stride = rows * n;
  return p;
}

template <class T>
static py::tuple cell_forward(const std::string& isa, const Array<T>& z, const OptionalArray<T>& c_prev,
                              const OptionalArray<T>& peephole) {
  const py::ssize_t rows = z.shape(0), n = z.shape(2);
  check<T>(z, "z", {rows, 4, n});
  check(c_prev, "c_prev", {rows, n});
  check(peephole, "peephole", {3, rows, n});
  Array<T> c = zeros<T>({rows, n}), h = zeros<T>({rows, n}), activated = zeros<T>({rows, 4, n});
  CellSpan<T> p = span<T>(rows, n);
  p.z = z.data();
  p.c_prev = data(c_prev);
  p.peephole = data(peephole);
  p.c = c.mutable_data();
  p.h = h.mutable_data();
  p.activated = {activated.mutable_data(), kFull};
  kernels<T>(isa).cell_forward(p);
  return py::make_tuple(c, h, activated);
}

// -> (dz [rows, 4, n], dc_prev [rows, n], dpeephole [3, rows, n] or None)
template <class T>
static py::tuple cell_backward(const std::string& isa, Array<T> activated, Array<T> c, const OptionalArray<T>& c_prev,
                               const OptionalArray<T>& dh, const OptionalArray<T>& dc,
                               const OptionalArray<T>& peephole) {
  const py::ssize_t rows = activated.shape(0), n = activated.shape(2);
  check<T>(activated, "activated", {rows, 4, n});
  for (const auto& [name, a] : {std::pair{"c", OptionalArray<T>(c)}, {"c_prev", c_prev}, {"dh", dh}, {"dc", dc}})
    check(a, name, {rows, n});
  check(peephole, "peephole", {3, rows, n});
  Array<T> dz = zeros<T>({rows, 4, n}), dc_prev = zeros<T>({rows, n});
  OptionalArray<T> dpeephole;
  if (peephole) dpeephole = zeros<T>({3, rows, n});
  CellSpan<T> p = span<T>(rows, n);
  p.activated = {activated.mutable_data(), kFull};
  p.c = c.mutable_data();
  p.c_prev = data(c_prev);
  p.dh = data(dh);
  p.dc = data(dc);
  p.peephole = data(peephole);
  p.dz = dz.mutable_data();
  p.dc_prev = dc_prev.mutable_data();
  p.dpeephole = dpeephole ? dpeephole->mutable_data() : nullptr;
  kernels<T>(isa).cell_backward(p);
  return py::make_tuple(dz, dc_prev, dpeephole);
}

template <class T, void (*Kernels<T>::*F)(long, const T*, const T*, T*)>
static Array<T> map_backward(const std::string& isa, const Array<T>& dy, const Array<T>& x) {
  check<T>(dy, "dy", {x.size()});
  Array<T> dx(x.size());
  (kernels<T>(isa).*F)(x.size(), dy.data(), x.data(), dx.mutable_data());
  return dx;
}

// b [k, columns] as pack_panels leaves it.
template <class T>
static std::vector<T> pack(const Kernels<T>& table, const T* b, long k, long columns) {
  std::vector<T> packed;
  for (long first = 0; first < columns; first += table.panel) {
    const long across = columns - first > table.lanes ? table.panel : table.lanes;
    packed.resize(k * (first + across) + 64, T(0));
    for (long row = 0; row < k; ++row)
      for (long n = 0; n < across && first + n < columns; ++n) packed[k * first + row * across + n] = b[row * columns + first + n];
  }
  return packed;
}

static const long kZero = 0;

// a [rows, k] b [k, columns] + init [rows, columns] -> [rows, columns]; b packed first or, whole vectors of it, read as it lies.
template <class T>
static Array<T> gemm(const std::string& isa, const Array<T>& a, const Array<T>& b, const OptionalArray<T>& init, bool pack_b) {
  const Kernels<T>& table = kernels<T>(isa);
  const long rows = a.shape(0), k = a.shape(1), columns = b.shape(1), ld = columns + table.lanes;
  check<T>(b, "b", {k, columns});
  check(init, "init", {rows, columns});
  if (!pack_b && columns % table.lanes) throw py::value_error("b: expected whole vectors of columns");
  const std::vector<T> packed = pack_b ? pack(table, b.data(), k, columns) : std::vector<T>();
  std::vector<T> out(rows * ld);
  for (long r = 0; init && r < rows; ++r) std::memcpy(&out[r * ld], init->data() + r * columns, columns * sizeof(T));
  table.gemm({rows, {a.data()}, {{&kZero, 1, k, k}}, pack_b ? packed.data() : b.data(), k, columns, init ? out.data() : nullptr, ld, out.data(), ld,
              pack_b ? 0 : columns});
  Array<T> result({rows, columns});
  for (long r = 0; r < rows; ++r) std::memcpy(result.mutable_data() + r * columns, &out[r * ld], columns * sizeof(T));
  return result;
}

// aᵀ g of a [rows, k] and g [rows, columns] -> [k, columns]; `runs`: so many stretches of k, the last of them first in the result.
template <class T>
static Array<T> outer_sum(const std::string& isa, const Array<T>& a, const Array<T>& g, long runs) {
  const Kernels<T>& table = kernels<T>(isa);
  const long rows = a.shape(0), k = a.shape(1), columns = g.shape(1), ld = columns + table.lanes;
  check<T>(g, "g", {rows, columns});
  std::vector<T> wide(rows * ld), sum(k * ld, T(0));
  for (long r = 0; r < rows; ++r) std::memcpy(&wide[r * ld], g.data() + r * columns, columns * sizeof(T));
  if (runs < 1 || k % runs) throw py::value_error("runs: expected a divisor of k");
  std::vector<long> from(runs), to(runs);
  for (long i = 0; i < runs; ++i) {
    from[i] = i * (k / runs);
    to[i] = (runs - 1 - i) * (k / runs) * ld;
  }
  table.outer_sum({rows, a.data(), {from.data(), runs, k / runs, k}, wide.data(), ld, columns, sum.data(), ld, runs > 1 ? to.data() : nullptr});
  Array<T> result({k, columns});
  for (long i = 0; i < k; ++i) std::memcpy(result.mutable_data() + i * columns, &sum[i * ld], columns * sizeof(T));
  return result;
}

// Taps of a depthwise convolution over x [time, channels].
template <class T>
struct Depthwise {
  std::vector<long> offset;
  Runs runs;
  long rows;
  Depthwise(const Array<T>& x, long taps, long stride, long dilation) : rows((x.shape(0) - dilation * (taps - 1) - 1) / stride + 1) {
    const long channels = x.shape(1);
    for (long j = 0; j < taps; ++j) offset.push_back(j * dilation * channels);
    runs = {offset.data(), taps, channels, stride * channels};
  }
};

// A copy with so many NaN behind it, for who reads whole vectors.
template <class T>
static std::vector<T> with_more(const Array<T>& x, long more) {
  std::vector<T> all(x.data(), x.data() + x.size());
  all.resize(all.size() + more, std::numeric_limits<T>::quiet_NaN());
  return all;
}

// x [time, channels], w [taps, channels], bias [channels] -> [rows, channels]
template <class T>
static Array<T> depthwise(const std::string& isa, const Array<T>& x, const Array<T>& w, const OptionalArray<T>& bias, long stride, long dilation) {
  const Depthwise<T> d(x, w.shape(0), stride, dilation);
  check<T>(w, "w", {w.shape(0), x.shape(1)});
  check(bias, "bias", {x.shape(1)});
  Array<T> out({d.rows, long(x.shape(1))});
  const Kernels<T>& table = kernels<T>(isa);
  const std::vector<T> wide_x = with_more(x, table.lanes), wide_w = with_more(w, table.lanes), wide_bias = bias ? with_more(*bias, table.lanes) : std::vector<T>();
  table.depthwise(d.rows, wide_x.data(), d.runs, wide_w.data(), bias ? wide_bias.data() : nullptr, out.mutable_data(), x.shape(1));
  return out;
}

// The gradient of w for that of the result, g [rows, channels] -> [taps, channels]
template <class T>
static Array<T> depthwise_weight_grad(const std::string& isa, const Array<T>& x, const Array<T>& g, long taps, long stride, long dilation) {
  const Depthwise<T> d(x, taps, stride, dilation);
  check<T>(g, "g", {d.rows, x.shape(1)});
  Array<T> dw = zeros<T>({taps, x.shape(1)});
  const Kernels<T>& table = kernels<T>(isa);
  const std::vector<T> wide_x = with_more(x, table.lanes), wide_g = with_more(g, table.lanes);
  table.depthwise_weight_grad(d.rows, wide_x.data(), d.runs, wide_g.data(), x.shape(1), dw.mutable_data());
  return dw;
}

// Convolution, stride 1, no padding: frames [S, H, W, C], weight [kh, kw, C, N] -> [S, H - kh + 1, W - kw + 1, N].
// The first `split` kernel rows come from the first operand and the rest from the second, as x and h do in a step.
template <class T>
static Array<T> convolve(const std::string& isa, const Array<T>& frames, const Array<T>& weight, long split) {
  const Kernels<T>& table = kernels<T>(isa);
  const long samples = frames.shape(0), height = frames.shape(1), width = frames.shape(2), channels = frames.shape(3);
  const long kh = weight.shape(0), kw = weight.shape(1), columns = weight.shape(3), k = kh * kw * channels;
  check<T>(weight, "weight", {kh, kw, channels, columns});
  const std::vector<T> packed = pack(table, weight.data(), k, columns);
  std::vector<long> offset(kh), sample(samples);
  for (long y = 0; y < kh; ++y) offset[y] = y * width * channels;
  for (long s = 0; s < samples; ++s) sample[s] = s;
  RowsGemm<T> p = {};
  const long out_height = height - kh + 1, out_width = width - kw + 1;
  p.rows = {sample.data(), samples, out_height, out_height, out_width};
  const RowMap map = {0, width * channels};
  const long frame = height * width * channels;
  if (split > 0) p.a[0] = {frames.data(), frame, map, {offset.data(), split, kw * channels, channels}};
  if (split < kh) p.a[1] = {frames.data(), frame, map, {offset.data() + split, kh - split, kw * channels, channels}};
  p.b = packed.data();
  p.columns = columns;
  p.k = k;
  p.ldo = (columns + table.panel - 1) / table.panel * table.panel;
  std::vector<T> out(samples * out_height * out_width * p.ldo);
  p.out = out.data();
  const long rows = samples * out_height, half = rows / 2;
  table.rows_gemm(p, 0, half);  // in two calls, as two threads would
  table.rows_gemm(p, half, rows);

  Array<T> result({samples, out_height, out_width, columns});
  for (long pixel = 0; pixel < rows * out_width; ++pixel)
    std::memcpy(result.mutable_data() + pixel * columns, out.data() + pixel * p.ldo, columns * sizeof(T));
  return result;
}

// Frames [S, H, W, C] cut into tiles of m x m outputs, with room for whole ones.
struct Tiles {
  const WinogradKernels<float>& kernels;
  long samples, height, width, channels, down, across;
  std::vector<float> frames, scratch;
  std::vector<long> sample;
  Winograd<float> w = {};

  Tiles(const Kernels<float>& table, const Array<float>& x, long r)
      : kernels(*table.winograd[r == 3 ? 0 : 1]),
        samples(x.shape(0)),
        height(x.shape(1) - r + 1),
        width(x.shape(2) - r + 1),
        channels(x.shape(3)),
        down((height + kernels.m - 1) / kernels.m),
        across((width + kernels.m - 1) / kernels.m),
        sample(samples) {
    const long h = down * kernels.m + r - 1, line = (across * kernels.m + r - 1) * channels;
    frames.assign(samples * h * line + 64, 0.f);
    for (long s = 0; s < samples; ++s) {
      sample[s] = s;
      for (long y = 0; y < x.shape(1); ++y)
        std::memcpy(&frames[(s * h + y) * line], x.data() + (s * x.shape(1) + y) * x.shape(2) * channels, x.shape(2) * channels * sizeof(float));
    }
    w.rows = {sample.data(), samples, height, height, width};
    w.down = down;
    w.across = across;
    w.block = 5;
    w.group = 2;
    static const long kFirst = 0;
    w.pieces = 1;
    w.piece = &kFirst;
    w.a[0] = {frames.data(), h * line, 0, line, channels, 1, 0, channels};
    w.k = channels;
    scratch.resize(winograd_scratch(kernels.planes, channels, w.block, w.group));
  }
  long tiles() const { return samples * down * across; }
};

static long winograd_side(const Array<float>& weight) {
  const long r = weight.shape(0);
  if ((r != 3 && r != 5) || weight.shape(1) != r) throw std::invalid_argument("weight is neither 3x3 nor 5x5");
  return r;
}

// convolve() by Winograd.
static Array<float> winograd_convolve(const std::string& isa, const Array<float>& frames, const Array<float>& weight) {
  const Kernels<float>& table = kernels<float>(isa);
  const long r = winograd_side(weight), columns = weight.shape(3), lanes = table.lanes;
  Tiles t(table, frames, r);
  check<float>(weight, "weight", {r, r, t.channels, columns});
  std::vector<float> packed(t.kernels.planes * t.channels * (columns + lanes)), g(25 * kSlab);
  for (long n0 = 0; n0 < columns; n0 += kSlab) {
    const long n = std::min<long>(kSlab, columns - n0), ld = (n + lanes - 1) / lanes * lanes;
    for (long c = 0; c < t.channels; ++c) {
      std::fill(g.begin(), g.end(), 0.f);
      for (long tap = 0; tap < r * r; ++tap) std::memcpy(&g[tap * kSlab], weight.data() + (tap * t.channels + c) * columns + n0, n * sizeof(float));
      for (long p = 0; p < ld; p += table.panel) {
        const long across = std::min(table.panel, ld - p);
        t.kernels.filter(&g[p], across, &packed[(n0 * t.kernels.planes + p) * t.channels + c * across], t.channels * ld);
      }
    }
  }
  RowsGemm<float> p = {};
  p.rows = t.w.rows;
  p.columns = columns;
  p.ldo = (columns + lanes - 1) / lanes * lanes;
  std::vector<float> out(t.samples * t.height * t.width * p.ldo);
  p.out = out.data();
  t.w.weights = packed.data();
  const long slabs = (columns + kSlab - 1) / kSlab, half = t.tiles() / 2;
  t.kernels.rows_gemm(p, t.w, {0, half, 0, slabs}, t.scratch.data());  // in two calls, as two threads would
  t.kernels.rows_gemm(p, t.w, {half, t.tiles(), 0, slabs}, t.scratch.data());
  Array<float> result({t.samples, t.height, t.width, columns});
  for (long pixel = 0; pixel < t.samples * t.height * t.width; ++pixel)
    std::memcpy(result.mutable_data() + pixel * columns, &out[pixel * p.ldo], columns * sizeof(float));
  return result;
}

// Its weight's gradient for that of its output, [S, H - r + 1, W - r + 1, 4 n] of up to kBlock channels n: [r, r, C, 4 n].
static Array<float> winograd_weight_gradient(const std::string& isa, const Array<float>& frames, const Array<float>& grad, long r) {
  const Kernels<float>& table = kernels<float>(isa);
  const long columns = grad.shape(3), lanes = table.lanes, ld = (columns + lanes - 1) / lanes * lanes;
  Tiles t(table, frames, r);
  check<float>(grad, "grad", {t.samples, t.height, t.width, columns});
  const long width = t.across * t.kernels.m, pixels = t.down * t.kernels.m * width;
  std::vector<float> bordered(t.samples * pixels * columns + 64, 0.f), sums(t.kernels.planes * t.channels * ld, 0.f), u(64 * kSlab), g(25 * kSlab);
  for (long s = 0; s < t.samples; ++s)
    for (long y = 0; y < t.height; ++y)
      std::memcpy(&bordered[(s * pixels + y * width) * columns], grad.data() + (s * t.height + y) * t.width * columns, t.width * columns * sizeof(float));
  const GateFrames<float> gates = {bordered.data(), pixels * columns, pixels, 0, 0, width, columns / 4};
  t.kernels.weight_grad(t.w, gates, {0, t.tiles() / 2, 0, 1}, t.scratch.data(), sums.data());
  t.kernels.weight_grad(t.w, gates, {t.tiles() / 2, t.tiles(), 0, 1}, t.scratch.data(), sums.data());
  Array<float> result({r, r, t.channels, columns});
  for (long c = 0; c < t.channels; ++c) {
    for (long p = 0; p < t.kernels.planes; ++p) std::memcpy(&u[p * kSlab], &sums[(p * t.channels + c) * ld], ld * sizeof(float));
    t.kernels.filter_gradient(u.data(), ld, g.data());
    for (long tap = 0; tap < r * r; ++tap) std::memcpy(result.mutable_data() + (tap * t.channels + c) * columns, &g[tap * kSlab], columns * sizeof(float));
  }
  return result;
}

// The transforms of Winograd1d, whose vectors run over the end of their n columns.
struct Transforms {
  const Winograd1d<float>& kernels;
  const long tiles;

  Transforms(const std::string& isa, long r, long rows) : kernels(*::kernels<float>(isa).winograd_1d[r == 3 ? 0 : 1]), tiles((rows + kernels.m - 1) / kernels.m) {}

  static std::vector<float> wide(const Array<float>& a, long rows, long n) {
    std::vector<float> to(rows * ld(n), NAN);
    for (long i = 0; i < rows; ++i) std::memcpy(&to[i * ld(n)], a.data() + i * n, n * sizeof(float));
    return to;
  }
  static Array<float> narrow(const std::vector<float>& from, long n, std::vector<py::ssize_t> shape) {
    shape.push_back(n);
    Array<float> to(shape);
    for (long i = 0; i < to.size() / n; ++i) std::memcpy(to.mutable_data() + i * n, &from[i * ld(n)], n * sizeof(float));
    return to;
  }
  static long ld(long n) { return (n + 15) / 16 * 16; }
};

// Of x [rows + r - 1, n], or of gradients [rows, n]: [planes, tiles, n].
static Array<float> winograd_1d_input(const std::string& isa, const Array<float>& x, long r, bool gradient) {
  const long n = x.shape(1), ld = Transforms::ld(n), rows = x.shape(0) - (gradient ? 0 : r - 1);
  const Transforms t(isa, r, rows);
  std::vector<float> v(t.kernels.planes * t.tiles * ld);
  (gradient ? t.kernels.output_gradient : t.kernels.input)(rows, n, t.wide(x, x.shape(0), n).data(), ld, v.data(), t.tiles * ld, ld);
  return t.narrow(v, n, {t.kernels.planes, t.tiles});
}

// v [planes, tiles, n] -> [rows, n]
static Array<float> winograd_1d_output(const std::string& isa, const Array<float>& v, long r, long rows, const OptionalArray<float>& bias, bool relu) {
  const long n = v.shape(2), ld = Transforms::ld(n);
  const Transforms t(isa, r, rows);
  std::vector<float> out((rows + 1) * ld, -1.f), wide_bias = bias ? t.wide(*bias, 1, n) : std::vector<float>();
  t.kernels.output(rows, n, t.wide(v, t.kernels.planes * t.tiles, n).data(), t.tiles * ld, ld, bias ? wide_bias.data() : nullptr, relu, out.data(), ld);
  if (out[rows * ld] != -1.f) throw std::runtime_error("a row past the last was written");
  return t.narrow(out, n, {rows});
}

// g [r, n] -> [planes, n], or back.
static Array<float> winograd_1d_filter(const std::string& isa, const Array<float>& g, long r, bool back) {
  const long n = g.shape(1), ld = Transforms::ld(n);
  const Transforms t(isa, r, 1);
  const long rows = back ? r : t.kernels.planes;
  std::vector<float> out(rows * ld);
  (back ? t.kernels.filter_gradient : t.kernels.filter)(n, t.wide(g, g.shape(0), n).data(), ld, out.data(), ld);
  return t.narrow(out, n, {rows});
}

// src [rows, columns] -> [columns, rows]
template <class T>
static Array<T> transpose(const std::string& isa, const Array<T>& src) {
  Array<T> dst({src.shape(1), src.shape(0)});
  kernels<T>(isa).transpose(src.shape(0), src.shape(1), src.data(), src.shape(1), dst.mutable_data(), src.shape(0));
  return dst;
}

static Array<float> widen(const std::string& isa, const Array<unsigned short>& from, bool half) {
  Array<float> to(from.size());
  kernels<float>(isa).widen(from.size(), from.data(), half ? kHalf : kBfloat16, to.mutable_data());
  return to;
}

static Array<unsigned short> narrow(const std::string& isa, const Array<float>& from, bool half) {
  Array<unsigned short> to(from.size());
  kernels<float>(isa).narrow(from.size(), from.data(), half ? kHalf : kBfloat16, to.mutable_data());
  return to;
}

// What `threads` threads found at `turns` turns of a Team, or, if they follow each other, of Progress: how many of them took part, how
// often one was let through too early (or, of a whole team, had another's rank), and the seconds of processor that all of them took. At
// every turn one of them, another one each time, comes `nap` microseconds late. At turn `failing` (-1: never) the first one fails, and the
// last number is how many others learned of it.
static std::tuple<long, long, double, long> take_turns(long threads, long turns, long nap, bool follow, long failing) {
  Team team(threads);
  std::vector<Progress> progress(threads);
  std::vector<std::atomic<long>> behind(threads);  // turns that a thread has behind it
  std::atomic<long> begun{0}, members{0}, early{0}, nanoseconds{0}, learned{0};
  const auto take = [&](long rank) {
    long turn = 0;
    for (long t = 0; t < turns; ++t) {
      if (rank == 0 && t == failing) return follow ? progress[rank].fail() : team.fail(rank);
      if (follow && rank > 0) {
        progress[rank - 1].wait(t + 1);
        early += behind[rank - 1] < t + 1;
      }
      if (nap && t % threads == rank) std::this_thread::sleep_for(std::chrono::microseconds(nap));
      behind[rank].store(t + 1, std::memory_order_relaxed);
      if (follow) {
        progress[rank].reach(t + 1);
        continue;
      }
      team.wait(rank, turn);
      for (long i = 0; i < team.size(); ++i) early += behind[i] < t + 1;
    }
  };
  const auto run = [&](long own) {
    for (++begun; begun < threads;) std::this_thread::yield();
    const long rank = follow ? own : team.join(own);
    members += rank >= 0;
    early += !follow && team.size() == threads && rank != own;
    try {
      if (rank >= 0) take(rank);
    } catch (const std::runtime_error&) {
      ++learned;
      if (follow) progress[rank].fail();
      else team.fail(rank);
    }
    timespec spent;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &spent);
    nanoseconds += spent.tv_sec * 1000000000l + spent.tv_nsec;
  };
  std::vector<std::thread> all;
  for (long i = 0; i < threads; ++i) all.emplace_back(run, i);
  for (std::thread& thread : all) thread.join();
  return {members, early, 1e-9 * nanoseconds, learned};
}

template <class T>
static void bind(py::module_& m) {
  const py::arg isa("isa");
  m.def("sigmoid", map<T, &Kernels<T>::sigmoid>, isa, py::arg("x").noconvert());
  m.def("tanh", map<T, &Kernels<T>::tanh>, isa, py::arg("x").noconvert());
  m.def("relu", map<T, &Kernels<T>::relu>, isa, py::arg("x").noconvert());
  m.def("leaky_relu", map<T, &Kernels<T>::leaky_relu>, isa, py::arg("x").noconvert());
  m.def("silu", map<T, &Kernels<T>::silu>, isa, py::arg("x").noconvert());
  m.def("gelu", map<T, &Kernels<T>::gelu>, isa, py::arg("x").noconvert());
  const auto backward = [&](const char* name, auto f) { m.def(name, f, isa, py::arg("dy").noconvert(), py::arg("x").noconvert()); };
  backward("sigmoid_backward", map_backward<T, &Kernels<T>::sigmoid_backward>);
  backward("tanh_backward", map_backward<T, &Kernels<T>::tanh_backward>);
  backward("relu_backward", map_backward<T, &Kernels<T>::relu_backward>);
  backward("leaky_relu_backward", map_backward<T, &Kernels<T>::leaky_relu_backward>);
  backward("silu_backward", map_backward<T, &Kernels<T>::silu_backward>);
  backward("gelu_backward", map_backward<T, &Kernels<T>::gelu_backward>);
  m.def("gemm", gemm<T>, isa, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("init") = py::none(), py::arg("pack_b") = true);
  m.def("outer_sum", outer_sum<T>, isa, py::arg("a").noconvert(), py::arg("g").noconvert(), py::arg("runs") = 1);
  m.def("depthwise", depthwise<T>, isa, py::arg("x").noconvert(), py::arg("w").noconvert(), py::arg("bias"), py::arg("stride"), py::arg("dilation"));
  m.def("depthwise_weight_grad", depthwise_weight_grad<T>, isa, py::arg("x").noconvert(), py::arg("g").noconvert(), py::arg("taps"), py::arg("stride"),
        py::arg("dilation"));
  m.def("cell_forward", cell_forward<T>, isa, py::arg("z").noconvert(), py::arg("c_prev") = py::none(),
        py::arg("peephole") = py::none());
  m.def("cell_backward", cell_backward<T>, isa, py::arg("activated").noconvert(), py::arg("c").noconvert(),
        py::arg("c_prev") = py::none(), py::arg("dh") = py::none(), py::arg("dc") = py::none(),
        py::arg("peephole") = py::none());
  m.def("transpose", transpose<T>, isa, py::arg("src").noconvert());
  m.def("convolve", convolve<T>, isa, py::arg("frames").noconvert(), py::arg("weight").noconvert(), py::arg("split"));
}

PYBIND11_MODULE(convfast_kernels, m) {
  m.def("instruction_sets", instruction_sets, "Those that this machine can run.");
  m.def("take_turns", take_turns, py::arg("threads"), py::arg("turns"), py::arg("nap"), py::arg("follow"), py::arg("failing") = -1,
        py::call_guard<py::gil_scoped_release>());
  bind<float>(m);
  bind<double>(m);
  const py::arg isa("isa");
  m.def("widen", widen, isa, py::arg("from_").noconvert(), py::arg("half"));
  m.def("narrow", narrow, isa, py::arg("from_").noconvert(), py::arg("half"));
  m.def("winograd_convolve", winograd_convolve, isa, py::arg("frames").noconvert(), py::arg("weight").noconvert());
  m.def("winograd_1d_input", winograd_1d_input, isa, py::arg("x").noconvert(), py::arg("r"), py::arg("gradient") = false);
  m.def("winograd_1d_output", winograd_1d_output, isa, py::arg("v").noconvert(), py::arg("r"), py::arg("rows"), py::arg("bias") = py::none(), py::arg("relu") = false);
  m.def("winograd_1d_filter", winograd_1d_filter, isa, py::arg("g").noconvert(), py::arg("r"), py::arg("back") = false);
  m.def("winograd_weight_gradient", winograd_weight_gradient, isa, py::arg("frames").noconvert(), py::arg("grad").noconvert(), py::arg("r"));
}
