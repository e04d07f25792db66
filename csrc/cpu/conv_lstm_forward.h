// ConvLSTM's forward: frames with borders, weights as GEMM operands, and the steps.
#pragma once
#include "conv_lstm_problem.h"
#include "conv_lstm_winograd.h"

namespace convfast {
namespace cpu {
namespace conv_lstm {

// A convolution's reads as runs over bordered frames of `pixel` elements a pixel.
struct FrameLayout {
  Extent padded;
  long pixel = 0, frame = 0, run = 0;
  RowMap map{};
  std::vector<long> offsets;

  FrameLayout(const Extent& padded, const ConvDims& conv, long pixel) : padded(padded), pixel(pixel) {
    frame = padded.pixels() * pixel;
    map = {conv.stride.d * padded.h * padded.w * pixel, conv.stride.h * padded.w * pixel};
    const bool joined = conv.dilation.w == 1;  // neighbouring taps of a kernel row are neighbours in memory
    run = joined ? conv.kernel.w * pixel : pixel;
    for (long d = 0; d < conv.kernel.d; ++d)
      for (long h = 0; h < conv.kernel.h; ++h)
        for (long w = 0; w < (joined ? 1 : conv.kernel.w); ++w)
          offsets.push_back(((d * conv.dilation.d * padded.h + h * conv.dilation.h) * padded.w + w * conv.dilation.w) * pixel);
  }

  template <class T>
  Operand<T> operand(const T* frames, long stride_w) const {
    return {frames, frame, map, {offsets.data(), long(offsets.size()), run, pixel * stride_w}};
  }
};

// The engine for activations A, cell arithmetic T.
template <class A>
struct Engine {
  using T = Wide<A>;
  static constexpr bool kNarrow = !std::is_same_v<A, T>;

  Problem p;
  Inputs in;
  const Kernels<T>& k = kernels<T>();
  Workspace workspace;
  long pixels, c1, state;  // state: elements of one sample's h
  PaddingMaps x_maps, h_maps, plain_maps;
  FrameLayout x_layout, h_layout;
  Tiling<T> tiling;

  // Weights as the kernels read them, packed once a call for all groups.
  struct Packed {
    const T *weights = nullptr, *bias = nullptr, *peephole = nullptr;
  };

  Engine(const Problem& problem, const Inputs& inputs)
      : p(problem),
        in(inputs),
        pixels(p.pixels()),
        c1(p.channels),
        state(pixels * c1),
        x_maps(frame_maps(p.in, p.x_conv, p.padding_mode)),
        h_maps(frame_maps(p.out, p.h_conv, "zeros")),
        plain_maps{padding_map(p.out.d, 0, 0, "zeros"), padding_map(p.out.h, 0, 0, "zeros"), padding_map(p.out.w, 0, 0, "zeros")},
        x_layout(x_maps.extent(), p.x_conv, p.x_channels),
        h_layout(h_maps.extent(), p.h_conv, c1),
        tiling(p.winograd, p.h_conv.kernel, p.out, h_layout.padded) {}

  // Frames of whole tiles and pieces: Winograd reads past the last row and column.
  PaddingMaps frame_maps(const Extent& size, const ConvDims& conv, const std::string& mode) const {
    const WinogradCut& cut = p.winograd;
    const auto rest = [&](long n, long pieces, long kernel) { return cut ? round_up(n, cut.m) - n + pieces * cut.r - kernel : 0; };
    return {padding_map(size.d, conv.before.d, conv.behind.d, mode),
            padding_map(size.h, conv.before.h, conv.behind.h + rest(size.h, cut.pieces.h, conv.kernel.h), mode),
            padding_map(size.w, conv.before.w, conv.behind.w + rest(size.w, cut.pieces.w, conv.kernel.w), mode)};
  }

  // What a team has for the samples that it takes together.
  struct Buffers {
    long team, samples;  // threads that it is to have, samples at most
    T *x_frames = nullptr, *gates_x = nullptr, *h_frames[2] = {};
    T* scratch = nullptr;  // Winograd: of each thread
    long scratch_size = 0;
  };

  // Of x of one step.
  long x_size(long samples) const { return samples * (p.convolved ? 4 * state : x_layout.frame); }

  void take_x(Workspace& room, Buffers& b, long steps = 1) const {
    const long elements = steps * x_size(b.samples);
    if (p.convolves_x()) b.x_frames = room.take<T>(elements);
    if (p.convolved) b.gates_x = room.take<T>(elements);
  }

  void take_scratch(Workspace& room, Buffers& b, std::initializer_list<long> channels) const {
    if (!tiling) return;
    b.scratch_size = tiling.scratch_size(b.samples, channels);
    b.scratch = room.take<T>(b.team * b.scratch_size);
  }

  // call(team, group, pieces) on every member of every team of a phase, group after group.
  template <class F>
  void run(const Phase& phase, const F& call) const {
    in_teams(phase.teams, p.threads / phase.teams, [&](long team, const Member& member) {
      Pieces pieces(member);
      const Group all = p.share(phase, team);
      for (long i = 0, n = p.groups(phase); i < n; ++i) {
        const long begin = all.samples * i / n, end = all.samples * (i + 1) / n;
        call(team, Group{all.first + begin * all.stride, all.stride, end - begin, i == 0}, pieces);
      }
    });
  }

  const T* pack_peephole() {
    if (!defined(in.peephole)) return nullptr;
    T* packed = workspace.take<T>(3 * state);
    const FrameStrides strides = frame_strides(*in.peephole, 1);
    parallel(p.out.rows(), [&](long begin, long end) {
      for (long i = 0; i < 3; ++i)
        for (long row = begin; row < end; ++row)
          pack_row(k, data(*in.peephole) + i * in.peephole->stride(0), strides, plain_maps, row, c1, c1, packed + i * state + row * p.out.w * c1);
    });
    return packed;
  }

  static const A* data(const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); }
  static A* out_data(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }

  Rows rows(const std::vector<long>& active) const {
    return {active.data(), long(active.size()), p.out.h, p.out.rows(), p.out.w};
  }

  // Packs frame(i) of t, whose channel axis is `axis`, for every active sample of a group, to every `stride`th frame of dst.
  template <class B, class Frame>
  void pack(Pieces& pieces, const std::vector<long>& active, const Tensor& t, long axis, const PaddingMaps& maps, T* dst, const Frame& frame, long ld = 0,
            long stride = 1) const {
    const FrameStrides strides = frame_strides(t, axis);
    const long channels = t.size(axis), n = maps.extent().rows(), width = ld ? ld : channels, row_size = maps.w.size() * width;
    const B* base = static_cast<const B*>(t.const_data_ptr());
    pieces.take(active.size() * n, [&](long begin, long end) {
      for (long r = begin; r < end; ++r) {
        const long s = active[r / n], row = r % n;
        pack_row(k, base + frame(s), strides, maps, row, channels, width, dst + (s * stride * n + row) * row_size);
      }
    });
  }

  // The group's of state tensors [B, C, *S'] in activations or in the wide type.
  void pack_state(Pieces& pieces, const Group& g, const Tensor& t, const PaddingMaps& maps, T* dst, long ld = 0, long stride = 1) const {
    std::vector<long> all(g.samples);
    for (long i = 0; i < g.samples; ++i) all[i] = i;
    const auto frame = [&, of_sample = t.stride(0)](long i) { return g.sample(i) * of_sample; };
    if (t.scalar_type() == scalar_type<A>()) pack<A>(pieces, all, t, 1, maps, dst, frame, ld, stride);
    else pack<T>(pieces, all, t, 1, maps, dst, frame, ld, stride);
  }

  // An expanded x shows the same frame at every step: it is packed once, for whoever takes part in step 0.
  bool same_x() const { return p.has_x && in.x->stride(1) == 0; }

  void pack_x(Pieces& pieces, const Group& g, const std::vector<long>& active, long step, T* x_frames, T* gates_x) const {
    const auto frame = [&, of_sample = in.x->stride(0), of_frame = in.x->stride(1)](long i) {
      return g.sample(i) * of_sample + p.frame_of(g.sample(i), step) * of_frame;
    };
    if (p.convolved) pack<A>(pieces, active, *in.x, 2, plain_maps, gates_x, frame);
    else pack<A>(pieces, active, *in.x, 2, x_maps, x_frames, frame);
  }

  long input_channels() const { return (p.convolves_x() ? p.x_channels : 0) + c1; }
  long k_rows() const { return (p.convolves_x() ? p.x_conv.taps() * p.x_channels : 0) + p.h_conv.taps() * c1; }

  Packed pack_weights() { return {tiling ? pack_winograd_weights() : pack_direct_weights(), pack_bias(), pack_peephole()}; }

  // [4 * first channel of block + column]
  T* pack_bias() {
    T* bias = workspace.take<T>(4 * c1);
    const A* const given = defined(in.bias) ? data(*in.bias) : nullptr;
    const long stride = given ? in.bias->stride(0) : 0;
    for (long n = 0; n < 4 * c1; ++n) bias[n] = given ? static_cast<T>(given[p.weight_row(n) * stride]) : T(0);
    return bias;
  }

  // [block][panel][k][panel columns], k = taps of x, then taps of h.
  T* pack_direct_weights() {
    const long kx = p.convolves_x() ? p.x_conv.taps() * p.x_channels : 0, kh = p.h_conv.taps() * c1;
    long columns = 0;
    for (long b = 0; b < p.blocks(); ++b) columns += round_up(4 * p.block_channels(b), k.lanes);
    T* packed = workspace.take<T>(columns * (kx + kh));
    // Both weights are one operand only if they are one array; so they are packed apart into a common layout.
    const Tensor w_hh = torch::stable::contiguous(in.w_hh);
    const Tensor w_ih = kx ? torch::stable::contiguous(*in.w_ih) : w_hh;
    parallel(p.blocks(), [&](long begin, long end) {
      for (long b = begin; b < end; ++b) {
        const long width = 4 * p.block_channels(b);
        T* block = packed + kSlab * b * (kx + kh);
        for (long n0 = 0; n0 < width; n0 += k.panel) {
          const long left = width - n0, w = panel_width(k, left), real = std::min(left, w), column = kSlab * b + n0;
          T* panel = block + n0 * (kx + kh);
          if (kx) pack_columns(w_ih, p.x_channels, p.x_conv.taps(), column, real, panel, w);
          pack_columns(w_hh, c1, p.h_conv.taps(), column, real, panel + kx * w, w);
        }
      }
    });
    return packed;
  }

  // Columns of a contiguous weight, [tap][channel][width], zero from `columns` on.
  void pack_columns(const Tensor& weight, long channels, long taps, long first, long columns, T* to, long width) const {
    constexpr long kTogether = 16;  // channels
    std::vector<T> rows(kTogether * taps * width);
    for (long c0 = 0; c0 < channels; c0 += kTogether) {
      const long n = std::min(kTogether, channels - c0);
      read_columns(k, data(weight) + c0 * taps, channels * taps, 1, n * taps, c1, first, columns, rows.data(), width);
      for (long t = 0; t < taps; ++t)
        for (long c = 0; c < n; ++c) std::copy_n(rows.data() + (c * taps + t) * width, width, to + (t * channels + c0 + c) * width);
    }
  }

  T* pack_winograd_weights() {
    const long ci = p.convolves_x() ? p.x_channels : 0, taps = p.h_conv.taps();
    const Tensor w_hh = torch::stable::contiguous(in.w_hh), w_ih = ci ? torch::stable::contiguous(*in.w_ih) : w_hh;
    const A *of_x = data(w_ih), *of_h = data(w_hh);
    return tiling.pack_filters(k, workspace, ci, c1, 4 * c1, [=](long first, long n, long column, long columns, T* to) {
      const long with_x = std::clamp(ci - first, 0l, n), with_h = n - with_x, h = std::max(0l, first - ci);
      if (with_x) read_columns(k, of_x + first * taps, ci * taps, 1, with_x * taps, c1, column, columns, to, kSlab);
      if (with_h) read_columns(k, of_h + h * taps, c1 * taps, 1, with_h * taps, c1, column, columns, to + with_x * taps * kSlab, kSlab);
    });
  }

  // The arguments of a step that do not change from step to step.
  ConvLSTMStep<T> step_arguments(const Packed& packed, const Buffers& b) const {
    ConvLSTMStep<T> s{};
    s.weights = packed.weights;
    s.bias = packed.bias;
    s.k = k_rows();
    s.channels = c1;
    s.gates_x = b.gates_x;
    s.gates_x_frame = 4 * state;
    s.peephole = packed.peephole;
    if (p.convolves_x()) s.x = x_layout.template operand<T>(b.x_frames, p.x_conv.stride.w);
    return s;
  }

  // Channels of bordered frames as Winograd reads them.
  static WinogradInput<T> winograd_input(const FrameLayout& layout, const T* frames) {
    const Extent& size = layout.padded;
    return {frames, layout.frame, size.h * size.w * layout.pixel, size.w * layout.pixel, layout.pixel, 1, 0, layout.pixel};
  }

  // The member's own part of its team's scratch.
  static T* scratch(const Pieces& pieces, const Buffers& b) { return b.scratch + pieces.member.rank * b.scratch_size; }

  void take_step(Pieces& pieces, const Buffers& b, const ConvLSTMStep<T>& s) const {
    if (tiling) {
      const Winograd<T> w = tiling.problem(s.rows, winograd_input(x_layout, s.x.frames), winograd_input(h_layout, s.h.frames),
                                           input_channels(), s.weights);
      tiling.take(pieces, b.team, w, 4 * c1, [&](const Winograd<T>& w, const WinogradRange& range, long) {
        tiling.kernels->step(s, w, range, scratch(pieces, b));
      });
      return;
    }
    pieces.take(s.rows.samples * s.rows.rows, [&](long begin, long end) { k.conv_lstm_step(s, begin, end); });
  }

  // Interior rows of a bordered frame, rounded to A in place and copied out.
  void round_rows(Pieces& pieces, const std::vector<long>& active, T* frames, A* out, const std::vector<long>& out_sample) const {
    const long n = p.out.rows();
    pieces.take(active.size() * n, [&](long begin, long end) {
      for (long r = begin; r < end; ++r) {
        T* src = frames + active[r / n] * h_layout.frame + h_origin() + (r % n) / p.out.h * h_layout.map.depth + (r % n) % p.out.h * h_layout.map.height;
        A* dst = out + out_sample[r / n] + (r % n) * p.out.w * c1;
        convert(src, p.out.w * c1, dst);
        convert(dst, p.out.w * c1, src);
      }
    });
  }

  long h_origin() const {
    const Extent& e = h_layout.padded;
    return ((p.h_conv.before.d * e.h + p.h_conv.before.h) * e.w + p.h_conv.before.w) * c1;
  }

  std::vector<int64_t> last_order(long dims) const {  // channels-last order of [.., C, *S'] with C at axis dims - spatial - 1
    std::vector<int64_t> order;
    for (long i = 0; i < dims; ++i)
      if (i != dims - p.spatial - 1) order.push_back(i);
    order.push_back(dims - p.spatial - 1);
    return order;
  }

  Tensor new_channels_last(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return empty_ordered(shape, last_order(shape.size()), dtype);
  }

  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  Outputs forward(const std::string& save) {
    const ScalarType narrow = scalar_type<A>(), wide = scalar_type<T>();
    const bool keep_c = save != "none", keep_gates = save == "fast";
    Outputs all{new_channels_last(p.shape({p.batch, p.time, c1}), narrow), new_channels_last(p.shape({p.batch, c1}), narrow),
                new_channels_last(p.shape({p.batch, c1}), wide),
                keep_c ? new_channels_last(p.shape({p.batch, p.time, c1}), wide) : empty_cpu({0}, wide),
                keep_gates ? new_channels_last(p.shape({p.batch, p.time, 4 * c1}), narrow) : empty_cpu({0}, narrow)};
    const auto& [h, h_n, c_n, c, gates] = all;
    const Packed packed = pack_weights();
    const bool stream_gates = keep_gates && streams<A>(gates, c1, kMostGates), stream_out = !kNarrow && streams<A>(h, c1, 8l << 20);
    const To to{out_data(h), out_data(h_n), static_cast<T*>(c_n.mutable_data_ptr()), keep_c ? static_cast<T*>(c.mutable_data_ptr()) : nullptr,
                keep_gates ? out_data(gates) : nullptr, stream_gates, stream_out};
    for (const Phase& phase : p.phases(1)) {
      const long samples = p.most_samples(phase);
      // x of the next step is packed beside this one where that is little: it saves waiting for each other.
      const bool ahead = p.has_x && !same_x() && phase.teams * x_size(samples) * long(sizeof(T)) <= 1 << 20;
      std::vector<Buffers> buffers;
      Workspace room;
      for (long i = 0; i < phase.teams; ++i) {
        Buffers b{p.threads / phase.teams, samples};
        take_x(room, b, ahead ? 2 : 1);
        take_scratch(room, b, {input_channels()});
        for (T*& frames : b.h_frames) frames = room.take<T>(samples * h_layout.frame);
        buffers.push_back(b);
      }
      run(phase, [&](long team, const Group& g, Pieces& pieces) { run_forward(g, packed, to, buffers[team], ahead, pieces); });
    }
    return all;
  }

  // Where results go; null = not wanted.
  struct To {
    A *h, *h_n;
    T *c_n, *c;
    A* gates;
    bool stream_gates, stream_out;
  };

  void run_forward(const Group& g, const Packed& packed, const To& to, const Buffers& b, bool ahead, Pieces& pieces) const {
    // Of the group's first sample, and from one to the next.
    T* const c_last = to.c_n + g.first * state;
    T* const c_all = to.c ? to.c + g.first * p.time * state : nullptr;
    const long last_frame = g.stride * state, all_frame = p.time * last_frame, size = x_size(b.samples);
    const bool has_h0 = defined(in.h0), has_c0 = defined(in.c0);

    if (has_h0) pack_state(pieces, g, *in.h0, h_maps, b.h_frames[0]);
    for (int i = has_h0 ? 1 : 0; g.fresh && i < 2; ++i) clear(pieces, b.h_frames[i], b.samples * h_layout.frame);
    if (has_c0) pack_state(pieces, g, *in.c0, plain_maps, c_last, 0, g.stride);
    std::vector<long> out_sample, active = p.active(g, 0), next;
    if (p.has_x) pack_x(pieces, g, active, 0, b.x_frames, b.gates_x);
    pieces.wait();

    ConvLSTMStep<T> s = step_arguments(packed, b);
    for (long step = 0; !active.empty(); ++step, active = next) {
      next = step + 1 < p.time ? p.active(g, step + 1) : std::vector<long>();
      if (step > 0 && p.has_x && !same_x() && !ahead) {
        pack_x(pieces, g, active, step, b.x_frames, b.gates_x);
        pieces.wait();
      }
      const long now = ahead ? step % 2 * size : 0;
      if (b.x_frames) s.x.frames = b.x_frames + now;
      if (b.gates_x) s.gates_x = b.gates_x + now;
      if (ahead && !next.empty()) pack_x(pieces, g, next, step + 1, b.x_frames + size - now, b.gates_x + size - now);
      out_sample.clear();
      for (long i : active) out_sample.push_back(p.row_of(g, i, step) * state);
      s.rows = rows(active);
      s.h = step > 0 || has_h0 ? h_layout.template operand<T>(b.h_frames[step % 2], 1) : Operand<T>{};
      s.c_prev = c_all && step > 0 ? c_all + (step - 1) * state : step > 0 || has_c0 ? c_last : nullptr;
      s.c_prev_frame = c_all && step > 0 ? all_frame : last_frame;
      s.c = c_all ? c_all + step * state : c_last;
      s.c_frame = c_all ? all_frame : last_frame;
      if (to.gates) s.gates = kept(to.gates + 4 * (g.first * p.time + step) * state);
      s.gates_frame = 4 * all_frame;
      s.stream_gates = to.stream_gates;
      s.h_frames = kNarrow || step + 1 < p.time ? b.h_frames[(step + 1) % 2] + h_origin() : nullptr;
      s.stream_out = to.stream_out && s.h_frames;
      s.h_frame = h_layout.frame;
      s.h_map = h_layout.map;
      if constexpr (!kNarrow) s.out = to.h;
      s.out_sample = out_sample.data();
      take_step(pieces, b, s);
      pieces.wait();
      if constexpr (kNarrow) {
        round_rows(pieces, active, b.h_frames[(step + 1) % 2], to.h, out_sample);
        pieces.wait();
      }
    }

    pieces.take(g.samples, [&](long begin, long end) {
      for (long i = begin; i < end; ++i) {
        const long sample = g.sample(i), n = p.lengths[sample];
        A* last = to.h_n + sample * state;
        T* c = c_last + i * last_frame;
        if (n > 0) std::memcpy(static_cast<void*>(last), to.h + p.row_of(g, i, n - 1) * state, state * sizeof(A));
        else copy_initial(sample, last);
        if (n > 0 && c_all) std::memcpy(static_cast<void*>(c), c_all + i * all_frame + (n - 1) * state, state * sizeof(T));
        else if (n == 0 && !has_c0) std::memset(static_cast<void*>(c), 0, state * sizeof(T));
        std::memset(static_cast<void*>(to.h + (sample * p.time + n) * state), 0, (p.time - n) * state * sizeof(A));
      }
    });
  }

  void copy_initial(long sample, A* dst) const {
    if (!defined(in.h0)) {
      std::memset(static_cast<void*>(dst), 0, state * sizeof(A));
      return;
    }
    const FrameStrides strides = frame_strides(*in.h0, 1);
    for (long row = 0; row < p.out.rows(); ++row)
      pack_row(k, data(*in.h0) + sample * in.h0->stride(0), strides, plain_maps, row, c1, c1, dst + row * p.out.w * c1);
  }

  static void clear(Pieces& pieces, T* dst, long n) {
    constexpr long kPiece = 1 << 12;
    pieces.take((n + kPiece - 1) / kPiece, [&](long begin, long end) {
      std::memset(static_cast<void*>(dst + begin * kPiece), 0, (std::min(n, end * kPiece) - begin * kPiece) * sizeof(T));
    });
  }
};

}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast
