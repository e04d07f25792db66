// One ConvLSTM call in plain numbers: its checked arguments, and which engine runs it.
#pragma once
#include "frames.h"

namespace convfast {
namespace cpu {
namespace conv_lstm {

inline bool operator==(const Extent& a, const Extent& b) { return a.d == b.d && a.h == b.h && a.w == b.w; }

struct ConvDims {
  Extent kernel, stride, dilation, before{0, 0, 0}, behind{0, 0, 0};
  long taps() const { return kernel.pixels(); }
  bool operator==(const ConvDims& o) const {
    return kernel == o.kernel && stride == o.stride && dilation == o.dilation && before == o.before && behind == o.behind;
  }
};

// How Winograd computes a convolution: m×m pixels of a 2-D frame a tile, and the kernel in pieces of r×r taps, zero where it has
// none. m = 0: it does not.
struct WinogradCut {
  long m = 0, r = 0;
  Extent pieces;
  explicit operator bool() const { return m != 0; }
  long planes() const { return (m + r - 1) * (m + r - 1); }
  long tiles(const Extent& frame) const { return frame.d * ((frame.h + m - 1) / m) * ((frame.w + m - 1) / m); }
  // For one channel and column of a frame.
  double products(const Extent& frame) const { return double(planes() * pieces.pixels() * tiles(frame)); }
};

// Samples that a team takes together: every `stride`th.
struct Group {
  long first = 0, stride = 1, samples = 0;
  bool fresh = true;  // it is the first that has the team's buffers
  long sample(long i) const { return first + i * stride; }
};

// Samples [first, first + samples), shared out to teams of as many threads each.
struct Phase {
  long first, samples, teams;
};

// Everything about one call that both passes share, in plain numbers.
struct Problem {
  long batch = 0, time = 0, spatial = 0, channels = 0, x_channels = 0;
  bool has_x = false, convolved = false;  // convolved: x is the input convolution's result
  Extent in, out;
  ConvDims x_conv, h_conv;
  std::string padding_mode;
  bool reverse = false;
  std::vector<long> lengths;
  WinogradCut winograd;
  long threads = torch::stable::get_num_threads();  // asked of a thread of the pool it may be another number

  long pixels() const { return out.pixels(); }
  long frame_of(long sample, long step) const { return reverse ? lengths[sample] - 1 - step : step; }
  // Row of h [B * T] that is the group's ith sample's at this step.
  long row_of(const Group& g, long i, long step) const {
    return g.sample(i) * time + frame_of(g.sample(i), step);
  }
  bool varied() const {
    return std::any_of(lengths.begin(), lengths.end(), [&](long n) { return n != time; });
  }
  // Those of a group that have this step.
  std::vector<long> active(const Group& g, long step) const {
    std::vector<long> samples;
    for (long i = 0; i < g.samples; ++i)
      if (step < lengths[g.sample(i)]) samples.push_back(i);
    return samples;
  }
  std::vector<int64_t> shape(std::vector<int64_t> leading) const {
    const long dims[] = {out.d, out.h, out.w};
    for (long i = 3 - spatial; i < 3; ++i) leading.push_back(dims[i]);
    return leading;
  }
  // Samples are taken together only as far as threads need work between two barriers; scratch is theirs.
  long together() const {
    const double direct = 8. * channels * pixels() * (h_conv.taps() * channels + (convolved ? 0 : x_conv.taps() * x_channels));
    const double flops = winograd ? direct * winograd.products(out) / (h_conv.taps() * pixels()) : direct;
    const long by_work = long(2.5e7 * threads / std::max(1., flops)) + 1, by_rows = (4 * threads + out.rows() - 1) / std::max<long>(1, out.rows());
    return std::min(batch, std::max(by_work, by_rows));
  }
  // As many teams as have samples for that: threads wait for fewer others, and find their samples in their own caches. Those left over
  // go to fewer and larger teams. `least`: threads of a team.
  std::vector<Phase> phases(long least) const {
    std::vector<Phase> all;
    for (long first = 0; first < batch; first += all.back().samples) {
      const long left = batch - first;
      long teams = std::min({threads, left, together()});
      while (teams > 1 && (threads % teams || threads / teams < least || !even({first, left - left % teams, teams}))) --teams;
      all.push_back({first, left - left % teams, teams});
    }
    return all;
  }
  // Neighbours in memory; where lengths differ, each team has as many long ones as short ones.
  Group share(const Phase& phase, long team) const {
    const long n = phase.samples / phase.teams;
    return varied() ? Group{phase.first + team, phase.teams, n} : Group{phase.first + team * n, 1, n};
  }
  // Whether all teams have about as many steps.
  bool even(const Phase& phase) const {
    long most = 0, sum = 0;
    for (long team = 0; team < phase.teams; ++team) {
      const Group g = share(phase, team);
      long steps = 0;
      for (long i = 0; i < g.samples; ++i) steps += lengths[g.sample(i)];
      most = std::max(most, steps);
      sum += steps;
    }
    return 16 * phase.teams * most <= 17 * sum;
  }
  // Groups that a team takes one after another, and samples of the largest.
  long groups(const Phase& phase) const {
    const long n = phase.samples / phase.teams, most = std::max(1l, together() / phase.teams);
    return (n + most - 1) / most;
  }
  long most_samples(const Phase& phase) const {
    const long n = phase.samples / phase.teams, count = groups(phase);
    return (n + count - 1) / count;
  }
  bool convolves_x() const { return has_x && !convolved; }
  long blocks() const { return (channels + kBlock - 1) / kBlock; }
  long weight_row(long column) const { return gate_row(column, channels); }
  long block_channels(long block) const { return std::min<long>(kBlock, channels - block * kBlock); }
};

inline Extent extent_from(const std::vector<int64_t>& dims, long skip, long fill = 1, long every = 1) {
  long v[3] = {fill, fill, fill};
  const long n = (dims.size() - skip + every - 1) / every;
  for (long i = 0; i < n; ++i) v[3 - n + i] = dims[skip + i * every];
  return {v[0], v[1], v[2]};
}

// Strides of x [.., C, *S] whose channel axis is `axis`.
inline FrameStrides frame_strides(const Tensor& t, long axis) {
  long v[3] = {0, 0, 0};
  const long n = t.dim() - axis - 1;
  for (long i = 0; i < n; ++i) v[3 - n + i] = t.stride(axis + 1 + i);
  return {t.stride(axis), v[0], v[1], v[2]};
}

inline bool dense_channels_last(const Tensor& t, long axis) {
  long expected = t.size(axis);
  if (expected > 1 && t.stride(axis) != 1) return false;
  for (long i = t.dim() - 1; i > axis; --i) {
    if (t.size(i) > 1 && t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

struct Inputs {
  OptionalTensor x, w_ih;
  Tensor w_hh;
  OptionalTensor bias, peephole, h0, c0, lengths;
};

inline Problem make_problem(const char* op, const Inputs& in, int64_t time, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const std::string& padding_mode,
                     bool reverse) {
  Problem p;
  const ScalarType dtype = in.w_hh.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  p.spatial = in.w_hh.dim() - 2;
  CONVFAST_CHECK(p.spatial >= 1 && p.spatial <= 3, op, "w_hh", "[4C, C, *K] with 1 to 3 kernel dims", shape_string(shape_of(in.w_hh)));
  p.channels = in.w_hh.size(1);
  CONVFAST_CHECK(p.channels >= 1 && in.w_hh.size(0) == 4 * p.channels, op, "w_hh", "[4C, C, *K]", shape_string(shape_of(in.w_hh)));
  CONVFAST_CHECK(time >= 1, op, "time", "at least 1", time);
  p.time = time;
  p.has_x = defined(in.x);
  p.convolved = p.has_x && !defined(in.w_ih);
  p.padding_mode = padding_mode;
  p.reverse = reverse;

  const Extent one, zero{0, 0, 0};
  const auto kernel = shape_of(in.w_hh);
  p.h_conv = {extent_from(kernel, 2), one, one, zero, zero};
  const Extent& k = p.h_conv.kernel;
  CONVFAST_CHECK(k.d >= 1 && k.h >= 1 && k.w >= 1, op, "w_hh", "of at least one tap a dim", shape_string(kernel));
  p.h_conv.before = {(k.d - 1) / 2, (k.h - 1) / 2, (k.w - 1) / 2};
  p.h_conv.behind = {k.d / 2, k.h / 2, k.w / 2};

  const int64_t rank = p.spatial + 2;
  if (p.has_x) {
    CONVFAST_CHECK(in.x->dim() == rank + 1, op, "x", "of rank " + std::to_string(rank + 1), shape_string(shape_of(*in.x)));
    CONVFAST_CHECK(in.x->size(1) == time, op, "x", "of time extent " + std::to_string(time), shape_string(shape_of(*in.x)));
    p.batch = in.x->size(0);
    p.in = extent_from(shape_of(*in.x), 3);
    p.x_channels = in.x->size(2);
    CONVFAST_CHECK(p.x_channels >= 1 && p.in.d >= 1 && p.in.h >= 1 && p.in.w >= 1, op, "x", "of at least one channel and pixel",
                   shape_string(shape_of(*in.x)));
    p.out = p.in;
    check_dtype(op, "x", *in.x, dtype, dtype);
    if (p.convolved) {
      CONVFAST_CHECK(p.x_channels == 4 * p.channels, op, "x", "of 4C channels when w_ih is undefined", shape_string(shape_of(*in.x)));
    } else {
      const auto w = shape_of(*in.w_ih);
      CONVFAST_CHECK(int64_t(w.size()) == rank && w[0] == 4 * p.channels && w[1] == p.x_channels, op, "w_ih", "[4C, Cin, *K]",
                     shape_string(w));
      check_dtype(op, "w_ih", *in.w_ih, dtype, dtype);
      CONVFAST_CHECK(int64_t(stride.size()) == p.spatial && int64_t(dilation.size()) == p.spatial &&
                         int64_t(padding.size()) == 2 * p.spatial,
                     op, "stride, padding, dilation", "of n, 2n and n elements", shape_string(padding));
      std::vector<int64_t> before, behind;
      for (long i = 0; i < p.spatial; ++i) {
        before.push_back(padding[2 * i]);
        behind.push_back(padding[2 * i + 1]);
      }
      p.x_conv = {extent_from(w, 2), extent_from(stride, 0), extent_from(dilation, 0), extent_from(before, 0, 0), extent_from(behind, 0, 0)};
      const ConvDims& c = p.x_conv;
      const auto out_size = [&](long n, long k, long s, long d, long lo, long hi) {
        CONVFAST_CHECK(k >= 1 && s >= 1 && d >= 1 && lo >= 0 && hi >= 0, op, "stride, padding, dilation", "positive", std::min({s, d, lo, hi}));
        const long greatest = std::max({s, d, lo, hi});
        CONVFAST_CHECK(greatest <= kMostOfOption, op, "stride, padding, dilation", "at most " + std::to_string(kMostOfOption), greatest);
        const long most = padding_mode == "reflect" ? n - 1 : padding_mode == "circular" ? n : lo + hi;
        CONVFAST_CHECK(lo <= most && hi <= most, op, "padding", "at most " + std::to_string(most) + " for this size", std::max(lo, hi));
        const long span = n + lo + hi - d * (k - 1) - 1;
        CONVFAST_CHECK(span >= 0, op, "x", "at least as large as the kernel", shape_string(shape_of(*in.x)));
        return span / s + 1;
      };
      CONVFAST_CHECK(padding_mode == "zeros" || padding_mode == "reflect" || padding_mode == "replicate" || padding_mode == "circular", op,
                     "padding_mode", "zeros, reflect, replicate or circular", padding_mode);
      p.out.d = out_size(p.in.d, c.kernel.d, c.stride.d, c.dilation.d, c.before.d, c.behind.d);
      p.out.h = out_size(p.in.h, c.kernel.h, c.stride.h, c.dilation.h, c.before.h, c.behind.h);
      p.out.w = out_size(p.in.w, c.kernel.w, c.stride.w, c.dilation.w, c.before.w, c.behind.w);
    }
  } else {
    CONVFAST_CHECK(defined(in.h0) || defined(in.c0), op, "h0 or c0", "given when x is undefined", "neither");
    const Tensor& state = defined(in.h0) ? *in.h0 : *in.c0;
    CONVFAST_CHECK(state.dim() == rank, op, defined(in.h0) ? "h0" : "c0", "of rank " + std::to_string(rank), shape_string(shape_of(state)));
    p.batch = state.size(0);
    p.out = p.in = extent_from(shape_of(state), 2);
    CONVFAST_CHECK(p.out.d >= 1 && p.out.h >= 1 && p.out.w >= 1, op, defined(in.h0) ? "h0" : "c0", "of at least one pixel",
                   shape_string(shape_of(state)));
  }
  const auto state_shape = p.shape({p.batch, p.channels});
  if (defined(in.h0)) {
    check_shape(op, "h0", *in.h0, state_shape);
    check_dtype(op, "h0", *in.h0, dtype, dtype);
  }
  if (defined(in.c0)) {
    check_shape(op, "c0", *in.c0, state_shape);
    check_dtype(op, "c0", *in.c0, dtype, wide);
  }
  if (defined(in.bias)) {
    check_shape(op, "bias", *in.bias, {4 * p.channels});
    check_dtype(op, "bias", *in.bias, dtype, dtype);
  }
  if (defined(in.peephole)) {
    check_shape(op, "peephole", *in.peephole, p.shape({3, p.channels}));
    check_dtype(op, "peephole", *in.peephole, dtype, dtype);
  }
  p.lengths = read_lengths(op, in.lengths, p.batch, time);
  return p;
}

// Why the Winograd engine cannot take a call; empty where it can.
inline std::string winograd_obstacle(const Problem& p, ScalarType dtype) {
  if (dtype == ScalarType::Double) return "float64 runs direct";
  if (p.spatial == 1) return "frames are 1-D, not 2-D or 3-D";
  if (p.convolves_x() && !(p.x_conv == p.h_conv && p.padding_mode == "zeros"))
    return "the input convolution is not like the hidden one (same kernel, stride 1, dilation 1, 'same' padding with zeros)";
  return "";
}

// Products of one pixel that a kernel of one tap would take.
inline long channel_products(const Problem& p) { return ((p.convolves_x() ? p.x_channels : 0) + p.channels) * 4 * p.channels; }

// F(4×4, 3×3) or F(2×2, 5×5), whichever leaves fewer products. Where both leave as many, as for 5×5, the former, which transforms a
// quarter of the results, unless its four times as many weights are too many for the frame's tiles. From measurement (2 cores, AVX2).
inline WinogradCut winograd_cut(const Problem& p) {
  constexpr long kMostOfTile = 20480;  // numbers of weights
  const Extent& kernel = p.h_conv.kernel;
  const auto cut = [&](long m, long r) { return WinogradCut{m, r, {kernel.d, (kernel.h + r - 1) / r, (kernel.w + r - 1) / r}}; };
  const WinogradCut threes = cut(4, 3), fives = cut(2, 5);
  const double of_threes = threes.products(p.out), of_fives = fives.products(p.out);
  const long pieces = threes.pieces.pixels();
  const bool many = pieces > fives.pieces.pixels() && channel_products(p) * threes.planes() * pieces > kMostOfTile * threes.tiles(p.out);
  return of_fives < of_threes || (of_fives == of_threes && many) ? fives : threes;
}

// Why direct is faster for a call that Winograd could take; empty where it is not. From measurement (2 cores, AVX-512), and by the
// frame alone: batch and time must not change an item's numbers. Pieces (AVX2): 1.2 to 3.2 times as fast where 1.6 times fewer are left.
inline std::string winograd_loss(const Problem& p, const WinogradCut& cut) {
  constexpr double kLeastSaved = 1.6;
  // Bytes of weights. Those that no cache holds want more than a few tiles each time they are read; above the most, memory is worth more.
  constexpr long kMany = 8 << 20, kMost = 512 << 20;
  const Extent& k = p.h_conv.kernel;
  const auto size = [&](const Extent& e) { return (p.spatial == 3 ? std::to_string(e.d) + "x" : "") + std::to_string(e.h) + "x" + std::to_string(e.w); };
  const long tiles = cut.tiles(p.out), products = channel_products(p), bytes = products * cut.planes() * cut.pieces.pixels() * long(sizeof(float));
  if (tiles < 4 || double(k.pixels() * p.pixels()) < kLeastSaved * cut.products(p.out))
    return "a hidden kernel of " + size(k) + " on frames of " + size(p.out) + " leaves too few products out";
  if (products < (cut.r == 5 || tiles < 32 ? 512 : 256)) return "too few channels";
  if (bytes > kMost) return "transformed weights of " + std::to_string(bytes >> 20) + " MiB";
  return bytes > kMany && tiles < 16 ? "many channels on too few tiles" : "";
}

// Sets the engine; the answer names it, and for direct the reason.
inline std::string choose_algorithm(const char* op, Problem& p, ScalarType dtype, const std::string& algorithm) {
  CONVFAST_CHECK(algorithm == "auto" || algorithm == "direct" || algorithm == "winograd", op, "algorithm", "auto, direct or winograd", algorithm);
  if (algorithm == "direct") return "direct: asked for";
  const std::string obstacle = winograd_obstacle(p, dtype);
  if (!obstacle.empty() && algorithm != "auto") refuse(op, ": algorithm is 'winograd', expected 'auto' or 'direct': ", obstacle);
  const WinogradCut cut = winograd_cut(p);
  const std::string reason = obstacle.empty() && algorithm == "auto" ? winograd_loss(p, cut) : obstacle;
  if (!reason.empty()) return "direct: " + reason;
  p.winograd = cut;
  const auto square = [](long n) { return std::to_string(n) + "x" + std::to_string(n); };
  const long pieces = cut.pieces.pixels();
  return "winograd F(" + square(cut.m) + ", " + square(cut.r) + ")" + (pieces > 1 ? ", the kernel in " + std::to_string(pieces) + " pieces" : "");
}

}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast
