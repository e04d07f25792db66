// The LSTM's forward: weights as GEMM operands, buffers, and the steps of each thread.
#pragma once
#include "lstm_plan.h"

namespace convfast {
namespace cpu {
namespace lstm {

constexpr long kZero = 0;

// The engine for activations A, cell arithmetic T.
template <class A>
struct Engine {
  using T = Wide<A>;
  static constexpr bool kNarrow = !std::is_same_v<A, T>;
  static constexpr long kParts = kSplitParts<A>;
  // Bytes of h that a stage of a pipeline may be ahead of the next one: what a busy machine takes from one, the other does not lose. More
  // than the next one's L2, which has let go of a line before it is written again.
  static constexpr long kAhead = 4 << 20;

  Plan<A> plan;
  const Problem& p = plan.p;
  Inputs in;
  const Kernels<T>& k = kernels<T>();
  Workspace workspace;
  SequenceOf<const A> frames;  // of x
  const long hidden = p.hidden, size = p.size, inputs = p.inputs, columns = plan.columns;
  const long ldz = p.ldz(), ldh = p.ldh(), ldx = leading(inputs);

  Engine(const Problem& problem, const Inputs& inputs_) : plan(problem), in(inputs_), frames(in.x) {}

  void set_x(const Tensor& x) {
    in.x = x;
    frames = SequenceOf<const A>(x);
  }

  static const A* data(const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); }
  static A* out_data(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }
  static Runs rows_of(long length, long stride) { return {&kZero, 1, length, stride}; }

  // call(group, part, member) on every member of every team, group after group of its part's rows; of the directions from the first on that
  // run at once, whose parts are counted through.
  template <class F>
  void run(long first_direction, const F& call) {
    const auto s = plan.sharing();
    const long most = plan.most_rows(s);
    in_teams(s.abreast * s.parts, s.team, [&](long of_all, const Member& member) {
      const long part = of_all % s.parts, direction = first_direction + of_all / s.parts;
      // Neighbours in memory; where lengths differ, each part has as many long ones as short ones.
      const long stride = in.lengths ? s.parts : 1, first = in.lengths ? part : p.batch * part / s.parts;
      const long rows = in.lengths ? (p.batch - part + s.parts - 1) / s.parts : p.batch * (part + 1) / s.parts - first;
      for (long i = 0; i < rows; i += most) call(Group{&p, direction, first + i * stride, stride, std::min(most, rows - i)}, of_all, member);
    });
  }

  // What of the hidden units is a member's: blocks, channels, and columns of the gates.
  struct Share {
    long block, block_end, ch, ch_end, column, columns;
  };

  Share share(const Member& m) const {
    const long first = 2 * m.begin(plan.units()), last = std::min(p.blocks(), 2 * m.end(plan.units()));
    return {first, last, first * kBlock, std::min(hidden, last * kBlock), first * kSlab, std::min(columns, last * kSlab) - first * kSlab};
  }

  struct Packed {
    T *w_ih, *w_hh, *bias, *peephole, *w_hr;  // together(): w_ih is both, one above the other
    Part *split_ih, *split_hh;                // by_parts(): instead of w_ih and w_hh; together(): split_ih is both
  };

  // Rows [first, first + n) of a GEMM operand of `all` rows from w [4H, n], the gates' columns in blocks: [panel][all][panel columns].
  void pack_matrix(const Tensor& w, long n, T* packed, long first, long all) const {
    parallel((columns + k.panel - 1) / k.panel, [&](long begin, long end) {
      for (long start = begin * k.panel; start < std::min(columns, end * k.panel); start += k.panel) pack_panel(w, n, start, packed + start * all, first);
    }, std::max(1l, kPackGrain / (n * k.panel)));
  }

  // The panel from column `start` on.
  void pack_panel(const Tensor& w, long n, long start, T* panel, long first) const {
    const long left = columns - start, width = panel_width(k, left), real = std::min(4 * hidden - start, width);
    panel += first * width;
    read_columns(k, data(w), w.stride(0), w.stride(1), n, hidden, start, real, panel, width);
    clear_rest(panel, n, real, width);
  }

  // Columns [real, width) of a panel of n rows.
  static void clear_rest(T* panel, long n, long real, long width) {
    for (long i = 0; real < width && i < n; ++i) std::fill(panel + i * width + real, panel + (i + 1) * width, T(0));
  }

  // Columns [begin, end), whole panels, of the operand of a linear layer w [O, n].
  void pack_linear(const Tensor& w, long begin, long end, T* packed) const {
    const long outputs = w.size(0), n = w.size(1);
    std::vector<T> wide;
    for (long first = begin; first < std::min(outputs, end); first += k.panel) {
      const long left = outputs - first, width = panel_width(k, left), real = std::min(left, width);
      turn_rows(k, data(w) + first * w.stride(0), w.stride(0), w.stride(1), n, real, packed + first * n, width, wide);
      clear_rest(packed + first * n, n, real, width);
    }
  }

  void pack_linear(const Tensor& w, T* packed) const {
    const long outputs = w.size(0);
    parallel((outputs + k.panel - 1) / k.panel, [&](long begin, long end) { pack_linear(w, begin * k.panel, end * k.panel, packed); },
             std::max(1l, kPackGrain / (w.size(1) * k.panel)));
  }

  void pack_peephole(const Tensor& t, T* to) const {
    for (long i = 0; i < 3; ++i) read(data(t) + i * t.stride(0), t.stride(1), hidden, to + i * hidden);
  }

  // Room for a direction's weights.
  Packed take(const Direction& d) {
    Packed to{};
    to.bias = workspace.take<T>(round_up(4 * hidden, kSlab));
    if (d.peephole) to.peephole = workspace.take<T>(3 * hidden);
    if (d.w_hr) to.w_hr = workspace.take<T>(hidden * round_up(size, k.lanes));
    if (plan.once()) return to;
    if (plan.by_parts()) {
      to.split_ih = workspace.take<Part>(split_size(4 * hidden, plan.together() ? plan.split_depth() : plan.split_x(), kParts));
      if (!plan.together()) to.split_hh = workspace.take<Part>(split_size(4 * hidden, plan.split_h(), kParts));
    } else {  // one above the other, or two buffers, which the backward will take for its own
      to.w_ih = workspace.take<T>((plan.together() ? inputs + size : inputs) * columns);
      if (!plan.together()) to.w_hh = workspace.take<T>(size * columns);
    }
    return to;
  }

  void pack(const Direction& d, const Packed& to) const {
    std::fill(to.bias, to.bias + round_up(4 * hidden, kSlab), T(0));
    for (const OptionalTensor& term : {d.bias, d.second_bias}) {
      if (!term) continue;
      const A* source = data(*term);
      const long stride = term->stride(0);
      for (long n = 0; n < 4 * hidden; ++n) to.bias[n] = static_cast<T>(static_cast<A>(to.bias[n] + static_cast<T>(source[p.weight_row(n) * stride])));
    }
    if (d.peephole) pack_peephole(*d.peephole, to.peephole);
    if (plan.once()) return;
    if (d.w_hr) pack_linear(*d.w_hr, to.w_hr);
    if (plan.by_parts()) {
      const auto pack_columns = [&](long depth, bool of_x, bool of_h, Part* packed) {
        pack_split<Unsplit<A>>(*plan.split_by, 4 * hidden, depth, kParts, packed, [&](long column, Unsplit<A>* row) { read_column(d, column, depth, of_x, of_h, row); });
      };
      if (plan.together()) return pack_columns(plan.split_depth(), true, true, to.split_ih);
      pack_columns(plan.split_x(), true, false, to.split_ih);
      pack_columns(plan.split_h(), false, true, to.split_hh);
    } else {
      const long all = inputs + size;
      pack_matrix(d.w_ih, inputs, to.w_ih, 0, plan.together() ? all : inputs);
      if (plan.together()) pack_matrix(d.w_hh, size, to.w_ih, inputs, all);
      else pack_matrix(d.w_hh, size, to.w_hh, 0, size);
    }
  }

  // A column of the gates: its weights for x, for h, or for both, one behind the other, in `depth` numbers.
  void read_column(const Direction& d, long column, long depth, bool of_x, bool of_h, Unsplit<A>* to) const {
    const auto read_row = [row = p.weight_row(column)](const Tensor& w, long n, Unsplit<A>* to) {
      read(unsplit(data(w)) + row * w.stride(0), w.stride(1), n, to);
    };
    std::fill(to, to + depth, Unsplit<A>(0));
    if (of_x) read_row(d.w_ih, inputs, to);
    if (of_h) read_row(d.w_hh, size, to + (of_x ? plan.split_x() : 0));
  }

  // n elements, `stride` apart.
  template <class B, class C>
  static void read(const B* from, long stride, long n, C* to) {
    if (stride == 1) return convert(from, n, to);
    for (long i = 0; i < n; ++i) to[i] = static_cast<C>(from[i * stride]);
  }

  template <class B>
  static void write(const T* from, long n, B* to, long stride = 1) {
    if (stride == 1) return convert(from, n, to);
    for (long i = 0; i < n; ++i) to[i * stride] = static_cast<B>(from[i]);
  }

  // Which row of the states a direction has.
  long state_row(long direction) const { return in.layer * p.directions + direction; }

  // Channels [begin, end) of a state [.., B, n] in activations or in the wide type.
  void read_state(const OptionalTensor& t, const Group& g, long begin, long end, T* to, long ld) const {
    for (long i = 0; i < g.rows; ++i) {
      T* row = to + i * ld;
      if (!t) {
        std::fill(row + begin, row + end, T(0));
        continue;
      }
      const long at = state_row(g.direction) * t->stride(0) + g.sample(i) * t->stride(1) + begin * t->stride(2);
      if (t->scalar_type() == scalar_type<A>()) read(data(*t) + at, t->stride(2), end - begin, row + begin);
      else read(static_cast<const T*>(t->const_data_ptr()) + at, t->stride(2), end - begin, row + begin);
    }
  }

  // Rows of a group are equally far apart in x and y: no lengths have changed their order.
  bool regular() const { return !in.lengths && !kNarrow; }

  // Whether rows of x can be read as they lie. At multiples of a page they would share cache sets.
  bool reads_x_directly(const Group& g) const {
    constexpr long kPage = 4096;
    return regular() && frames.feature == 1 && (g.rows == 1 || g.stride * frames.sample * long(sizeof(T)) % kPage != 0);
  }

  // The input rows of a chunk, [row][ldx].
  void read_x(const Group& g, const Chunk& chunk, T* to) const {
    for (long s = chunk.begin; s < chunk.end; ++s)
      for (long i = 0; i < chunk.active(s); ++i)
        read(frames.at(g.sample(i), g.frame(i, s)), frames.feature, inputs, to + (chunk.at(s) + i) * ldx);
  }

  struct Outputs {
    OptionalTensor y;
    Tensor h_n, c_n;
    OptionalTensor c, gates;  // what is saved
    bool stream_gates = false;
  };

  Tensor empty_output(bool time_major, long channels) const {
    const std::vector<int64_t> order = time_major ? std::vector<int64_t>{1, 0, 2} : std::vector<int64_t>{0, 1, 2};
    return empty_ordered({p.batch, p.time, channels}, order, scalar_type<A>());
  }
  // What the layer above checks its weights against, in place of an output that may never be in memory.
  Tensor shape_of_output() const { return empty_strided({p.batch, p.time, p.directions * size}, {0, 0, 1}, scalar_type<A>()); }
  Tensor empty_h() const { return empty_cpu({in.layers * p.directions, p.batch, size}, scalar_type<A>()); }
  Tensor empty_c() const { return empty_cpu({in.layers * p.directions, p.batch, hidden}, scalar_type<T>()); }
  Tensor empty_saved(long n, ScalarType dtype) const { return empty_cpu({p.directions, p.batch, p.time, n}, dtype); }

  // A linear layer as the kernels read it.
  struct PackedHead {
    const T *weight = nullptr, *bias = nullptr;
    long inputs = 0, outputs = 0;
    long ld() const { return leading(outputs); }
  };
  PackedHead head;  // of forward(): y is what it gives

  // A head that a thread can apply to h of a step, which it has in cache; else project() does it at the end.
  bool takes_head() const { return p.directions == 1 && !plan.shares_units(); }

  void set_head(const Head& from) { head = pack(from); }

  PackedHead pack(const Head& from) {
    const long outputs = from.weight->size(0), n = from.weight->size(1);
    T *weight = workspace.take<T>(n * round_up(outputs, k.lanes)), *bias = workspace.take<T>(round_up(outputs, k.lanes));
    pack_linear(*from.weight, weight);
    std::fill(bias, bias + round_up(outputs, k.lanes), T(0));
    if (from.bias) read(data(*from.bias), from.bias->stride(0), outputs, bias);
    return {weight, bias, n, outputs};
  }

  void apply(const PackedHead& to, long rows, const T* h, long ld, T* out) const {
    k.gemm({rows, {h}, {rows_of(to.inputs, ld)}, to.weight, to.inputs, to.outputs, to.bias, 0, out, to.ld()});
  }

  // y [B, T, D P] through a linear layer.
  void project(const Tensor& y, const Head& from, const Tensor& to) {
    constexpr long kRows = 64;
    const PackedHead packed = pack(from);
    const SequenceOf<const A> rows(y);
    const SequenceOf<A> results(to);
    const long chunks = (p.time + kRows - 1) / kRows, ld = leading(packed.inputs);
    parallel(p.batch * chunks, [&](long begin, long end) {
      std::vector<T> h(kRows * ld), out(kRows * packed.ld());
      for (long task = begin; task < end; ++task) {
        const long sample = task / chunks, first = task % chunks * kRows, n = std::min(kRows, p.time - first);
        for (long i = 0; i < n; ++i) read(rows.at(sample, first + i), 1, packed.inputs, h.data() + i * ld);
        apply(packed, n, h.data(), ld, out.data());
        for (long i = 0; i < n; ++i) write(out.data() + i * packed.ld(), packed.outputs, results.at(sample, first + i));
      }
    });
  }

  struct Buffers {
    std::vector<T*> x, c;  // of each member
    T *z, *h, *m, *out;    // z: each member's columns apart, see task()
    long z_rows;
    long slots, slot;   // steps that h is kept of, the newest in place of the oldest; elements of one, [rows][ldh]
    Part* split;        // together(): x and h of a step
    std::vector<Part*> split_own;  // of each member, else: x of a chunk, h of a step; once(): both
    std::vector<T*> slab;          // once(): of each member, weights of a block; by_parts() their parts

    T* h_after(long steps) const { return h + (steps + slots - 1) % slots * slot; }
  };

  std::vector<Buffers> buffers() {
    const auto s = plan.sharing();
    const long rows = plan.most_rows(s), steps = plan.steps_of_chunk(), at_once = plan.together() ? 1 : steps;
    std::vector<Buffers> parts(s.abreast * s.parts);
    for (Buffers& b : parts) {
      b.z_rows = at_once * (plan.by_tiles() ? round_up(rows, kTileRows) : rows);
      b.z = workspace.take<T>(b.z_rows * (ldz + s.team * leading(2 * kSlab)));
      for (long i = 0; i < s.team; ++i) b.c.push_back(workspace.take<T>(rows * ldh));
      b.split = plan.by_parts() && plan.together() && !plan.once() ? workspace.take<Part>(round_up(rows, kTileRows) * plan.split_ld()) : nullptr;
      const bool own = plan.by_parts() && (!plan.together() || plan.once());
      b.slot = rows * ldh;
      b.slots = plan.stages > 1 ? round_up(std::clamp<long>(kAhead / (b.slot * long(sizeof(T))), 2 * steps, p.time + 1), steps) : std::max(2l, plan.turn);
      b.h = workspace.take<T>(b.slots * b.slot);
      b.m = in.directions[0].w_hr ? workspace.take<T>(rows * ldh) : nullptr;
      b.out = head.weight ? workspace.take<T>(rows * head.ld()) : nullptr;
      for (long i = 0; i < s.team; ++i) b.x.push_back(workspace.take<T>(at_once * rows * ldx));
      for (long i = 0; own && i < s.team; ++i) b.split_own.push_back(workspace.take<Part>(at_once * rows * (plan.once() ? plan.split_ld() : std::max(plan.split_x(), plan.split_h()) + kSplitDepth)));
      for (long i = 0; plan.once() && i < s.team; ++i) b.slab.push_back(workspace.take<T>(kSlab * plan.split_depth()));
    }
    return parts;
  }

  // A member's work on the rows of a group: start(), step() by step, finish().
  struct Task {
    const Group& g;
    const Packed w;
    const Buffers& b;
    const Member& member;
    const Outputs& outputs;
    SequenceOf<A> y;  // null: nobody but the layer above reads it
    T* c;             // null: not kept
    A* gates;         // the same
    T* z;             // of a chunk, [row][ldz]
    long ldz;
  };

  Task task(const Group& g, const Packed& w, const Buffers& b, const Member& member, const Outputs& outputs) const {
    T *c = outputs.c ? static_cast<T*>(outputs.c->mutable_data_ptr()) : nullptr, *z = b.z;
    long ld = ldz;
    if (const long n = member.team->size(); n > 1) {
      // Side by side, what a core fetches ahead of its own columns would be its neighbour's.
      ld = leading((plan.units() + n - 1) / n * 2 * kSlab);
      z += member.rank * b.z_rows * ld - share(member).column;
    }
    return {g, w, b, member, outputs, outputs.y ? SequenceOf<A>(*outputs.y) : SequenceOf<A>(), c, outputs.gates ? out_data(*outputs.gates) : nullptr, z, ld};
  }

  static std::vector<const Plan<A>*> plans(const std::vector<Engine*>& layers) {
    std::vector<const Plan<A>*> all;
    for (const Engine* layer : layers) all.push_back(&layer->plan);
    return all;
  }

  void forward(const Outputs& all) {
    if (p.batch == 0) return;
    plan.pass = all.gates ? Plan<A>::kTraining : Plan<A>::kInference;
    const std::vector<Buffers> parts = buffers();
    const long abreast = plan.sharing().abreast;
    for (long d = 0; d < p.directions; d += abreast) {
      std::vector<Packed> weights;
      for (long i = d; i < d + abreast; ++i) {
        weights.push_back(take(in.directions[i]));
        pack(in.directions[i], weights.back());
      }
      run(d, [&](const Group& g, long part, const Member& member) {
        run_layers({this}, {task(g, weights[g.direction - d], parts[part], member, all)}, 0, 1, nullptr);
      });
    }
  }

  // Layers of a pipeline, or that take turns, so that what one gives the next one reads while it is in cache.
  static void forward(const std::vector<Engine*>& layers, const std::vector<Outputs>& all) {
    const long turn = Plan<A>::turn_of(plans(layers));
    for (Engine* layer : layers) layer->plan.turn = turn;
    std::vector<std::vector<Buffers>> parts;
    std::vector<Packed> weights;
    std::vector<std::vector<Progress>> progress;  // of each part, layer by layer
    for (Engine* layer : layers) {
      parts.push_back(layer->buffers());
      weights.push_back(layer->take(layer->in.directions[0]));
    }
    const long n = layers.size();
    const bool pipeline = layers[0]->plan.stages > 1, own = pipeline && parts[0].size() == 1;  // own: a layer is one thread's, who packs its weights
    const auto pack = [&](long i) { layers[i]->pack(layers[i]->in.directions[0], weights[i]); };
    for (long i = 0; !own && i < n; ++i) pack(i);
    for (size_t part = 0; pipeline && part < parts[0].size(); ++part) progress.emplace_back(n);
    layers[0]->run(0, [&](const Group& g, long part, const Member& member) {
      const long first = member.begin(n), last = member.end(n);
      try {
        Team alone(1);
        long turn = 0;
        const Member one{&alone, alone.join(0), &turn};
        for (long i = first; own && i < last; ++i) pack(i);
        std::vector<Task> tasks;
        for (long i = 0; i < n; ++i) tasks.push_back(layers[i]->task(g, weights[i], parts[i][part], pipeline ? one : member, all[i]));
        if (pipeline) run_layers(layers, tasks, first, last, progress[part].data());
        else run_layers(layers, tasks, 0, n, nullptr);
      } catch (...) {
        for (long i = first; pipeline && i < last; ++i) progress[part][i].fail();
        throw;
      }
    });
  }

  // Rows of x at a step, [row][stride].
  struct RowsOfX {
    const T* data;
    long stride;
  };

  RowsOfX rows_of_x(const Task& t, const Chunk& chunk) const {
    if (plan.together() && (t.w.split_ih ? regular() && frames.feature == 1 : reads_x_directly(t.g)))
      return {reinterpret_cast<const T*>(frames.at(t.g.sample(0), t.g.frame(0, chunk.begin))), t.g.stride * frames.sample};
    T* x = t.b.x[t.member.rank];
    read_x(t.g, chunk, x);
    return {x, ldx};
  }

  // The same of what the layer below gives.
  RowsOfX rows_of_h(const Task& t, const Chunk& chunk, const Engine& below, const Buffers& given) const {
    if (chunk.end - chunk.begin == 1 || chunk.rows() * below.ldh == (chunk.end - chunk.begin) * given.slot) return {given.h_after(chunk.begin + 1), below.ldh};
    T* x = t.b.x[t.member.rank];
    for (long s = chunk.begin; s < chunk.end; ++s)
      for (long i = 0; i < chunk.active(s); ++i) read(given.h_after(s + 1) + i * below.ldh, 1, inputs, x + (chunk.at(s) + i) * ldx);
    return {x, ldx};
  }

  // Layers [first, last), chunk by chunk. `progress`: of every layer, where others are other threads'.
  static void run_layers(const std::vector<Engine*>& layers, const std::vector<Task>& tasks, long first, long last, Progress* progress) {
    const Group& g = tasks[0].g;
    // All layers are together() or none: they have the same rows, and those of a pipeline weights that L2 holds.
    const long steps = layers[0]->plan.steps_of_chunk(), each = layers[0]->plan.together() ? 1 : steps, most = g.length(0);
    for (long i = first; i < last; ++i) layers[i]->start(tasks[i]);
    for (long begin = 0; begin < most; begin += steps) {
      const long end = std::min(most, begin + steps);
      for (long i = first; i < last; ++i) {
        if (progress && i > 0) progress[i - 1].wait(end);
        for (long at = begin; at < end; at += each) {
          const Chunk chunk(g, at, std::min(end, at + each));
          const RowsOfX x = i > 0 ? layers[i]->rows_of_h(tasks[i], chunk, *layers[i - 1], tasks[i - 1].b) : layers[i]->rows_of_x(tasks[i], chunk);
          layers[i]->take(tasks[i], chunk, x, progress && i + 1 < long(layers.size()) ? &progress[i + 1] : nullptr);
        }
        if (progress) progress[i].reach(end);
      }
    }
    for (long i = first; i < last; ++i) layers[i]->finish(tasks[i]);
  }

  // The steps of a chunk. `above`: who reads h, which must not be overwritten before.
  void take(const Task& t, const Chunk& chunk, const RowsOfX& x, Progress* above) const {
    const bool whole = plan.together();
    if (!whole && t.w.split_ih) {
      split_chunk(t, chunk.rows(), x);
    } else if (!whole) {
      const Share mine = share(t.member);
      k.gemm({chunk.rows(), {x.data}, {rows_of(inputs, x.stride)}, t.w.w_ih + mine.column * inputs, inputs, mine.columns, t.w.bias + mine.column, 0,
              t.z + mine.column, t.ldz});
    }
    for (long s = chunk.begin; s < chunk.end; ++s) {
      if (above) above->wait(s + 1 - t.b.slots);
      step(t, s, chunk.active(s), t.z + chunk.at(s) * t.ldz, whole ? x : RowsOfX{nullptr, 0});
    }
  }

  // The input part of a chunk's gates, of parts.
  void split_chunk(const Task& t, long rows, const RowsOfX& x) const {
    if constexpr (std::is_same_v<T, float>) {
      const Share mine = share(t.member);
      const long ld = plan.split_x() + kSplitDepth;
      Part* own = t.b.split_own[t.member.rank];
      plan.split_by->split({rows, inputs, kParts, x.data, x.stride, own, 0, ld});
      plan.split_by->gemm({rows, kParts, own, 0, ld, t.w.split_ih + mine.column * plan.split_x(), plan.split_x(), round_up(mine.columns, kSlab), t.w.bias + mine.column,
                      t.z + mine.column, t.ldz});
    }
  }

  // A step's GEMM and cells; of x and h, or of h, where there is one.
  void step_by_parts(const Task& t, long rows, const T* before, T* z, const RowsOfX& x, const LstmCells<T>& cells) const {
    if constexpr (std::is_same_v<T, float>) {
      const long all = round_up(4 * hidden, kSlab);
      if (x.data) {
        split_rows(t.b, rows, inputs, x.data, x.stride, 0);
        plan.split_by->lstm_step({rows, kParts, t.b.split, plan.split_depth(), plan.split_ld(), t.w.split_ih, plan.split_depth(), all, t.w.bias, z, t.ldz}, cells);
      } else {
        const long ld = plan.split_h() + kSplitDepth;
        Part* own = t.b.split_own[t.member.rank];
        plan.split_by->split({rows, size, kParts, before, ldh, own, 0, ld});
        plan.split_by->lstm_step({rows, kParts, own, 0, ld, t.w.split_hh, plan.split_h(), all, nullptr, z, t.ldz}, cells);
      }
    }
  }

  // The step of once().
  void only_step(const Task& t, long rows, T* z, const RowsOfX& x, const LstmCells<T>& cells) const {
    const Direction& d = in.directions[t.g.direction];
    const Share mine = share(t.member);
    const T* h = in.h0 ? t.b.h_after(0) : nullptr;
    const long end = mine.column + mine.columns, deep = inputs + (h ? size : 0);
    T* slab = t.b.slab[t.member.rank];
    if constexpr (std::is_same_v<T, float>) {
      if (plan.by_parts()) {
        Part* own = t.b.split_own[t.member.rank];
        plan.split_by->split({rows, inputs, kParts, x.data, x.stride, own, plan.split_depth(), plan.split_ld()});
        plan.split_by->split({rows, size, kParts, t.b.h_after(0), ldh, own + plan.split_x(), plan.split_depth(), plan.split_ld()});
        for (long column = mine.column; column < end; column += kSlab) {
          Part* parts = reinterpret_cast<Part*>(slab);
          pack_split<Unsplit<A>>(*plan.split_by, std::min<long>(kSlab, 4 * hidden - column), plan.split_depth(), kParts, parts, [&](long i, Unsplit<A>* to) { read_column(d, column + i, plan.split_depth(), true, true, to); });
          plan.split_by->gemm({rows, kParts, own, plan.split_depth(), plan.split_ld(), parts, plan.split_depth(), kSlab, t.w.bias + column, z + column, t.ldz});
        }
        return k.lstm_step({rows, {nullptr}}, cells);
      }
    }
    for (long column = mine.column; column < end; column += kSlab) {
      const long n = std::min<long>(kSlab, end - column);
      for (long start = column; start < column + n; start += k.panel) {
        T* panel = slab + (start - column) * deep;
        pack_panel(d.w_ih, inputs, start, panel, 0);
        if (h) pack_panel(d.w_hh, size, start, panel, inputs);
      }
      k.gemm({rows, {x.data, h}, {rows_of(inputs, x.stride), rows_of(size, ldh)}, slab, deep, n, t.w.bias + column, 0, z + column, t.ldz});
    }
    k.lstm_step({rows, {nullptr}}, cells);
  }

  // What of h is a member's: its hidden units, or whole panels of what a projection makes of all of them.
  std::pair<long, long> outputs_of(const Member& member) const {
    const Share mine = share(member);
    if (!p.projected) return {mine.ch, mine.ch_end};
    const long panels = (size + k.panel - 1) / k.panel;
    return {std::min(size, member.begin(panels) * k.panel), std::min(size, member.end(panels) * k.panel)};
  }

  // What others wrote: all lines at once, not as a sum comes to each.
  void ask_for(const Member& member, long rows, const T* from, long n) const {
    if (member.team->size() == 1) return;
    for (long i = 0; i < rows; ++i)
      for (long j = 0; j < n; j += 64 / long(sizeof(T))) __builtin_prefetch(from + i * ldh + j);
  }

  // A member's columns of h = w_hr m.
  void project(const Task& t, long rows, T* h) const {
    const auto [out, end] = outputs_of(t.member);
    if (plan.once()) pack_linear(*in.directions[t.g.direction].w_hr, out, end, t.w.w_hr);
    t.member.wait();
    ask_for(t.member, rows, t.b.m, hidden);
    k.gemm({rows, {t.b.m}, {rows_of(hidden, ldh)}, t.w.w_hr + out * hidden, hidden, end - out, nullptr, 0, h + out, ldh});
  }

  void split_rows(const Buffers& b, long rows, long n, const T* from, long ld, long at) const {
    plan.split_by->split({rows, n, kParts, reinterpret_cast<const float*>(from), ld, b.split + at, plan.split_depth(), plan.split_ld()});
  }

  void start(const Task& t) const {
    const Share mine = share(t.member);
    const auto [out, out_end] = outputs_of(t.member);
    read_state(in.c0, t.g, mine.ch, mine.ch_end, t.b.c[t.member.rank], ldh);
    read_state(in.h0, t.g, out, out_end, t.b.h_after(0), ldh);
    if (t.b.split) split_rows(t.b, t.g.rows, size, t.b.h_after(0), ldh, plan.split_x());
    t.member.wait();
  }

  // Without x, its part of the gates is in z.
  void step(const Task& t, long s, long rows, T* z, const RowsOfX& x) const {
    const auto& [g, w, b, member, outputs, y, c, gates, all_z, ldz] = t;
    const Share mine = share(member);
    T* h = b.h_after(s + 1);
    const T* before = s > 0 || in.h0 ? b.h_after(s) : nullptr;
    const bool inside = !y.data || head.weight, direct_y = !inside && regular() && !w.w_hr;
    LstmCells<T> cells{};
    cells.rows = rows;
    cells.channels = hidden;
    cells.begin = mine.block;
    cells.end = mine.block_end;
    cells.z = z;
    cells.ldz = ldz;
    if (gates) cells.gates = kept(gates + g.saved_row(s) * 4 * hidden);
    cells.stream_gates = outputs.stream_gates;
    cells.ldg = g.stride * 4 * hidden;
    cells.c_prev = c && s > 0 ? c + g.saved_row(s - 1) * hidden : b.c[member.rank];
    cells.ldc_prev = c && s > 0 ? g.stride * hidden : ldh;
    cells.c = c ? c + g.saved_row(s) * hidden : b.c[member.rank];
    cells.ldc = c ? g.stride * hidden : ldh;
    cells.peephole = w.peephole;
    cells.h = w.w_hr ? b.m : h;
    cells.ldh = ldh;
    if constexpr (!kNarrow) {
      cells.y = direct_y ? y.at(g.sample(0), g.frame(0, s)) + g.direction * size : nullptr;
      cells.ldy = g.stride * y.sample;
    }
    if (before) ask_for(member, rows, before, size);
    if (plan.once()) only_step(t, rows, z, x, cells);
    else if (w.split_ih && (before || x.data)) step_by_parts(t, rows, before, z, x, cells);
    else if (x.data) k.lstm_step({rows, {x.data, before}, {rows_of(inputs, x.stride), rows_of(size, ldh)}, w.w_ih, inputs + size, columns, w.bias, 0, z, ldz}, cells);
    else k.lstm_step({rows, {before}, {rows_of(size, ldh)}, w.w_hh, size, columns, z, ldz, z, ldz}, cells);
    if (w.w_hr) project(t, rows, h);
    if (inside && kNarrow)
      for (long i = 0; i < rows; ++i) round_to<A>(size, h + i * ldh);
    if (head.weight) {
      apply(head, rows, h, ldh, b.out);
      for (long i = 0; i < rows; ++i) write(b.out + i * head.ld(), head.outputs, y.at(g.sample(i), g.frame(i, s)));
    }
    const auto [out, out_end] = outputs_of(member);
    for (long i = 0; !inside && !direct_y && i < rows; ++i) {
      A* to = y.at(g.sample(i), g.frame(i, s)) + g.direction * size + out;
      write(h + i * ldh + out, out_end - out, to);
      if constexpr (kNarrow) read(to, 1, out_end - out, h + i * ldh + out);
    }
    if (b.split && s + 1 < g.length(0)) split_rows(b, rows, size, h, ldh, plan.split_x());
    member.wait();
  }

  void finish(const Task& t) const {
    const auto& [g, w, b, member, outputs, y, c, gates, all_z, ldz] = t;
    const Share mine = share(member);
    const auto [out, out_end] = outputs_of(member);
    for (long i = 0; i < g.rows; ++i) {
      const long sample = g.sample(i), length = g.length(i), row = state_row(g.direction) * p.batch + sample;
      write(b.h_after(length) + i * ldh + out, out_end - out, out_data(outputs.h_n) + row * size + out);
      const T* last_c = c && length > 0 ? c + (g.saved_row(length - 1) + i * g.stride) * hidden : b.c[member.rank] + i * ldh;
      std::memcpy(static_cast<T*>(outputs.c_n.mutable_data_ptr()) + row * hidden + mine.ch, last_c + mine.ch, (mine.ch_end - mine.ch) * sizeof(T));
      for (long step = length; y.data && step < p.time; ++step) {
        A* to = y.at(sample, step) + g.direction * size;
        if (head.weight) write(head.bias, head.outputs, to);
        else std::fill(to + out, to + out_end, static_cast<A>(T(0)));
      }
    }
    member.wait();
  }
};

}  // namespace lstm
}  // namespace cpu
}  // namespace convfast
