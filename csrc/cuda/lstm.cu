// One LSTM layer in one or both directions: the input product by the library for all steps at once, the recurrence by the
// persistent kernels of lstm_recurrence.h where `plan` says so, else by a loop over the steps, driven from here: a product by the
// library and a kernel for the cell. Gradients of the weights are products over all steps. The contract is in ops.h.
//
// Saved c and gates lie in memory as [D, T, B, ..], whatever their shape says, on both paths.
#include <algorithm>
#include <tuple>

#include "../lstm_layers.h"
#include "aten.h"
#include "lstm_recurrence.h"

namespace convfast {
namespace cuda {
namespace lstm {
namespace {

constexpr const char* kForwardName = "lstm_forward";
constexpr const char* kLayersName = "lstm_layers";
constexpr const char* kBackwardName = "lstm_backward";
constexpr int kNeeds = 13;
constexpr int kThreads = 256;

// The kernels here take an element a thread.
CONVFAST_DEVICE int64_t element() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
inline dim3 elements(int64_t n) { return dim3(unsigned((n + kThreads - 1) / kThreads)); }

// Step t of all samples, forward. Reads z of the product before it on the stream, and alone writes the rest.
template <class A>
struct CellStep {
  int64_t batch, hidden, t;
  const A *z, *gates_x;  // gates_x: rows gates_b apart
  int64_t gates_b;
  const A* peephole;       // or null
  const int64_t* lengths;  // or null
  float* c;                // [B, H], from before the step to after it
  A* h;                    // the same; where projected what the projection reads
  bool projected;
  A* y;  // rows y_b apart
  int64_t y_b;
  float* c_saved;  // null: nothing is saved
  A* gates_saved;
};

template <class A>
__global__ void __launch_bounds__(kThreads) cell_step(CellStep<A> p) {
  const int64_t at = element();
  if (at >= p.batch * p.hidden) return;
  const int64_t b = at / p.hidden, u = at % p.hidden;
  float z[4];
#pragma unroll
  for (int g = 0; g < 4; ++g)
    z[g] = to_float(p.z[(b * 4 + g) * p.hidden + u]) + to_float(p.gates_x[b * p.gates_b + g * p.hidden + u]);
  float c = p.c[at];
  const Peephole<float> peephole = load_peephole(p.peephole, p.hidden, u);
  // Without peepholes no product with a zero one: an infinite c would make it NaN.
  const CellForward<float> r = p.peephole ? lstm_cell_forward<DeviceMath, true>(z[0], z[1], z[2], z[3], c, peephole)
                                          : lstm_cell_forward<DeviceMath, false>(z[0], z[1], z[2], z[3], c, peephole);
  const bool active = !p.lengths || p.t < p.lengths[b];
  if (active) p.c[at] = c = r.c;
  if (p.projected || active) p.h[at] = from_float<A>(r.h);
  if (!p.projected) p.y[b * p.y_b + u] = from_float<A>(active ? r.h : 0.f);
  if (!p.gates_saved) return;
  p.c_saved[at] = c;
  const float gates[4] = {r.i, r.f, r.g, r.o};
#pragma unroll
  for (int g = 0; g < 4; ++g) p.gates_saved[(b * 4 + g) * p.hidden + u] = from_float<A>(gates[g]);
}

// The projected h of step t to the state and to y.
template <class A>
struct OutputStep {
  int64_t batch, size, t;
  const A* projected;      // [B, P]
  const int64_t* lengths;  // or null
  A *h, *y;
  int64_t y_b;
};

template <class A>
__global__ void __launch_bounds__(kThreads) output_step(OutputStep<A> p) {
  const int64_t at = element();
  if (at >= p.batch * p.size) return;
  const int64_t b = at / p.size;
  const bool active = !p.lengths || p.t < p.lengths[b];
  if (active) p.h[at] = p.projected[at];
  p.y[b * p.y_b + at % p.size] = active ? p.projected[at] : from_float<A>(0.f);
}

// The gradient of h at step t: what comes from the step after it in time, and dy. The product of that step is its gradient only
// where the sample had that step.
template <class A>
struct StateGradient {
  int64_t batch, size, t, after;  // after: the step whose product `dh` is; none: a negative one
  const int64_t* lengths;         // or null
  const A* dh;                    // [B, P]
  float* state;                   // [B, P]: where there is no such product
  const A* dy;                    // rows dy_b apart, or null
  int64_t dy_b;

  CONVFAST_DEVICE bool active(int64_t step, int64_t b) const { return step >= 0 && (!lengths || step < lengths[b]); }
  CONVFAST_DEVICE float gradient(int64_t i) const {
    const int64_t b = i / size;
    const float before = active(after, b) ? to_float(dh[i]) : state[i];
    state[i] = before;
    return dy && active(t, b) ? before + to_float(dy[b * dy_b + i % size]) : before;
  }
};

// It rounded, for the product with w_hr, or as the gradient of h0.
template <class A>
struct GradientStep {
  StateGradient<A> from;
  A* to;     // [B, P]
  A* saved;  // the same, zero where the sample has no step t; or null
};

template <class A>
__global__ void __launch_bounds__(kThreads) gradient_step(GradientStep<A> p) {
  const int64_t at = element();
  if (at >= p.from.batch * p.from.size) return;
  const A dh = from_float<A>(p.from.gradient(at));
  p.to[at] = dh;
  if (p.saved) p.saved[at] = p.from.active(p.from.t, at / p.from.size) ? dh : from_float<A>(0.f);
}

// Step t of all samples, backward.
template <class A>
struct CellGradient {
  StateGradient<A> from;
  const A* dhidden;  // [B, H], where h is projected; else null
  int64_t hidden;
  const A* gates;  // of step t
  const float *c, *c_before;
  const A* peephole;  // or null
  float* dc;          // [B, H], from after the step to before it
  A *dgates, *z;      // rows dgates_b apart; the same without gaps, for the product
  int64_t dgates_b;
  float* dpeephole;  // [B, 3, H], added to; or null
};

template <class A>
__global__ void __launch_bounds__(kThreads) cell_gradient(CellGradient<A> p) {
  const int64_t at = element();
  if (at >= p.from.batch * p.hidden) return;
  const int64_t b = at / p.hidden, u = at % p.hidden, gates = b * 4 * p.hidden + u;
  const float dh = p.dhidden ? to_float(p.dhidden[at]) : p.from.gradient(at);
  const float c = p.c[at], c_before = p.c_before ? p.c_before[at] : 0.f;
  const float i = to_float(p.gates[gates]), f = to_float(p.gates[gates + p.hidden]), g = to_float(p.gates[gates + 2 * p.hidden]),
              o = to_float(p.gates[gates + 3 * p.hidden]);
  const Peephole<float> peephole = load_peephole(p.peephole, p.hidden, u);
  const CellBackward<float> r = p.peephole ? lstm_cell_backward<DeviceMath, true>(i, f, g, o, c_before, c, dh, p.dc[at], peephole)
                                           : lstm_cell_backward<DeviceMath, false>(i, f, g, o, c_before, c, dh, p.dc[at], peephole);
  const bool active = p.from.active(p.from.t, b);
  if (active) p.dc[at] = r.dc;
  const float d[4] = {r.di, r.df, r.dg, r.d_o};
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
    p.z[gates + gate * p.hidden] = p.dgates[b * p.dgates_b + gate * p.hidden + u] = from_float<A>(active ? d[gate] : 0.f);
  if (!p.dpeephole || !active) return;
  float* const sums = p.dpeephole + 3 * b * p.hidden + u;
  sums[0] += r.di * c_before, sums[p.hidden] += r.df * c_before, sums[2 * p.hidden] += r.d_o * c;
}

// to[t][b] = from[t + shift][b]; first[b], or zero, where sample b has no such step.
template <class A>
struct ShiftedRows {
  int64_t batch, time, width;
  int shift;
  const A* from;
  int64_t from_t, from_b;
  const A* first;          // [B, width] or null
  const int64_t* lengths;  // or null
  A* to;
  int64_t to_t, to_b;
};

template <class A>
__global__ void __launch_bounds__(kThreads) shifted_rows(ShiftedRows<A> p) {
  const int64_t at = element();
  if (at >= p.batch * p.time * p.width) return;
  const int64_t i = at % p.width, b = at / p.width % p.batch, t = at / p.width / p.batch, source = t + p.shift;
  // Nobody has checked lengths that are on the device.
  const bool there = source >= 0 && source < (p.lengths ? min(p.lengths[b], p.time) : p.time);
  const A otherwise = p.first ? p.first[b * p.width + i] : from_float<A>(0.f);
  p.to[t * p.to_t + b * p.to_b + i] = there ? p.from[source * p.from_t + b * p.from_b + i] : otherwise;
}

// What the projection read at each step, zero past a length: [T, B, H].
template <class A>
struct HiddenRows {
  int64_t batch, time, hidden;
  const A* gates;
  const float* c;
  const int64_t* lengths;  // or null
  A* to;
};

template <class A>
__global__ void __launch_bounds__(kThreads) hidden_rows(HiddenRows<A> p) {
  const int64_t at = element();
  if (at >= p.batch * p.time * p.hidden) return;
  const int64_t row = at / p.hidden, b = row % p.batch, t = row / p.batch;
  const bool active = !p.lengths || t < p.lengths[b];
  const float o = to_float(p.gates[(4 * row + 3) * p.hidden + at % p.hidden]);
  p.to[at] = from_float<A>(active ? o * DeviceMath::tanh(p.c[at]) : 0.f);
}

struct Direction {
  Tensor w_ih, w_hh;
  OptionalTensor bias, peephole, w_hr;
};

struct Call {
  Tensor x;
  std::vector<Direction> directions;
  OptionalTensor h0, c0, lengths;
  int64_t batch, time, inputs, hidden, size;  // size: of h, P
  bool time_major;                            // order of the rows of x, and of gates_x and dgates with it

  int64_t count() const { return int64_t(directions.size()); }
  bool projected() const { return directions[0].w_hr.has_value(); }
  ScalarType dtype() const { return directions[0].w_hh.scalar_type(); }
  // Of the rows of x, in rows.
  int64_t row_t() const { return time_major ? batch : 1; }
  int64_t row_b() const { return time_major ? 1 : time; }
  Tensor empty(const Sizes& shape, ScalarType type) const { return torch::stable::new_empty(directions[0].w_hh, shape, type); }
  Tensor empty(const Sizes& shape) const { return empty(shape, dtype()); }
};

void check(const char* op, const char* name, const OptionalTensor& t, const Sizes& shape, ScalarType dtype, ScalarType or_dtype) {
  if (!t) return;
  check_shape(op, name, *t, shape);
  check_dtype(op, name, *t, dtype, or_dtype);
}

// Contiguous, and where the kernels may read pairs of elements.
Tensor dense(const Tensor& t) {
  const Tensor found = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 8 ? torch::stable::clone(found) : found;
}
OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : t; }

Call make_call(const char* op, Tensor x, Direction first, const OptionalTensor& w_ih_r, const OptionalTensor& w_hh_r,
               const OptionalTensor& bias_r, const OptionalTensor& peephole_r, const OptionalTensor& w_hr_r,
               const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths) {
  Call call{x, {first}, dense(h0), dense(c0), dense(lengths)};
  if (w_ih_r && w_hh_r) call.directions.push_back({*w_ih_r, *w_hh_r, bias_r, peephole_r, w_hr_r});
  CONVFAST_CHECK(x.dim() == 3, op, "x", "[B, T, I]", shape_string(shape_of(x)));
  CONVFAST_CHECK(first.w_hh.dim() == 2 && first.w_hh.size(0) % 4 == 0 && first.w_hh.numel() > 0, op, "w_hh", "[4H, P]",
                 shape_string(shape_of(first.w_hh)));
  call.batch = x.size(0), call.time = x.size(1), call.inputs = x.size(2);
  call.hidden = first.w_hh.size(0) / 4, call.size = first.w_hh.size(1);
  call.time_major = x.stride(0) < x.stride(1);
  CONVFAST_CHECK(call.time >= 1 && call.inputs >= 1, op, "x", "of at least one step and one feature", shape_string(shape_of(x)));
  const ScalarType dtype = call.dtype();
  check(op, "x", x, shape_of(x), dtype, dtype);
  for (Direction& d : call.directions) {
    check(op, "w_ih", d.w_ih, {4 * call.hidden, call.inputs}, dtype, dtype);
    check(op, "w_hh", d.w_hh, {4 * call.hidden, call.size}, dtype, dtype);
    check(op, "bias", d.bias, {4 * call.hidden}, dtype, dtype);
    check(op, "peephole", d.peephole, {3, call.hidden}, dtype, dtype);
    check(op, "w_hr", d.w_hr, {call.size, call.hidden}, dtype, dtype);
    CONVFAST_CHECK(d.w_hr || call.size == call.hidden, op, "w_hr", "given where h is not as large as c", "none");
    d.w_hh = dense(d.w_hh);
    d.peephole = dense(d.peephole);
  }
  check(op, "h0", call.h0, {call.count(), call.batch, call.size}, dtype, dtype);
  check(op, "c0", call.c0, {call.count(), call.batch, call.hidden}, dtype, ScalarType::Float);
  check(op, "lengths", call.lengths, {call.batch}, ScalarType::Long, ScalarType::Long);
  return call;
}

// How the recurrence is computed.
struct Plan {
  int cluster = 0;  // blocks that share a tile of samples; 0: the loop over steps
  int register_tiles = 0, warps = 0, tiles = 0, buffers = 0;
  size_t shared = 0;
  std::string reason;
};

template <class Params>
struct Kernels {
  void (*four)(Params);  // with four tiles of weights in registers
  void (*eight)(Params);
  void (*clusters)(Params);
};

template <class A>
int64_t sample_tiles(const Call& call) {
  return (call.batch + Product<A>::kSamples - 1) / Product<A>::kSamples;
}

// The rule. Weights of 16 bits: up to 128 hidden units are in the registers of one block; a cluster of 2, 4 or 8 blocks (sm_90
// on, with 227 KiB of shared memory) holds 256, 384, 512; else one block 160 (sm_80, 163 KiB). float32: one block 64, clusters
// 128, 256, 384. Of the clusters that hold it the largest with which all samples still run at the same time, for a block then
// reads the fewest weights from shared memory in a step; else the smallest.
// Not measured: where a cluster is slower than the loop, and from how many waves of blocks on the loop is faster, whose steps
// cost two launches (taken: 8).
template <class A, class Params>
Plan plan(const Call& call, bool forward, const Kernels<Params>& kernels) {
  using P = Product<A>;
  constexpr int kMostHidden = 1024, kMostWaves = 8;
  const auto loop = [](const std::string& why) {
    Plan plan;
    plan.reason = "a loop over the steps: " + why;
    return plan;
  };
  const std::string hidden = std::to_string(call.hidden) + " hidden units";
  if (call.projected()) return loop("h is projected");
  if (call.hidden % P::kPair) return loop(hidden + " are not an even number");
  if (call.hidden > kMostHidden) return loop(hidden + " do not fit");
  if (P::kSamples * call.time * call.count() * 4 * call.hidden >= int64_t(1) << 31) return loop("too many steps");
  Plan found;
  int resident = 0;  // tiles of samples that run at the same time
  const auto fits = [&](int cluster, int register_tiles) {
    found.cluster = cluster;
    found.register_tiles = register_tiles;
    found.warps = int((call.hidden + cluster * P::kUnits - 1) / (cluster * P::kUnits));
    found.tiles = std::max(int((call.hidden + 2 * kTile - 1) / (2 * kTile) * 2), register_tiles);
    const size_t weights = size_t(found.tiles - register_tiles) * found.warps * 2048;
    const size_t buffer = size_t(P::kSamples) * ((forward ? 1 : 4) * found.tiles * kTile + kPad) * sizeof(A);
    found.buffers = forward || weights + 2 * buffer <= shared_limit() ? 2 : 1;
    found.shared = weights + found.buffers * buffer;
    const int threads = found.warps * 32;
    if (threads > recurrence_threads<A>(register_tiles) || found.shared > shared_limit()) return false;
    resident = cluster > 1 ? resident_clusters(kernels.clusters, threads, found.shared, cluster)
                           : resident_blocks(register_tiles == 4 ? kernels.four : kernels.eight, threads, found.shared);
    return resident > 0;
  };
  const int64_t tiles = sample_tiles<A>(call) * call.count();
  const auto chosen = [&] {
    if (fits(1, call.hidden <= 4 * kTile ? 4 : 8)) return true;
    if (compute_capability() >= 90) {
      for (int cluster = 8; cluster >= 2; cluster /= 2)
        if (fits(cluster, 8) && tiles <= resident) return true;
      for (int cluster = 2; cluster <= 8; cluster *= 2)
        if (fits(cluster, 8)) return true;
    }
    return fits(1, 4);
  };
  if (!chosen()) return loop(hidden + " do not fit");
  if (tiles > int64_t(kMostWaves) * resident)
    return loop("more than " + std::to_string(kMostWaves) + " times as many samples as run at the same time");
  const std::string blocks = std::to_string(found.cluster) + (found.cluster == 1 ? " block" : " blocks");
  found.reason = "one persistent kernel: " + hidden + " in " + blocks + " of " + std::to_string(found.warps) + " warps";
  return found;
}

template <class A>
const A* data(const OptionalTensor& t, int64_t offset = 0) {
  return t ? static_cast<const A*>(t->const_data_ptr()) + offset : nullptr;
}
template <class A>
A* out_data(const Tensor& t, int64_t offset = 0) {
  return static_cast<A*>(t.mutable_data_ptr()) + offset;
}

Tensor narrow(Tensor t, int64_t dim, int64_t start, int64_t length) { return torch::stable::narrow(t, dim, start, length); }
Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
Tensor mm(const Tensor& a, const Tensor& b) { return call<1>("aten::mm", "", a, b)[0]; }
void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) { call<1>("aten::mm", "out", a, b, out); }
Tensor both(const std::vector<Tensor>& tensors) {
  return tensors.size() == 1 ? tensors[0] : call<1>("aten::cat", "", tensors, int64_t(0))[0];
}

// [B, T, n] as rows in the order of x's; a copy where its memory is another.
Tensor rows(const Call& call, const Tensor& t) {
  return torch::stable::view(torch::stable::contiguous(call.time_major ? transposed(t) : t), {call.batch * call.time, t.size(2)});
}

template <class A>
void fill_layer(Layer<A>& p, const Call& call, const Plan& plan) {
  p.batch = int(call.batch), p.time = int(call.time), p.hidden = int(call.hidden), p.directions = int(call.count());
  p.tiles = plan.tiles, p.units = plan.warps * Product<A>::kUnits, p.cluster = plan.cluster, p.buffers = plan.buffers;
  for (int d = 0; d < 2; ++d) {
    const Direction& direction = call.directions[d < call.count() ? d : 0];
    p.w_hh[d] = data<A>(direction.w_hh);
    p.peephole[d] = data<A>(direction.peephole);
  }
  p.c0 = call.c0 ? call.c0->const_data_ptr() : nullptr;
  p.c0_narrow = call.c0 && call.c0->scalar_type() == call.dtype() && sizeof(A) < 4;
  p.lengths = data<int64_t>(call.lengths);
  const int64_t gates = call.count() * 4 * call.hidden;
  p.gates_t = call.row_t() * gates, p.gates_b = call.row_b() * gates;
}

template <class A, class Params>
void launch_recurrence(const Kernels<Params>& kernels, const Call& call, const Plan& plan, const Params& p, cudaStream_t stream) {
  const dim3 grid(unsigned(sample_tiles<A>(call) * plan.cluster), unsigned(call.count()));
  if (plan.cluster > 1) launch_cluster(kernels.clusters, grid, plan.warps * 32, plan.shared, stream, plan.cluster, p);
  else launch(plan.register_tiles == 4 ? kernels.four : kernels.eight, grid, plan.warps * 32, plan.shared, stream, p);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
void loop_forward(const Call& call, int64_t d, const Tensor& gates_x, const Tensor& y, bool time_major, const Tensor& h_n,
                  const Tensor& c_n, const Tensor* c_saved, const Tensor* gates_saved, cudaStream_t stream) {
  const Direction& direction = call.directions[d];
  const int64_t batch = call.batch, hidden = call.hidden, size = call.size, count = call.count();
  // The state at each step is what is returned after the last.
  Tensor h = torch::stable::select(h_n, 0, d), c = torch::stable::select(c_n, 0, d);
  if (call.h0) torch::stable::copy_(h, torch::stable::select(*call.h0, 0, d));
  else torch::stable::zero_(h);
  if (call.c0) torch::stable::copy_(c, torch::stable::select(*call.c0, 0, d));
  else torch::stable::zero_(c);
  const Tensor z = call.empty({batch, 4 * hidden}), w_hh = transposed(direction.w_hh);
  Tensor unprojected, projected, w_hr;
  if (direction.w_hr) {
    unprojected = call.empty({batch, hidden});
    projected = call.empty({batch, size});
    w_hr = transposed(*direction.w_hr);
  }
  const int64_t gates = count * 4 * hidden, y_row = count * size;
  for (int64_t n = 0; n < call.time; ++n) {
    const int64_t t = d ? call.time - 1 - n : n, saved = (d * call.time + t) * batch * hidden;
    mm_out(z, h, w_hh);
    A* const y_t = out_data<A>(y, (time_major ? t * batch : t) * y_row + d * size);
    const int64_t y_b = (time_major ? 1 : call.time) * y_row;
    CellStep<A> step{batch, hidden, t};
    step.z = data<A>(z);
    step.gates_x = data<A>(gates_x, t * call.row_t() * gates + d * 4 * hidden);
    step.gates_b = call.row_b() * gates;
    step.peephole = data<A>(direction.peephole);
    step.lengths = data<int64_t>(call.lengths);
    step.c = out_data<float>(c);
    step.projected = direction.w_hr.has_value();
    step.h = out_data<A>(step.projected ? unprojected : h);
    step.y = y_t, step.y_b = y_b;
    if (c_saved) step.c_saved = out_data<float>(*c_saved, saved), step.gates_saved = out_data<A>(*gates_saved, 4 * saved);
    launch(cell_step<A>, elements(batch * hidden), kThreads, 0, stream, step);
    if (!step.projected) continue;
    mm_out(projected, unprojected, w_hr);
    const OutputStep<A> output{batch, size, t, data<A>(projected), step.lengths, out_data<A>(h), y_t, y_b};
    launch(output_step<A>, elements(batch * size), kThreads, 0, stream, output);
  }
}

template <class A>
Outputs forward(const Call& call, bool time_major, bool save) {
  const Device device(call.x);
  const int64_t batch = call.batch, time = call.time, hidden = call.hidden, size = call.size, count = call.count();
  Tensor y = time_major ? transposed(call.empty({time, batch, count * size})) : call.empty({batch, time, count * size});
  Tensor h_n = call.empty({count, batch, size}), c_n = call.empty({count, batch, hidden}, ScalarType::Float);
  Tensor c = call.empty(save ? Sizes{count, batch, time, hidden} : Sizes{0}, ScalarType::Float);
  Tensor gates = call.empty(save ? Sizes{count, batch, time, 4 * hidden} : Sizes{0});
  if (batch == 0) return {y, h_n, c_n, c, gates};

  std::vector<Tensor> weights, biases;
  for (const Direction& d : call.directions) {
    weights.push_back(d.w_ih);
    if (d.bias) biases.push_back(*d.bias);
  }
  const OptionalTensor bias = biases.empty() ? OptionalTensor() : both(biases);
  const Tensor gates_x = convfast::cuda::call<1>("aten::linear", "", rows(call, call.x), both(weights), bias)[0];
  const Kernels<ForwardRecurrence<A>> kernels{recurrence_forward<A, 4, false>, recurrence_forward<A, 8, false>,
                                              recurrence_forward<A, 8, true>};
  const Plan found = plan<A>(call, true, kernels);
  if (found.cluster == 0) {
    for (int64_t d = 0; d < count; ++d)
      loop_forward<A>(call, d, gates_x, y, time_major, h_n, c_n, save ? &c : nullptr, save ? &gates : nullptr, device.stream);
    return {y, h_n, c_n, c, gates};
  }
  ForwardRecurrence<A> p{};
  fill_layer(p, call, found);
  p.y_t = (time_major ? batch : 1) * count * size, p.y_b = (time_major ? 1 : time) * count * size;
  p.gates_x = data<A>(gates_x);
  p.h0 = data<A>(call.h0);
  p.y = out_data<A>(y), p.h_n = out_data<A>(h_n), p.c_n = out_data<float>(c_n);
  if (save) p.c = out_data<float>(c), p.gates = out_data<A>(gates);
  launch_recurrence<A>(kernels, call, found, p, device.stream);
  return {y, h_n, c_n, c, gates};
}

struct Gradients {
  OptionalTensor dy, dh_n, dc_n;
  Tensor y, c, gates;
};

// Direction d of dgates and dh_saved → (dh0, dc0), the latter in float.
template <class A>
std::tuple<Tensor, Tensor> loop_backward(const Call& call, int64_t d, const Gradients& g, bool dy_time_major,
                                         const Tensor& dgates, const Tensor* dh_saved, const Tensor* dpeephole,
                                         cudaStream_t stream) {
  const Direction& direction = call.directions[d];
  const int64_t batch = call.batch, hidden = call.hidden, size = call.size, count = call.count(), time = call.time;
  const Tensor z = call.empty({batch, 4 * hidden}), product = call.empty({batch, size}), dh = call.empty({batch, size});
  Tensor state = call.empty({batch, size}, ScalarType::Float), dc = call.empty({batch, hidden}, ScalarType::Float);
  if (g.dh_n) torch::stable::copy_(state, torch::stable::select(*g.dh_n, 0, d));
  else torch::stable::zero_(state);
  if (g.dc_n) torch::stable::copy_(dc, torch::stable::select(*g.dc_n, 0, d));
  else torch::stable::zero_(dc);
  OptionalTensor c0;
  if (call.c0) c0 = cast(torch::stable::select(*call.c0, 0, d), ScalarType::Float);
  const OptionalTensor dhidden = direction.w_hr ? OptionalTensor(call.empty({batch, hidden})) : OptionalTensor();
  const int64_t gates = count * 4 * hidden, y_row = count * size;

  StateGradient<A> from{batch, size};
  from.after = -1;
  from.lengths = data<int64_t>(call.lengths);
  from.dh = data<A>(product);
  from.state = out_data<float>(state);
  from.dy_b = (dy_time_major ? 1 : time) * y_row;
  for (int64_t n = 0; n < time; ++n) {
    const int64_t t = d ? n : time - 1 - n, before = d ? t + 1 : t - 1;
    from.t = t;
    from.dy = data<A>(g.dy, (dy_time_major ? t * batch : t) * y_row + d * size);
    if (direction.w_hr) {
      GradientStep<A> step{from, out_data<A>(dh), dh_saved ? out_data<A>(*dh_saved, (d * time + t) * batch * size) : nullptr};
      launch(gradient_step<A>, elements(batch * size), kThreads, 0, stream, step);
      mm_out(*dhidden, dh, *direction.w_hr);
    }
    CellGradient<A> step{from, data<A>(dhidden), hidden};
    const int64_t saved = (d * time + t) * batch * hidden;
    step.gates = data<A>(g.gates, 4 * saved);
    step.c = data<float>(g.c, saved);
    step.c_before = n + 1 < time ? data<float>(g.c, (d * time + before) * batch * hidden) : data<float>(c0);
    step.peephole = data<A>(direction.peephole);
    step.dc = out_data<float>(dc);
    step.dgates = out_data<A>(dgates, t * call.row_t() * gates + d * 4 * hidden);
    step.dgates_b = call.row_b() * gates;
    step.z = out_data<A>(z);
    step.dpeephole = dpeephole ? out_data<float>(*dpeephole, d * batch * 3 * hidden) : nullptr;
    launch(cell_gradient<A>, elements(batch * hidden), kThreads, 0, stream, step);
    mm_out(product, z, direction.w_hh);
    from.after = t;
  }
  from.t = -1;
  from.dy = nullptr;
  launch(gradient_step<A>, elements(batch * size), kThreads, 0, stream, GradientStep<A>{from, out_data<A>(dh), nullptr});
  return {dh, dc};
}

template <class A>
std::vector<Tensor> backward(const Call& call, Gradients g, const std::vector<int64_t>& needs) {
  const Device device(call.x);
  const int64_t batch = call.batch, time = call.time, hidden = call.hidden, size = call.size, count = call.count();
  const bool dy_time_major = g.dy && g.dy->stride(0) < g.dy->stride(1);
  if (g.dy) g.dy = dense(dy_time_major ? transposed(*g.dy) : *g.dy);
  g.dh_n = dense(g.dh_n);
  g.dc_n = dense(g.dc_n);
  g.c = dense(g.c);
  g.gates = dense(g.gates);
  const auto any = [&](int i) { return needs[i] || needs[i + 5]; };

  const Tensor dgates = call.empty({batch * time, count * 4 * hidden});
  Tensor dh0 = call.empty(needs[11] ? shape_of(*call.h0) : Sizes{0});
  Tensor dc0 = call.empty(needs[12] ? shape_of(*call.c0) : Sizes{0}, needs[12] ? call.c0->scalar_type() : ScalarType::Float);
  Tensor dh_saved, dbias, dpeephole;  // [D, T, B, P], [D, 4H], [D, 3, H]; the last two in float
  if (any(5)) dh_saved = call.empty({count, time, batch, size});
  const Kernels<BackwardRecurrence<A>> kernels{recurrence_backward<A, 4, false>, recurrence_backward<A, 8, false>,
                                               recurrence_backward<A, 8, true>};
  const Plan found = plan<A>(call, false, kernels);
  if (found.cluster > 0) {
    Tensor sums;
    BackwardRecurrence<A> p{};
    fill_layer(p, call, found);
    p.y_t = (dy_time_major ? batch : 1) * count * size, p.y_b = (dy_time_major ? 1 : time) * count * size;
    p.dy = data<A>(g.dy), p.dh_n = data<A>(g.dh_n), p.dc_n = data<float>(g.dc_n);
    p.c = data<float>(g.c), p.gates = data<A>(g.gates);
    p.dgates = out_data<A>(dgates);
    if (needs[11]) p.dh0 = out_data<A>(dh0);
    if (needs[12]) p.dc0 = dc0.mutable_data_ptr();
    if (any(3) || any(4)) {
      sums = call.empty({sample_tiles<A>(call), count, 7, hidden}, ScalarType::Float);
      p.sums = out_data<float>(sums);
    }
    launch_recurrence<A>(kernels, call, found, p, device.stream);
    if (p.sums) {
      const Tensor total = torch::stable::sum(sums, Sizes{0});
      dbias = narrow(total, 1, 0, 4);
      dpeephole = narrow(total, 1, 4, 3);
    }
  } else {
    Tensor sums;
    if (any(4)) sums = torch::stable::new_zeros(dgates, {count, batch, 3, hidden}, ScalarType::Float);
    for (int64_t d = 0; d < count && batch > 0; ++d) {
      const auto [dh0_d, dc0_d] = loop_backward<A>(call, d, g, dy_time_major, dgates, any(5) ? &dh_saved : nullptr,
                                                   any(4) ? &sums : nullptr, device.stream);
      Tensor to;
      if (needs[11]) to = torch::stable::select(dh0, 0, d), torch::stable::copy_(to, dh0_d);
      if (needs[12]) to = torch::stable::select(dc0, 0, d), torch::stable::copy_(to, dc0_d);
    }
    if (any(4)) dpeephole = torch::stable::sum(sums, Sizes{1});
    if (any(3)) dbias = torch::stable::sum(dgates, Sizes{0}, false, ScalarType::Float);
  }

  std::vector<Tensor> grads;
  for (int i = 0; i < kNeeds; ++i) grads.push_back(call.empty({0}));
  grads[11] = dh0;
  grads[12] = dc0;
  if (needs[0]) {
    std::vector<Tensor> weights;
    for (const Direction& d : call.directions) weights.push_back(d.w_ih);
    grads[0] = torch::stable::empty_like(call.x);
    Tensor to = call.time_major ? transposed(grads[0]) : grads[0];
    if (to.is_contiguous()) mm_out(torch::stable::view(to, {batch * time, call.inputs}), dgates, both(weights));
    else torch::stable::copy_(to, torch::stable::view(mm(dgates, both(weights)), shape_of(to)));
  }
  const auto float_to = [&](const Tensor& from, int64_t d, const Sizes& shape) {
    const Tensor one = count == from.size(0) ? torch::stable::select(from, 0, d) : narrow(from, 0, d * 4 * hidden, 4 * hidden);
    Tensor to = call.empty(shape);  // a copy: results may not share memory
    torch::stable::copy_(to, torch::stable::reshape(one, shape));
    return to;
  };
  const int64_t* lengths = data<int64_t>(call.lengths);
  Tensor x;
  if (needs[1] || needs[6]) {
    x = rows(call, call.x);
    if (lengths) {  // which may be NaN past them
      Tensor kept = call.empty(shape_of(x));
      const int64_t row_t = call.row_t() * call.inputs, row_b = call.row_b() * call.inputs;
      const ShiftedRows<A> keep{batch, time, call.inputs, 0, data<A>(x), row_t, row_b, nullptr, lengths, out_data<A>(kept),
                                row_t, row_b};
      launch(shifted_rows<A>, elements(x.numel()), kThreads, 0, device.stream, keep);
      x = kept;
    }
  }
  for (int64_t d = 0; d < count; ++d) {
    const int64_t* need = needs.data() + 1 + 5 * d;
    Tensor* to = grads.data() + 1 + 5 * d;
    const Tensor across = transposed(narrow(dgates, 1, d * 4 * hidden, 4 * hidden));
    if (need[0]) to[0] = mm(across, x);
    if (need[1]) {
      const Tensor before = call.empty({batch * time, size});
      ShiftedRows<A> shifted{batch, time, size, d ? 1 : -1};
      shifted.from = data<A>(g.y, d * size), shifted.from_t = g.y.stride(1), shifted.from_b = g.y.stride(0);
      shifted.first = data<A>(call.h0, d * batch * size);
      shifted.lengths = lengths;
      shifted.to = out_data<A>(before), shifted.to_t = call.row_t() * size, shifted.to_b = call.row_b() * size;
      launch(shifted_rows<A>, elements(before.numel()), kThreads, 0, device.stream, shifted);
      to[1] = mm(across, before);
    }
    if (need[2]) to[2] = float_to(dbias, d, {4 * hidden});
    if (need[3]) to[3] = float_to(dpeephole, d, {3, hidden});
    if (need[4]) {
      const Tensor read = call.empty({batch * time, hidden});
      const int64_t saved = d * time * batch * hidden;
      const HiddenRows<A> of{batch, time, hidden, data<A>(g.gates, 4 * saved), data<float>(g.c, saved), lengths, out_data<A>(read)};
      launch(hidden_rows<A>, elements(read.numel()), kThreads, 0, device.stream, of);
      to[4] = mm(transposed(torch::stable::view(torch::stable::select(dh_saved, 0, d), {time * batch, size})), read);
    }
  }
  return grads;
}

// Calls f with a value of the activation type.
template <class F>
auto switch_type(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: break;
  }
  CONVFAST_CHECK(false, op, "w_hh", "float32, float16 or bfloat16", torch::headeronly::toString(t.scalar_type()));
  return f(float());
}

Outputs lstm_forward(Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor bias, OptionalTensor peephole, OptionalTensor w_hr,
                     OptionalTensor w_ih_r, OptionalTensor w_hh_r, OptionalTensor bias_r, OptionalTensor peephole_r, OptionalTensor w_hr_r,
                     OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths, bool time_major, bool save) {
  const Call call =
      make_call(kForwardName, x, {w_ih, w_hh, bias, peephole, w_hr}, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r, h0, c0, lengths);
  return switch_type(kForwardName, w_hh, [&](auto a) { return forward<decltype(a)>(call, time_major, save); });
}

// Layer after layer, the linear layer by the library.
std::tuple<Tensor, Tensor, Tensor> lstm_layers(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> peepholes, bool bias,
                                               bool projection, bool bidirectional, OptionalTensor h0, OptionalTensor c0,
                                               OptionalTensor lengths, OptionalTensor head, OptionalTensor head_bias, bool time_major) {
  const auto layers = lstm_weights(kLayersName, weights, peepholes, bias, projection, bidirectional);
  const int64_t count = layers[0].size(), rows = layers.size() * count;
  for (const auto& [name, state] : {std::make_pair("h0", h0), std::make_pair("c0", c0)})
    CONVFAST_CHECK(!state || state->size(0) == rows, kLayersName, name, "of " + std::to_string(rows) + " rows", shape_string(shape_of(*state)));
  std::vector<Tensor> h_n, c_n;
  for (size_t k = 0; k < layers.size(); ++k) {
    std::vector<Direction> directions;
    for (const LSTMWeights& w : layers[k]) {
      OptionalTensor sum;
      if (w.bias_ih) sum = torch::stable::sum(torch::stable::view(both({*w.bias_ih, *w.bias_hh}), {2, w.bias_ih->numel()}), Sizes{0});
      directions.push_back({w.w_ih, w.w_hh, sum, w.peephole, w.w_hr});
    }
    const Direction none, &one = directions[0], &two = count == 2 ? directions[1] : none;
    const auto given = [&](const Tensor& t) { return count == 2 ? OptionalTensor(t) : OptionalTensor(); };
    const auto state = [&](const OptionalTensor& t) { return t ? OptionalTensor(narrow(*t, 0, k * count, count)) : t; };
    const bool last = k + 1 == layers.size();
    const auto [y, h, c, c_saved, gates] =
        lstm_forward(x, one.w_ih, one.w_hh, one.bias, one.peephole, one.w_hr, given(two.w_ih), given(two.w_hh), two.bias, two.peephole,
                     two.w_hr, state(h0), state(c0), lengths, time_major || !last, false);
    x = y;
    h_n.push_back(h);
    c_n.push_back(c);
  }
  if (head) {
    const auto apply = [&](const Tensor& y) { return call<1>("aten::linear", "", y, *head, head_bias)[0]; };
    x = time_major ? transposed(apply(transposed(x))) : apply(x);
  }
  return {x, both(h_n), both(c_n)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor bias,
    OptionalTensor peephole, OptionalTensor w_hr, OptionalTensor w_ih_r, OptionalTensor w_hh_r, OptionalTensor bias_r,
    OptionalTensor peephole_r, OptionalTensor w_hr_r, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths, Tensor y, Tensor c,
    Tensor gates, std::vector<int64_t> needs) {
  const char* op = kBackwardName;
  const Call call = make_call(op, x, {w_ih, w_hh, bias, peephole, w_hr}, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r, h0, c0, lengths);
  CONVFAST_CHECK(int(needs.size()) == kNeeds, op, "needs", "13 flags", needs.size());
  const ScalarType dtype = call.dtype(), wide = ScalarType::Float;
  check(op, "y", y, {call.batch, call.time, call.count() * call.size}, dtype, dtype);
  CONVFAST_CHECK(y.stride(2) == 1 || y.numel() == 0, op, "y", "as the forward returned it", "other strides");
  check(op, "c", c, {call.count(), call.batch, call.time, call.hidden}, wide, wide);
  check(op, "gates", gates, {call.count(), call.batch, call.time, 4 * call.hidden}, dtype, dtype);
  check(op, "dy", dy, shape_of(y), dtype, dtype);
  check(op, "dh_n", dh_n, {call.count(), call.batch, call.size}, dtype, dtype);
  check(op, "dc_n", dc_n, {call.count(), call.batch, call.hidden}, wide, wide);
  return switch_type(op, w_hh, [&](auto a) {
    const std::vector<Tensor> g = backward<decltype(a)>(call, {dy, dh_n, dc_n, y, c, gates}, needs);
    return std::make_tuple(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12]);
  });
}

}  // namespace
}  // namespace lstm
}  // namespace cuda
}  // namespace convfast

CONVFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("lstm_forward", TORCH_BOX(&convfast::cuda::lstm::lstm_forward));
  m.impl("lstm_layers", TORCH_BOX(&convfast::cuda::lstm::lstm_layers));
  m.impl("lstm_backward", TORCH_BOX(&convfast::cuda::lstm::lstm_backward));
}
