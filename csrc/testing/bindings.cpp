// The raw kernels as a Python module over numpy arrays, for tests/test_kernels.py: no torch around them. Every function
// takes the name of an instruction set first and works in the dtype of its arrays, float32 or float64.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels/kernels.h"

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
  p.activated = activated.mutable_data();
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
  p.activated = activated.mutable_data();
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

// Convolution, stride 1, no padding: frames [S, H, W, C], weight [kh, kw, C, N] -> [S, H - kh + 1, W - kw + 1, N].
// The first `split` kernel rows come from the first operand and the rest from the second, as x and h do in a step.
template <class T>
static Array<T> convolve(const std::string& isa, const Array<T>& frames, const Array<T>& weight, long split) {
  const Kernels<T>& table = kernels<T>(isa);
  const long samples = frames.shape(0), height = frames.shape(1), width = frames.shape(2), channels = frames.shape(3);
  const long kh = weight.shape(0), kw = weight.shape(1), columns = weight.shape(3), k = kh * kw * channels;
  check<T>(weight, "weight", {kh, kw, channels, columns});
  const long lanes = table.lanes, panel = table.panel, padded = (columns + lanes - 1) / lanes * lanes;

  std::vector<T> packed(k * padded, T(0));
  for (long first = 0; first < columns; first += panel) {
    const long across = columns - first > lanes ? panel : lanes;
    packed.resize(std::max<size_t>(packed.size(), k * (first + across)), T(0));
    for (long row = 0; row < k; ++row)
      for (long n = 0; n < across && first + n < columns; ++n)
        packed[k * first + row * across + n] = weight.data()[row * columns + first + n];
  }

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
  p.ldo = (columns + panel - 1) / panel * panel;
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

template <class T>
static void bind(py::module_& m) {
  const py::arg isa("isa");
  m.def("sigmoid", map<T, &Kernels<T>::sigmoid>, isa, py::arg("x").noconvert());
  m.def("tanh", map<T, &Kernels<T>::tanh>, isa, py::arg("x").noconvert());
  m.def("cell_forward", cell_forward<T>, isa, py::arg("z").noconvert(), py::arg("c_prev") = py::none(),
        py::arg("peephole") = py::none());
  m.def("cell_backward", cell_backward<T>, isa, py::arg("activated").noconvert(), py::arg("c").noconvert(),
        py::arg("c_prev") = py::none(), py::arg("dh") = py::none(), py::arg("dc") = py::none(),
        py::arg("peephole") = py::none());
  m.def("convolve", convolve<T>, isa, py::arg("frames").noconvert(), py::arg("weight").noconvert(), py::arg("split"));
}

PYBIND11_MODULE(convfast_kernels, m) {
  m.def("instruction_sets", instruction_sets, "Those that this machine can run.");
  bind<float>(m);
  bind<double>(m);
}
