// The pointwise LSTM cell, one pass over memory. The contract of the ops is in csrc/ops.h.
//
// Both layouts are rows of gates [4, width] beside rows [width] of everything else: channels-first has a row a sample, width = C S,
// channels-last a row a pixel, width = C. A thread owns N neighbouring elements of a row, all four gates of them, in one sample (for
// the peephole's gradient: in the samples of a part of the batch, one after another). It alone reads and writes them, so nothing has
// to come before but the launches that wrote its operands. N elements of A are 16 bytes where the width and the pointers allow that,
// else one element.
// Floor: bytes. For 16-bit A and float32 c an element takes 18 bytes forward (26 if saved) and 34 backward.
#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "aten.h"
#include "device.h"

namespace convfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Rows of a sample; all pointers are to memory without gaps, nullptr where something is not there.
struct Frame {
  int64_t batch = 0, rows = 0, width = 0;

  __host__ __device__ int64_t size() const { return rows * width; }
};

template <class A>
struct GatesForward {
  Frame frame;
  const A* gates;
  const void* c;  // float or A
  bool c_wide;
  const A* peephole;
  A* h;
  float* c_out;
  A* activated;
};

template <class A>
struct GatesBackward {
  Frame frame;
  const A* activated;
  const void* c;  // float or A
  bool c_wide;
  const float* c_out;
  const A *peephole, *dh;
  const float* dc_out;
  A* dgates;
  float *dc, *sums;  // sums [parts, 3, rows, width]: of dpeephole over the samples of a part
  int64_t parts;
};

// N floats of memory in A or float.
template <class A, int N>
CONVFAST_DEVICE Vec<float, N> load_floats(const A* p) {
  if constexpr (std::is_same_v<A, float>) {
    return load_vec<N>(p);
  } else {
    const Vec<A, N> narrow = load_vec<N>(p);
    Vec<float, N> r;
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] = to_float(narrow.v[i]);
    return r;
  }
}

template <class A, int N>
CONVFAST_DEVICE Vec<float, N> load_state(const void* p, bool wide, int64_t offset) {
  if (!p) return Vec<float, N>{};
  return wide ? load_floats<float, N>(static_cast<const float*>(p) + offset) : load_floats<A, N>(static_cast<const A*>(p) + offset);
}

template <class A, int N>
CONVFAST_DEVICE void store_floats(A* p, const Vec<float, N>& x) {
  if constexpr (std::is_same_v<A, float>) {
    store_vec<float, N>(p, x);
  } else {
    Vec<A, N> narrow;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow.v[i] = from_float<A>(x.v[i]);
    store_vec<A, N>(p, narrow);
  }
}

// What the thread works on: elements of a frame, in a sample or in a part of the batch.
struct Place {
  int64_t outer, offset, gates;  // offset in a frame; of the first gate in a frame of gates
};

template <int N>
CONVFAST_DEVICE Place place(const Frame& f) {
  const int64_t pieces = f.size() / N, index = int64_t(blockIdx.x) * kThreads + threadIdx.x, outer = index / pieces;
  const int64_t offset = (index - outer * pieces) * N, row = offset / f.width;
  return {outer, offset, row * 3 * f.width + offset};
}

template <class A, int N, bool kPeephole>
__global__ void __launch_bounds__(kThreads, 2) gates_forward_kernel(GatesForward<A> p) {
  const Place at = place<N>(p.frame);
  if (at.outer >= p.frame.batch) return;
  const int64_t width = p.frame.width, size = p.frame.size(), offset = at.outer * size + at.offset, gates = at.outer * 4 * size + at.gates;
  Vec<float, N> z[4], w[3] = {}, c_out, h;
#pragma unroll
  for (int g = 0; g < 4; ++g) z[g] = load_floats<A, N>(p.gates + gates + g * width);
  const Vec<float, N> c = load_state<A, N>(p.c, p.c_wide, offset);
  if (kPeephole)
#pragma unroll
    for (int g = 0; g < 3; ++g) w[g] = load_floats<A, N>(p.peephole + g * size + at.offset);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto cell = lstm_cell_forward<DeviceMath, kPeephole>(z[0].v[i], z[1].v[i], z[2].v[i], z[3].v[i], c.v[i],
                                                               Peephole<float>{w[0].v[i], w[1].v[i], w[2].v[i]});
    z[0].v[i] = cell.i;
    z[1].v[i] = cell.f;
    z[2].v[i] = cell.g;
    z[3].v[i] = cell.o;
    c_out.v[i] = cell.c;
    h.v[i] = cell.h;
  }
  store_floats<A, N>(p.h + offset, h);
  store_floats<float, N>(p.c_out + offset, c_out);
  if (p.activated)
#pragma unroll
    for (int g = 0; g < 4; ++g) store_floats<A, N>(p.activated + gates + g * width, z[g]);
}

template <class A, int N, bool kPeephole, bool kSums>
__global__ void __launch_bounds__(kThreads, 2) gates_backward_kernel(GatesBackward<A> p) {
  const Place at = place<N>(p.frame);
  const int64_t width = p.frame.width, size = p.frame.size(), parts = kSums ? p.parts : p.frame.batch;
  if (at.outer >= parts) return;
  const int64_t together = kSums ? (p.frame.batch + parts - 1) / parts : 1, end = min(p.frame.batch, (at.outer + 1) * together);
  Vec<float, N> w[3] = {}, sum[3] = {};
  if (kPeephole)
#pragma unroll
    for (int g = 0; g < 3; ++g) w[g] = load_floats<A, N>(p.peephole + g * size + at.offset);
  for (int64_t sample = at.outer * together; sample < end; ++sample) {
    const int64_t offset = sample * size + at.offset, gates = sample * 4 * size + at.gates;
    Vec<float, N> z[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) z[g] = load_floats<A, N>(p.activated + gates + g * width);
    const Vec<float, N> c = load_state<A, N>(p.c, p.c_wide, offset), c_out = load_floats<float, N>(p.c_out + offset);
    const Vec<float, N> dh = load_state<A, N>(p.dh, false, offset);
    Vec<float, N> dc = load_state<A, N>(p.dc_out, true, offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto cell = lstm_cell_backward<DeviceMath, kPeephole>(z[0].v[i], z[1].v[i], z[2].v[i], z[3].v[i], c.v[i], c_out.v[i], dh.v[i],
                                                                  dc.v[i], Peephole<float>{w[0].v[i], w[1].v[i], w[2].v[i]});
      z[0].v[i] = cell.di;
      z[1].v[i] = cell.df;
      z[2].v[i] = cell.dg;
      z[3].v[i] = cell.d_o;
      dc.v[i] = cell.dc;
      if (kSums) {
        sum[0].v[i] += cell.di * c.v[i];
        sum[1].v[i] += cell.df * c.v[i];
        sum[2].v[i] += cell.d_o * c_out.v[i];
      }
    }
    if (p.dgates)
#pragma unroll
      for (int g = 0; g < 4; ++g) store_floats<A, N>(p.dgates + gates + g * width, z[g]);
    if (p.dc) store_floats<float, N>(p.dc + offset, dc);
  }
  if (kSums)
#pragma unroll
    for (int g = 0; g < 3; ++g) store_floats<float, N>(p.sums + (at.outer * 3 + g) * size + at.offset, sum[g]);
}

template <class A>
struct PeepholeSum {
  const float* sums;  // [parts, elements]
  int64_t parts, elements;
  A* dpeephole;
};

// A thread owns one element and alone writes it.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) peephole_sum_kernel(PeepholeSum<A> p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.elements) return;
  float sum = 0.f;
  for (int64_t part = 0; part < p.parts; ++part) sum += p.sums[part * p.elements + i];
  p.dpeephole[i] = from_float<A>(sum);
}

dim3 grid_of(int64_t threads) { return dim3(unsigned((threads + kThreads - 1) / kThreads)); }

// Whether all of it can be read and written n elements at a time.
bool in_pieces(int n, int64_t width, std::initializer_list<const void*> pointers) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return width % n == 0 && std::all_of(pointers.begin(), pointers.end(), aligned);
}

template <int N, class A>
void launch_forward_by(const GatesForward<A>& p, cudaStream_t stream) {
  launch(p.peephole ? gates_forward_kernel<A, N, true> : gates_forward_kernel<A, N, false>, grid_of(p.frame.batch * (p.frame.size() / N)),
         kThreads, 0, stream, p);
}

template <class A>
void launch_forward(const GatesForward<A>& p, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(A);
  if (in_pieces(N, p.frame.width, {p.gates, p.c, p.peephole, p.h, p.c_out, p.activated})) launch_forward_by<N>(p, stream);
  else launch_forward_by<1>(p, stream);
}

template <int N, class A>
void launch_backward_by(const GatesBackward<A>& p, cudaStream_t stream) {
  // With peepholes eight elements and their sums are more than a thread's registers.
  constexpr int kFew = std::min(N, 4);
  if (p.peephole)
    launch(p.sums ? gates_backward_kernel<A, kFew, true, true> : gates_backward_kernel<A, kFew, true, false>,
           grid_of((p.sums ? p.parts : p.frame.batch) * (p.frame.size() / kFew)), kThreads, 0, stream, p);
  else
    launch(gates_backward_kernel<A, N, false, false>, grid_of(p.frame.batch * (p.frame.size() / N)), kThreads, 0, stream, p);
}

template <class A>
void launch_backward(const GatesBackward<A>& p, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(A);
  if (in_pieces(N, p.frame.width, {p.activated, p.c, p.c_out, p.peephole, p.dh, p.dc_out, p.dgates, p.dc, p.sums})) launch_backward_by<N>(p, stream);
  else launch_backward_by<1>(p, stream);
}

// Into how many parts the sum over the batch is split: enough to fill a GPU, whichever, so that the sum is the same on all.
int64_t parts_of(const Frame& f) {
  constexpr int64_t kFills = int64_t(1) << 21;  // elements
  const int64_t wanted = std::max<int64_t>(1, kFills / f.size()), together = (f.batch + wanted - 1) / wanted;
  return (f.batch + together - 1) / together;
}

constexpr const char* kForward = "lstm_gates_forward";
constexpr const char* kBackward = "lstm_gates_backward";

struct Layout {
  bool last = false;  // channels-last
  Sizes shape;        // of the state
  Frame frame;

  Layout(const char* op, const char* argument, const Tensor& gates) : shape(shape_of(gates)) {
    CONVFAST_CHECK(shape.size() >= 2 && shape[1] % 4 == 0, op, argument, "[B, 4C, *S]", shape_string(shape));
    shape[1] /= 4;
    last = shape.size() > 2 && !gates.is_contiguous() && movedim(gates, 1, -1).is_contiguous();
    int64_t pixels = 1;
    for (size_t i = 2; i < shape.size(); ++i) pixels *= shape[i];
    frame = {shape[0], last ? pixels : 1, last ? shape[1] : shape[1] * pixels};
  }

  // t itself where its memory has the order of the gates, else a copy.
  Tensor ordered(const Tensor& t) const {
    return last ? movedim(torch::stable::contiguous(movedim(t, 1, -1)), -1, 1) : torch::stable::contiguous(t);
  }
  OptionalTensor ordered(const OptionalTensor& t) const { return t ? OptionalTensor(ordered(*t)) : t; }

  Tensor empty(const Tensor& like, Sizes shape, ScalarType dtype) const {
    if (!last) return torch::stable::new_empty(like, shape, dtype);
    std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
    return movedim(torch::stable::new_empty(like, shape, dtype), -1, 1);
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& gates, const OptionalTensor& c, const OptionalTensor& peephole, bool save) {
  const Layout l(kForward, "gates", gates);
  const Device device(gates);
  const ScalarType dtype = gates.scalar_type();
  Tensor h = l.empty(gates, l.shape, dtype), c_out = l.empty(gates, l.shape, ScalarType::Float);
  Tensor activated = save ? l.empty(gates, shape_of(gates), dtype) : torch::stable::new_empty(gates, {0}, dtype);
  const Tensor z = l.ordered(gates);
  const OptionalTensor c_in = l.ordered(c), w = l.ordered(peephole);
  const bool c_wide = c_in && c_in->scalar_type() == ScalarType::Float;
  const GatesForward<A> p{l.frame, pointer<A>(z), pointer<void>(c_in), c_wide, pointer<A>(w), writable<A>(h), writable<float>(c_out),
                          save ? writable<A>(activated) : nullptr};
  if (h.numel()) launch_forward(p, device.stream);
  return {h, c_out, activated};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& activated, const OptionalTensor& c, const Tensor& c_out, const OptionalTensor& peephole,
                                            const OptionalTensor& dh, const OptionalTensor& dc_out, const std::vector<int64_t>& needs) {
  const Layout l(kBackward, "activated", activated);
  const ScalarType dtype = activated.scalar_type();
  const auto fresh = [&](bool needed, const Sizes& shape, ScalarType dtype) {
    return needed ? l.empty(activated, shape, dtype) : torch::stable::new_empty(activated, {0}, dtype);
  };
  const bool need_peephole = peephole && needs[2];
  Tensor dgates = fresh(needs[0], shape_of(activated), dtype), dc = fresh(needs[1], l.shape, ScalarType::Float);
  Tensor dpeephole = torch::stable::new_empty(activated, need_peephole ? shape_of(*peephole) : Sizes{0}, dtype);
  const Device device(activated);
  if (c_out.numel() == 0) {
    torch::stable::zero_(dpeephole);
    return {dgates, dc, dpeephole};
  }
  const Tensor z = l.ordered(activated), c_next = l.ordered(c_out);
  const OptionalTensor c_in = l.ordered(c), w = l.ordered(peephole), dh_in = l.ordered(dh), dc_in = l.ordered(dc_out);
  const int64_t parts = need_peephole ? parts_of(l.frame) : 0;
  const Tensor sums = torch::stable::new_empty(activated, {parts, dpeephole.numel()}, ScalarType::Float);
  const bool c_wide = c_in && c_in->scalar_type() == ScalarType::Float;
  const GatesBackward<A> p{l.frame, pointer<A>(z), pointer<void>(c_in), c_wide, pointer<float>(c_next), pointer<A>(w), pointer<A>(dh_in),
                           pointer<float>(dc_in), needs[0] ? writable<A>(dgates) : nullptr, needs[1] ? writable<float>(dc) : nullptr,
                           need_peephole ? writable<float>(sums) : nullptr, parts};
  launch_backward(p, device.stream);
  if (need_peephole) {
    const Tensor total = l.empty(activated, shape_of(*peephole), dtype);
    const PeepholeSum<A> sum{p.sums, parts, total.numel(), writable<A>(total)};
    launch(peephole_sum_kernel<A>, grid_of(total.numel()), kThreads, 0, device.stream, sum);
    torch::stable::copy_(dpeephole, total);
  }
  return {dgates, dc, dpeephole};
}

std::tuple<Tensor, Tensor, Tensor> lstm_gates_forward(Tensor gates, OptionalTensor c, OptionalTensor peephole, bool save) {
  Layout l(kForward, "gates", gates);
  const ScalarType dtype = gates.scalar_type();
  if (c) {
    check_shape(kForward, "c", *c, l.shape);
    check_dtype(kForward, "c", *c, dtype, ScalarType::Float);
  }
  if (peephole) {
    l.shape[0] = 3;
    check_shape(kForward, "peephole", *peephole, l.shape);
    check_dtype(kForward, "peephole", *peephole, dtype, dtype);
  }
  return switch_dtype(kForward, "gates", dtype, [&](auto a) { return forward<decltype(a)>(gates, c, peephole, save); });
}

std::tuple<Tensor, Tensor, Tensor> lstm_gates_backward(Tensor activated, OptionalTensor c, Tensor c_out, OptionalTensor peephole, OptionalTensor dh,
                                                       OptionalTensor dc_out, std::vector<int64_t> needs) {
  Layout l(kBackward, "activated", activated);
  const ScalarType dtype = activated.scalar_type();
  CONVFAST_CHECK(needs.size() == 3, kBackward, "needs", "3 flags", needs.size());
  check_shape(kBackward, "c_out", c_out, l.shape);
  check_dtype(kBackward, "c_out", c_out, ScalarType::Float, ScalarType::Float);
  if (c) {
    check_shape(kBackward, "c", *c, l.shape);
    check_dtype(kBackward, "c", *c, dtype, ScalarType::Float);
  }
  if (dh) {
    check_shape(kBackward, "dh", *dh, l.shape);
    check_dtype(kBackward, "dh", *dh, dtype, dtype);
  }
  if (dc_out) {
    check_shape(kBackward, "dc_out", *dc_out, l.shape);
    check_dtype(kBackward, "dc_out", *dc_out, ScalarType::Float, ScalarType::Float);
  }
  if (peephole) {
    l.shape[0] = 3;
    check_shape(kBackward, "peephole", *peephole, l.shape);
    check_dtype(kBackward, "peephole", *peephole, dtype, dtype);
  }
  return switch_dtype(kBackward, "activated", dtype,
                     [&](auto a) { return backward<decltype(a)>(activated, c, c_out, peephole, dh, dc_out, needs); });
}

}  // namespace
}  // namespace cuda
}  // namespace convfast

CONVFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("lstm_gates_forward", TORCH_BOX(&convfast::cuda::lstm_gates_forward));
  m.impl("lstm_gates_backward", TORCH_BOX(&convfast::cuda::lstm_gates_backward));
}
