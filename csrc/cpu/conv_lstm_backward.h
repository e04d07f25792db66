// ConvLSTM's backward: gradients of the gates, dgrad, dx and wgrad, step by step.
#pragma once
#include "conv_lstm_forward.h"

namespace convfast {
namespace cpu {
namespace conv_lstm {

template <class A>
struct Backward : Engine<A> {
  using Base = Engine<A>;
  using T = typename Base::T;
  using Base::c1;
  using Base::in;
  using Base::k;
  using Base::p;
  using Base::pixels;
  using Base::state;
  using Base::tiling;
  using Base::workspace;
  using Base::x_layout;
  using Base::h_layout;

  // dgates live in frames bordered for dgrad: a tap that reached forward reaches back.
  Extent padded;
  long padded_pixels, origin;
  RowMap pixel_map;

  Backward(const Problem& problem, const Inputs& inputs) : Base(problem, inputs), padded(h_layout.padded) {
    padded_pixels = padded.pixels();
    origin = (p.h_conv.behind.d * padded.h + p.h_conv.behind.h) * padded.w + p.h_conv.behind.w;
    pixel_map = {padded.h * padded.w, padded.w};
  }

  // dgates as a GEMM operand: whole blocks, then the narrow last one. `taps` false: only the pixel itself.
  struct DgatesOperand {
    std::vector<long> offsets[2];
    Operand<T> a[2];
    std::vector<long> column, tap;  // of each k: row of the weight matrix, and which tap
  };

  void dgates_operand(const T* dgates, bool taps, DgatesOperand& o) const {
    const Extent kernel = taps ? p.h_conv.kernel : Extent{};
    const long whole = c1 / kBlock, rest = c1 % kBlock;
    for (int part = 0; part < 2; ++part) {
      const long n = part ? rest : long(kBlock), blocks = part ? (rest ? 1 : 0) : whole, ch0 = part ? whole * kBlock : 0;
      o.a[part] = {};
      if (!blocks) continue;
      for (long b = 0; b < blocks; ++b)
        for (long d = 0; d < kernel.d; ++d)
          for (long h = 0; h < kernel.h; ++h) {
            const long pixel = taps ? (d * padded.h + h) * padded.w : origin;
            o.offsets[part].push_back(4 * n * (b * padded_pixels + pixel));
            for (long w = 0; w < kernel.w; ++w)
              for (long j = 0; j < 4 * n; ++j) {
                o.column.push_back(j / n * c1 + ch0 + b * kBlock + j % n);
                o.tap.push_back(((kernel.d - 1 - d) * kernel.h + kernel.h - 1 - h) * kernel.w + kernel.w - 1 - w);
              }
          }
      o.a[part] = {dgates + 4 * padded_pixels * ch0, 4 * padded_pixels * c1, {4 * n * pixel_map.depth, 4 * n * pixel_map.height},
                   {o.offsets[part].data(), long(o.offsets[part].size()), 4 * n * kernel.w, 4 * n}};
    }
  }

  struct Gather {  // along one dim: which (tap, output) pairs an input coordinate takes part in
    std::vector<long> begin;
    std::vector<std::pair<long, long>> pairs;
  };

  static Gather gather(long size, long out, long kernel, long stride, long dilation, const std::vector<long>& map) {
    std::vector<std::vector<std::pair<long, long>>> lists(size);
    for (long o = 0; o < out; ++o)
      for (long t = 0; t < kernel; ++t) {
        const long x = map[o * stride + t * dilation];
        if (x >= 0) lists[x].emplace_back(t, o);
      }
    Gather g;
    for (const auto& list : lists) {
      g.begin.push_back(g.pairs.size());
      g.pairs.insert(g.pairs.end(), list.begin(), list.end());
    }
    g.begin.push_back(g.pairs.size());
    return g;
  }

  // What a call wants, how dx comes about, and what all groups share: packed weights, and sums over samples.
  struct Plan {
    bool lean, dx, w_ih, w_hh, bias, peephole, h0, c0;
    // dh is a GEMM over the taps of dgates. Where the convolutions are alike and Cin fills vectors, or the rest of dh's, dx is more
    // columns of it: [sample][pixel][dh | dx]. Else dx is a GEMM over dgates alone with all taps as columns, and a gather over them.
    bool dx_like_dh;
    typename Base::Packed packed;
    const T *w_back = nullptr, *w_dx = nullptr;
    Gather gather[3];
    std::vector<T*> dw[3];  // [operand: x, h, one][block][k][columns rounded up]
    T* sums = nullptr;      // Winograd: of the transformed gradients of w_ih | w_hh, one of each part of the tiles
    T* dpeephole = nullptr;
  };

  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  // Channels of x and h whose weights' gradients are wanted.
  static long sum_channels(const Plan& plan, const Problem& p) { return (plan.w_ih ? p.x_channels : 0) + (plan.w_hh ? p.channels : 0); }

  long kx() const { return p.convolves_x() ? p.x_conv.taps() * p.x_channels : 0; }
  long kh() const { return p.h_conv.taps() * c1; }
  // Where dx begins beside dh.
  long dx_column() const { return fills_dh() ? c1 : round_up(c1, k.lanes); }
  bool fills_dh() const { return c1 + p.x_channels <= round_up(c1, k.lanes); }

  Plan make_plan(bool lean, const std::vector<int64_t>& needs) {
    Plan plan{};
    plan.lean = lean;
    plan.dx = needs[0] && p.has_x;
    plan.w_ih = needs[1] && p.convolves_x();
    plan.w_hh = needs[2];
    plan.bias = needs[3] && defined(in.bias);
    plan.peephole = needs[4] && defined(in.peephole);
    plan.h0 = needs[5] && defined(in.h0);
    plan.c0 = needs[6] && defined(in.c0);
    plan.dx_like_dh = plan.dx && kx() && p.padding_mode == "zeros" && p.x_conv == p.h_conv &&
                      (fills_dh() || 4 * p.x_channels >= 3 * round_up(p.x_channels, k.lanes));
    if (lean) plan.packed = Base::pack_weights();
    else plan.packed.peephole = Base::pack_peephole();
    if (tiling && (p.time > 1 || plan.h0 || plan.dx_like_dh)) {
      plan.w_back = pack_winograd_back(plan.dx_like_dh);
    } else if (p.time > 1 || plan.h0 || plan.dx_like_dh) {
      DgatesOperand back;
      dgates_operand(nullptr, true, back);
      plan.w_back = pack_taps(back, plan.dx_like_dh);
    }
    if (plan.dx && kx() && !plan.dx_like_dh) {
      DgatesOperand here;
      dgates_operand(nullptr, false, here);
      T* w_dx = workspace.template take<T>(here.column.size() * round_up(kx(), k.lanes));
      const Tensor w = torch::stable::contiguous(*in.w_ih);
      pack_panels(k, here.column.size(), kx(), w_dx, [&](long i, long n) {
        return static_cast<T>(Base::data(w)[here.column[i] * kx() + n % p.x_channels * p.x_conv.taps() + n / p.x_channels]);
      });
      plan.w_dx = w_dx;
      const ConvDims& v = p.x_conv;
      plan.gather[0] = gather(p.in.d, p.out.d, v.kernel.d, v.stride.d, v.dilation.d, Base::x_maps.d);
      plan.gather[1] = gather(p.in.h, p.out.h, v.kernel.h, v.stride.h, v.dilation.h, Base::x_maps.h);
      plan.gather[2] = gather(p.in.w, p.out.w, v.kernel.w, v.stride.w, v.dilation.w, Base::x_maps.w);
    }
    const bool wanted[3] = {plan.w_ih, plan.w_hh, plan.bias};
    const long k_of[3] = {kx(), kh(), 1};
    for (int o = 0; o < 3; ++o)
      for (long b = 0; wanted[o] && b < p.blocks(); ++b) {
        const long size = k_of[o] * round_up(4 * p.block_channels(b), k.lanes);
        plan.dw[o].push_back(workspace.template take<T>(size));
        Base::clear(plan.dw[o].back(), size);
      }
    if (tiling && sum_channels(plan, p)) {
      const long size = tiling.parts(0, sum_channels(plan, p), 4 * c1, true).tiles * tiling.weights_size(sum_channels(plan, p), round_up(4 * c1, k.lanes));
      plan.sums = workspace.template take<T>(size);
      Base::clear(plan.sums, size);
    }
    if (plan.peephole) {
      plan.dpeephole = workspace.template take<T>(3 * state);
      Base::clear(plan.dpeephole, 3 * state);
    }
    return plan;
  }

  Gradients backward(const OptionalTensor& dh, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& h, const Tensor& c,
                     const Tensor& gates, const std::vector<int64_t>& needs) {
    const ScalarType narrow = scalar_type<A>();
    const bool lean = gates.numel() == 0;
    const Plan plan = make_plan(lean, needs);
    const ScalarType c0_dtype = plan.c0 ? in.c0->scalar_type() : scalar_type<T>();
    Tensor dx = plan.dx ? cpu::empty_like(*in.x) : empty_cpu({0}, narrow);  // in x's own layout
    const bool all_frames = std::all_of(p.lengths.begin(), p.lengths.end(), [&](long n) { return n == p.time; });
    if (plan.dx && !all_frames) torch::stable::zero_(dx);
    else if (plan.dx && poison_requested() && dx.numel()) poison(dx.mutable_data_ptr(), dx.numel() * dx.element_size());
    Tensor dh0 = plan.h0 ? Base::new_channels_last(shape_of(*in.h0), narrow) : empty_cpu({0}, narrow);
    Tensor dc0 = plan.c0 ? Base::new_channels_last(shape_of(*in.c0), c0_dtype) : empty_cpu({0}, c0_dtype);

    for (long begin = 0, size = p.group_size(); begin < p.batch; begin += size) {
      const long n = std::min(size, p.batch - begin);
      Backward part(p.group(begin, n), in.group(begin, n));
      part.run_backward(plan, samples(dh, begin, n), samples(dh_n, begin, n), samples(dc_n, begin, n), samples(h, begin, n),
                        samples(c, begin, n), lean ? gates : samples(gates, begin, n), plan.dx ? samples(dx, begin, n) : dx,
                        plan.h0 ? samples(dh0, begin, n) : dh0, plan.c0 ? samples(dc0, begin, n) : dc0);
    }

    if (plan.sums) finish_winograd_sums(plan);
    Tensor dw_ih = plan.w_ih ? empty_cpu(shape_of(*in.w_ih), narrow) : empty_cpu({0}, narrow);
    Tensor dw_hh = plan.w_hh ? empty_cpu(shape_of(in.w_hh), narrow) : empty_cpu({0}, narrow);
    Tensor dbias = plan.bias ? empty_cpu({4 * c1}, narrow) : empty_cpu({0}, narrow);
    if (plan.w_ih) unpack_weight_grad(plan.dw[0], p.x_channels, p.x_conv.taps(), Base::out_data(dw_ih));
    if (plan.w_hh) unpack_weight_grad(plan.dw[1], c1, p.h_conv.taps(), Base::out_data(dw_hh));
    if (plan.bias) unpack_weight_grad(plan.dw[2], 1, 1, Base::out_data(dbias));
    Tensor dp = plan.peephole ? empty_cpu(p.shape({3, c1}), narrow) : empty_cpu({0}, narrow);
    if (plan.peephole)
      for (long i = 0; i < 3; ++i) unpack_row(k, plan.dpeephole + i * state, c1, pixels, c1, Base::out_data(dp) + i * state, 1, pixels);
    return {dx, dw_ih, dw_hh, dbias, dp, dh0, dc0};
  }

  void run_backward(const Plan& plan, const OptionalTensor& dh, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& h,
                    const Tensor& c, const Tensor& gates, const Tensor& dx, const Tensor& dh0, const Tensor& dc0) {
    const long n_rows = p.out.rows();
    const T* c_all = static_cast<const T*>(c.const_data_ptr());
    T* dgates = workspace.template take<T>(4 * p.batch * padded_pixels * c1);
    Base::clear(dgates, 4 * p.batch * padded_pixels * c1);
    const long dh_ld = round_up(plan.dx_like_dh ? dx_column() + p.x_channels : c1, k.lanes);
    T* dh_rec = workspace.template take<T>(p.batch * pixels * dh_ld);
    T* dc = workspace.template take<T>(p.batch * state);
    if (defined(dh_n)) Base::pack_state(*dh_n, Base::plain_maps(), dh_rec, dh_ld);
    else Base::clear(dh_rec, p.batch * pixels * dh_ld);
    if (defined(dc_n)) Base::pack_state(*dc_n, Base::plain_maps(), dc);
    else Base::clear(dc, p.batch * state);
    T* c0 = nullptr;
    if (defined(in.c0)) Base::pack_state(*in.c0, Base::plain_maps(), c0 = workspace.template take<T>(p.batch * state));
    // dh goes in as it lies where it can.
    const bool dh_direct = defined(dh) && !Base::kNarrow && p.uniform_frames() && dense_channels_last(*dh, 2);
    T* dh_packed = defined(dh) && !dh_direct ? workspace.template take<T>(p.batch * state) : nullptr;
    T* h_frames = plan.w_hh || plan.lean ? workspace.template take<T>(p.batch * h_layout.frame) : nullptr;
    const bool reads_x = p.has_x && (plan.w_ih || plan.lean);
    if (reads_x) Base::take_x();
    tiling.take_scratch(workspace, p.batch, {4 * c1, Base::input_channels(), sum_channels(plan, p)});

    DgatesOperand back, here;
    if (plan.w_back && !tiling) dgates_operand(dgates, true, back);
    if (plan.w_dx) dgates_operand(dgates, false, here);
    const long dx_padded = round_up(kx(), k.lanes);
    T* dx_rows = plan.w_dx ? workspace.template take<T>(p.batch * pixels * dx_padded) : nullptr;

    const T one = T(1);
    const long zero_offset = 0;
    const Operand<T> operand[3] = {kx() ? x_layout.template operand<T>(Base::x_frames, p.x_conv.stride.w) : Operand<T>{},
                                   h_layout.template operand<T>(h_frames, 1), {&one, 0, {0, 0}, {&zero_offset, 1, 1, 0}}};
    std::vector<WeightGrad<T>> wgrads;
    for (long b = 0; b < p.blocks(); ++b)
      for (int o = 0; o < 3; ++o) {
        if (plan.dw[o].empty() || (tiling && o < 2)) continue;
        const long n = p.block_channels(b);
        WeightGrad<T> g{};
        g.a = operand[o];
        g.dgates = dgates + 4 * (padded_pixels * b * kBlock + origin * n);
        g.dgates_frame = 4 * padded_pixels * c1;
        g.dgates_map = {4 * n * pixel_map.depth, 4 * n * pixel_map.height};
        g.columns = 4 * n;
        g.dw = plan.dw[o][b];
        wgrads.push_back(g);
      }

    // lean: the activated gates of one step, recomputed to where their gradients will lie.
    ConvLSTMStep<T> again{};
    if (plan.lean) {
      again = Base::step_arguments(plan.packed);
      again.blocked_gates = dgates;
      again.gates_frame = 4 * padded_pixels * c1;
      again.gates_pixels = padded_pixels;
      again.gates_origin = origin;
      again.gates_map = pixel_map;
    }

    // Two regions a step: what its gates need, with the end of the step before; then what they are for.
    Region region;
    const std::vector<long> all = p.active(0);
    if (reads_x && Base::same_x()) Base::pack_x(region, all, 0);
    for (long step = p.time; step-- > 0;) {
      const std::vector<long> active = p.active(step);
      if (active.empty()) continue;
      const Rows r = Base::rows(active);
      const bool first = step == 0, has_h = !first || defined(in.h0);
      if (reads_x && !Base::same_x()) Base::pack_x(region, active, step);
      if (h_frames && has_h) {
        if (first) Base::pack_state(*in.h0, Base::h_maps, h_frames);
        else Base::template pack<A>(region, active, h, 2, Base::h_maps, h_frames, [this, step](long s) { return (s * p.time + p.frame_of(s, step - 1)) * state; });
      }
      const T* c_prev = first ? c0 : c_all + (step - 1) * state;
      const long c_prev_frame = first ? state : p.time * state;
      if (plan.lean) {
        again.rows = r;
        again.h = has_h ? operand[1] : Operand<T>{};
        again.c_prev = c_prev;
        again.c_prev_frame = c_prev_frame;
        region.run();
        Base::add_step(region, again);
      }
      if (dh_packed)
        Base::template pack<A>(region, active, *dh, 2, Base::plain_maps(), dh_packed,
                               [&](long s) { return s * dh->stride(0) + p.frame_of(s, step) * dh->stride(1); });
      if (plan.lean || dh_packed) region.run();

      GatesBackward<T> g{};
      g.rows = r;
      g.channels = c1;
      if (!plan.lean) g.gates = kept(Base::data(gates) + 4 * step * state);
      g.gates_frame = 4 * p.time * state;
      g.c_prev = c_prev;
      g.c_prev_frame = c_prev_frame;
      g.c = c_all + step * state;
      g.c_frame = p.time * state;
      g.peephole = plan.packed.peephole;
      g.dpeephole = plan.dpeephole;
      g.dh[0] = dh_direct ? reinterpret_cast<const T*>(dh->const_data_ptr()) + (p.reverse ? p.time - 1 - step : step) * dh->stride(1) : dh_packed;
      g.dh_frame[0] = dh_direct ? dh->stride(0) : state;
      g.dh_stride[0] = c1;
      g.dh[1] = dh_rec;
      g.dh_frame[1] = pixels * dh_ld;
      g.dh_stride[1] = dh_ld;
      g.dc = dc;
      g.dc_frame = state;
      g.dgates = dgates;
      g.dgates_frame = 4 * padded_pixels * c1;
      g.dgates_pixels = padded_pixels;
      g.origin = origin;
      g.map = pixel_map;
      region.add(plan.dpeephole ? n_rows : r.samples * n_rows, [&](long begin, long end, long) { k.gates_backward(g, begin, end); });
      region.run();

      if (!first || plan.h0 || plan.dx_like_dh) {
        // Nobody wants dh before the first step; its columns can be left out where they are whole panels.
        const long unit = tiling ? long(kSlab) : k.panel, from = first && !plan.h0 && dx_column() % unit == 0 ? dx_column() : 0;
        const long columns = (plan.dx_like_dh ? dx_column() + p.x_channels : c1) - from, depth = back.column.size();
        if (tiling) {
          const RowsGemm<T> gemm{r, {}, nullptr, columns, 0, dh_rec + from, dh_ld};
          const Winograd<T> w = dgates_tiles(r, dgates, plan.w_back + tiling.kernels->planes * 4 * c1 * from);
          tiling.add(region, w, columns, [gemm, rows_gemm = tiling.kernels->rows_gemm](const Winograd<T>& w, const WinogradRange& range, T* scratch, long) {
            rows_gemm(gemm, w, range, scratch);
          });
        } else {
          const RowsGemm<T> gemm{r, {back.a[0], back.a[1]}, plan.w_back + depth * from, columns, depth, dh_rec + from, dh_ld};
          region.add(r.samples * n_rows, [this, gemm](long begin, long end, long) { k.rows_gemm(gemm, begin, end); });
        }
      }
      if (dx_rows) {
        const RowsGemm<T> gemm{r, {here.a[0], here.a[1]}, plan.w_dx, kx(), long(here.column.size()), dx_rows, dx_padded};
        region.add(r.samples * n_rows, [this, gemm](long begin, long end, long) { k.rows_gemm(gemm, begin, end); });
      } else if (p.convolved && plan.dx) {
        unpack_dgates(region, active, step, dgates, dx);
      }
      add_weight_grads(region, wgrads, r, has_h, plan.w_hh ? h_frames : nullptr);
      if (plan.sums) add_winograd_sums(region, plan, r, dgates, has_h ? h_frames : nullptr);
      region.run();
      if (plan.dx_like_dh) unpack_dx(region, active, step, dh_rec + dx_column(), dh_ld, dx);
      if (dx_rows) gather_dx(region, active, step, dx_rows, dx_padded, plan.gather, dx);
    }
    region.run();

    if (plan.h0) unpack_row(k, dh_rec, dh_ld, p.batch * pixels, c1, Base::out_data(dh0), c1, 1);
    if (plan.c0 && dc0.scalar_type() == scalar_type<A>()) unpack_row(k, dc, c1, p.batch * pixels, c1, Base::out_data(dc0), c1, 1);
    else if (plan.c0) unpack_row(k, dc, c1, p.batch * pixels, c1, static_cast<T*>(dc0.mutable_data_ptr()), c1, 1);
  }

  // All operands and blocks: their tasks end to end.
  void add_weight_grads(Region& region, std::vector<WeightGrad<T>>& wgrads, const Rows& rows, bool has_h, const T* h_frames) {
    std::vector<long> end_of;
    long total = 0;
    for (auto& g : wgrads) {
      g.rows = rows;
      const bool skipped = !has_h && g.a.frames == h_frames;
      end_of.push_back(total += skipped ? 0 : k.weight_grad_tasks(g.a.runs));
    }
    region.add(total, [=, &wgrads](long begin, long end, long) {
      long start = 0;
      for (size_t i = 0; i < wgrads.size(); start = end_of[i++]) {
        const long b = std::max(begin, start) - start, e = std::min(end, end_of[i]) - start;
        if (b < e) k.weight_grad(wgrads[i], b, e);
      }
    });
  }

  Winograd<T> dgates_tiles(const Rows& rows, const T* dgates, const T* weights) const {
    const long whole = c1 / kBlock, rest = 4 * (c1 % kBlock), frame = 4 * padded_pixels * c1;
    return tiling.problem(rows, {whole ? dgates : nullptr, frame, kSlab * padded.w, kSlab, whole, kSlab * padded_pixels, kSlab},
                          {rest ? dgates + kSlab * whole * padded_pixels : nullptr, frame, rest * padded.w, rest, 1, 0, rest}, 4 * c1, weights);
  }

  // w_hh, and w_ih behind it, turned round: from gates' gradients to those of h and x.
  T* pack_winograd_back(bool with_x) {
    const long taps = p.h_conv.taps(), split = dx_column(), ci = p.x_channels;
    const Tensor w_hh = torch::stable::contiguous(in.w_hh), w_ih = with_x ? torch::stable::contiguous(*in.w_ih) : w_hh;
    const A *of_h = Base::data(w_hh), *of_x = Base::data(w_ih);
    // Taps of neighbouring channels lie side by side: columns [begin, end) of all are channels from `from` on.
    const auto read = [=](const A* from, long begin, long end, T* to) {
      to += (taps - 1) * kSlab + begin;
      if constexpr (std::is_same_v<A, T>) return k.transpose(end - begin, taps, from, taps, to, -kSlab);
      for (long t = 0; t < taps; ++t, to -= kSlab)
        for (long j = 0; j < end - begin; ++j) to[j] = static_cast<T>(from[j * taps + t]);
    };
    return tiling.pack_filters(k, workspace, 4 * c1, with_x ? split + ci : c1, [=](long first, long n, long column, long columns, T* to) {
      const long of_hidden = std::clamp(c1 - column, 0l, columns), none = std::clamp(split - column, of_hidden, columns);
      for (long i = 0; i < n; ++i, to += taps * kSlab) {
        const long row = p.weight_row(first + i);
        if (of_hidden) read(of_h + (row * c1 + column) * taps, 0, of_hidden, to);
        for (long t = 0; none > of_hidden && t < taps; ++t) std::fill(to + t * kSlab + of_hidden, to + t * kSlab + none, T(0));
        if (columns > none) read(of_x + (row * ci + column + none - split) * taps, none, columns, to);
      }
    });
  }

  void add_winograd_sums(Region& region, const Plan& plan, const Rows& rows, const T* dgates, const T* h_frames) {
    const long channels = sum_channels(plan, p), size = tiling.weights_size(channels, round_up(4 * c1, k.lanes));
    const Winograd<T> w = tiling.problem(rows, Base::winograd_input(x_layout, plan.w_ih ? Base::x_frames : nullptr),
                                         Base::winograd_input(h_layout, plan.w_hh ? h_frames : nullptr), channels, nullptr);
    if (!w.a[0].frames && !w.a[1].frames) return;
    const GateFrames<T> g{dgates, 4 * padded_pixels * c1, padded_pixels, origin, padded.w, c1};
    tiling.add(region, w, 4 * c1, [=, sums = plan.sums, weight_grad = tiling.kernels->weight_grad](const Winograd<T>& w, const WinogradRange& range, T* scratch, long part) {
      weight_grad(w, g, range, scratch, sums + part * size);
    });
  }

  // From transformed sums to dw, as the direct kernels leave it.
  void finish_winograd_sums(const Plan& plan) {
    const long channels = sum_channels(plan, p), parts = tiling.parts(0, channels, 4 * c1, true).tiles, taps = p.h_conv.taps();
    const long size = tiling.weights_size(channels, round_up(4 * c1, k.lanes)), ci = plan.w_ih ? p.x_channels : 0;
    parallel(p.blocks() * channels, [&](long begin, long end) {
      alignas(64) T u[64 * kSlab], g[25 * kSlab];
      std::vector<const T*> terms(parts);
      for (long i = begin; i < end; ++i) {
        const long b = i / channels, c = i % channels, ld = round_up(4 * p.block_channels(b), k.lanes);
        for (long plane = 0; plane < tiling.kernels->planes; ++plane) {
          for (long part = 0; part < parts; ++part) terms[part] = plan.sums + part * size + kSlab * b * tiling.kernels->planes * channels + (plane * channels + c) * ld;
          k.sum_rows(parts, terms.data(), ld, u + plane * kSlab);
        }
        tiling.kernels->filter_gradient(u, ld, g);
        T* dw = c < ci ? plan.dw[0][b] + c * ld : plan.dw[1][b] + (c - ci) * ld;
        for (long t = 0; t < taps; ++t) std::memcpy(dw + t * (c < ci ? ci : c1) * ld, g + t * kSlab, ld * sizeof(T));
      }
    });
  }

  // w_hh, and w_ih behind it, as GEMM operand over the taps of dgates. Both are [4C, channels, *K] over the same taps, so one is
  // packed into the columns before `split` and the other after.
  T* pack_taps(const DgatesOperand& over, bool with_x) {
    const long taps = p.h_conv.taps(), split = dx_column(), columns = with_x ? split + p.x_channels : c1;
    const Tensor w_hh = torch::stable::contiguous(in.w_hh), w_ih = with_x ? torch::stable::contiguous(*in.w_ih) : w_hh;
    T* packed = workspace.template take<T>(over.column.size() * round_up(columns, k.lanes));
    pack_panels(k, over.column.size(), columns, packed, [&](long i, long n) {
      if (n < c1) return static_cast<T>(Base::data(w_hh)[(over.column[i] * c1 + n) * taps + over.tap[i]]);
      if (n < split) return T(0);
      return static_cast<T>(Base::data(w_ih)[(over.column[i] * p.x_channels + n - split) * taps + over.tap[i]]);
    });
    return packed;
  }

  void unpack_dx(Region& region, const std::vector<long>& active, long step, const T* rows, long ld, const Tensor& dx) {
    const long n = p.in.rows();
    const FrameStrides strides = frame_strides(dx, 2);
    region.add(active.size() * n, [=](long begin, long end, long) {
      for (long r = begin; r < end; ++r) {
        const long s = active[r / n], d = (r % n) / p.in.h, y = (r % n) % p.in.h;
        A* dst = Base::out_data(dx) + s * dx.stride(0) + p.frame_of(s, step) * dx.stride(1) + d * strides.d + y * strides.h;
        unpack_row(k, rows + (s * n + r % n) * p.in.w * ld, ld, p.in.w, p.x_channels, dst, strides.w, strides.c);
      }
    });
  }

  // dx[q] = sum over the (tap, output) pairs that read q of dcol[output, tap].
  void gather_dx(Region& region, const std::vector<long>& active, long step, const T* dcol, long ld, const Gather (&along)[3], const Tensor& dx) {
    const long n = p.in.rows(), ci = p.x_channels;
    const FrameStrides strides = frame_strides(dx, 2);
    region.add(active.size() * n, [=, &along](long begin, long end, long) {
      const auto& [gd, gh, gw] = along;
      std::vector<T> sum(p.in.w * ci);
      std::vector<const T*> rows, terms;  // terms may repeat a tap where padding shows a pixel more than once
      for (long r = begin; r < end; ++r) {
        const long s = active[r / n], d = (r % n) / p.in.h, y = (r % n) % p.in.h;
        rows.clear();
        for (long i = gd.begin[d]; i < gd.begin[d + 1]; ++i)
          for (long j = gh.begin[y]; j < gh.begin[y + 1]; ++j) {
            const auto [td, od] = gd.pairs[i];
            const auto [th, oh] = gh.pairs[j];
            rows.push_back(dcol + (s * pixels + (od * p.out.h + oh) * p.out.w) * ld + (td * p.x_conv.kernel.h + th) * p.x_conv.kernel.w * ci);
          }
        for (long x = 0; x < p.in.w; ++x) {
          terms.clear();
          for (const T* row : rows)
            for (long q = gw.begin[x]; q < gw.begin[x + 1]; ++q) terms.push_back(row + gw.pairs[q].second * ld + gw.pairs[q].first * ci);
          k.sum_rows(terms.size(), terms.data(), ci, sum.data() + x * ci);
        }
        A* dst = Base::out_data(dx) + s * dx.stride(0) + p.frame_of(s, step) * dx.stride(1) + d * strides.d + y * strides.h;
        unpack_row(k, sum.data(), ci, p.in.w, ci, dst, strides.w, strides.c);
      }
    });
  }

  // x was the input convolution's result: its gradient is dgates, in plain gate order.
  void unpack_dgates(Region& region, const std::vector<long>& active, long step, const T* dgates, const Tensor& dx) {
    const long n_rows = p.out.rows();
    const FrameStrides strides = frame_strides(dx, 2);
    region.add(active.size() * n_rows, [=](long begin, long end, long) {
      for (long r = begin; r < end; ++r) {
        const long s = active[r / n_rows], row = r % n_rows;
        const long at = origin + row / p.out.h * pixel_map.depth + row % p.out.h * pixel_map.height;
        A* dst = Base::out_data(dx) + s * dx.stride(0) + p.frame_of(s, step) * dx.stride(1) + row / p.out.h * strides.d + row % p.out.h * strides.h;
        for (long b = 0; b < p.blocks(); ++b) {
          const long n = p.block_channels(b), ch = b * kBlock;
          const T* src = dgates + 4 * (padded_pixels * (s * c1 + ch) + at * n);
          for (long gate = 0; gate < 4; ++gate)
            unpack_row(k, src + gate * n, 4 * n, p.out.w, n, dst + (gate * c1 + ch) * strides.c, strides.w, strides.c);
        }
      }
    });
  }

  // [block][tap][channel][gate, channel of block] to [4C, channels, taps].
  void unpack_weight_grad(const std::vector<T*>& dw, long channels, long taps, A* out) const {
    parallel(dw.size(), [&](long begin, long end) {
      for (long b = begin; b < end; ++b) {
        const long n = p.block_channels(b), ld = round_up(4 * n, k.lanes);
        for (long j = 0; j < 4 * n; ++j) {
          A* row = out + (j / n * c1 + b * kBlock + j % n) * channels * taps;
          for (long c = 0; c < channels; ++c)
            for (long t = 0; t < taps; ++t) row[c * taps + t] = static_cast<A>(dw[b][(t * channels + c) * ld + j]);
        }
      }
    });
  }
};

}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast
