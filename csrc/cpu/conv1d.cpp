// Convolution along time on the CPU: glue between tensors and the kernels. The contract is in ops.h.
//
// A chunk of output rows of one sample is one GEMM: its padded input rows are packed [row][F], so that the window of a row is one
// stretch of k F numbers (k stretches with dilation or groups), and the activation follows while the rows are in cache, relu in
// registers. dx is the same GEMM over the gradients of the rows that read a row: with stride s the rows of each phase modulo s share
// their taps. Depthwise convolutions run channel by channel in vectors.
// Floor: 2 k F/groups C operations per output row at the FMA peak, three times that for training.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "../text.h"
#include "conv1d_winograd.h"
#include "frames.h"
#include "split.h"

namespace convfast {
namespace cpu {
namespace {

constexpr const char* kForward = "conv1d_forward";
constexpr const char* kBackward = "conv1d_backward";
constexpr long kZero = 0, kRows = 64;  // rows of a chunk

struct Problem {
  long batch = 0, time = 0, features = 0, channels = 0, taps = 0, stride = 1, dilation = 1, before = 0, behind = 0, groups = 1, out_time = 0;
  std::string padding_mode, activation;
  std::vector<long> lengths, out_lengths;

  long reach() const { return dilation * (taps - 1); }
  long out_length(long length) const {
    const long span = length + before + behind - reach() - 1;
    return length == 0 || span < 0 ? 0 : span / stride + 1;
  }
  long group_features() const { return features / groups; }
  long group_channels() const { return channels / groups; }
  bool depthwise() const { return groups == features && groups > 1; }
  // The row of x that row `padded` of a padded sample shows, -1 for zero.
  long source(long padded, long length) const {
    const long i = padded - before;
    if (i >= 0 && i < length) return i;
    if (padding_mode == "zeros" || length == 0) return -1;
    if (padding_mode == "reflect") return i < 0 ? -i : 2 * (length - 1) - i;
    if (padding_mode == "replicate") return i < 0 ? 0 : length - 1;
    return (i % length + length) % length;
  }
};

Problem make_problem(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lengths, int64_t stride,
                     const std::vector<int64_t>& padding, int64_t dilation, int64_t groups, const std::string& padding_mode,
                     const std::string& activation) {
  Problem p;
  CONVFAST_CHECK(x.dim() == 3, op, "x", "[B, T, F]", shape_string(shape_of(x)));
  CONVFAST_CHECK(weight.dim() == 3 && weight.numel() > 0, op, "weight", "[C, F/groups, k]", shape_string(shape_of(weight)));
  for (const int64_t n : {stride, dilation, groups})
    CONVFAST_CHECK(n >= 1 && n <= kMostOfOption, op, "stride, dilation, groups", "1 to " + std::to_string(kMostOfOption), n);
  CONVFAST_CHECK(padding.size() == 2, op, "padding", "two numbers", shape_string(padding));
  for (const int64_t n : padding) CONVFAST_CHECK(n >= 0 && n <= kMostOfOption, op, "padding", "0 to " + std::to_string(kMostOfOption), n);
  p.batch = x.size(0);
  p.time = x.size(1);
  p.features = x.size(2);
  p.channels = weight.size(0);
  p.taps = weight.size(2);
  p.dilation = dilation;
  p.before = padding[0];
  p.behind = padding[1];
  p.stride = std::min<long>(stride, p.before + p.time + p.behind);  // a second step would be past the end
  p.groups = groups;
  p.padding_mode = padding_mode;
  p.activation = activation;
  CONVFAST_CHECK(p.channels % groups == 0 && weight.size(1) * groups == p.features, op, "weight", "[C, F/groups, k]", shape_string(shape_of(weight)));
  const ScalarType dtype = weight.scalar_type();
  check_dtype(op, "x", x, dtype, dtype);
  if (bias) {
    check_shape(op, "bias", *bias, {p.channels});
    check_dtype(op, "bias", *bias, dtype, dtype);
  }
  CONVFAST_CHECK(padding_mode == "zeros" || padding_mode == "reflect" || padding_mode == "replicate" || padding_mode == "circular", op,
                 "padding_mode", "zeros, reflect, replicate or circular", padding_mode);
  p.lengths = read_lengths(op, lengths, p.batch, p.time);
  const long most = std::max(p.before, p.behind);
  for (long b = 0; b < std::max<long>(1, p.batch); ++b) {
    const long length = p.batch ? p.lengths[b] : p.time, limit = padding_mode == "reflect" ? length - 1 : padding_mode == "circular" ? length : most;
    CONVFAST_CHECK(most <= limit || (lengths && length == 0), op, lengths ? "lengths" : "x", "longer than its padding", length);
  }
  p.out_time = p.out_length(p.time);
  CONVFAST_CHECK(p.out_time > 0, op, "x", "at least as long as the kernel", shape_string(shape_of(x)));
  for (long n : p.lengths) p.out_lengths.push_back(p.out_length(n));
  return p;
}

template <class T>
struct Activation {
  void (*forward)(long, const T*, T*) = nullptr;                // null: none
  void (*backward)(long, const T* dy, const T* x, T*) = nullptr;
  bool from_pre = false;                                        // x of the backward: pre-activations, else results
};

template <class T>
Activation<T> activation(const char* op, const std::string& name) {
  const Kernels<T>& k = kernels<T>();
  if (name == "none") return {};
  if (name == "relu") return {k.relu, k.relu_backward};
  if (name == "leaky_relu") return {k.leaky_relu, k.leaky_relu_backward};
  if (name == "tanh") return {k.tanh, k.tanh_backward};
  if (name == "sigmoid") return {k.sigmoid, k.sigmoid_backward};
  if (name == "silu") return {k.silu, k.silu_backward, true};
  CONVFAST_CHECK(name == "gelu", op, "activation", "none, relu, tanh, sigmoid, gelu, silu or leaky_relu", name);
  return {k.gelu, k.gelu_backward, true};
}

// The engine for activations A, arithmetic T.
template <class A>
struct Engine {
  using T = Wide<A>;
  static constexpr bool kNarrow = !std::is_same_v<A, T>;

  const Problem p;
  const Tensor x, weight;
  const OptionalTensor bias;
  const bool few_rows;
  const SequenceOf<const A> frames;  // of x
  const Kernels<T>& k = kernels<T>();
  const Activation<T> act;
  Workspace workspace;
  // Packed input rows have a feature for each channel of a depthwise convolution, else x's own.
  const long width, ldc;
  const long threads = torch::stable::get_num_threads();  // asked of a thread of the pool it may be another number
  std::vector<long> tap_offsets;

  Engine(const char* op, const Problem& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias)
      : p(p), x(x), weight(weight), bias(bias), few_rows(op == kForward && takes_longer_to_share(p, weight.numel())), frames(x), act(activation<T>(op, p.activation)), width(p.depthwise() ? p.channels : p.features), ldc(round_up(p.channels, kSlab) + 16) {
    for (long j = 0; j < p.taps; ++j) tap_offsets.push_back(j * p.dilation * width);
  }

  // So few rows that what is done to the weights takes longer than the products: then as little as can be, and all by the thread that calls.
  static bool takes_longer_to_share(const Problem& p, long weights) {
    constexpr long kMostRows = 32, kMostWeights = 1 << 18, kMostProducts = 1 << 20;
    const long rows = p.batch * p.out_time;
    return rows <= kMostRows && weights <= kMostWeights && rows * weights <= kMostProducts;
  }

  static const A* data(const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); }
  static A* out_data(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }

  // The window of an output row in packed input rows.
  Runs window() const {
    if (p.groups == 1 && p.dilation == 1) return {&kZero, 1, p.taps * width, p.stride * width};
    return {tap_offsets.data(), p.taps, p.depthwise() ? width : p.group_features(), p.stride * width};
  }

  // Of a chunk; Winograd reads whole tiles.
  long most_rows() const { return p.stride == 1 ? kRows : std::min(kRows, p.out_time); }
  long packed_rows(long rows) const { return (rows - 1) * p.stride + p.reach() + 1; }

  // Rows [begin, begin + rows) of the padded sample, [row][width].
  void pack_input(long sample, long begin, long rows, T* to) const {
    const long st = frames.step, sf = frames.feature, length = p.lengths[sample], each = width / p.features;
    const A* from = frames.at(sample, 0);
    const long inside = std::clamp(p.before - begin, 0l, rows), inside_end = std::clamp(p.before + length - begin, inside, rows);
    if (each > 1 || sf != 1) {
      // Feature by feature where time lies innermost.
      const long features = st == 1 ? 1 : p.features;
      for (long f0 = 0; f0 < p.features; f0 += features)
        for (long r = inside; r < inside_end; ++r) {
          const A* q = from + (begin + r - p.before) * st;
          T* row = to + r * width;
          for (long f = f0; f < f0 + features; ++f)
            for (long e = 0; e < each; ++e) row[f * each + e] = static_cast<T>(q[f * sf]);
        }
    } else if (inside < inside_end) {
      const long together = st == p.features ? inside_end - inside : 1;  // rows without a gap are one stretch
      for (long r = inside; r < inside_end; r += together) convert(from + (begin + r - p.before) * st, together * width, to + r * width);
    }
    for (long r = 0; r < rows; r = r + 1 == inside ? inside_end : r + 1) {
      if (r >= inside && r < inside_end) continue;
      const long source = p.source(begin + r, length);
      for (long f = 0; f < width; ++f) to[r * width + f] = source < 0 ? T(0) : static_cast<T>(from[source * st + f / each * sf]);
    }
  }

  // Whether windows are split into parts of bfloat16. They have to be whole depths: what follows a window may be NaN.
  const SplitKernels* const split_by = split_kernels<A>();
  bool by_parts() const {
    return split_by && p.groups == 1 && p.dilation == 1 && p.taps * width % kSplitDepth == 0;
  }

  const Part* pack_parts() {
    const long depth = p.taps * width, s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2);
    Part* packed = workspace.take<Part>(split_size(p.channels, depth, kSplitParts<A>));
    pack_split<Unsplit<A>>(*split_by, p.channels, depth, kSplitParts<A>, packed, [&](long c, Unsplit<A>* to) {
      for (long j = 0; j < p.taps; ++j)
        for (long f = 0; f < width; ++f) to[j * width + f] = static_cast<Unsplit<A>>(unsplit(data(weight))[c * s0 + f * s1 + j * s2]);
    });
    return packed;
  }

  // Elements of the parts of a chunk's packed rows, read up to whole tiles of rows.
  long part_size() const { return packed_rows(most_rows() + kTileRows) * width; }

  void convolve_parts(long rows, const T* packed, const Part* w, const T* b, Part* split, T* z) const {
    if constexpr (std::is_same_v<T, float>) {
      split_by->split({1, packed_rows(rows) * width, kSplitParts<A>, packed, 0, split, part_size(), 0});
      split_by->gemm({rows, kSplitParts<A>, split, part_size(), p.stride * width, w, p.taps * width, round_up(p.channels, kSlab), b, z, ldc});
    }
  }

  // Whether Winograd can be had and its transforms do not outweigh the products that it saves. float64 is for those who want every digit.
  bool takes_winograd() const {
    constexpr long kLeast = 16;
    return !few_rows && std::is_same_v<T, float> && (p.taps == 3 || p.taps == 5) && p.stride == 1 && p.dilation == 1 && p.groups == 1 &&
           std::min(p.features, p.channels) >= kLeast;
  }
  const TimeTiling<T> winograd = takes_winograd() ? TimeTiling<T>(k, p.taps, p.features, p.channels, p.batch * p.out_time) : TimeTiling<T>();

  // How many sums of the weights' gradients there are: one of each thread, or as many as take no more than this, of which several threads
  // share the channels.
  long copies() const {
    constexpr long kMostCopies = 256 << 20;  // bytes
    const long rows = p.groups * (winograd ? winograd.kernels().planes : p.taps) * p.group_features();
    return p.depthwise() ? threads : std::clamp<long>(kMostCopies / (rows * round_up(p.group_channels(), 16) * long(sizeof(T))), 1, threads);
  }

  // Whether it pays for weights' gradients: their sums are larger.
  const bool sums_by_winograd = winograd && p.batch * p.out_time >= 3 * kRows && copies() == threads;

  // Channels that a depthwise convolution takes for one row's: those of so many rows as fill whole vectors, where one row's would leave
  // much of them empty. 0: each row by itself.
  long flat_channels() const {
    constexpr long kFewVectors = 4;
    if (!p.depthwise() || p.stride > 1 || width % k.lanes == 0 || width > kFewVectors * k.lanes) return 0;
    const long channels = std::lcm(width, k.lanes);
    return std::min(kRows, p.out_time) * width >= channels ? channels : 0;
  }
  const long flat = flat_channels();

  // Weights as a GEMM operand, [group][tap][feature] by channels; or, depthwise, [tap][channel], and behind them the same for the flat ones.
  const T* pack_weights() {
    const A* w = data(weight);
    const long s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2);
    if (p.depthwise()) {
      T* packed = workspace.take<T>(p.taps * (width + flat));
      for (long j = 0; j < p.taps; ++j)
        for (long c = 0; c < width; ++c) packed[j * width + c] = static_cast<T>(w[c * s0 + j * s2]);
      for (long j = 0; j < p.taps; ++j)
        for (long i = 0; i < flat; i += width) std::copy_n(packed + j * width, width, packed + p.taps * width + j * flat + i);
      return packed;
    }
    if (winograd) return winograd.pack(workspace, width, p.channels, [&](long first, long n, long lanes, T* to) { read_taps(first, n, lanes, to); });
    const long fg = p.group_features(), cg = p.group_channels(), size = p.taps * fg * round_up(cg, k.lanes);
    T* packed = workspace.take<T>(p.groups * size);
    for (long g = 0; g < p.groups; ++g)
      for_panels(k, workspace, p.taps * fg, cg, [=](long first, long n, long lanes, T* taps) {
        read_taps(g * cg + first, n, lanes, taps);
        T* to = packed + g * size + first * p.taps * fg;
        for (long j = 0; j < p.taps; ++j)
          for (long f = 0; f < fg; ++f, to += lanes) std::copy_n(taps + (f * p.taps + j) * lanes, lanes, to);
      }, few_rows);
    return packed;
  }

  // Weights of n channels as [feature][tap][lanes], zero from n on.
  void read_taps(long channel, long n, long lanes, T* to) const {
    const long s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2), fg = p.group_features();
    const A* from = data(weight) + channel * s0;
    if (n < lanes) std::fill_n(to, fg * p.taps * lanes, T(0));
    if constexpr (!kNarrow) {
      if (s2 == 1 && s1 == p.taps) return k.transpose(n, fg * p.taps, from, s0, to, lanes);
    }
    for (long f = 0; f < fg; ++f)
      for (long j = 0; j < p.taps; ++j, to += lanes)
        for (long c = 0; c < n; ++c) to[c] = static_cast<T>(from[c * s0 + f * s1 + j * s2]);
  }

  // The same for gradients of x: those of n features as [channel][tap, the last first][lanes].
  void read_taps_back(long feature, long n, long lanes, T* to) const {
    const long s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2);
    const A* from = data(weight) + feature * s1;
    for (long c = 0; c < p.channels; ++c)
      for (long j = p.taps; j-- > 0; to += lanes)
        for (long f = 0; f < lanes; ++f) to[f] = f < n ? static_cast<T>(from[c * s0 + f * s1 + j * s2]) : T(0);
  }

  const T* pack_bias() {
    if (!bias && !by_parts()) return nullptr;
    T* packed = workspace.take<T>(std::max(ldc, flat));
    const A* const given = bias ? data(*bias) : nullptr;
    const long stride = given ? bias->stride(0) : 0;
    for (long c = 0; c < ldc; ++c) packed[c] = given && c < p.channels ? static_cast<T>(given[c * stride]) : T(0);
    for (long c = width; c < flat; ++c) packed[c] = packed[c - width];
    return packed;
  }

  // Whether relu is applied where the sums are, in registers.
  bool relu_in_gemm() const { return act.forward == k.relu && !p.depthwise(); }

  // Convolution of packed rows: z [rows][ldz]. `in_place`: z is the result, out of cache, and relu_in_gemm() holds.
  void convolve(long rows, const T* packed, const T* w, const T* b, T* z, long ldz, bool in_place, T* scratch) const {
    if (winograd) return winograd.convolve(rows, packed, width, p.features, p.channels, w, b, in_place && relu_in_gemm(), z, ldz, scratch);
    const Runs runs = window();
    if (p.depthwise()) {
      const long whole = flat && ldz == width ? rows * width / flat * flat : 0;
      if (whole) k.depthwise(whole / flat, packed, {tap_offsets.data(), p.taps, flat, flat}, w + p.taps * width, b, z, flat);
      return k.depthwise(rows - whole / width, packed + whole, runs, w, b, z + whole, ldz);
    }
    const long deep = p.taps * p.group_features(), columns = p.group_channels(), size = deep * round_up(columns, k.lanes);
    for (long g = 0; g < p.groups; ++g)  // what a group's last vector writes past its end, the next one writes over
      k.gemm({rows, {packed + g * p.group_features()}, {runs}, w + g * size, deep, columns, b ? b + g * columns : nullptr, 0, z + g * columns, ldz, 0,
              in_place && relu_in_gemm(), in_place});
  }

  static void read(const A* from, long stride, long n, T* to) {
    if (stride == 1) return convert(from, n, to);
    for (long i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);
  }

  static void write(const T* from, long n, A* to, long stride = 1) {
    if (stride == 1) return convert(from, n, to);
    for (long i = 0; i < n; ++i) to[i * stride] = static_cast<A>(from[i]);
  }

  static long chunks_of(long rows, long chunk) { return (rows + chunk - 1) / chunk; }

  // Rows of a chunk of results: half of kRows where else a thread would have none, but not before a backward, which reads the results on
  // other threads. Whole tiles, so that results do not depend on it.
  long chunk_rows(bool save) const {
    const bool idle = !save && p.batch * chunks_of(p.out_time, kRows) < torch::stable::get_num_threads();
    return idle && p.out_time >= kRows ? kRows / 2 : kRows;
  }

  // call(sample, first row, rows) over chunks of each sample's `rows_each` rows, the thread's own.
  template <class F>
  void add_chunks(Region& region, long rows_each, long chunk, const F& call) const {
    const long chunks = chunks_of(rows_each, chunk);
    region.add(p.batch * chunks, [=](long begin, long end, long thread) {
      for (long i = begin; i < end; ++i) call(i / chunks, i % chunks * chunk, std::min(chunk, rows_each - i % chunks * chunk), thread);
    });
  }

  std::tuple<Tensor, Tensor> forward(bool time_major, bool save) {
    const std::vector<int64_t> order = time_major ? std::vector<int64_t>{1, 0, 2} : std::vector<int64_t>{0, 1, 2}, shape{p.batch, p.out_time, p.channels};
    const bool keep = save && act.from_pre;
    Tensor y = empty_ordered(shape, order, scalar_type<A>()), pre = keep ? empty_ordered(shape, order, scalar_type<A>()) : empty_cpu({0}, scalar_type<A>());
    const Part* parts = by_parts() ? pack_parts() : nullptr;
    const T *w = parts ? nullptr : pack_weights(), *b = pack_bias();
    const long each = chunk_rows(save), threads = std::min<long>(torch::stable::get_num_threads(), p.batch * chunks_of(p.out_time, each)), split_size = parts ? kSplitParts<A> * part_size() : 0, winograd_size = winograd && !parts ? winograd.scratch() : 0;
    const long size = round_up(packed_rows(most_rows()) * width + kRows * ldc + 64 + winograd_size, 16);
    T* scratch = workspace.take<T>(threads * size);
    Part* split = workspace.take<Part>(threads * split_size);
    const SequenceOf<A> results(y);
    const SequenceOf<A> kept(pre);
    // Results are written where they belong, without scratch between: by GEMMs whole vectors of them, depthwise no number more than there are.
    const bool in_place = !parts && !keep && (p.depthwise() ? !flat || results.step == p.channels : p.channels % k.lanes == 0 && p.group_channels() % k.lanes == 0);
    const long ldz = flat ? p.channels : ldc;
    const auto chunk = [=](long sample, long begin, long rows, long thread) {
      const long valid = std::clamp(p.out_lengths[sample] - begin, 0l, rows);
      for (long r = valid; r < rows; ++r) std::fill_n(results.at(sample, begin + r), p.channels, static_cast<A>(T(0)));
      if (!valid) return;
      T *own = scratch + thread * size, *z = own + winograd_size, *packed = z + kRows * ldc;
      pack_input(sample, begin * p.stride, packed_rows(valid), packed);
      if constexpr (!kNarrow) {
        if (in_place) {
          T* first = results.at(sample, begin);
          convolve(valid, packed, w, b, first, results.step, true, own);
          if (relu_in_gemm()) return;
          const long together = results.step == p.channels ? valid : 1;  // rows without a gap are one stretch
          for (long r = 0; act.forward && r < valid; r += together) act.forward(together * p.channels, first + r * results.step, first + r * results.step);
          return;
        }
      }
      if (parts) convolve_parts(valid, packed, parts, b, split + thread * split_size, z);
      else convolve(valid, packed, w, b, z, ldz, false, own);
      const long together = ldz == p.channels && results.step == p.channels ? valid : 1, n = together * p.channels;
      for (long r = 0; r < valid; r += together) {
        T* row = z + r * ldz;
        A* to = results.at(sample, begin + r);
        if (keep) convert(row, n, kept.at(sample, begin + r));
        if constexpr (!kNarrow) {
          if (act.forward) act.forward(n, row, to);
          else std::memcpy(static_cast<void*>(to), row, n * sizeof(T));
        } else {
          if (act.forward) act.forward(n, row, row);
          write(row, n, to);
        }
      }
    };
    Region region;
    if (!few_rows) add_chunks(region, p.out_time, each, chunk);
    else for (long sample = 0; sample < p.batch; ++sample) chunk(sample, 0, p.out_time, 0);
    region.run();
    return {y, pre};
  }

  struct Saved {
    SequenceOf<const A> dy, y, pre;
  };

  // Gradients of the pre-activations of rows [begin, begin + rows) of a sample, zero where there is none: [row][ldc].
  void pre_gradients(const Saved& saved, long sample, long begin, long rows, T* row_buffer, T* to) const {
    for (long r = 0; r < rows; ++r, to += ldc) {
      const long t = begin + r;
      if (t < 0 || t >= p.out_lengths[sample]) {
        std::fill(to, to + p.channels, T(0));
        continue;
      }
      const A* from = saved.dy.at(sample, t);
      const T* gradient = to;
      if constexpr (!kNarrow) {
        if (saved.dy.feature == 1) gradient = from;
      }
      if (gradient == to) read(from, saved.dy.feature, p.channels, to);
      if (!act.backward) {
        if (gradient != to) std::memcpy(static_cast<void*>(to), gradient, p.channels * sizeof(T));
        continue;
      }
      const T* result = row_buffer;
      const SequenceOf<const A>& from_forward = act.from_pre ? saved.pre : saved.y;
      if constexpr (kNarrow) read(from_forward.at(sample, t), from_forward.feature, p.channels, row_buffer);
      else result = from_forward.at(sample, t);
      act.backward(p.channels, gradient, result, to);
    }
  }

  // Rows of a padded sample that are equal modulo the stride are read through the same taps: which, and weights for them.
  struct Phase {
    std::vector<long> offsets;  // of each tap's gradient row, from that of the phase's first row; in elements of [row][ldc]
    const T* weights;           // [group] packed [tap][channel] by features; depthwise [tap][channel]; null = no taps
    long group_size;
  };

  std::vector<Phase> pack_back() {
    const A* w = data(weight);
    const long s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2), cg = p.group_channels(), fg = p.group_features();
    std::vector<Phase> phases(p.stride);
    for (long phase = 0; phase < p.stride; ++phase) {
      Phase& q = phases[phase];
      std::vector<long> taps;
      for (long j = p.taps; j-- > 0;)
        if ((phase - j * p.dilation) % p.stride == 0) {
          taps.push_back(j);
          q.offsets.push_back((phase - j * p.dilation) / p.stride * ldc);
        }
      const long n = taps.size();
      if (!n) continue;
      if (p.depthwise()) {
        T* packed = workspace.take<T>(n * width);
        for (long i = 0; i < n; ++i)
          for (long c = 0; c < width; ++c) packed[i * width + c] = static_cast<T>(w[c * s0 + taps[i] * s2]);
        q.weights = packed;
        continue;
      }
      q.group_size = n * cg * round_up(fg, k.lanes);
      T* packed = workspace.take<T>(p.groups * q.group_size);
      for (long g = 0; g < p.groups; ++g)
        pack_panels(k, n * cg, fg, packed + g * q.group_size, [&](long i, long f) {
          return static_cast<T>(w[(g * cg + i % cg) * s0 + f * s1 + taps[i / cg] * s2]);
        });
      q.weights = packed;
    }
    return phases;
  }

  // Gradients of rows [begin, begin + rows) of the padded sample, [row][ldw]; g holds those of the output rows from `first` on.
  void input_gradients(const std::vector<Phase>& phases, const T* winograd_weights, long begin, long rows, const T* g, long first, T* to, long ldw, T* scratch) const {
    if (winograd) return winograd.convolve(rows, g + (begin - p.reach() - first) * ldc, ldc, p.channels, p.features, winograd_weights, nullptr, false, to, ldw, scratch);
    for (long skip = 0; skip < std::min(p.stride, rows); ++skip) {
      const long phase = (begin + skip) % p.stride, n = (rows - skip + p.stride - 1) / p.stride;
      const Phase& q = phases[phase];
      const T* start = g + ((begin + skip - phase) / p.stride - first) * ldc;
      T* out = to + skip * ldw;
      if (!q.weights) {
        for (long r = 0; r < n; ++r) std::fill(out + r * p.stride * ldw, out + r * p.stride * ldw + width, T(0));
        continue;
      }
      const Runs runs{q.offsets.data(), long(q.offsets.size()), p.depthwise() ? width : p.group_channels(), ldc};
      if (p.depthwise()) {
        k.depthwise(n, start, runs, q.weights, nullptr, out, p.stride * ldw);
        continue;
      }
      for (long group = 0; group < p.groups; ++group)
        k.gemm({n, {start + group * p.group_channels()}, {runs}, q.weights + group * q.group_size, runs.count * runs.length, p.group_features(), nullptr, 0,
                out + group * p.group_features(), p.stride * ldw});
    }
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& y, const Tensor& pre, const std::vector<int64_t>& needs) {
    const ScalarType narrow = scalar_type<A>();
    Tensor dx = needs[0] ? cpu::empty_like(x) : empty_cpu({0}, narrow), dweight = empty_cpu({0}, narrow), dbias = empty_cpu({0}, narrow);
    const bool need_bias = needs[2] && bias;
    const long cg = p.group_channels(), fg = p.group_features();
    const long ldg = p.depthwise() ? width : round_up(cg, 16), planes = sums_by_winograd ? winograd.kernels().planes : p.taps;
    const long depth = !needs[1] ? 0 : p.depthwise() ? p.taps : p.groups * planes * fg, winograd_size = winograd ? round_up(winograd.scratch(), 16) : 0;
    const Runs runs = window();
    const Saved saved{SequenceOf<const A>(dy), SequenceOf<const A>(y), SequenceOf<const A>(pre)};
    const SequenceOf<A> out(dx);
    Region region;

    const T* winograd_weights = nullptr;
    if (needs[0] && winograd)
      winograd_weights = winograd.pack(workspace, p.channels, p.features, [&](long first, long n, long lanes, T* to) { read_taps_back(first, n, lanes, to); });
    T* const winograd_scratch = workspace.take<T>(threads * winograd_size);
    const long sums_size = depth * ldg + ldc;
    std::vector<T*> sums(threads, nullptr);   // of each thread that has some
    std::vector<long> collected(threads, 0);  // tiles that are not in them yet
    if (needs[1] || need_bias) {
      const bool share = needs[1] && this->copies() < threads;
      const long copies = share ? this->copies() : threads, members = std::min((threads + copies - 1) / copies, (cg + 15) / 16), each = round_up((cg + members - 1) / members, 16);
      T* all_sums = workspace.take<T>(copies * sums_size);
      const long size = round_up(packed_rows(most_rows()) * width + 64 + kRows * ldc + ldc, 16);
      T* scratch = workspace.take<T>(threads * size);
      // Adds rows' part in channels [first, first + n) of each group; that of the bias goes with the first ones.
      const auto add_rows = [=, &collected](long sample, long begin, long valid, long thread, T* sum, long first, long n) {
        static const T one = 1;
        T *tiles = winograd_scratch + thread * winograd_size, *g = scratch + thread * size, *buffer = g + kRows * ldc, *packed = buffer + ldc;
        pre_gradients(saved, sample, begin, valid, buffer, g);
        if (need_bias && first == 0) k.outer_sum({valid, &one, {&kZero, 1, 1, 0}, g, ldc, p.channels, sum + depth * ldg, ldc});
        if (!needs[1]) return;
        pack_input(sample, begin * p.stride, packed_rows(valid), packed);
        if (sums_by_winograd) {
          collected[thread] = winograd.collect(valid, packed, width, g, ldc, tiles, collected[thread], sum, ldg);
          return;
        }
        if (p.depthwise()) return k.depthwise_weight_grad(valid, packed, runs, g, ldc, sum);
        for (long group = 0; group < p.groups; ++group)
          k.outer_sum({valid, packed + group * fg, runs, g + group * cg + first, ldc, n, sum + group * p.taps * fg * ldg + first, ldg});
      };
      const auto valid_rows = [=](long sample, long begin, long rows) { return std::clamp(p.out_lengths[sample] - begin, 0l, rows); };
      if (!share) {
        add_chunks(region, p.out_time, kRows, [=, &sums](long sample, long begin, long rows, long thread) {
          const long valid = valid_rows(sample, begin, rows);
          if (!valid) return;
          T* sum = all_sums + thread * sums_size;
          if (!sums[thread]) {
            sums[thread] = sum;
            std::fill(sum, sum + sums_size, T(0));
          }
          add_rows(sample, begin, valid, thread, sum, 0, cg);
        });
      } else {
        for (long copy = 0; copy < copies; ++copy) sums[copy] = all_sums + copy * sums_size;
        const long chunks = chunks_of(p.out_time, kRows), all = p.batch * chunks;
        region.add(copies * members, [=](long begin, long end, long thread) {
          for (long i = begin; i < end; ++i) {
            const long copy = i / members, first = i % members * each, n = std::min(each, cg - first);
            if (n <= 0) continue;
            T* sum = all_sums + copy * sums_size;
            for (long row = 0; row < depth; ++row) std::fill_n(sum + row * ldg + first, n, T(0));
            if (first == 0) std::fill_n(sum + depth * ldg, ldc, T(0));
            for (long at = all * copy / copies; at < all * (copy + 1) / copies; ++at) {
              const long sample = at / chunks, row = at % chunks * kRows, valid = valid_rows(sample, row, std::min(kRows, p.out_time - row));
              if (valid) add_rows(sample, row, valid, thread, sum, first, n);
            }
          }
        });
      }
      if (sums_by_winograd && needs[1])
        region.add(threads, [=, &sums, &collected](long, long, long thread) {
          if (collected[thread]) winograd.add_products(collected[thread], winograd_scratch + thread * winograd_size, sums[thread], ldg);
        });
    }

    std::vector<Phase> phases;
    if (needs[0]) {
      if (!winograd) phases = pack_back();
      // Rows of a sample are cut into chunks where each shows itself alone; other paddings show some twice, and are summed.
      const bool alone = p.padding_mode == "zeros" || !(p.before || p.behind);
      const long ldw = round_up(width, 16) + 16, reach = p.reach() / p.stride + 2, padded = p.before + p.time + p.behind;
      const long most = alone ? kRows : padded, size = round_up(most * ldw + (most / p.stride + reach + 1) * ldc + ldc + (alone ? 0 : p.time * p.features), 16);
      T* scratch = workspace.take<T>(threads * size);
      const auto chunk = [=, &phases](long sample, long begin, long rows, T* sum, T* own, T* tiles) {
        const long last = (begin + rows - 1) / p.stride, first = begin / p.stride - reach + 1;
        T *g = own + most * ldw, *buffer = g + (last - first + 1) * ldc;
        pre_gradients(saved, sample, first, last - first + 1, buffer, g);
        input_gradients(phases, winograd_weights, begin, rows, g, first, own, ldw, tiles);
        const long each = width / p.features;
        for (long r = 0; r < rows; ++r) {
          T* row = own + r * ldw;
          for (long f = 0; each > 1 && f < p.features; ++f) {
            T total = 0;
            for (long e = 0; e < each; ++e) total += row[f * each + e];
            row[f] = total;
          }
          if (!sum) {
            write(row, p.features, out.at(sample, begin + r - p.before), out.feature);
            continue;
          }
          const long source = p.source(begin + r, p.lengths[sample]);
          for (long f = 0; source >= 0 && f < p.features; ++f) sum[source * p.features + f] += row[f];
        }
      };
      if (alone) {
        add_chunks(region, p.time, kRows, [=](long sample, long begin, long rows, long thread) {
          const long valid = std::clamp(p.lengths[sample] - begin, 0l, rows);
          if (valid) chunk(sample, begin + p.before, valid, nullptr, scratch + thread * size, winograd_scratch + thread * winograd_size);
          zero_rows(out, sample, begin + valid, begin + rows);
        });
      } else {
        region.add(p.batch, [=](long begin, long end, long thread) {
          for (long sample = begin; sample < end; ++sample) {
            T *own = scratch + thread * size, *sum = own + size - p.time * p.features;
            const long length = p.lengths[sample];
            std::fill(sum, sum + length * p.features, T(0));
            if (length) chunk(sample, 0, p.before + length + p.behind, sum, own, winograd_scratch + thread * winograd_size);
            for (long t = 0; t < length; ++t) write(sum + t * p.features, p.features, out.at(sample, t), out.feature);
            zero_rows(out, sample, length, p.time);
          }
        });
      }
    }
    region.run();

    sums.erase(std::remove(sums.begin(), sums.end(), nullptr), sums.end());
    if (needs[1]) dweight = weight_gradient(sums, planes, ldg);
    if (need_bias) {
      dbias = empty_cpu({p.channels}, narrow);
      std::vector<T> total(p.channels);
      add_up(sums, depth * ldg, p.channels, total.data());
      convert(total.data(), p.channels, out_data(dbias));
    }
    return {dx, dweight, dbias};
  }

  // to[i] = all sums' [at + i].
  static void add_up(const std::vector<T*>& sums, long at, long n, T* to) {
    std::fill_n(to, n, T(0));
    for (const T* sum : sums)
      for (long i = 0; i < n; ++i) to[i] += sum[at + i];
  }

  // From each thread's sums, [group][tap or plane][feature][ld].
  Tensor weight_gradient(const std::vector<T*>& sums, long planes, long ld) const {
    constexpr long kTogether = 32;
    const long groups = p.depthwise() ? 1 : p.groups, columns = p.channels / groups, blocks = (columns + kTogether - 1) / kTogether;
    const long fg = p.group_features(), each = fg * p.taps;
    Tensor dweight = empty_cpu({p.channels, fg, p.taps}, scalar_type<A>());
    A* to = out_data(dweight);
    parallel(groups * blocks, [&](long begin, long end) {
      std::vector<T> of_planes(sums_by_winograd ? planes * kTogether : 0), by_tap(each * kTogether), by_channel(kNarrow ? each * kTogether : 0);
      for (long i = begin; i < end; ++i) {
        const long group = i / blocks, first = i % blocks * kTogether, n = std::min(kTogether, columns - first);
        for (long f = 0; f < fg; ++f) {
          T* taps = by_tap.data() + f * p.taps * kTogether;
          for (long j = 0; j < planes; ++j) add_up(sums, ((group * planes + j) * fg + f) * ld + first, n, (sums_by_winograd ? of_planes.data() : taps) + j * kTogether);
          if (sums_by_winograd) winograd.kernels().filter_gradient(kTogether, of_planes.data(), kTogether, taps, kTogether);
        }
        A* rows = to + (group * columns + first) * each;
        if constexpr (kNarrow) {
          k.transpose(each, n, by_tap.data(), kTogether, by_channel.data(), each);
          convert(by_channel.data(), n * each, rows);
        } else {
          k.transpose(each, n, by_tap.data(), kTogether, rows, each);
        }
      }
    });
    return dweight;
  }

  void zero_rows(const SequenceOf<A>& t, long sample, long begin, long end) const {
    for (long r = begin; r < end; ++r)
      for (long f = 0; f < p.features; ++f) t.at(sample, r)[f * t.feature] = static_cast<A>(T(0));
  }
};

std::tuple<Tensor, Tensor, Tensor> conv1d_backward(Tensor dy, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor lengths, Tensor y, Tensor pre,
                                                   int64_t stride, std::vector<int64_t> padding, int64_t dilation, int64_t groups,
                                                   Text padding_mode, Text activation, std::vector<int64_t> needs) {
  const Problem p = make_problem(kBackward, x, weight, bias, lengths, stride, padding, dilation, groups, padding_mode, activation);
  CONVFAST_CHECK(needs.size() == 3, kBackward, "needs", "3 flags", needs.size());
  const ScalarType dtype = weight.scalar_type();
  check_shape(kBackward, "dy", dy, {p.batch, p.out_time, p.channels});
  check_dtype(kBackward, "dy", dy, dtype, dtype);
  check_shape(kBackward, "y", y, {p.batch, p.out_time, p.channels});
  CONVFAST_CHECK(y.stride(2) == 1 || p.channels == 1 || y.numel() == 0, kBackward, "y", "as the forward returned it", "other strides");
  check_dtype(kBackward, "y", y, dtype, dtype);
  if (pre.numel() || activation == "gelu" || activation == "silu") {
    check_shape(kBackward, "pre", pre, {p.batch, p.out_time, p.channels});
    check_dtype(kBackward, "pre", pre, dtype, dtype);
    CONVFAST_CHECK(pre.stride(2) == 1 || p.channels == 1 || pre.numel() == 0, kBackward, "pre", "as the forward returned it", "other strides");
  }
  return switch_dtype(kBackward, "weight", weight, [&](auto a) { return Engine<decltype(a)>(kBackward, p, x, weight, bias).backward(dy, y, pre, needs); });
}

}  // namespace

std::tuple<Tensor, Tensor> conv1d_forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor lengths, int64_t stride,
                                          std::vector<int64_t> padding, int64_t dilation, int64_t groups, Text padding_mode,
                                          Text activation, bool time_major, bool save) {
  const Problem p = make_problem(kForward, x, weight, bias, lengths, stride, padding, dilation, groups, padding_mode, activation);
  return switch_dtype(kForward, "weight", weight, [&](auto a) { return Engine<decltype(a)>(kForward, p, x, weight, bias).forward(time_major, save); });
}

}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CPU, m) {
  m.impl("conv1d_forward", TORCH_BOX(&convfast::cpu::conv1d_forward));
  m.impl("conv1d_backward", TORCH_BOX(&convfast::cpu::conv1d_backward));
}
