// Convolution over time. The contract of the ops is in csrc/ops.h, the kernels are in conv1d_kernels.h.
//
// Forward: for 16-bit types without groups one kernel of our own, bias and activation in its epilogue, its output in the layout that
// the LSTM reads. Else the library's convolution (which takes TF32 where torch is told to) and a kernel for what follows it.
// Backward: a kernel for the activation's derivative; then at stride 1, again for 16-bit types without groups, the forward's kernel
// for the gradient of the input and a matrix product a tap for that of the weight, all on [B, T, n] as it lies; else the library's.
#include "conv1d_kernels.h"

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../text.h"
#include "aten.h"

namespace convfast {
namespace cuda {
namespace {

constexpr const char* kForward = "conv1d_forward";
constexpr const char* kBackward = "conv1d_backward";

Mode read_mode(const char* op, const std::string& name) {
  if (name == "zeros") return Mode::kZeros;
  if (name == "reflect") return Mode::kReflect;
  if (name == "replicate") return Mode::kReplicate;
  CONVFAST_CHECK(name == "circular", op, "padding_mode", "zeros, reflect, replicate or circular", name);
  return Mode::kCircular;
}

Activation read_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  CONVFAST_CHECK(name == "leaky_relu", op, "activation", "none, relu, tanh, sigmoid, gelu, silu or leaky_relu", name);
  return Activation::kLeakyRelu;
}

bool by_input(Activation a) { return a == Activation::kGelu || a == Activation::kSilu; }

struct Problem {
  Walk walk;
  int channels = 0, features = 0;
  int64_t groups = 1;
  Activation activation = Activation::kNone;
  OptionalTensor lengths;  // what walk.lengths points to

  Problem(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lengths, int64_t stride,
          const std::vector<int64_t>& padding, int64_t dilation, int64_t groups, const std::string& mode, const std::string& activation)
      : groups(groups), activation(read_activation(op, activation)) {
    CONVFAST_CHECK(x.dim() == 3, op, "x", "[B, T, F]", shape_string(shape_of(x)));
    CONVFAST_CHECK(weight.dim() == 3 && groups >= 1 && weight.size(0) % groups == 0 && weight.size(1) * groups == x.size(2), op, "weight",
                   "[C, F / groups, k] for " + std::to_string(x.size(2)) + " features", shape_string(shape_of(weight)));
    CONVFAST_CHECK(padding.size() == 2, op, "padding", "two numbers", padding.size());
    CONVFAST_CHECK(stride >= 1 && dilation >= 1, op, "stride and dilation", "positive", std::min(stride, dilation));
    check_dtype(op, "x", x, weight.scalar_type(), weight.scalar_type());
    if (bias) {
      check_shape(op, "bias", *bias, {weight.size(0)});
      check_dtype(op, "bias", *bias, weight.scalar_type(), weight.scalar_type());
    }
    walk.batch = x.size(0);
    const int64_t padded = x.size(1) + padding[0] + padding[1], reach = dilation * (weight.size(2) - 1);
    CONVFAST_CHECK(x.size(1) > 0 && padded > reach, op, "x", "at least as long as the kernel", shape_string(shape_of(x)));
    CONVFAST_CHECK(padded + reach + stride < std::numeric_limits<int>::max() && x.size(2) < std::numeric_limits<int>::max() / 2, op, "x",
                   "shorter than 2^31 in each dim", shape_string(shape_of(x)));
    walk.time = int(x.size(1));
    walk.out_time = int((padded - reach - 1) / stride + 1);
    walk.taps = int(weight.size(2));
    walk.stride = int(stride);
    walk.before = int(padding[0]);
    walk.behind = int(padding[1]);
    walk.dilation = int(dilation);
    walk.mode = read_mode(op, mode);
    channels = int(weight.size(0));
    features = int(x.size(2));
    if (lengths) {
      check_shape(op, "lengths", *lengths, {walk.batch});
      CONVFAST_CHECK(lengths->scalar_type() == ScalarType::Long, op, "lengths", "int64", torch::headeronly::toString(lengths->scalar_type()));
      this->lengths = torch::stable::contiguous(*lengths);
      walk.lengths = static_cast<const int64_t*>(this->lengths->const_data_ptr());
    }
  }

  // Whether the library pads as it has to be done here.
  bool pads_by_library() const {
    return !walk.lengths && (walk.before + walk.behind == 0 || (walk.mode == Mode::kZeros && walk.before == walk.behind));
  }
  int64_t padded_time() const { return int64_t(walk.before) + walk.time + walk.behind; }
  Sizes padding_by_library() const { return {pads_by_library() ? walk.before : 0}; }
};

dim3 grid_of(int64_t threads) { return dim3(unsigned((threads + kThreads - 1) / kThreads)); }

// y or pre, [B, T', C].
template <class T>
Rows<T> rows_of(const Tensor& t, T* data) {
  return {data, t.stride(0), t.stride(1)};
}

bool aligned(const Tensor& t, int n) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) % n == 0 && t.stride(1) % n == 0;
}

// Whether rows of `size` features can be read 16 bytes at a time.
bool in_pieces(const Tensor& t, int64_t size) {
  const int n = int(16 / t.element_size());
  return size % n == 0 && (t.stride(2) == 1 || t.size(2) == 1) && aligned(t, n);
}

// x [B, T, F] as [B, T + padding, out_features], padded as `walk` says.
template <class A>
Tensor padded_copy(const Tensor& x, const Walk& walk, int out_features, cudaStream_t stream) {
  const int64_t positions = int64_t(walk.before) + walk.time + walk.behind;
  Tensor out = torch::stable::new_empty(x, {walk.batch, positions, out_features});
  const PaddedCopy<A> p{walk,        pointer<A>(x), x.stride(0), x.stride(1), x.stride(2), writable<A>(out), int(x.size(2)),
                        out_features};
  constexpr int N = 16 / sizeof(A);
  if (out_features == x.size(2) && in_pieces(x, out_features))
    launch(padded_copy_kernel<A, N>, grid_of(walk.batch * positions * (out_features / N)), kThreads, 0, stream, p);
  else
    launch(padded_copy_kernel<A, 1>, grid_of(walk.batch * positions * out_features), kThreads, 0, stream, p);
  return out;
}

// A walk over [B, time] that copies and pads nothing.
Walk plain_walk(int64_t batch, int64_t time) {
  Walk walk;
  walk.batch = batch;
  walk.time = int(time);
  return walk;
}

template <class A, int BM, int BN>
void launch_tile(const Conv1dGemm<A>& p, cudaStream_t stream) {
  const int64_t rows = p.walk.batch * p.walk.out_time, blocks = (rows + BM - 1) / BM * ((p.channels + BN - 1) / BN);
  launch(conv1d_kernel<A, BM, BN>, dim3(unsigned(blocks)), kThreads, conv1d_shared<BM, BN>(), stream, p);
}

// The largest tile reads least for the same work; it is the better one where there are two of it for every processor.
template <class A>
void launch_gemm(const Conv1dGemm<A>& g, cudaStream_t stream) {
  const int64_t tall = (g.walk.batch * g.walk.out_time + 127) / 128;
  const auto fills = [&](int bn) { return tall * ((g.channels + bn - 1) / bn) >= 2 * sm_count(); };
  if (g.channels <= 32) launch_tile<A, 128, 32>(g, stream);
  else if (g.channels > 64 && fills(128)) launch_tile<A, 128, 128>(g, stream);
  else if (fills(64)) launch_tile<A, 128, 64>(g, stream);
  else launch_tile<A, 64, 64>(g, stream);
}

// 16-bit types, no groups.
template <class A>
void forward_by_gemm(const Problem& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y, const OptionalTensor& pre,
                     cudaStream_t stream) {
  const int features = (p.features + 7) / 8 * 8;
  const bool as_it_is = features == p.features && in_pieces(x, features);
  const Tensor read = as_it_is ? x : padded_copy<A>(x, plain_walk(p.walk.batch, p.walk.time), features, stream);
  const Tensor by_tap = padded_copy<A>(torch::stable::transpose(weight, 1, 2), plain_walk(p.channels, p.walk.taps), features, stream);
  const OptionalTensor bias_in = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : bias;
  Conv1dGemm<A> g;
  g.walk = p.walk;
  g.x = rows_of(read, pointer<A>(read));
  g.weight = pointer<A>(by_tap);
  g.bias = pointer<A>(bias_in);
  g.y = rows_of(y, writable<A>(y));
  if (pre) g.pre = rows_of(*pre, writable<A>(*pre));
  g.channels = p.channels;
  g.features = features;
  g.activation = p.activation;
  launch_gemm(g, stream);
}

template <class A>
void forward_by_library(const Problem& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y,
                        const OptionalTensor& pre, cudaStream_t stream) {
  const Tensor read = p.pads_by_library() ? x : padded_copy<A>(x, p.walk, p.features, stream);
  const Tensor z = call<1>("aten::convolution", "", torch::stable::transpose(read, 1, 2), weight, bias, Sizes{p.walk.stride}, p.padding_by_library(),
                           Sizes{p.walk.dilation}, false, Sizes{0}, p.groups)[0];
  Finish<A> f{};
  f.walk = p.walk;
  f.z = pointer<A>(z);
  f.z_sample = z.stride(0);
  f.z_channel = z.stride(1);
  f.z_step = z.stride(2);
  f.y = rows_of(y, writable<A>(y));
  if (pre) f.pre = rows_of(*pre, writable<A>(*pre));
  f.channels = p.channels;
  f.activation = p.activation;
  const int64_t tiles = (int64_t(p.walk.out_time) + 31) / 32 * ((p.channels + 31) / 32) * p.walk.batch;
  launch(finish_kernel<A>, dim3(unsigned(tiles)), kThreads, 32 * 33 * 4, stream, f);
}

Tensor empty_sequence(const Tensor& like, const Problem& p, bool time_major) {
  if (!time_major) return torch::stable::new_empty(like, {p.walk.batch, p.walk.out_time, p.channels});
  Tensor t = torch::stable::new_empty(like, {p.walk.out_time, p.walk.batch, p.channels});
  return torch::stable::transpose(t, 0, 1);
}

template <class A>
std::tuple<Tensor, Tensor> forward(const Problem& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool time_major, bool save) {
  const Tensor y = empty_sequence(weight, p, time_major);
  OptionalTensor pre;
  if (save && by_input(p.activation)) pre = empty_sequence(weight, p, time_major);
  const Device device(x);
  if (y.numel()) {
    if constexpr (sizeof(A) == 2) {
      if (p.groups == 1) forward_by_gemm<A>(p, x, weight, bias, y, pre, device.stream);
      else forward_by_library<A>(p, x, weight, bias, y, pre, device.stream);
    } else {
      forward_by_library<A>(p, x, weight, bias, y, pre, device.stream);
    }
  }
  return {y, pre ? *pre : torch::stable::new_empty(weight, {0})};
}

// dy times the activation's derivative, [B, positions, columns].
template <class A>
Tensor derivative_of(const Problem& p, const Tensor& dy, const Tensor& saved, int64_t positions, int64_t columns, cudaStream_t stream) {
  Tensor out = torch::stable::new_empty(dy, {p.walk.batch, positions, columns});
  Derivative<A> d{};
  d.walk = p.walk;
  d.dy = rows_of(dy, pointer<A>(dy));
  d.dy_feature = dy.stride(2);
  if (p.activation != Activation::kNone) d.saved = rows_of(saved, pointer<A>(saved));
  d.out = writable<A>(out);
  d.channels = p.channels;
  d.positions = int(positions);
  d.columns = int(columns);
  d.activation = p.activation;
  constexpr int N = 16 / sizeof(A);
  const int64_t rows = p.walk.batch * positions;
  if (columns == p.channels && in_pieces(dy, columns) && (!d.saved.data || in_pieces(saved, columns)))
    launch(derivative_kernel<A, N>, grid_of(rows * (columns / N)), kThreads, 0, stream, d);
  else
    launch(derivative_kernel<A, 1>, grid_of(rows * columns), kThreads, 0, stream, d);
  return out;
}

// Gradient of padded time, [B, F, T + padding] by its strides -> dx.
template <class A>
void fold(const Problem& p, const Tensor& padded, const Tensor& dx, cudaStream_t stream) {
  const Fold<A> f{p.walk,         pointer<A>(padded),
                  padded.stride(0), padded.stride(2), padded.stride(1), writable<A>(dx), dx.stride(0), dx.stride(1), dx.stride(2), p.features};
  launch(fold_kernel<A>, grid_of(dx.numel()), kThreads, 0, stream, f);
}

// dpre [B, T + padding, columns], a multiple of 8 of them.
template <class A>
void input_gradient(const Problem& p, const Tensor& dpre, const Tensor& weight, const Tensor& dx, cudaStream_t stream) {
  const int columns = int(dpre.size(2));
  const Tensor by_tap = padded_copy<A>(movedim(weight, 0, 2), plain_walk(p.features, p.walk.taps), columns, stream);
  const bool plain = !p.walk.lengths && (p.walk.mode == Mode::kZeros || p.walk.before + p.walk.behind == 0);
  const bool direct = plain && dx.stride(2) == 1 && (p.features % 8 || in_pieces(dx, p.features));
  const int64_t time = plain ? p.walk.time : p.padded_time();
  const Tensor found = direct ? dx : torch::stable::new_empty(dx, {p.walk.batch, time, p.features});
  Conv1dGemm<A> g{};
  g.walk.batch = p.walk.batch;
  g.walk.time = p.walk.out_time;
  g.walk.out_time = int(time);
  g.walk.taps = p.walk.taps;
  g.walk.dilation = -p.walk.dilation;
  g.walk.before = plain ? -p.walk.before : 0;
  g.walk.behind = plain ? -p.walk.behind : 0;
  g.x = rows_of(dpre, pointer<A>(dpre));
  g.weight = pointer<A>(by_tap);
  g.y = rows_of(found, writable<A>(found));
  g.channels = p.features;
  g.features = columns;
  launch_gemm(g, stream);
  Tensor result = dx;
  if (!plain) fold<A>(p, torch::stable::transpose(found, 1, 2), dx, stream);
  else if (!direct) torch::stable::copy_(result, found);
}

// Rows of all samples lie in one matrix, T + padding of them a sample; those of dpre past T' are zero, so no tap brings two samples
// together.
template <class A>
Tensor weight_gradient(const Problem& p, Tensor dpre, const Tensor& x, cudaStream_t stream) {
  const int64_t rows = p.walk.batch * p.padded_time(), taps = p.walk.taps;
  Tensor padded = torch::stable::view(padded_copy<A>(x, p.walk, p.features, stream), {rows, p.features});
  Tensor found = torch::stable::new_empty(dpre, {p.channels, p.features, taps});
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t shift = tap * p.walk.dilation;
    Tensor d = torch::stable::narrow(dpre, 0, 0, rows - shift), to = torch::stable::select(found, 2, tap);
    torch::stable::copy_(to, call<1>("aten::mm", "", torch::stable::transpose(d, 0, 1), torch::stable::narrow(padded, 0, shift, rows - shift))[0]);
  }
  return found;
}

// 16-bit types at stride 1, no groups.
template <class A>
std::tuple<Tensor, Tensor, Tensor> backward_by_gemm(const Problem& p, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& saved,
                                                    const bool (&wanted)[3], cudaStream_t stream) {
  const auto nothing = [&] { return torch::stable::new_empty(weight, {0}); };
  const int64_t columns = (p.channels + 7) / 8 * 8;
  const Tensor dpre = derivative_of<A>(p, dy, saved, p.padded_time(), columns, stream);
  Tensor flat = torch::stable::view(dpre, {p.walk.batch * p.padded_time(), columns});
  flat = torch::stable::narrow(flat, 1, 0, p.channels);
  const Tensor dx = wanted[0] ? torch::stable::empty_like(x) : nothing();
  if (wanted[0]) input_gradient<A>(p, dpre, weight, dx, stream);
  const Tensor dweight = wanted[1] ? weight_gradient<A>(p, flat, x, stream) : nothing();
  if (!wanted[2]) return {dx, dweight, nothing()};
  return {dx, dweight, call<1>("aten::sum", "dim_IntList", flat, std::optional<Sizes>(Sizes{0}), false, std::optional<ScalarType>())[0]};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward_by_library(const Problem& p, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& saved,
                                                       const bool (&wanted)[3], cudaStream_t stream) {
  const auto nothing = [&] { return torch::stable::new_empty(weight, {0}); };
  const bool plain = p.activation == Activation::kNone && !p.walk.lengths;
  const Tensor dpre = plain ? dy : derivative_of<A>(p, dy, saved, p.walk.out_time, p.channels, stream);
  const Tensor read = p.pads_by_library() ? x : padded_copy<A>(x, p.walk, p.features, stream);
  const auto found = call<3>("aten::convolution_backward", "", torch::stable::transpose(dpre, 1, 2), torch::stable::transpose(read, 1, 2), weight,
                             std::optional<Sizes>(Sizes{p.channels}), Sizes{p.walk.stride}, p.padding_by_library(), Sizes{p.walk.dilation}, false,
                             Sizes{0}, p.groups, torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3));
  Tensor dx = wanted[0] ? torch::stable::empty_like(x) : nothing();
  if (wanted[0] && p.pads_by_library()) torch::stable::copy_(dx, torch::stable::transpose(found[0], 1, 2));
  else if (wanted[0]) fold<A>(p, found[0], dx, stream);
  return {dx, wanted[1] ? torch::stable::contiguous(found[1]) : nothing(), wanted[2] ? found[2] : nothing()};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Problem& p, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& saved,
                                            const std::vector<int64_t>& needs) {
  const auto fresh = [&](bool wanted, const Sizes& shape) { return torch::stable::new_zeros(weight, wanted ? shape : Sizes{0}); };
  const bool wanted[3] = {needs[0] != 0, needs[1] != 0, needs[2] != 0};
  if (dy.numel() == 0 || !(wanted[0] || wanted[1] || wanted[2]))
    return {wanted[0] ? torch::stable::empty_like(x) : fresh(false, {}), fresh(wanted[1], shape_of(weight)), fresh(wanted[2], {p.channels})};
  const Device device(x);
  if constexpr (sizeof(A) == 2)
    if (p.groups == 1 && p.walk.stride == 1) return backward_by_gemm<A>(p, dy, x, weight, saved, wanted, device.stream);
  return backward_by_library<A>(p, dy, x, weight, saved, wanted, device.stream);
}

std::tuple<Tensor, Tensor> conv1d_forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor lengths, int64_t stride,
                                          std::vector<int64_t> padding, int64_t dilation, int64_t groups, Text padding_mode,
                                          Text activation, bool time_major, bool save) {
  const Problem p(kForward, x, weight, bias, lengths, stride, padding, dilation, groups, padding_mode, activation);
  return switch_dtype(kForward, "weight", weight.scalar_type(), [&](auto a) { return forward<decltype(a)>(p, x, weight, bias, time_major, save); });
}

std::tuple<Tensor, Tensor, Tensor> conv1d_backward(Tensor dy, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor lengths, Tensor y,
                                                   Tensor pre, int64_t stride, std::vector<int64_t> padding, int64_t dilation, int64_t groups,
                                                   Text padding_mode, Text activation, std::vector<int64_t> needs) {
  const Problem p(kBackward, x, weight, bias, lengths, stride, padding, dilation, groups, padding_mode, activation);
  CONVFAST_CHECK(needs.size() == 3, kBackward, "needs", "3 flags", needs.size());
  const std::vector<int64_t> shape{p.walk.batch, p.walk.out_time, p.channels};
  check_shape(kBackward, "dy", dy, shape);
  check_dtype(kBackward, "dy", dy, weight.scalar_type(), weight.scalar_type());
  const Tensor& saved = by_input(p.activation) ? pre : y;
  if (p.activation != Activation::kNone) check_shape(kBackward, by_input(p.activation) ? "pre" : "y", saved, shape);
  return switch_dtype(kBackward, "weight", weight.scalar_type(), [&](auto a) { return backward<decltype(a)>(p, dy, x, weight, saved, needs); });
}

}  // namespace
}  // namespace cuda
}  // namespace convfast

CONVFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv1d_forward", TORCH_BOX(&convfast::cuda::conv1d_forward));
  m.impl("conv1d_backward", TORCH_BOX(&convfast::cuda::conv1d_backward));
}
