// ConvLSTM on a GPU: a launch a step each way, or one for all steps. The contract is in ops.h, the kernels in conv_lstm_step.h.
//
// Forward: the input convolution of all frames is the library's, a chunk of steps at a time; then each step is one launch, which
// adds the recurrent convolution and runs the cell, or the library's convolution and a launch of the cell (`engine`). Backward: a
// launch a step computes dh by dgrad of the successor's dgates and the cell's gradients; weights' gradients and dx are the library's,
// over all frames at once. Where all tiles of a step run at the same time, so do all steps: in one launch that keeps its weights
// (`fits_one_launch`). Every sample is at frame t at step t: one past its length keeps its state, which is the same as to start
// at its own end, and reads no lengths on the host.
#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "../text.h"
#include "aten.h"
#include "conv_lstm_step.h"

namespace convfast {
namespace cuda {
namespace {

using namespace conv_lstm;

constexpr const char* kForward = "conv_lstm_forward";
constexpr const char* kBackward = "conv_lstm_backward";
constexpr int64_t kChunkBytes = int64_t(256) << 20;  // of gates that await their steps

// The last, the smallest, is that of one launch for all steps.
using ForwardTiles = std::tuple<Tile<1, 4, 4, 8, 2, 1, true>, Tile<1, 4, 4, 8, 1, 2, true>, Tile<2, 4, 4, 4, 2, 1>, Tile<1, 4, 4, 4, 1, 3>,
                                Tile<1, 4, 2, 4, 1, 4>>;
using BackwardTiles = std::tuple<Tile<1, 2, 4, 8, 2, 1, true>, Tile<1, 2, 4, 8, 1, 2, true>, Tile<2, 2, 4, 4, 1, 2>, Tile<1, 1, 4, 4, 1, 3>,
                                 Tile<2, 1, 2, 2, 1, 4>>;

template <class A>
constexpr ScalarType scalar_type() {
  return std::is_same_v<A, float> ? ScalarType::Float : std::is_same_v<A, Half> ? ScalarType::Half : ScalarType::BFloat16;
}

Extent extent(const Sizes& dims, int leading = 1) {
  int v[3] = {leading, leading, leading};
  for (size_t i = 0; i < dims.size(); ++i) v[3 - dims.size() + i] = int(dims[i]);
  return {v[0], v[1], v[2]};
}

Sizes from(const Sizes& sizes, size_t first) { return Sizes(sizes.begin() + first, sizes.end()); }

Sizes joined(Sizes leading, const Sizes& space, int64_t last) {
  leading.insert(leading.end(), space.begin(), space.end());
  leading.push_back(last);
  return leading;
}

Tensor empty(const Tensor& like, const Sizes& shape, ScalarType dtype) { return torch::stable::new_empty(like, shape, dtype); }

unsigned blocks(int64_t n, int64_t of) {
  const int64_t count = (n + of - 1) / of;
  STD_TORCH_CHECK(count < (int64_t(1) << 31), "convfast: a tensor has more elements than a grid has threads");
  return unsigned(count);
}

// A convolution of frames by the library; what it cannot pad is padded before.
struct FrameConvolution {
  Tensor weight;
  Sizes stride, dilation, in, out;  // in, out: spatial sizes
  Padding mode = Padding::kZeros;
  Sizes before, by_library, padded;  // padded: sizes of what the library reads
  bool pads = false;

  FrameConvolution() = default;
  FrameConvolution(const Tensor& weight, const Sizes& in, const Sizes& stride, const Sizes& padding, const Sizes& dilation, Padding mode)
      : weight(weight), stride(stride), dilation(dilation), in(in), out(in), mode(mode), before(in.size()),
        by_library(in.size(), 0), padded(in) {
    for (size_t d = 0; d < in.size(); ++d) {
      before[d] = padding[2 * d];
      pads |= padding[2 * d] != padding[2 * d + 1] || (mode != Padding::kZeros && padding[2 * d]);
      padded[d] = in[d] + padding[2 * d] + padding[2 * d + 1];
      out[d] = (padded[d] - dilation[d] * (weight.size(2 + d) - 1) - 1) / stride[d] + 1;
    }
    if (!pads) by_library = before, padded = in;
  }

  // frames [B, T, *in, C], dense → what the library reads [B T, C, *padded]; zero past lengths, where they are given.
  template <class A>
  Tensor source(const Tensor& frames, const OptionalTensor& lengths, int64_t t0, cudaStream_t stream) const {
    const int64_t channels = frames.size(frames.dim() - 1);
    Tensor found = frames;
    if (pads || lengths) {
      found = empty(frames, joined({frames.size(0), frames.size(1)}, padded, channels), scalar_type<A>());
      const PadFrames<A> p{pointer<A>(frames), writable<A>(found), found.numel(), int(frames.size(1)), int(channels), extent(in),
                           pads ? extent(before, 0) : Extent{0, 0, 0}, extent(padded), mode, t0,
                           lengths ? pointer<int64_t>(*lengths) : nullptr};
      launch(pad_frames<A>, blocks(found.numel(), 256), 256, 0, stream, p);
    }
    return movedim(torch::stable::flatten(found, 0, 1), -1, 1);
  }

  Tensor operator()(const Tensor& source) const { return convolution(source, weight, stride, by_library, dilation); }

  // grad [N, Cout, *out] and the source → gradients of the frames [N, Cin, *in] and of the weight.
  template <class A>
  std::array<Tensor, 2> backward(const Tensor& grad, const Tensor& source, bool need_frames, bool need_weight, cudaStream_t stream) const {
    auto found = convolution_backward(grad, source, weight, stride, by_library, dilation, need_frames, need_weight);
    if (need_weight) found[1] = torch::stable::contiguous(found[1]);
    if (!need_frames || !pads) return found;
    const Tensor grads = dense_last(found[0], 1);
    const int64_t channels = source.size(1);
    Tensor frames = empty(grads, joined({source.size(0)}, in, channels), scalar_type<A>());
    const UnpadFrames<A> p{pointer<A>(grads), writable<A>(frames), frames.numel(), int(channels), extent(in), extent(before, 0),
                           extent(padded), mode};
    launch(unpad_frames<A>, blocks(frames.numel(), 256), 256, 0, stream, p);
    found[0] = movedim(frames, -1, 1);
    return found;
  }
};

struct Inputs {
  OptionalTensor x, w_ih;
  Tensor w_hh;
  OptionalTensor bias, peephole, h0, c0, lengths;
};

// One call in plain numbers, its arguments checked.
struct Problem {
  int64_t batch = 0, time = 0, channels = 0;
  Sizes space;  // of the state
  bool reverse = false;
  FrameConvolution of_x, of_h;

  Problem(const char* op, const Inputs& in, int64_t time, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
          const std::string& padding_mode, bool reverse)
      : time(time), reverse(reverse) {
    const auto kernel = shape_of(in.w_hh);
    const int64_t dims = in.w_hh.dim() - 2;
    CONVFAST_CHECK(dims >= 1 && dims <= 3 && kernel[0] == 4 * kernel[1] && kernel[1] > 0, op, "w_hh", "[4C, C, *K] with 1 to 3 kernel dims",
                   shape_string(kernel));
    CONVFAST_CHECK(time >= 1, op, "time", "at least 1", time);
    channels = kernel[1];
    const ScalarType dtype = in.w_hh.scalar_type();
    Padding mode = Padding::kZeros;
    if (padding_mode == "reflect") mode = Padding::kReflect;
    else if (padding_mode == "replicate") mode = Padding::kReplicate;
    else if (padding_mode == "circular") mode = Padding::kCircular;
    else CONVFAST_CHECK(padding_mode == "zeros", op, "padding_mode", "zeros, reflect, replicate or circular", padding_mode);

    const OptionalTensor like = defined(in.x) ? in.x : defined(in.h0) ? in.h0 : in.c0;
    CONVFAST_CHECK(defined(like), op, "h0 or c0", "given where x is not", "neither");
    CONVFAST_CHECK(like->dim() == dims + 2 + defined(in.x), op, "x or the state", "of as many spatial dims as w_hh",
                   shape_string(shape_of(*like)));
    batch = like->size(0);
    space = from(shape_of(*like), defined(in.x) ? 3 : 2);
    if (defined(in.x)) {
      CONVFAST_CHECK(in.x->size(1) == time, op, "x", "of time extent " + std::to_string(time), shape_string(shape_of(*in.x)));
      check_dtype(op, "x", *in.x, dtype, dtype);
    }
    if (defined(in.x) && defined(in.w_ih)) {
      const auto w = shape_of(*in.w_ih);
      CONVFAST_CHECK(int64_t(w.size()) == dims + 2 && w[0] == 4 * channels && w[1] == in.x->size(2), op, "w_ih", "[4C, Cin, *K]",
                     shape_string(w));
      check_dtype(op, "w_ih", *in.w_ih, dtype, dtype);
      CONVFAST_CHECK(int64_t(stride.size()) == dims && int64_t(dilation.size()) == dims && int64_t(padding.size()) == 2 * dims, op,
                     "stride, dilation and padding", "of one, one and two numbers a dim", shape_string(padding));
      of_x = FrameConvolution(*in.w_ih, space, stride, padding, dilation, mode);
      space = of_x.out;
    } else if (defined(in.x)) {
      CONVFAST_CHECK(in.x->size(2) == 4 * channels, op, "x", "of 4C channels when w_ih is undefined", shape_string(shape_of(*in.x)));
    }
    for (int64_t size : space) CONVFAST_CHECK(size > 0, op, "x", "of a size that leaves at least one output pixel", shape_string(space));

    Sizes same;
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t total = kernel[2 + d] - 1;
      same.push_back(total / 2);
      same.push_back(total - total / 2);
    }
    of_h = FrameConvolution(in.w_hh, space, Sizes(dims, 1), same, Sizes(dims, 1), Padding::kZeros);

    Sizes state{batch, channels}, planes{3, channels};
    state.insert(state.end(), space.begin(), space.end());
    planes.insert(planes.end(), space.begin(), space.end());
    if (defined(in.bias)) check_shape(op, "bias", *in.bias, {4 * channels});
    if (defined(in.peephole)) check_shape(op, "peephole", *in.peephole, planes);
    if (defined(in.h0)) check_shape(op, "h0", *in.h0, state);
    if (defined(in.c0)) check_shape(op, "c0", *in.c0, state);
    if (defined(in.bias)) check_dtype(op, "bias", *in.bias, dtype, dtype);
    if (defined(in.peephole)) check_dtype(op, "peephole", *in.peephole, dtype, dtype);
    if (defined(in.h0)) check_dtype(op, "h0", *in.h0, dtype, dtype);
    if (defined(in.c0)) check_dtype(op, "c0", *in.c0, dtype, ScalarType::Float);
    if (defined(in.lengths)) {
      check_shape(op, "lengths", *in.lengths, {batch});
      CONVFAST_CHECK(in.lengths->scalar_type() == ScalarType::Long, op, "lengths", "int64",
                     torch::headeronly::toString(in.lengths->scalar_type()));
    }
  }

  int64_t area() const { return extent(space).pixels(); }
  int64_t pixels() const { return batch * area(); }
  int64_t frame() const { return area() * channels; }
  int64_t taps() const { return extent(from(shape_of(of_h.weight), 2)).pixels(); }
  // Frame of the i-th step, and of the step before.
  int64_t at(int64_t i) const { return reverse ? time - 1 - i : i; }
};

enum class Engine { kImplicitGemm, kLibrary };

// Which kernels run a step: own GEMMs for 16-bit types whose channels fill 16 bytes, else the library's convolution and the cell
// alone. A rule from the kernels' limits; nothing of it was measured.
Engine engine(const Problem& p, ScalarType dtype) {
  const bool fits = p.pixels() < (int64_t(1) << 30) && 4 * p.frame() < (int64_t(1) << 30);
  return dtype != ScalarType::Float && p.channels % 8 == 0 && fits ? Engine::kImplicitGemm : Engine::kLibrary;
}

template <class T>
constexpr int channels_of(bool backward) {
  return backward ? T::kColumns : T::kColumns / 4;
}

// How long a step's GEMM takes by the tile, in cycles a step of K; endless where the GPU cannot run it.
template <class T>
int64_t cycles(const Problem& p, bool backward, bool has_warpgroups, int processors) {
  if (T::kWarpgroups && !has_warpgroups) return INT64_MAX;
  const int64_t width = channels_of<T>(backward), across = (p.channels + width - 1) / width;
  const int64_t tiles = (p.pixels() + T::kPixels - 1) / T::kPixels * across;
  return (tiles + processors - 1) / processors * T::kCycles;
}

template <class Tiles, size_t... I, class F>
void with_fastest(const Problem& p, bool backward, const F& f, std::index_sequence<I...>) {
  const bool has_warpgroups = warpgroups();
  const int processors = sm_count();
  const std::array<int64_t, sizeof...(I)> taken{cycles<std::tuple_element_t<I, Tiles>>(p, backward, has_warpgroups, processors)...};
  const size_t fastest = std::min_element(taken.begin(), taken.end()) - taken.begin();
  ((I == fastest ? f(std::tuple_element_t<I, Tiles>()) : void()), ...);
}

// Calls f with the tile that should be fastest.
template <class Tiles, class F>
void with_tile(const Problem& p, bool backward, const F& f) {
  with_fastest<Tiles>(p, backward, f, std::make_index_sequence<std::tuple_size_v<Tiles>>());
}

// Frames of the input convolution that are computed together.
int64_t chunk_frames(const Problem& p, int64_t element) {
  return std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, 4 * p.batch * p.frame() * element));
}

// The recurrent convolution as the kernels see it, forward or (sign -1) as the gradient of its input.
Convolution step_convolution(const Problem& p, bool backward) {
  const Extent kernel = extent(from(shape_of(p.of_h.weight), 2));
  const int sign = backward ? -1 : 1, channels = int(p.channels * (backward ? 4 : 1));
  const Extent origin{-sign * ((kernel.d - 1) / 2), -sign * ((kernel.h - 1) / 2), -sign * ((kernel.w - 1) / 2)};
  return {extent(p.space), kernel, origin, sign, channels, int((p.taps() * channels + 31) / 32), channels % 32 == 0, 0};
}

template <class Tiles>
using SmallTile = std::tuple_element_t<std::tuple_size_v<Tiles> - 1, Tiles>;

// Whether all steps can be one launch of `kernel`: the small tile is taken, all of its tiles run at once and weights fit beside them.
template <class Tiles, class Kernel>
bool fits_one_launch(const Problem& p, bool backward, Kernel kernel) {
  using T = SmallTile<Tiles>;
  if (p.time < 2 || p.pixels() == 0) return false;
  bool taken = false;
  with_tile<Tiles>(p, backward, [&](auto tile) { taken = std::is_same_v<decltype(tile), T>; });
  const int64_t k_blocks = step_convolution(p, backward).k_blocks, width = channels_of<T>(backward);
  const int64_t tiles = (p.pixels() + T::kPixels - 1) / T::kPixels * ((p.channels + width - 1) / width);
  if (!taken || k_blocks * T::kWeights + T::kStages * T::kRows > int64_t(shared_limit())) return false;
  return tiles <= resident_blocks(kernel, T::kThreads, sequence_shared<T>(int(k_blocks)));
}

template <class A>
bool one_launch(const Problem& p, const Inputs& in) {
  if (engine(p, scalar_type<A>()) != Engine::kImplicitGemm || (defined(in.x) && chunk_frames(p, sizeof(A)) < p.time)) return false;
  return fits_one_launch<ForwardTiles>(p, false, forward_sequence<A, SmallTile<ForwardTiles>>);
}

template <class A, class T, bool kBackward>
Tensor packed_weights(const Problem& p, const Tensor& w_hh, cudaStream_t stream) {
  const Convolution conv = step_convolution(p, kBackward);
  const int64_t width = channels_of<T>(kBackward), total = (p.channels + width - 1) / width * conv.k_blocks * T::kColumns * T::kDepth;
  Tensor packed = empty(w_hh, {total}, scalar_type<A>());
  const Tensor w = torch::stable::contiguous(w_hh);
  const PackWeights<A> s{pointer<A>(w), writable<A>(packed), total, int(p.channels), int(p.taps()), conv.k_blocks, conv.taps_inner};
  launch(pack_weights<A, T, kBackward>, blocks(total, 256), 256, 0, stream, s);
  return packed;
}

// Launches the cell alone, with as many neighbouring channels a thread as are 16 bytes, where channels are whole such pieces.
template <class A, class Params>
void launch_cell(void (*vector)(Params), void (*scalar)(Params), const Params& s, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(A);
  const bool whole = s.channels % N == 0;
  launch(whole ? vector : scalar, blocks(s.pixels * (s.channels / (whole ? N : 1)), 256), 256, 0, stream, s);
}

OptionalTensor dense_state(const OptionalTensor& t, ScalarType dtype) {
  return t ? OptionalTensor(dense_last(cast(*t, dtype), 1)) : t;
}

// A copy of frame t of frames [B, T, ..]: an output may not be a view of another.
Tensor copy_of_frame(const Tensor& frames, int64_t t) {
  const Tensor frame = torch::stable::select(frames, 1, t);
  Tensor copy = empty(frames, shape_of(frame), frames.scalar_type());
  torch::stable::copy_(copy, frame);
  return copy;
}

// Puts `found` in the place of t: t becomes it where it lies alike, else a copy.
void give(Tensor& t, const Tensor& found) {
  bool alike = true;
  for (int64_t d = 0; d < t.dim(); ++d) alike &= t.stride(d) == found.stride(d);
  if (alike) t = found;
  else torch::stable::copy_(t, found);
}

// What the forward steps of a call share, and their launch. The backward runs them again to recompute gates.
template <class A>
struct Forward {
  static constexpr ScalarType kDtype = scalar_type<A>();
  const Problem& p;
  const Inputs& in;
  cudaStream_t stream;
  Engine by;
  bool down;  // from the last frame to the first
  ForwardStep<A> step{};
  OptionalTensor weights, bias, peephole, lengths;  // in the kernels' form
  Tensor gates_x;                                   // of frames begin ... begin + count
  int64_t begin = 0, count = 0;

  Forward(const Problem& p, const Inputs& in, bool down, cudaStream_t stream)
      : p(p), in(in), stream(stream), by(engine(p, kDtype)), down(down) {
    if (defined(in.bias)) bias = dense_last(*in.bias, 0);
    if (defined(in.peephole)) peephole = dense_last(cast(*in.peephole, ScalarType::Float), 1);
    if (defined(in.lengths)) lengths = torch::stable::contiguous(*in.lengths);
    step.conv = step_convolution(p, false);
    step.pixels = p.pixels();
    step.area = int(p.area());
    step.channels = int(p.channels);
    step.bias = bias ? pointer<A>(*bias) : nullptr;
    step.peephole = peephole ? pointer<float>(*peephole) : nullptr;
    step.lengths = lengths ? pointer<int64_t>(*lengths) : nullptr;
    if constexpr (sizeof(A) == 2) {
      if (by == Engine::kImplicitGemm)
        with_tile<ForwardTiles>(p, false, [&](auto tile) { weights = packed_weights<A, decltype(tile), false>(p, in.w_hh, stream); });
    }
  }

  // The input convolution of frame t, for step.gates_x. A frame that stands for all is convolved once.
  void input_frame(int64_t t) {
    if (!defined(in.x)) return;
    const int64_t gates_frame = 4 * p.frame();
    const int64_t frames = p.time > 1 && in.x->stride(1) == 0 ? 1 : p.time;
    if (frames == 1) t = 0;
    if (t < begin || t >= begin + count) {
      count = std::min(chunk_frames(p, sizeof(A)), down && frames > 1 ? t + 1 : frames - t);
      begin = down && frames > 1 ? t + 1 - count : t;
      gates_x = Tensor();
      Tensor x = *in.x;
      const Tensor chunk = dense_last(count == p.time ? x : torch::stable::narrow(x, 1, begin, count), 2);
      gates_x = defined(in.w_ih) ? dense_last(p.of_x(p.of_x.source<A>(chunk, OptionalTensor(), begin, stream)), 1) : chunk;
    }
    step.gates_x = pointer<A>(gates_x) + (t - begin) * gates_frame;
    step.gates_x_sample = count * gates_frame;
  }

  // All steps in one launch, where that can be: `step` is as for the first, h_before the state before it.
  bool run_sequence(const OptionalTensor& h_before) {
    if constexpr (sizeof(A) == 2) {
      using T = SmallTile<ForwardTiles>;
      if (!one_launch<A>(p, in)) return false;
      ForwardSequence<A> s{};
      step.t = p.at(0);
      input_frame(step.t);
      step.h_before = h_before ? pointer<A>(*h_before) : nullptr;
      step.conv.sample = p.frame();
      step.weights = pointer<A>(*weights);
      s.step = step;
      s.steps = p.time;
      s.direction = down ? -1 : 1;
      s.h_next = s.direction * p.frame();
      s.c_next = step.c_sample == p.frame() ? 0 : s.h_next;
      s.gates_next = 4 * s.h_next;
      s.gates_x_next = count == 1 ? 0 : 4 * s.h_next;
      const unsigned across = unsigned((p.channels + kForwardChannels<T> - 1) / kForwardChannels<T>);
      launch_cooperative(forward_sequence<A, T>, blocks(p.pixels(), T::kPixels) * across, T::kThreads,
                         sequence_shared<T>(step.conv.k_blocks), stream, s);
      return true;
    }
    return false;
  }

  // h_before: frames [B, T', *S', C] of which frame t_before was the last, or undefined for zero. The rest of `step` is the caller's.
  void run(int64_t t, const OptionalTensor& h_before, int64_t t_before) {
    step.t = t;
    input_frame(t);
    step.h_before = nullptr;
    if (h_before) {
      step.h_before = pointer<A>(*h_before) + t_before * p.frame();
      step.conv.sample = h_before->size(1) * p.frame();
    }
    if constexpr (sizeof(A) == 2) {
      if (h_before && by == Engine::kImplicitGemm) {
        step.weights = pointer<A>(*weights);
        with_tile<ForwardTiles>(p, false, [&](auto tile) {
          using T = decltype(tile);
          const int64_t across = (p.channels + kForwardChannels<T> - 1) / kForwardChannels<T>;
          launch(forward_step<A, T>, blocks(p.pixels(), T::kPixels) * unsigned(across), T::kThreads, T::kShared, stream, step);
        });
        return;
      }
    }
    Tensor gates_h;
    step.gates_h = nullptr;
    if (h_before) {
      Tensor sequence = *h_before;
      const Tensor frame = torch::stable::contiguous(torch::stable::narrow(sequence, 1, t_before, 1));
      gates_h = dense_last(p.of_h(p.of_h.source<A>(frame, OptionalTensor(), 0, stream)), 1);
      step.gates_h = pointer<A>(gates_h);
    }
    launch_cell<A>(forward_cell<A, 16 / sizeof(A)>, forward_cell<A, 1>, step, stream);
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Outputs forward(const Problem& p, const Inputs& in, const std::string& save) {
  constexpr ScalarType kDtype = scalar_type<A>();
  const Device device(in.w_hh);
  const bool saved = save != "none", keeps_gates = save == "fast";
  CONVFAST_CHECK(saved ? keeps_gates || save == "lean" : true, kForward, "save", "none, fast or lean", save);
  const Tensor h = empty(in.w_hh, joined({p.batch, p.time}, p.space, p.channels), kDtype);
  const Tensor c = empty(in.w_hh, joined(saved ? Sizes{p.batch, p.time} : Sizes{p.batch}, p.space, p.channels), ScalarType::Float);
  const Tensor gates = empty(in.w_hh, keeps_gates ? joined({p.batch, p.time}, p.space, 4 * p.channels) : Sizes{0}, kDtype);
  if (p.pixels() > 0) {
    Forward<A> f(p, in, p.reverse, device.stream);
    const OptionalTensor h0 = dense_state(in.h0, kDtype), c0 = dense_state(in.c0, ScalarType::Float);
    OptionalTensor h_before;
    if (h0) h_before = torch::stable::unsqueeze(*h0, 1);
    int64_t t_before = 0;
    ForwardStep<A>& s = f.step;
    s.c_before = c0 ? pointer<float>(*c0) : nullptr;
    s.c_before_sample = p.frame();
    s.h_sample = p.time * p.frame();
    s.c_sample = saved ? s.h_sample : p.frame();
    s.gates_sample = 4 * s.h_sample;
    const auto place = [&](int64_t t) {
      s.h = writable<A>(h) + t * p.frame();
      s.c = writable<float>(c) + (saved ? t * p.frame() : 0);
      s.gates = keeps_gates ? writable<A>(gates) + 4 * t * p.frame() : nullptr;
    };
    place(p.at(0));
    const bool done = f.run_sequence(h_before);
    for (int64_t i = 0; i < p.time && !done; ++i) {
      const int64_t t = p.at(i);
      place(t);
      f.run(t, h_before, t_before);
      h_before = h;
      t_before = t;
      s.c_before = s.c;
      s.c_before_sample = s.c_sample;
    }
  }
  const Tensor h_n = copy_of_frame(h, p.at(p.time - 1)), c_n = saved ? copy_of_frame(c, p.at(p.time - 1)) : c;
  if (defined(in.lengths) && p.pixels() > 0) {
    const Tensor lengths = torch::stable::contiguous(*in.lengths);
    const ClearFrames<A> s{writable<A>(h), pointer<int64_t>(lengths), p.frame(), h.numel(), int(p.time)};
    launch(clear_past_lengths<A>, blocks(h.numel(), 256), 256, 0, device.stream, s);
  }
  return {movedim(h, -1, 2), movedim(h_n, -1, 1), movedim(c_n, -1, 1), saved ? movedim(c, -1, 2) : empty(c, {0}, ScalarType::Float),
          keeps_gates ? movedim(gates, -1, 2) : gates};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
struct Backward {
  static constexpr ScalarType kDtype = scalar_type<A>();
  const Problem& p;
  const Inputs& in;
  Device device;
  Engine by;
  BackwardStep<A> step{};
  OptionalTensor weights;

  Backward(const Problem& p, const Inputs& in) : p(p), in(in), device(in.w_hh), by(engine(p, kDtype)) {}

  // dh of a step from its successor's dgates [B, T, *S', 4C], frame t: by the step's own GEMM, or here by the library.
  Tensor recurrent_backward(const Tensor& dgates, int64_t t) const {
    Tensor all = dgates;
    const Tensor frame = movedim(torch::stable::contiguous(torch::stable::select(all, 1, t)), -1, 1);
    const size_t dims = p.space.size();
    Sizes before;
    for (size_t d = 0; d < dims; ++d) before.push_back((in.w_hh.size(2 + d) - 1) / 2);
    // With an even kernel there is one more behind the last: nobody's.
    Tensor dh = convolution(frame, in.w_hh, Sizes(dims, 1), before, Sizes(dims, 1), true);
    for (size_t d = 0; d < dims; ++d) dh = torch::stable::narrow(dh, 2 + d, 0, p.space[d]);
    return dense_last(dh, 1);
  }

  // dgates_after: as above, undefined where there is no successor; then dh_after, undefined for zero, takes the place of their GEMM.
  void run(const OptionalTensor& dgates_after, OptionalTensor dh_after) {
    if (by == Engine::kLibrary && dgates_after) dh_after = recurrent_backward(*dgates_after, step.t_after);
    step.dh_after = dh_after ? pointer<A>(*dh_after) : nullptr;
    if constexpr (sizeof(A) == 2) {
      if (by == Engine::kImplicitGemm && dgates_after) {
        step.dgates_after = pointer<A>(*dgates_after) + 4 * step.t_after * p.frame();
        with_tile<BackwardTiles>(p, true, [&](auto tile) {
          using T = decltype(tile);
          if (!weights) weights = packed_weights<A, T, true>(p, in.w_hh, device.stream);
          step.weights = pointer<A>(*weights);
          const int64_t across = (p.channels + T::kColumns - 1) / T::kColumns;
          launch(backward_step<A, T>, blocks(p.pixels(), T::kPixels) * unsigned(across), T::kThreads, T::kShared, device.stream, step);
        });
        return;
      }
    }
    launch_cell<A>(backward_cell<A, 16 / sizeof(A)>, backward_cell<A, 1>, step, device.stream);
  }

  // All steps in one launch, where that can be: `step` is as for the last in time, but for what comes after it.
  bool run_sequence(const OptionalTensor& dh_after, const float* c0, A* dh0) {
    if constexpr (sizeof(A) == 2) {
      using T = SmallTile<BackwardTiles>;
      if (by != Engine::kImplicitGemm || !fits_one_launch<BackwardTiles>(p, true, backward_sequence<A, T>)) return false;
      weights = packed_weights<A, T, true>(p, in.w_hh, device.stream);
      step.weights = pointer<A>(*weights);
      step.dh_after = dh_after ? pointer<A>(*dh_after) : nullptr;
      const int64_t direction = p.reverse ? 1 : -1, next = direction * p.frame();
      const BackwardSequence<A> s{step, p.time, direction, next, 4 * next, c0, dh0};
      const unsigned across = unsigned((p.channels + T::kColumns - 1) / T::kColumns);
      launch_cooperative(backward_sequence<A, T>, blocks(p.pixels(), T::kPixels) * across, T::kThreads,
                         sequence_shared<T>(step.conv.k_blocks), device.stream, s);
      return true;
    }
    return false;
  }

  Gradients backward(const OptionalTensor& dh, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& h_, const Tensor& c_,
                     const Tensor& gates_, const Sizes& needs) {
    const auto none = [&] { return empty(in.w_hh, {0}, kDtype); };  // a fresh one each: outputs may not be one tensor
    const bool lean = gates_.numel() == 0, need_x = needs[0] && defined(in.x), need_w_ih = needs[1] && defined(in.w_ih);
    const bool need_bias = needs[3] && defined(in.bias), need_peephole = needs[4] && defined(in.peephole);
    const bool need_h0 = needs[5] && defined(in.h0), need_c0 = needs[6] && defined(in.c0);
    const Sizes state = joined({p.batch}, p.space, p.channels), sequence = joined({p.batch, p.time}, p.space, p.channels);
    Tensor dx = need_x ? torch::stable::empty_like(*in.x) : none();
    Tensor dw_ih = need_w_ih ? torch::stable::new_zeros(*in.w_ih, shape_of(*in.w_ih)) : none();
    Tensor dw_hh = needs[2] ? torch::stable::new_zeros(in.w_hh, shape_of(in.w_hh)) : none();
    Tensor dbias = need_bias ? torch::stable::new_zeros(*in.bias, shape_of(*in.bias)) : none();
    Tensor dpeephole = need_peephole ? torch::stable::new_zeros(*in.peephole, shape_of(*in.peephole)) : none();
    Tensor dh0 = need_h0 ? empty(in.w_hh, state, kDtype) : none();
    const Tensor dc = empty(in.w_hh, state, ScalarType::Float);
    const ScalarType c0_dtype = need_c0 ? in.c0->scalar_type() : ScalarType::Float;
    const auto results = [&] {
      return Gradients{dx, dw_ih, dw_hh, dbias, dpeephole, need_h0 ? movedim(dh0, -1, 1) : none(),
                       need_c0 ? movedim(cast(dc, c0_dtype), -1, 1) : empty(in.w_hh, {0}, ScalarType::Float)};
    };
    if (p.pixels() == 0) return results();

    const Tensor h = dense_last(h_, 2), c = dense_last(c_, 2), gates = lean ? none() : dense_last(gates_, 2);
    const OptionalTensor h0 = dense_state(in.h0, kDtype), c0 = dense_state(in.c0, ScalarType::Float);
    const OptionalTensor dh_last = dense_state(dh_n, kDtype), dc_last = dense_state(dc_n, ScalarType::Float);
    OptionalTensor dh_all;
    if (dh) dh_all = dense_last(cast(*dh, kDtype), 2);
    const Tensor dgates = empty(in.w_hh, joined({p.batch, p.time}, p.space, 4 * p.channels), kDtype);
    Forward<A> again(p, in, !p.reverse, device.stream);
    OptionalTensor carry, sums, gates_now, h_before;
    if (again.lengths) carry = empty(in.w_hh, state, ScalarType::Float);
    if (need_peephole) sums = torch::stable::new_zeros(in.w_hh, joined({p.batch, 3}, p.space, p.channels), ScalarType::Float);
    if (needs[2] || lean) {
      h_before = empty(in.w_hh, sequence, kDtype);
      const PreviousFrames<A> s{pointer<A>(h), h0 ? pointer<A>(*h0) : nullptr, writable<A>(*h_before), h.numel(), p.frame(), int(p.time),
                                p.reverse ? -1 : 1, again.step.lengths};
      launch(previous_frames<A>, blocks(h.numel(), 256), 256, 0, device.stream, s);
    }
    if (lean) gates_now = empty(in.w_hh, joined({p.batch}, p.space, 4 * p.channels), kDtype);

    step.conv = step_convolution(p, true);
    step.conv.sample = 4 * p.time * p.frame();
    step.pixels = p.pixels();
    step.area = int(p.area());
    step.channels = int(p.channels);
    step.peephole = again.step.peephole;
    step.lengths = again.step.lengths;
    step.carry = carry ? writable<float>(*carry) : nullptr;
    step.dpeephole = sums ? writable<float>(*sums) : nullptr;
    step.dc = writable<float>(dc);
    step.dc_after = dc_last ? pointer<float>(*dc_last) : nullptr;
    step.dh_sample = step.c_sample = p.time * p.frame();
    step.dgates_sample = 4 * p.time * p.frame();
    step.gates_sample = lean ? 4 * p.frame() : step.dgates_sample;
    step.t_after = -1;
    const auto place = [&](int64_t i) {
      const int64_t t = step.t = p.at(i);
      step.dh = dh_all ? pointer<A>(*dh_all) + t * p.frame() : nullptr;
      step.c = pointer<float>(c) + t * p.frame();
      if (i > 0) step.c_before = pointer<float>(c) + p.at(i - 1) * p.frame();
      else step.c_before = c0 ? pointer<float>(*c0) : nullptr;
      step.c_before_sample = i > 0 ? step.c_sample : p.frame();
      step.gates = lean ? pointer<A>(*gates_now) : pointer<A>(gates) + 4 * t * p.frame();
      step.dgates = writable<A>(dgates) + 4 * t * p.frame();
    };
    place(p.time - 1);
    const bool done = !lean && run_sequence(dh_last, c0 ? pointer<float>(*c0) : nullptr, need_h0 ? writable<A>(dh0) : nullptr);
    for (int64_t i = p.time; i-- > 0 && !done;) {
      place(i);
      if (lean) {
        again.step.c_before = step.c_before;
        again.step.c_before_sample = step.c_before_sample;
        again.step.gates = writable<A>(*gates_now);
        again.step.gates_sample = step.gates_sample;
        again.run(step.t, i > 0 || h0 ? h_before : OptionalTensor(), step.t);
      }
      if (step.t_after < 0) run(OptionalTensor(), dh_last);
      else run(dgates, OptionalTensor());
      step.t_after = step.t;
      step.dc_after = step.dc;
    }
    if (need_h0 && !done) {
      step.dh0 = writable<A>(dh0);
      run(dgates, OptionalTensor());
    }

    const Tensor grads = movedim(torch::stable::flatten(dgates, 0, 1), -1, 1);
    if (needs[2]) {
      const Tensor source = p.of_h.template source<A>(*h_before, OptionalTensor(), 0, device.stream);
      dw_hh = p.of_h.template backward<A>(grads, source, false, true, device.stream)[1];
    }
    if (need_bias) dbias = torch::stable::sum(torch::stable::flatten(dgates, 0, dgates.dim() - 2), Sizes{0});
    if (sums) {
      const Tensor summed = torch::stable::sum(*sums, Sizes{0});
      torch::stable::copy_(dpeephole, movedim(summed, -1, 1));
    }
    if (need_x && !defined(in.w_ih)) {
      give(dx, movedim(dgates, -1, 2));
    } else if (need_x || need_w_ih) {
      const Tensor source = p.of_x.template source<A>(dense_last(*in.x, 2), again.lengths, 0, device.stream);
      const auto found = p.of_x.template backward<A>(grads, source, need_x, need_w_ih, device.stream);
      if (need_w_ih) dw_ih = found[1];
      if (need_x) give(dx, torch::stable::view(found[0], shape_of(*in.x)));
    }
    return results();
  }
};

Outputs conv_lstm_forward(OptionalTensor x, OptionalTensor w_ih, Tensor w_hh, OptionalTensor bias, OptionalTensor peephole, OptionalTensor h0,
                          OptionalTensor c0, OptionalTensor lengths, int64_t time, Sizes stride, Sizes padding, Sizes dilation,
                          Text padding_mode, bool reverse, Text algorithm, Text save) {
  const Inputs in{x, w_ih, w_hh, bias, peephole, h0, c0, lengths};
  const Problem p(kForward, in, time, stride, padding, dilation, padding_mode, reverse);
  return switch_dtype(kForward, "w_hh", w_hh.scalar_type(), [&](auto a) { return forward<decltype(a)>(p, in, save); });
}

Gradients conv_lstm_backward(OptionalTensor dh, OptionalTensor dh_n, OptionalTensor dc_n, OptionalTensor x, OptionalTensor w_ih, Tensor w_hh,
                             OptionalTensor bias, OptionalTensor peephole, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths,
                             Tensor h, Tensor c, Tensor gates, int64_t time, Sizes stride, Sizes padding, Sizes dilation,
                             Text padding_mode, bool reverse, Text algorithm, Sizes needs) {
  const Inputs in{x, w_ih, w_hh, bias, peephole, h0, c0, lengths};
  const Problem p(kBackward, in, time, stride, padding, dilation, padding_mode, reverse);
  CONVFAST_CHECK(needs.size() == 7, kBackward, "needs", "7 flags", needs.size());
  return switch_dtype(kBackward, "w_hh", w_hh.scalar_type(), [&](auto a) {
    return Backward<decltype(a)>(p, in).backward(dh, dh_n, dc_n, h, c, gates, needs);
  });
}

std::string conv_lstm_algorithm(OptionalTensor x, OptionalTensor w_ih, Tensor w_hh, OptionalTensor h0, OptionalTensor c0, int64_t time, Sizes stride,
                                Sizes padding, Sizes dilation, Text padding_mode, Text algorithm) {
  const Inputs in{x, w_ih, w_hh, {}, {}, h0, c0, {}};
  const Problem p("conv_lstm_algorithm", in, time, stride, padding, dilation, padding_mode, false);
  if (engine(p, w_hh.scalar_type()) == Engine::kLibrary) return "direct: the library's convolution and one launch of the cell a step";
  const Device device(w_hh);
  const bool at_once = w_hh.scalar_type() == ScalarType::Half ? one_launch<Half>(p, in) : one_launch<BFloat16>(p, in);
  bool by_warpgroups = false;
  with_tile<ForwardTiles>(p, false, [&](auto tile) { by_warpgroups = decltype(tile)::kWarpgroups; });
  return std::string("direct: implicit GEMM") + (by_warpgroups ? " of warpgroups" : "") + " and cell, one launch " +
         (at_once ? "for all steps" : "a step");
}

}  // namespace
}  // namespace cuda
}  // namespace convfast

CONVFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv_lstm_forward", TORCH_BOX(&convfast::cuda::conv_lstm_forward));
  m.impl("conv_lstm_backward", TORCH_BOX(&convfast::cuda::conv_lstm_backward));
  m.impl("conv_lstm_algorithm", TORCH_BOX(&convfast::cuda::conv_lstm_algorithm));
}
