// The LSTM's backward: gradients of the gates step by step, dx and the weights' gradients chunk by chunk.
#pragma once
#include <algorithm>

#include "lstm_forward.h"

namespace convfast {
namespace cpu {
namespace lstm {

template <class A>
struct Backward : Engine<A> {
  using Base = Engine<A>;
  using T = typename Base::T;
  using Base::Base;
  using Base::columns;
  using Base::data;
  using Base::hidden;
  using Base::in;
  using Base::inputs;
  using Base::k;
  using Base::ldh;
  using Base::ldx;
  using Base::ldz;
  using Base::out_data;
  using Base::p;
  using Base::plan;
  using Base::rows_of;
  using Base::size;
  using Base::workspace;

  enum Need { kX, kWih, kWhh, kBias, kPeephole, kWhr, kReverse, kH0 = 11, kC0 };

  struct Given {
    OptionalTensor dy, dh_n, dc_n;
    Tensor y, c, gates;
  };

  // One direction's weights as the kernels read them, [4H] or [P] long in K, and which of its gradients are wanted.
  struct Weights {
    const T *w_ih, *w_hh, *w_hr, *peephole;
    long ld_ih, ld_hh, ld_hr;         // 0: packed
    const Part *split_ih, *split_hh;  // splits_z(): instead of w_ih (where pays_for_x()) and w_hh
    bool need_ih, need_hh, need_bias, need_peephole, need_hr;
  };

  // Whether the products are of bfloat16, as forward; z is rounded to it. float16 and float32 would be products of several parts.
  bool splits_z() const { return std::is_same_v<A, BFloat16> && plan.by_parts() && plan.together(); }
  bool pays_for_x() const { return inputs > kSlab / 2; }
  long split_gates() const { return round_up(4 * hidden, kSplitDepth); }
  long split_ldz() const { return round_up(4 * hidden, kSlab) + kSplitDepth; }
  long ld_dx() const { return splits_z() ? leading(round_up(inputs, kSlab)) : ldx; }

  // Of a chunk: z, [row][split_ldz()], and the same as a second operand; rows of x or of h, where they are not in one piece, the same as
  // a second operand, and their transpose, [I or P][ld]. And dh of a step, where it is not of all rows.
  struct SplitBuffers {
    Part *z, *z_pairs, *rows, *row_pairs, *transposed, *zeros;
    long ld;
    T *dh, *no_bias;
  };

  SplitBuffers take_split(long rows_of_step, long rows) {
    const auto take = [&](long n) { return workspace.template take<Part>(n); };
    const long depth = round_up(rows, kSplitDepth), most = std::max(inputs, size), columns = round_up(std::max(most, 4 * hidden), kSlab);
    SplitBuffers b;
    b.z = take((rows + kTileRows) * split_ldz());
    b.z_pairs = take(depth * round_up(4 * hidden, kSlab));
    b.rows = take(depth * most);
    b.row_pairs = take(depth * round_up(most, kSlab));
    b.ld = depth + kSplitDepth;
    b.transposed = take(round_up(most, kTileRows) * b.ld);
    b.zeros = take(columns);
    b.dh = workspace.template take<T>(round_up(rows_of_step, kTileRows) * ldh);
    b.no_bias = workspace.template take<T>(columns);
    std::fill_n(b.zeros, columns, Part(0));
    std::fill_n(b.no_bias, columns, T(0));
    return b;
  }

  // Of a part of the rows: scratch, and sums over its rows.
  struct Buffers {
    T *z, *c0, *dm, *m, *dhs;                      // m and its dh: of a chunk, where w_hr's gradient is wanted
    T *dw_ih, *dw_hh, *dbias, *dpeephole, *dw_hr;  // [4H][I], [4H][P], whole vectors, [ldz], [3][H], [P][H], whole vectors; null = not wanted
    std::vector<T*> dh, dc, x, h, dx, dy;          // of each member; dh: of all together where a projection mixes the hidden units
    SplitBuffers split;                            // splits_z(); the sums of weights are transposed then, [I][ldz] and [P][ldz]
  };

  static const T* wide_data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

  // From row to row of a weight where it is read as it lies, else 0. Few rows for few steps would take about as long as the packing, which
  // the threads of a team wait for; more of them are faster with it: columns of rows that are a power of two apart share sets of the cache.
  long reads_directly(const Tensor& w) const {
    constexpr long kFew = 16, kFewOfTeam = 384;  // samples times steps
    const bool whole = hidden % kBlock == 0 && w.size(1) % k.lanes == 0 && w.stride(1) == 1;
    return !Base::kNarrow && p.batch * p.time < (plan.sharing().team > 1 ? kFewOfTeam : kFew) && whole ? w.stride(0) : 0;
  }

  // Gradients of gates as an operand for weights with rows in the order of blocks or, unpacked, of gates.
  std::vector<long> gates_first;
  Runs gates_of(long ld) const { return ld ? Runs{gates_first.data(), long(gates_first.size()), kBlock, ldz} : rows_of(4 * hidden, ldz); }

  // w [4H, n] with its rows in the order of blocks: [panel][4H][panel columns].
  const T* pack_back(const Tensor& w, long n) {
    return pack_back(w, n, [&](long i) { return p.weight_row(i); });
  }

  // A GEMM operand whose row i is row order(i) of w [.., n].
  template <class F>
  const T* pack_back(const Tensor& w, long n, const F& order) {
    const long rows = w.size(0), s0 = w.stride(0), s1 = w.stride(1);
    T* packed = workspace.template take<T>(rows * round_up(n, k.lanes));
    const A* source = data(w);
    std::vector<long> row(rows);
    for (long i = 0; i < rows; ++i) row[i] = order(i) * s0;
    parallel((n + k.panel - 1) / k.panel, [&](long begin, long end) {
      for (long first = begin * k.panel; first < std::min(n, end * k.panel); first += k.panel) {
        const long left = n - first, width = panel_width(k, left), real = std::min(left, width);
        T* to = packed + first * rows;
        for (long i = 0; i < rows; ++i, to += width) {
          Base::read(source + row[i] + first * s1, s1, real, to);
          std::fill(to + real, to + width, T(0));
        }
      }
    });
    return packed;
  }

  // The same as a second operand of split_by.
  const Part* pack_back_split(const Tensor& w, long n) {
    Part* packed = workspace.template take<Part>(split_size(n, split_gates(), 1));
    const long s0 = w.stride(0), s1 = w.stride(1);
    parallel(split_gates() / kSplitDepth, [&](long begin, long end) {
      const std::vector<Part> zeros(n);
      std::vector<A> copy(s1 == 1 ? 0 : 4 * hidden * n);
      std::vector<const Part*> rows(4 * hidden);
      for (long i = begin * kSplitDepth; i < std::min(4 * hidden, end * kSplitDepth); ++i) {
        const A* row = data(w) + p.weight_row(i) * s0;
        if (s1 != 1) {
          Base::read(row, s1, n, copy.data() + i * n);
          row = copy.data() + i * n;
        }
        rows[i] = reinterpret_cast<const Part*>(row);
      }
      pair_split(rows.data(), 4 * hidden, zeros.data(), n, packed, begin, end);
    });
    return packed;
  }

  Weights pack(long d, const std::vector<int64_t>& needs) {
    const Direction& from = in.directions[d];
    const auto need = [&](Need n) { return needs[n + (d ? kReverse - kWih : 0)] != 0; };
    Weights w{};
    w.need_ih = need(kWih);
    w.need_hh = need(kWhh);
    w.need_bias = need(kBias) && from.bias;
    w.need_peephole = need(kPeephole) && from.peephole;
    w.need_hr = need(kWhr) && from.w_hr;
    w.ld_ih = reads_directly(from.w_ih);
    w.ld_hh = reads_directly(from.w_hh);
    if (needs[kX] && splits_z() && pays_for_x()) w.split_ih = pack_back_split(from.w_ih, inputs);
    else if (needs[kX]) w.w_ih = w.ld_ih ? wide_data(from.w_ih) : pack_back(from.w_ih, inputs);
    if (p.time == 1 && !(needs[kH0] && in.h0)) w.w_hh = nullptr;  // no step goes on to one before
    else if (splits_z()) w.split_hh = pack_back_split(from.w_hh, size);
    else w.w_hh = w.ld_hh ? wide_data(from.w_hh) : pack_back(from.w_hh, size);
    if (from.peephole) {
      T* packed = workspace.template take<T>(3 * hidden);
      Base::pack_peephole(*from.peephole, packed);
      w.peephole = packed;
    }
    if (from.w_hr) {
      w.ld_hr = reads_directly(*from.w_hr);
      w.w_hr = w.ld_hr ? wide_data(*from.w_hr) : pack_back(*from.w_hr, hidden, [](long i) { return i; });
    }
    return w;
  }

  std::vector<std::pair<T*, long>> sums;  // that clear_sums() has still to set to zero

  T* new_sum(T* sum, long n) {
    sums.emplace_back(sum, n);
    return sum;
  }
  T* new_sum(long n) { return new_sum(workspace.template take<T>(n), n); }

  void clear_sums() {
    parallel(sums.size(), [&](long begin, long end) {
      for (long i = begin; i < end; ++i) std::fill_n(sums[i].first, sums[i].second, T(0));
    });
    sums.clear();
  }

  // A part's sum of a weight's gradient, rows rounded up to vectors: the gradient itself where it can be.
  T* weight_sum(const Tensor& gradient, bool first) {
    const long rows = gradient.size(0), channels = gradient.size(1);
    if (!first || Base::kNarrow || channels % k.lanes) return new_sum(rows * round_up(channels, k.lanes));
    return new_sum(static_cast<T*>(gradient.mutable_data_ptr()), gradient.numel());
  }

  // The same of the gates' rows.
  T* gates_sum(const Tensor& gradient, bool first) {
    return splits_z() ? new_sum(round_up(gradient.size(1), kTileRows) * ldz) : weight_sum(gradient, first);
  }

  // Adds rows of z (columns of blocks [begin, end)) times rows of x or h to the gradient of a weight.
  void add_weight_gradient(long rows, const T* z, long begin, long end, const T* other, long ld, long channels, T* sum) const {
    std::vector<long> from, to;
    const long ldw = round_up(channels, k.lanes);
    for (long block = begin; block < end; ++block) {
      const long width = std::min<long>(kBlock, hidden - block * kBlock);
      for (long gate = 0; gate < 4; ++gate) {
        from.push_back(block * kSlab + gate * width);
        to.push_back(p.weight_row(from.back()) * ldw);
      }
      if (block + 1 < end && hidden - (block + 1) * kBlock >= kBlock) continue;
      k.outer_sum({rows, z, {from.data(), long(from.size()), width, ldz}, other, ld, channels, sum, ldw, to.data()});
      from.clear();
      to.clear();
    }
  }

  // Whether a step of a chunk started from anything but zeros.
  bool has_h(const Chunk& chunk) const { return chunk.end > 1 || in.h0; }

  void add_weight_gradients(const Weights& w, const Buffers& b, const Group& g, const Chunk& chunk, const SequenceOf<const A>& y, const Member& member) const {
    const auto mine = Base::share(member);
    if (w.need_ih) {
      T* x = b.x[member.rank];
      Base::read_x(g, chunk, x);
      add_weight_gradient(chunk.rows(), b.z, mine.block, mine.block_end, x, ldx, inputs, b.dw_ih);
    }
    if (w.need_hh && has_h(chunk)) {
      T* h = b.h[member.rank];
      read_h(g, chunk, y, h);
      add_weight_gradient(chunk.rows(), b.z, mine.block, mine.block_end, h, ldh, size, b.dw_hh);
    }
  }

  std::vector<Tensor> backward(const Given& given, const std::vector<int64_t>& needs) {
    plan.pass = Plan<A>::kGradients;
    const ScalarType narrow = scalar_type<A>(), wide = scalar_type<T>();
    std::vector<Tensor> grads;
    for (size_t i = 0; i < needs.size(); ++i) grads.push_back(empty_cpu({0}, narrow));
    Tensor& dx = grads[kX];
    if (needs[kX]) {
      dx = cpu::empty_like(in.x);
      if (std::any_of(p.lengths.begin(), p.lengths.end(), [&](long n) { return n < p.time; })) torch::stable::zero_(dx);
    }
    if (needs[kH0] && in.h0) grads[kH0] = empty_cpu({p.directions, p.batch, size}, narrow);
    grads[kC0] = needs[kC0] && in.c0 ? empty_cpu({p.directions, p.batch, hidden}, in.c0->scalar_type()) : empty_cpu({0}, wide);
    for (long gate = 0; gate < 4; ++gate)
      for (long block = 0; block < hidden / kBlock; ++block) gates_first.push_back(block * kSlab + gate * kBlock);
    const auto s = plan.sharing();
    // With two directions the sum of their dx, before it is rounded; of each, where both run at once.
    const long numbers = p.batch * p.time * inputs;
    T* dx_sum = needs[kX] && p.directions == 2 ? workspace.template take<T>(s.abreast * numbers) : nullptr;
    for (long d = 0; d < p.directions; d += s.abreast) {
      std::vector<Weights> weights;
      std::vector<std::vector<Buffers>> parts;
      const auto to = [&](long direction) { return grads.data() + (direction ? kReverse - kWih : 0); };
      for (long i = d; i < d + s.abreast; ++i) {
        weights.push_back(pack(i, needs));
        parts.push_back(take_parts(weights.back(), needs[kX], given.dy.has_value(), to(i)));
      }
      clear_sums();
      Base::run(d, [&](const Group& g, long part, const Member& member) {
        const long i = g.direction - d;
        T* sum = dx_sum ? dx_sum + i * numbers : nullptr;
        run_backward(g, weights[i], parts[i][part % s.parts], member, given, dx, sum, grads[kH0], grads[kC0]);
      });
      for (long i = 0; i < s.abreast; ++i) finish(weights[i], parts[i], to(d + i));
    }
    if (dx_sum && s.abreast > 1) add_directions(dx_sum, dx_sum + numbers, SequenceOf<A>(dx));
    return grads;
  }

  // Buffers of a direction's parts, and its weights' gradients.
  std::vector<Buffers> take_parts(const Weights& w, bool need_x, bool has_dy, Tensor* to) {
    const auto s = plan.sharing();
    const ScalarType narrow = scalar_type<A>();
    const long rows = plan.most_rows(s), steps = plan.steps_of_chunk();
    if (w.need_ih) to[kWih] = empty_cpu({4 * hidden, inputs}, narrow);
    if (w.need_hh) to[kWhh] = empty_cpu({4 * hidden, size}, narrow);
    if (w.need_hr) to[kWhr] = empty_cpu({size, hidden}, narrow);
    std::vector<Buffers> parts(s.parts);
    for (Buffers& b : parts) {
      b.z = workspace.template take<T>(steps * rows * ldz);
      b.c0 = in.c0 ? workspace.template take<T>(rows * ldh) : nullptr;
      b.dm = w.w_hr ? workspace.template take<T>(rows * ldh) : nullptr;
      b.m = w.need_hr ? workspace.template take<T>(steps * rows * ldh) : nullptr;
      b.dhs = w.need_hr ? workspace.template take<T>(steps * rows * ldh) : nullptr;
      const bool first = &b == parts.data();
      b.dw_ih = w.need_ih ? gates_sum(to[kWih], first) : nullptr;
      b.dw_hh = w.need_hh ? gates_sum(to[kWhh], first) : nullptr;
      b.dw_hr = w.need_hr ? weight_sum(to[kWhr], first) : nullptr;
      b.dbias = w.need_bias ? new_sum(ldz) : nullptr;
      b.dpeephole = w.need_peephole ? new_sum(3 * hidden) : nullptr;
      for (long i = 0; i < s.team; ++i) {
        b.dh.push_back(i > 0 && w.w_hr ? b.dh[0] : workspace.template take<T>(round_up(rows, kTileRows) * ldh));
        b.dc.push_back(workspace.template take<T>(rows * ldh));
        b.x.push_back(w.need_ih && !splits_z() ? workspace.template take<T>(steps * rows * ldx) : nullptr);
        b.h.push_back(w.need_hh && !splits_z() ? workspace.template take<T>(steps * rows * ldh) : nullptr);
        b.dx.push_back(need_x ? workspace.template take<T>(round_up(steps * rows, kTileRows) * ld_dx()) : nullptr);
        b.dy.push_back(has_dy ? workspace.template take<T>(rows * ldh) : nullptr);
      }
      if (splits_z()) b.split = take_split(rows, steps * rows);
    }
    return parts;
  }

  void run_backward(const Group& g, const Weights w, const Buffers& b, const Member& member, const Given& given, const Tensor& dx, T* dx_sum,
                    const Tensor& dh0, const Tensor& dc0) {
    const auto [first, last, ch, ch_end, column, n] = Base::share(member);
    const auto [h_begin, h_end] = Base::outputs_of(member);
    const long most = g.length(0), steps = plan.steps_of_chunk();
    const T* c_all = static_cast<const T*>(given.c.const_data_ptr());
    const A* gates_all = data(given.gates);
    const T one = 1;
    T *dh = b.dh[member.rank], *dc = b.dc[member.rank];
    Base::read_state(given.dh_n, g, h_begin, h_end, dh, ldh);
    Base::read_state(given.dc_n, g, ch, ch_end, dc, ldh);
    if (b.c0) Base::read_state(in.c0, g, ch, ch_end, b.c0, ldh);
    const SequenceOf<const A> dys = given.dy ? SequenceOf<const A>(*given.dy) : SequenceOf<const A>(), ys(given.y);
    const SequenceOf<A> dxs(dx);
    std::vector<const T*> dy(g.rows), next_dy(g.rows);
    // What the forward kept of a step.
    const auto cells_of = [&](long s, long rows) {
      LstmCells<T> cells{};
      cells.rows = rows;
      cells.channels = hidden;
      cells.gates = kept(gates_all + g.saved_row(s) * 4 * hidden);
      cells.ldg = g.stride * 4 * hidden;
      cells.c_prev = s > 0 ? c_all + g.saved_row(s - 1) * hidden : b.c0;
      cells.ldc_prev = s > 0 ? g.stride * hidden : ldh;
      cells.c = const_cast<T*>(c_all) + g.saved_row(s) * hidden;
      cells.ldc = g.stride * hidden;
      return cells;
    };
    for (long begin = most ? (most - 1) / steps * steps : -1; begin >= 0; begin -= steps) {
      const Chunk chunk(g, begin, std::min(most, begin + steps));
      for (long s = chunk.end; s-- > begin;) {
        const long rows = chunk.active(s);
        LstmCells<T> cells = cells_of(s, rows), next{};
        cells.begin = first;
        cells.end = last;
        cells.z = b.z + chunk.at(s) * ldz;
        cells.ldz = ldz;
        cells.peephole = w.peephole;
        cells.dh = dh;
        cells.ldh = ldh;
        if (given.dy) read_dy(g, s, rows, dys, b.dy[member.rank], dy.data());
        cells.dy = given.dy ? dy.data() : nullptr;
        cells.dc = dc;
        cells.ld_dc = ldh;
        cells.dpeephole = b.dpeephole;
        if (s > begin) {
          next = cells_of(s - 1, rows);
          if (reads_dy_directly(dys)) {
            point_at_dy(g, s - 1, rows, dys, next_dy.data());
            next.dy = next_dy.data();
          }
          cells.next = &next;
        }
        if (w.w_hr) project_back(w, b, member, chunk.at(s), cells);
        k.lstm_cells_backward(cells);
        member.wait();
        const bool goes_on = s > 0 || dh0.numel();
        if (splits_z()) split_back(w, b, rows, cells.z, chunk.at(s), goes_on, rows == g.rows);
        else if (goes_on)
          k.gemm({rows, {cells.z}, {gates_of(w.ld_hh)}, w.w_hh + h_begin * (w.ld_hh ? 1 : 4 * hidden), 4 * hidden, h_end - h_begin, nullptr, 0, dh + h_begin, ldh, w.ld_hh});
      }
      if (splits_z()) add_split_weight_gradients(w, b, g, chunk, ys);
      else add_weight_gradients(w, b, g, chunk, ys, member);
      if (w.need_hr) add_projection_gradient(b, g, chunk, c_all, gates_all, member);
      if (w.need_bias) k.outer_sum({chunk.rows(), &one, rows_of(1, 0), b.z + column, ldz, n, b.dbias + column, ldz});
      if (w.split_ih) {
        if constexpr (std::is_same_v<A, BFloat16>)
          plan.split_by->gemm({chunk.rows(), 1, b.split.z, 0, split_ldz(), w.split_ih, split_gates(), round_up(inputs, kSlab), b.split.no_bias, b.dx[0], ld_dx()});
        write_dx(g, chunk, 0, chunk.rows(), b.dx[0], dxs, dx_sum);
      } else if (w.w_ih) {
        const long from = member.begin(chunk.rows()), rows = member.end(chunk.rows()) - from;
        T* out = b.dx[member.rank];
        k.gemm({rows, {b.z + from * ldz}, {gates_of(w.ld_ih)}, w.w_ih, 4 * hidden, inputs, nullptr, 0, out, ld_dx(), w.ld_ih});
        write_dx(g, chunk, from, from + rows, out, dxs, dx_sum);
      }
      member.wait();
    }
    for (long i = 0; i < g.rows; ++i) {
      const long row = g.direction * p.batch + g.sample(i);
      if (dh0.numel()) Base::write(dh + i * ldh + h_begin, h_end - h_begin, out_data(dh0) + row * size + h_begin);
      if (!dc0.numel()) continue;
      const T* from = dc + i * ldh + ch;
      if (dc0.scalar_type() == scalar_type<A>()) Base::write(from, ch_end - ch, out_data(dc0) + row * hidden + ch);
      else Base::write(from, ch_end - ch, static_cast<T*>(dc0.mutable_data_ptr()) + row * hidden + ch);
    }
    member.wait();
  }

  // z of a step, from row `at` of its chunk, rounded to a part; and of it the gradient of h before. `all`: of all rows of the group.
  void split_back(const Weights& w, const Buffers& b, long rows, const T* z, long at, bool goes_on, bool all) const {
    if constexpr (std::is_same_v<A, BFloat16>) {
      Part* to = b.split.z + at * split_ldz();
      plan.split_by->split({rows, 4 * hidden, 1, z, ldz, to, 0, split_ldz()});
      if (!goes_on) return;
      T* dh = all ? b.dh[0] : b.split.dh;  // rows are written up to a whole tile, and others have theirs already
      plan.split_by->gemm({rows, 1, to, 0, split_ldz(), w.split_hh, split_gates(), round_up(size, kSlab), b.split.no_bias, dh, ldh});
      for (long i = 0; !all && i < rows; ++i) std::copy_n(dh + i * ldh, size, b.dh[0] + i * ldh);
    }
  }

  void add_split_weight_gradients(const Weights& w, const Buffers& b, const Group& g, const Chunk& chunk, const SequenceOf<const A>& y) const {
    if constexpr (std::is_same_v<A, BFloat16>) {
      const SplitBuffers& split = b.split;
      const long n = chunk.rows(), depths = (n + kSplitDepth - 1) / kSplitDepth, k = depths * kSplitDepth;
      std::vector<const Part*> row(n);
      const auto add = [&](long channels, T* sum) {
        pair_split(row.data(), n, split.zeros, channels, split.row_pairs, 0, depths);
        transpose_split(split.row_pairs, k, channels, split.transposed, split.ld);
        plan.split_by->gemm({channels, 1, split.transposed, 0, split.ld, split.z_pairs, k, round_up(4 * hidden, kSlab), nullptr, sum, ldz});
      };
      const auto point_at = [&](long i, const A* from, long stride, long channels) {
        A* copy = reinterpret_cast<A*>(split.rows) + i * channels;
        if (stride != 1) Base::read(from, stride, channels, copy);
        row[i] = reinterpret_cast<const Part*>(stride != 1 ? copy : from);
      };
      if (w.need_ih || w.need_hh) {
        for (long i = 0; i < n; ++i) row[i] = split.z + i * split_ldz();
        pair_split(row.data(), n, split.zeros, 4 * hidden, split.z_pairs, 0, depths);
      }
      if (w.need_ih) {
        for (long s = chunk.begin; s < chunk.end; ++s)
          for (long i = 0; i < chunk.active(s); ++i) point_at(chunk.at(s) + i, Base::frames.at(g.sample(i), g.frame(i, s)), Base::frames.feature, inputs);
        add(inputs, b.dw_ih);
      }
      if (w.need_hh && Backward::has_h(chunk)) {
        for (long s = chunk.begin; s < chunk.end; ++s)
          for (long i = 0; i < chunk.active(s); ++i) {
            const long at = chunk.at(s) + i;
            if (s > 0) point_at(at, y.at(g.sample(i), g.frame(i, s - 1)) + g.direction * size, 1, size);
            else if (in.h0) point_at(at, data(*in.h0) + g.direction * in.h0->stride(0) + g.sample(i) * in.h0->stride(1), in.h0->stride(2), size);
            else row[at] = split.zeros;
          }
        add(size, b.dw_hh);
      }
    }
  }

  // Whether rows of dy are read as they lie.
  bool reads_dy_directly(const SequenceOf<const A>& dy) const { return !Base::kNarrow && dy.data && dy.feature == 1; }

  void point_at_dy(const Group& g, long step, long rows, const SequenceOf<const A>& dy, const T** row) const {
    for (long i = 0; i < rows; ++i) row[i] = reinterpret_cast<const T*>(dy.at(g.sample(i), g.frame(i, step)) + g.direction * size);
  }

  void read_dy(const Group& g, long step, long rows, const SequenceOf<const A>& dy, T* scratch, const T** row) const {
    if (reads_dy_directly(dy)) return point_at_dy(g, step, rows, dy, row);
    for (long i = 0; i < rows; ++i) {
      Base::read(dy.at(g.sample(i), g.frame(i, step)) + g.direction * size * dy.feature, dy.feature, size, scratch + i * ldh);
      row[i] = scratch + i * ldh;
    }
  }

  // h that each row of a chunk started from, [row][ldh].
  void read_h(const Group& g, const Chunk& chunk, const SequenceOf<const A>& y, T* to) const {
    for (long s = chunk.begin; s < chunk.end; ++s)
      for (long i = 0; i < chunk.active(s); ++i) {
        T* row = to + (chunk.at(s) + i) * ldh;
        if (s > 0) Base::read(y.at(g.sample(i), g.frame(i, s - 1)) + g.direction * size, 1, size, row);
        else if (in.h0) Base::read(data(*in.h0) + g.direction * in.h0->stride(0) + g.sample(i) * in.h0->stride(1), in.h0->stride(2), size, row);
        else std::fill(row, row + size, T(0));
      }
  }

  void write_dx(const Group& g, const Chunk& chunk, long begin, long end, const T* from, const SequenceOf<A>& dx, T* dx_sum) const {
    const bool adds = g.direction == 1 && plan.sharing().abreast == 1;
    for (long s = chunk.begin; s < chunk.end; ++s)
      for (long i = std::max<long>(0, begin - chunk.at(s)); i < std::min(chunk.active(s), end - chunk.at(s)); ++i) {
        const long sample = g.sample(i), frame = g.frame(i, s);
        T* row = const_cast<T*>(from) + (chunk.at(s) + i - begin) * ld_dx();
        if (dx_sum) {
          T* sum = dx_sum + (sample * p.time + frame) * inputs;
          if (!adds) {
            Base::write(row, inputs, sum);
            continue;
          }
          for (long j = 0; j < inputs; ++j) row[j] += sum[j];
        }
        Base::write(row, inputs, dx.at(sample, frame), dx.feature);
      }
  }

  // dx of two directions that ran at once.
  void add_directions(const T* one, const T* other, const SequenceOf<A>& dx) const {
    parallel(p.batch * p.time, [&](long begin, long end) {
      std::vector<T> sum(inputs);
      for (long i = begin; i < end; ++i) {
        const long sample = i / p.time, frame = i % p.time;
        if (frame >= p.lengths[sample]) continue;
        for (long j = 0; j < inputs; ++j) sum[j] = one[i * inputs + j] + other[i * inputs + j];
        Base::write(sum.data(), inputs, dx.at(sample, frame), dx.feature);
      }
    }, std::max(1l, kPackGrain / inputs));
  }

  // h = w_hr m: from the gradient of h, with dy, to that of m, which takes its place. A member's part of both. `at`: the step's first row of
  // its chunk.
  void project_back(const Weights& w, const Buffers& b, const Member& member, long at, LstmCells<T>& cells) const {
    const auto mine = Base::share(member);
    const auto [out, end] = Base::outputs_of(member);
    T* dh = b.dh[0];
    for (long i = 0; i < cells.rows; ++i) {
      T* row = dh + i * ldh;
      for (long j = out; cells.dy && j < end; ++j) row[j] += cells.dy[i][j];
      if (w.need_hr) std::copy(row + out, row + end, b.dhs + (at + i) * ldh + out);
    }
    member.wait();
    Base::ask_for(member, cells.rows, dh, size);
    k.gemm({cells.rows, {dh}, {rows_of(size, ldh)}, w.w_hr + mine.ch * (w.ld_hr ? 1 : size), size, mine.ch_end - mine.ch, nullptr, 0, b.dm + mine.ch, ldh, w.ld_hr});
    cells.dh = b.dm;
    cells.dy = nullptr;
  }

  // Adds dh times m = o tanh(c), a member's hidden units, to the gradient of w_hr.
  void add_projection_gradient(const Buffers& b, const Group& g, const Chunk& chunk, const T* c, const A* gates, const Member& member) const {
    const auto mine = Base::share(member);
    const long n = mine.ch_end - mine.ch;
    for (long s = chunk.begin; s < chunk.end; ++s)
      for (long i = 0; i < chunk.active(s); ++i) {
        const long from = g.saved_row(s) + i * g.stride;
        T* m = b.m + (chunk.at(s) + i) * ldh;
        k.tanh(n, c + from * hidden + mine.ch, m + mine.ch);
        for (long ch = mine.ch; ch < mine.ch_end; ch += kBlock) {
          const long width = std::min<long>(kBlock, hidden - ch);
          const A* o = gates + from * 4 * hidden + 4 * ch + 3 * width;
          for (long j = 0; j < width; ++j) m[ch + j] *= static_cast<T>(o[j]);
        }
      }
    k.outer_sum({chunk.rows(), b.dhs, rows_of(size, ldh), b.m + mine.ch, ldh, n, b.dw_hr + mine.ch, round_up(hidden, k.lanes)});
  }

  // Sums over the parts, [channels][ldz], to a gradient [4H][channels].
  void add_transposed_parts(const std::vector<Buffers>& parts, T* Buffers::*sum, const Tensor& gradient) const {
    constexpr long kWide = 16;
    const long channels = gradient.size(1), n = parts.size();
    parallel((4 * hidden + kWide - 1) / kWide, [&](long begin, long end) {
      std::vector<T> turned(n * kWide * channels), total(channels);
      std::vector<const T*> terms(n);
      for (long column = begin * kWide; column < std::min(4 * hidden, end * kWide); column += kWide) {
        const long wide = std::min(kWide, 4 * hidden - column);
        for (long j = 0; j < n; ++j) k.transpose(channels, wide, parts[j].*sum + column, ldz, turned.data() + j * kWide * channels, channels);
        for (long i = 0; i < wide; ++i) {
          for (long j = 0; j < n; ++j) terms[j] = turned.data() + (j * kWide + i) * channels;
          k.sum_rows(n, terms.data(), channels, total.data());
          Base::write(total.data(), channels, out_data(gradient) + p.weight_row(column + i) * channels);
        }
      }
    });
  }

  // Sums over the parts, [rows][ld], to a gradient [rows][channels], which may be the first of them.
  void add_parts(const std::vector<Buffers>& parts, T* Buffers::*sum, long ld, const Tensor& gradient) const {
    const long channels = gradient.size(1);
    if (parts.size() == 1 && parts[0].*sum == gradient.const_data_ptr()) return;
    parallel(gradient.size(0), [&](long begin, long end) {
      std::vector<T> total(channels);
      std::vector<const T*> terms(parts.size());
      for (long i = begin; i < end; ++i) {
        for (size_t j = 0; j < parts.size(); ++j) terms[j] = parts[j].*sum + i * ld;
        k.sum_rows(terms.size(), terms.data(), channels, total.data());
        Base::write(total.data(), channels, out_data(gradient) + i * channels);
      }
    });
  }

  // The same for [ldz] in columns of blocks.
  Tensor bias_gradient(const std::vector<Buffers>& parts) const {
    Tensor out = empty_cpu({4 * hidden}, scalar_type<A>());
    A* const to = out_data(out);
    for (long column = 0; column < 4 * hidden; ++column) {
      T total = 0;
      for (const Buffers& b : parts) total += b.dbias[column];
      to[p.weight_row(column)] = static_cast<A>(total);
    }
    return out;
  }

  void finish(const Weights& w, const std::vector<Buffers>& parts, Tensor* to) const {
    if (splits_z()) {
      if (w.need_ih) add_transposed_parts(parts, &Buffers::dw_ih, to[kWih]);
      if (w.need_hh) add_transposed_parts(parts, &Buffers::dw_hh, to[kWhh]);
    } else {
      if (w.need_ih) add_parts(parts, &Buffers::dw_ih, round_up(inputs, k.lanes), to[kWih]);
      if (w.need_hh) add_parts(parts, &Buffers::dw_hh, round_up(size, k.lanes), to[kWhh]);
    }
    if (w.need_bias) to[kBias] = bias_gradient(parts);
    if (w.need_peephole) add_parts(parts, &Buffers::dpeephole, hidden, to[kPeephole] = empty_cpu({3, hidden}, scalar_type<A>()));
    if (w.need_hr) add_parts(parts, &Buffers::dw_hr, round_up(hidden, k.lanes), to[kWhr]);
  }
};

}  // namespace lstm
}  // namespace cpu
}  // namespace convfast
