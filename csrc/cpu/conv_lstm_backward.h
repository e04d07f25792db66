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
  using Packed = typename Base::Packed;
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
    long depth = 0;
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
          }
      o.a[part] = {dgates + 4 * padded_pixels * ch0, 4 * padded_pixels * c1, {4 * n * pixel_map.depth, 4 * n * pixel_map.height},
                   {o.offsets[part].data(), long(o.offsets[part].size()), 4 * n * kernel.w, 4 * n}};
    }
    o.depth = 4 * c1 * kernel.pixels();
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
    Packed packed;
    const T *w_back = nullptr, *w_dx = nullptr;
    Gather gather[3];
    std::vector<Phase> phases;
    // Sums over samples. Of the weights, w_ih's and w_hh's together (Winograd: transformed), each thread's part of the rows has its own, or
    // where they would crowd its cache each team. Of the bias each part, [block][gate, channel of the block]; of the peepholes each team.
    T *sums = nullptr, *dbias = nullptr, *dpeephole = nullptr;
    long sums_size = 0, copies = 1, teams = 1;
    bool crowded = false;
    std::vector<long> dw[2];  // where those of w_ih and w_hh are of dw_size numbers, the direct engine's sums: [block][k][columns rounded up]
    long dw_size = 0;
  };

  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  // Channels of x and h whose weights' gradients are wanted.
  long sum_channels(const Plan& plan) const { return (plan.w_ih ? p.x_channels : 0) + (plan.w_hh ? p.channels : 0); }
  long ld_bias() const { return round_up(4 * c1, 16); }  // twice for each part: all rows', and those of its last ones

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
    if (p.time > 1 || plan.h0 || plan.dx_like_dh) plan.w_back = tiling ? pack_winograd_back(plan.dx_like_dh) : pack_taps(plan.dx_like_dh);
    if (plan.dx && kx() && !plan.dx_like_dh) {
      T* w_dx = workspace.template take<T>(4 * c1 * round_up(kx(), k.lanes));
      const Tensor w = torch::stable::contiguous(*in.w_ih);
      const A* const data = Base::data(w);
      const long taps = p.x_conv.taps(), columns = kx();
      pack_panels(k, 4 * c1, columns, w_dx, [&](long i, long n) {
        return static_cast<T>(data[p.weight_row(i) * columns + n % p.x_channels * taps + n / p.x_channels]);
      });
      plan.w_dx = w_dx;
      const ConvDims& v = p.x_conv;
      plan.gather[0] = gather(p.in.d, p.out.d, v.kernel.d, v.stride.d, v.dilation.d, Base::x_maps.d);
      plan.gather[1] = gather(p.in.h, p.out.h, v.kernel.h, v.stride.h, v.dilation.h, Base::x_maps.h);
      plan.gather[2] = gather(p.in.w, p.out.w, v.kernel.w, v.stride.w, v.dilation.w, Base::x_maps.w);
    }
    make_sums(plan);
    return plan;
  }

  void make_sums(Plan& plan) {
    constexpr long kMostSums = 1 << 20;
    const bool wanted[2] = {plan.w_ih, plan.w_hh};
    const long k_of[2] = {kx(), kh()};
    for (int o = 0; o < 2; ++o)
      for (long b = 0; wanted[o] && b < p.blocks(); ++b) {
        plan.dw[o].push_back(plan.dw_size);
        plan.dw_size += k_of[o] * round_up(4 * p.block_channels(b), k.lanes);
      }
    plan.sums_size = round_up(tiling ? tiling.weights_size(sum_channels(plan), round_up(4 * c1, k.lanes)) : plan.dw_size, 16);
    const long bytes = plan.sums_size * sizeof(T), most = tiling ? Tiling<T>::kMostSums : kMostSums;
    plan.crowded = bytes > most;
    plan.phases = p.phases((bytes + most - 1) / most);
    for (const Phase& phase : plan.phases) {
      plan.teams = std::max(plan.teams, phase.teams);
      plan.copies = std::max(plan.copies, phase.teams * copies(plan, p.threads / phase.teams));
    }
    const auto zeros = [&](long n) {
      T* sums = workspace.template take<T>(n);
      parallel(n, [&](long begin, long end) { std::memset(static_cast<void*>(sums + begin), 0, (end - begin) * sizeof(T)); }, 1 << 14);
      return sums;
    };
    if (plan.sums_size) plan.sums = zeros(plan.copies * plan.sums_size);
    if (plan.bias) plan.dbias = zeros(p.threads * 2 * ld_bias());
    if (plan.peephole) plan.dpeephole = zeros(plan.teams * 3 * state);
  }

  // Of the sums, a team's.
  long copies(const Plan& plan, long team) const {
    if (tiling) return tiling.parts(team, 0, tiling.depth(sum_channels(plan)), 4 * c1, true).tiles;
    return plan.crowded ? 1 : team;
  }

  Gradients backward(const OptionalTensor& dh, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& h, const Tensor& c,
                     const Tensor& gates, const std::vector<int64_t>& needs) {
    const ScalarType narrow = scalar_type<A>();
    const bool lean = gates.numel() == 0;
    const Plan plan = make_plan(lean, needs);
    const ScalarType c0_dtype = plan.c0 ? in.c0->scalar_type() : scalar_type<T>();
    Tensor dx = plan.dx ? cpu::empty_like(*in.x) : empty_cpu({0}, narrow);  // in x's own layout
    if (plan.dx && p.varied()) torch::stable::zero_(dx);
    else if (plan.dx && poison_requested() && dx.numel()) poison(dx.mutable_data_ptr(), dx.numel() * dx.element_size());
    Tensor dh0 = plan.h0 ? Base::new_channels_last(shape_of(*in.h0), narrow) : empty_cpu({0}, narrow);
    Tensor dc0 = plan.c0 ? Base::new_channels_last(shape_of(*in.c0), c0_dtype) : empty_cpu({0}, c0_dtype);

    const Given given{dh, dh_n, dc_n, h, static_cast<const T*>(c.const_data_ptr()), lean ? nullptr : Base::data(gates),
                      defined(dh) && !Base::kNarrow && !(p.reverse && p.varied()) && dense_channels_last(*dh, 2)};
    for (const Phase& phase : plan.phases) {
      Workspace room;
      std::vector<Buffers> buffers;
      for (long i = 0; i < phase.teams; ++i) buffers.push_back(take_buffers(room, plan, given, phase));
      Base::run(phase, [&](long team, const Group& g, Pieces& pieces) { run_backward(plan, given, g, team, buffers[team], pieces, dx, dh0, dc0); });
    }

    Tensor dw_ih = plan.w_ih ? empty_cpu(shape_of(*in.w_ih), narrow) : empty_cpu({0}, narrow);
    Tensor dw_hh = plan.w_hh ? empty_cpu(shape_of(in.w_hh), narrow) : empty_cpu({0}, narrow);
    Tensor dbias = plan.bias ? empty_cpu({4 * c1}, narrow) : empty_cpu({0}, narrow);
    const T* dw = plan.sums;
    if (plan.sums && tiling) dw = winograd_weight_grads(plan);
    else if (plan.sums) add_copies(plan.sums, plan.copies, plan.sums_size);
    if (plan.w_ih) unpack_weight_grad(dw, plan.dw[0], p.x_channels, p.x_conv.taps(), Base::out_data(dw_ih));
    if (plan.w_hh) unpack_weight_grad(dw, plan.dw[1], c1, p.h_conv.taps(), Base::out_data(dw_hh));
    if (plan.bias) {
      add_copies(plan.dbias, p.threads, 2 * ld_bias());
      A* const to = Base::out_data(dbias);
      for (long n = 0; n < 4 * c1; ++n) to[p.weight_row(n)] = static_cast<A>(plan.dbias[n]);
    }
    if (plan.peephole) add_copies(plan.dpeephole, plan.teams, 3 * state);
    Tensor dp = plan.peephole ? empty_cpu(p.shape({3, c1}), narrow) : empty_cpu({0}, narrow);
    if (plan.peephole)
      for (long i = 0; i < 3; ++i) unpack_row(k, plan.dpeephole + i * state, c1, pixels, c1, Base::out_data(dp) + i * state, 1, pixels);
    return {dx, dw_ih, dw_hh, dbias, dp, dh0, dc0};
  }

  struct Given {
    const OptionalTensor &dh, &dh_n, &dc_n;
    const Tensor& h;
    const T* c;
    const A* gates;  // null = to be recomputed
    bool dh_direct;  // dh goes in as it lies
  };

  struct Buffers : Base::Buffers {
    T *dgates, *dh, *dc, *dh_given = nullptr, *c0 = nullptr, *h = nullptr, *dx = nullptr;
  };

  // Columns of dh, with dx's where that is like dh.
  long ld_dh(const Plan& plan) const { return round_up(plan.dx_like_dh ? dx_column() + p.x_channels : c1, k.lanes); }
  bool reads_x(const Plan& plan) const { return p.has_x && (plan.w_ih || plan.lean); }

  Buffers take_buffers(Workspace& room, const Plan& plan, const Given& given, const Phase& phase) const {
    const long samples = p.most_samples(phase);
    Buffers b{{p.threads / phase.teams, samples}};
    b.dgates = room.take<T>(4 * samples * padded_pixels * c1);
    b.dh = room.take<T>(samples * pixels * ld_dh(plan));
    b.dc = room.take<T>(samples * state);
    if (defined(in.c0)) b.c0 = room.take<T>(samples * state);
    if (defined(given.dh) && !given.dh_direct) b.dh_given = room.take<T>(samples * state);
    if (plan.w_hh || plan.lean) b.h = room.take<T>(samples * h_layout.frame);
    if (plan.w_dx) b.dx = room.take<T>(samples * pixels * round_up(kx(), k.lanes));
    if (reads_x(plan)) Base::take_x(room, b);
    Base::take_scratch(room, b, {4 * c1, Base::input_channels(), sum_channels(plan)});
    return b;
  }

  void run_backward(const Plan& plan, const Given& given, const Group& g, long team, const Buffers& b, Pieces& pieces, const Tensor& dx, const Tensor& dh0,
                    const Tensor& dc0) const {
    const long n_rows = p.out.rows(), dh_ld = ld_dh(plan);
    // Of the group's first sample, and from one to the next.
    const T* const c_all = given.c + g.first * p.time * state;
    const long all_frame = g.stride * p.time * state;
    T* const dgates = b.dgates;
    if (g.fresh) Base::clear(pieces, dgates, 4 * b.samples * padded_pixels * c1);
    if (defined(given.dh_n)) Base::pack_state(pieces, g, *given.dh_n, Base::plain_maps, b.dh, dh_ld);
    else Base::clear(pieces, b.dh, g.samples * pixels * dh_ld);
    if (defined(given.dc_n)) Base::pack_state(pieces, g, *given.dc_n, Base::plain_maps, b.dc);
    else Base::clear(pieces, b.dc, g.samples * state);
    if (b.c0) Base::pack_state(pieces, g, *in.c0, Base::plain_maps, b.c0);
    pieces.wait();

    DgatesOperand back, here;
    if (plan.w_back && !tiling) dgates_operand(dgates, true, back);
    if (plan.w_dx) dgates_operand(dgates, false, here);
    const long dx_padded = round_up(kx(), k.lanes);
    const Operand<T> operand[2] = {kx() ? x_layout.template operand<T>(b.x_frames, p.x_conv.stride.w) : Operand<T>{}, h_layout.template operand<T>(b.h, 1)};
    std::vector<WeightGrad<T>> wgrads;
    for (long block = 0; block < p.blocks(); ++block)
      for (int o = 0; o < 2; ++o) {
        if (plan.dw[o].empty()) continue;
        const long n = p.block_channels(block);
        WeightGrad<T> w{};
        w.a = operand[o];
        w.dgates = dgates + 4 * (padded_pixels * block * kBlock + origin * n);
        w.dgates_frame = 4 * padded_pixels * c1;
        w.dgates_map = {4 * n * pixel_map.depth, 4 * n * pixel_map.height};
        w.columns = 4 * n;
        w.dw = plan.sums + team * copies(plan, b.team) * plan.sums_size + plan.dw[o][block];
        wgrads.push_back(w);
      }

    // lean: the activated gates of one step, recomputed to where their gradients will lie.
    ConvLSTMStep<T> again{};
    if (plan.lean) {
      again = Base::step_arguments(plan.packed, b);
      again.blocked_gates = dgates;
      again.gates_frame = 4 * padded_pixels * c1;
      again.gates_pixels = padded_pixels;
      again.gates_origin = origin;
      again.gates_map = pixel_map;
    }

    // Two waits a step: for what its gates need, with the end of the step before; then for what they are for.
    if (reads_x(plan) && Base::same_x()) Base::pack_x(pieces, g, p.active(g, 0), 0, b.x_frames, b.gates_x);
    for (long step = p.time; step-- > 0;) {
      const std::vector<long> active = p.active(g, step);
      if (active.empty()) continue;
      const Rows r = Base::rows(active);
      const bool first = step == 0, has_h = !first || defined(in.h0);
      if (reads_x(plan) && !Base::same_x()) Base::pack_x(pieces, g, active, step, b.x_frames, b.gates_x);
      if (b.h && has_h) {
        if (first) Base::pack_state(pieces, g, *in.h0, Base::h_maps, b.h);
        else Base::template pack<A>(pieces, active, given.h, 2, Base::h_maps, b.h, [&](long i) { return p.row_of(g, i, step - 1) * state; });
      }
      const T* c_prev = first ? b.c0 : c_all + (step - 1) * state;
      const long c_prev_frame = first ? state : all_frame;
      if (plan.lean) {
        again.rows = r;
        again.h = has_h ? operand[1] : Operand<T>{};
        again.c_prev = c_prev;
        again.c_prev_frame = c_prev_frame;
        pieces.wait();
        Base::take_step(pieces, b, again);
      }
      if (b.dh_given)
        Base::template pack<A>(pieces, active, *given.dh, 2, Base::plain_maps, b.dh_given, [&, of_sample = given.dh->stride(0), of_frame = given.dh->stride(1)](long i) {
          return g.sample(i) * of_sample + p.frame_of(g.sample(i), step) * of_frame;
        });
      if (plan.lean || b.dh_given) pieces.wait();

      GatesBackward<T> cells{};
      cells.rows = r;
      cells.channels = c1;
      if (given.gates) cells.gates = kept(given.gates + 4 * (g.first * p.time + step) * state);
      cells.gates_frame = 4 * all_frame;
      cells.c_prev = c_prev;
      cells.c_prev_frame = c_prev_frame;
      cells.c = c_all + step * state;
      cells.c_frame = all_frame;
      cells.peephole = plan.packed.peephole;
      cells.dpeephole = plan.dpeephole ? plan.dpeephole + team * 3 * state : nullptr;
      cells.dh[0] = b.dh_given;
      cells.dh_frame[0] = state;
      if (given.dh_direct) {
        cells.dh[0] = reinterpret_cast<const T*>(given.dh->const_data_ptr()) + g.first * given.dh->stride(0) + p.frame_of(g.first, step) * given.dh->stride(1);
        cells.dh_frame[0] = g.stride * given.dh->stride(0);
      }
      cells.dh_stride[0] = c1;
      cells.dh[1] = b.dh;
      cells.dh_frame[1] = pixels * dh_ld;
      cells.dh_stride[1] = dh_ld;
      cells.dc = b.dc;
      cells.dc_frame = state;
      cells.dgates = dgates;
      cells.dgates_frame = 4 * padded_pixels * c1;
      cells.dgates_pixels = padded_pixels;
      cells.origin = origin;
      cells.map = pixel_map;
      take_parts(pieces, b.team, plan.dpeephole ? n_rows : r.samples * n_rows, [&](long begin, long end, long part) {
        if (plan.dbias) {
          cells.dbias = plan.dbias + (team * b.team + part) * 2 * ld_bias();
          cells.dbias_part = cells.dbias + ld_bias();
        }
        k.gates_backward(cells, begin, end);
      });
      pieces.wait();

      if (!first || plan.h0 || plan.dx_like_dh) {
        // Nobody wants dh before the first step; its columns can be left out where they are whole panels.
        const long unit = tiling ? long(kSlab) : k.panel, from = first && !plan.h0 && dx_column() % unit == 0 ? dx_column() : 0;
        const long columns = (plan.dx_like_dh ? dx_column() + p.x_channels : c1) - from, depth = back.depth;
        if (tiling) {
          const RowsGemm<T> gemm{r, {}, nullptr, columns, 0, b.dh + from, dh_ld};
          tiling.take(pieces, b.team, dgates_tiles(r, dgates, plan.w_back + tiling.weights_size(4 * c1, from)), columns,
                      [&](const Winograd<T>& w, const WinogradRange& range, long) { tiling.kernels->rows_gemm(gemm, w, range, Base::scratch(pieces, b)); });
        } else {
          const RowsGemm<T> gemm{r, {back.a[0], back.a[1]}, plan.w_back + depth * from, columns, depth, b.dh + from, dh_ld};
          pieces.take(r.samples * n_rows, [&](long begin, long end) { k.rows_gemm(gemm, begin, end); });
        }
      }
      if (b.dx) {
        const RowsGemm<T> gemm{r, {here.a[0], here.a[1]}, plan.w_dx, kx(), here.depth, b.dx, dx_padded};
        pieces.take(r.samples * n_rows, [&](long begin, long end) { k.rows_gemm(gemm, begin, end); });
      } else if (p.convolved && plan.dx) {
        unpack_dgates(pieces, g, active, step, dgates, dx);
      }
      if (tiling && plan.sums) take_winograd_sums(pieces, plan, b, team, r, has_h);
      else if (plan.sums) take_sums(pieces, plan, b, wgrads, r, has_h);
      pieces.wait();
      if (plan.dx_like_dh) unpack_dx(pieces, g, active, step, b.dh + dx_column(), dh_ld, dx);
      if (b.dx) gather_dx(pieces, g, active, step, b.dx, dx_padded, plan.gather, dx);
    }

    if (plan.h0 || plan.c0)
      pieces.take(g.samples, [&](long begin, long end) {
        for (long i = begin; i < end; ++i) {
          const long at = g.sample(i) * state;
          if (plan.h0) unpack_row(k, b.dh + i * pixels * dh_ld, dh_ld, pixels, c1, Base::out_data(dh0) + at, c1, 1);
          if (plan.c0 && dc0.scalar_type() == scalar_type<A>()) unpack_row(k, b.dc + i * state, c1, pixels, c1, Base::out_data(dc0) + at, c1, 1);
          else if (plan.c0) unpack_row(k, b.dc + i * state, c1, pixels, c1, static_cast<T*>(dc0.mutable_data_ptr()) + at, c1, 1);
        }
      });
    pieces.wait();  // the next group is to have the buffers
  }

  // call(begin, end, part) for a member's of the parts of [0, n), which are as many as its team is to have threads: what is summed in
  // which order does not depend on how many have come.
  template <class F>
  static void take_parts(Pieces& pieces, long parts, long n, const F& call) {
    pieces.take(parts, [&](long begin, long end) {
      for (long i = begin; i < end; ++i) call(n * i / parts, n * (i + 1) / parts, i);
    });
  }

  // All operands and blocks: the rows of each part, or all rows' tasks, end to end.
  void take_sums(Pieces& pieces, const Plan& plan, const Buffers& b, const std::vector<WeightGrad<T>>& wgrads, const Rows& rows, bool has_h) const {
    const long all_rows = rows.samples * rows.rows;
    std::vector<long> end_of;
    long total = 0;
    for (const auto& w : wgrads) {
      const bool skipped = !has_h && w.a.frames == b.h;
      end_of.push_back(total += skipped ? 0 : k.weight_grad_tasks(w.a.runs));
    }
    const auto tasks = [&](long begin, long end, long row, long row_end, long copy) {
      long start = 0;
      for (size_t i = 0; i < wgrads.size(); start = end_of[i++]) {
        const long first = std::max(begin, start) - start, last = std::min(end, end_of[i]) - start;
        if (first >= last) continue;
        WeightGrad<T> w = wgrads[i];
        w.rows = rows;
        w.row = row;
        w.row_end = row_end;
        w.dw += copy * plan.sums_size;
        k.weight_grad(w, first, last);
      }
    };
    if (plan.crowded) pieces.take(total, [&](long begin, long end) { tasks(begin, end, 0, all_rows, 0); });
    else take_parts(pieces, b.team, all_rows, [&](long begin, long end, long part) { tasks(0, total, begin, end, part); });
  }

  Winograd<T> dgates_tiles(const Rows& rows, const T* dgates, const T* weights) const {
    const long whole = c1 / kBlock, rest = 4 * (c1 % kBlock), frame = 4 * padded_pixels * c1;
    const WinogradInput<T> blocks{whole ? dgates : nullptr, frame, kSlab * pixel_map.depth, kSlab * pixel_map.height, kSlab, whole, kSlab * padded_pixels, kSlab};
    const WinogradInput<T> narrow{rest ? dgates + kSlab * whole * padded_pixels : nullptr, frame, rest * pixel_map.depth, rest * pixel_map.height, rest, 1, 0, rest};
    return tiling.problem(rows, blocks, narrow, 4 * c1, weights);
  }

  // w_hh, and w_ih behind it, turned round: from gates' gradients to those of h and x.
  T* pack_winograd_back(bool with_x) {
    const long taps = p.h_conv.taps(), narrow = 4 * (c1 % kBlock);
    const Turned turned(*this, with_x);
    return tiling.pack_filters(k, workspace, 4 * c1 - narrow, narrow, turned.columns(), [&](long first, long n, long column, long columns, T* to) {
      for (long i = 0; i < n; ++i) turned.read(p.weight_row(first + i), column, columns, to + i * taps * kSlab, kSlab);
    });
  }

  // w_hh, and w_ih behind it, with their taps turned round: columns are channels of h, and of x from dx_column() on.
  struct Turned {
    const Kernels<T>& k;
    const long hidden, inputs, split, taps;
    const bool with_x;
    const Tensor w_hh, w_ih;
    const A *const of_h, *const of_x;

    Turned(const Backward& b, bool with_x)
        : k(b.k), hidden(b.c1), inputs(b.p.x_channels), split(b.dx_column()), taps(b.p.h_conv.taps()), with_x(with_x),
          w_hh(torch::stable::contiguous(b.in.w_hh)), w_ih(with_x ? torch::stable::contiguous(*b.in.w_ih) : w_hh),
          of_h(Base::data(w_hh)), of_x(Base::data(w_ih)) {}

    long columns() const { return with_x ? split + inputs : hidden; }

    // Of a row of the weights so many columns from `first` on, [tap, the last one first][column], taps ld apart.
    void read(long row, long first, long columns, T* to, long ld) const {
      const long of_hidden = std::clamp(hidden - first, 0l, columns), none = std::clamp(split - first, of_hidden, columns);
      if (of_hidden) turn(of_h + (row * hidden + first) * taps, of_hidden, to, ld);
      for (long t = 0; none > of_hidden && t < taps; ++t) std::fill(to + t * ld + of_hidden, to + t * ld + none, T(0));
      if (columns > none) turn(of_x + (row * inputs + first + none - split) * taps, columns - none, to + none, ld);
    }

   private:
    // Taps of neighbouring channels lie side by side.
    void turn(const A* from, long channels, T* to, long ld) const {
      to += (taps - 1) * ld;
      if constexpr (std::is_same_v<A, T>) return k.transpose(channels, taps, from, taps, to, -ld);
      for (long t = 0; t < taps; ++t, to -= ld)
        for (long j = 0; j < channels; ++j) to[j] = static_cast<T>(from[j * taps + t]);
    }
  };

  void take_winograd_sums(Pieces& pieces, const Plan& plan, const Buffers& b, long team, const Rows& rows, bool has_h) const {
    const Winograd<T> w = tiling.problem(rows, Base::winograd_input(x_layout, plan.w_ih ? b.x_frames : nullptr),
                                         Base::winograd_input(h_layout, plan.w_hh && has_h ? b.h : nullptr), sum_channels(plan), nullptr);
    if (!w.a[0].frames && !w.a[1].frames) return;
    const GateFrames<T> g{b.dgates, 4 * padded_pixels * c1, padded_pixels, origin, pixel_map.depth, pixel_map.height, c1};
    T* const sums = plan.sums + team * copies(plan, b.team) * plan.sums_size;
    tiling.take(pieces, b.team, w, 4 * c1, [&](const Winograd<T>& w, const WinogradRange& range, long part) {
      tiling.kernels->weight_grad(w, g, range, Base::scratch(pieces, b), sums + part * plan.sums_size);
    });
  }

  // The first of so many copies becomes the sum of all.
  void add_copies(T* sums, long copies, long size) const {
    constexpr long kPiece = 1 << 12;
    if (copies == 1) return;
    parallel((size + kPiece - 1) / kPiece, [&](long begin, long end) {
      std::vector<const T*> terms(copies);
      for (long i = begin * kPiece; i < std::min(size, end * kPiece); i += kPiece) {
        for (long copy = 0; copy < copies; ++copy) terms[copy] = sums + copy * size + i;
        k.sum_rows(copies, terms.data(), std::min(kPiece, size - i), sums + i);
      }
    });
  }

  // From transformed sums to dw, as the direct kernels leave it.
  const T* winograd_weight_grads(const Plan& plan) {
    const long channels = sum_channels(plan), ci = plan.w_ih ? p.x_channels : 0, planes = tiling.kernels->planes, depth = tiling.depth(channels);
    T* const all = workspace.template take<T>(plan.dw_size);
    parallel(p.blocks() * channels, [&](long begin, long end) {
      alignas(64) T u[36 * kSlab], g[25 * kSlab];
      std::vector<const T*> terms(plan.copies);
      for (long i = begin; i < end; ++i) {
        const long b = i / channels, c = i % channels, ld = round_up(4 * p.block_channels(b), k.lanes);
        T* const dw = all + (c < ci ? plan.dw[0][b] + c * ld : plan.dw[1][b] + (c - ci) * ld);
        for (long piece = 0; piece < tiling.pieces(); ++piece) {
          const T* sums = plan.sums + kSlab * b * planes * depth + tiling.row(c, piece, ci, channels - ci) * ld;
          for (long plane = 0; plane < planes; ++plane, sums += depth * ld) {
            for (long copy = 0; copy < plan.copies; ++copy) terms[copy] = sums + copy * plan.sums_size;
            k.sum_rows(plan.copies, terms.data(), ld, u + plane * kSlab);
          }
          tiling.kernels->filter_gradient(u, ld, g);
          tiling.each_tap(piece, [&](long t, long tap) { std::memcpy(dw + tap * (c < ci ? ci : c1) * ld, g + t * kSlab, ld * sizeof(T)); });
        }
      }
    });
    return all;
  }

  // w_hh, and w_ih behind it, as GEMM operand over the taps of dgates, [panel][block][tap][gate, channel of the block][panel columns].
  T* pack_taps(bool with_x) {
    const long taps = p.h_conv.taps(), depth = 4 * c1 * taps;
    const Turned turned(*this, with_x);
    const long columns = turned.columns();
    T* packed = workspace.template take<T>(depth * round_up(columns, k.lanes));
    parallel((columns + k.panel - 1) / k.panel, [&](long begin, long end) {
      for (long first = begin * k.panel; first < std::min(columns, end * k.panel); first += k.panel) {
        const long left = columns - first, width = panel_width(k, left), real = std::min(left, width);
        T* to = packed + first * depth;
        if (real < width) std::fill_n(to, depth * width, T(0));
        for (long block = 0; block < p.blocks(); ++block) {
          const long n = 4 * p.block_channels(block);
          for (long j = 0; j < n; ++j, to += width) turned.read(p.weight_row(kSlab * block + j), first, real, to, n * width);
          to += (taps - 1) * n * width;
        }
      }
    });
    return packed;
  }

  // The group's ith sample's of dx at a step.
  A* frame_of(const Group& g, long i, long step, const Tensor& dx) const {
    const long sample = g.sample(i);
    return Base::out_data(dx) + sample * dx.stride(0) + p.frame_of(sample, step) * dx.stride(1);
  }

  void unpack_dx(Pieces& pieces, const Group& g, const std::vector<long>& active, long step, const T* rows, long ld, const Tensor& dx) const {
    const long n = p.in.rows();
    const FrameStrides strides = frame_strides(dx, 2);
    pieces.take(active.size() * n, [&](long begin, long end) {
      for (long r = begin; r < end; ++r) {
        const long s = active[r / n], d = (r % n) / p.in.h, y = (r % n) % p.in.h;
        A* dst = frame_of(g, s, step, dx) + d * strides.d + y * strides.h;
        unpack_row(k, rows + (s * n + r % n) * p.in.w * ld, ld, p.in.w, p.x_channels, dst, strides.w, strides.c);
      }
    });
  }

  // dx[q] = sum over the (tap, output) pairs that read q of dcol[output, tap].
  void gather_dx(Pieces& pieces, const Group& g, const std::vector<long>& active, long step, const T* dcol, long ld, const Gather (&along)[3], const Tensor& dx) const {
    const long n = p.in.rows(), ci = p.x_channels;
    const FrameStrides strides = frame_strides(dx, 2);
    pieces.take(active.size() * n, [&](long begin, long end) {
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
        A* dst = frame_of(g, s, step, dx) + d * strides.d + y * strides.h;
        unpack_row(k, sum.data(), ci, p.in.w, ci, dst, strides.w, strides.c);
      }
    });
  }

  // x was the input convolution's result: its gradient is dgates, in plain gate order.
  void unpack_dgates(Pieces& pieces, const Group& g, const std::vector<long>& active, long step, const T* dgates, const Tensor& dx) const {
    const long n_rows = p.out.rows();
    const FrameStrides strides = frame_strides(dx, 2);
    pieces.take(active.size() * n_rows, [&](long begin, long end) {
      for (long r = begin; r < end; ++r) {
        const long s = active[r / n_rows], row = r % n_rows;
        const long at = origin + row / p.out.h * pixel_map.depth + row % p.out.h * pixel_map.height;
        A* dst = frame_of(g, s, step, dx) + row / p.out.h * strides.d + row % p.out.h * strides.h;
        for (long b = 0; b < p.blocks(); ++b) {
          const long n = p.block_channels(b), ch = b * kBlock;
          const T* src = dgates + 4 * (padded_pixels * (s * c1 + ch) + at * n);
          for (long gate = 0; gate < 4; ++gate)
            unpack_row(k, src + gate * n, 4 * n, p.out.w, n, dst + (gate * c1 + ch) * strides.c, strides.w, strides.c);
        }
      }
    });
  }

  // Of the sums at `at`, [block][tap][channel][gate, channel of block], to [4C, channels, taps].
  void unpack_weight_grad(const T* sums, const std::vector<long>& at, long channels, long taps, A* out) const {
    const long together = std::max(1l, 64 / taps), pieces = (channels + together - 1) / together;  // channels, whose sums stay in L1
    parallel(long(at.size()) * pieces, [&](long begin, long end) {
      std::vector<T> rows(together * taps * kSlab), turned;
      if (!std::is_same_v<A, T>) turned.resize(together * taps * kSlab);
      for (long i = begin; i < end; ++i) {
        const long block = i / pieces, first = i % pieces * together, count = std::min(together, channels - first), size = count * taps;
        const long n = p.block_channels(block), ld = round_up(4 * n, k.lanes);
        const T* const dw = sums + at[block];
        for (long c = 0; c < count; ++c)
          for (long t = 0; t < taps; ++t) std::copy_n(dw + (t * channels + first + c) * ld, 4 * n, rows.data() + (c * taps + t) * kSlab);
        for (long gate = 0; gate < 4; ++gate) {
          const T* const of_gate = rows.data() + gate * n;
          A* const to = out + ((gate * c1 + block * kBlock) * channels + first) * taps;
          if constexpr (std::is_same_v<A, T>) {
            k.transpose(size, n, of_gate, kSlab, to, channels * taps);
          } else {
            k.transpose(size, n, of_gate, kSlab, turned.data(), size);
            for (long j = 0; j < n; ++j) convert(turned.data() + j * size, size, to + j * channels * taps);
          }
        }
      }
    });
  }
};

}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast
