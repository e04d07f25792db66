// LSTM on the CPU: glue between tensors and the kernels. The contract is in ops.h.
//
// A thread owns rows (samples) and runs their whole sequence, waiting for nobody. Where rows are few, threads share out the hidden units
// instead and wait for each other once a step (team.h); or, without gradients, the layers, each a few steps behind the one below. Else
// layers without gradients take turns of a few steps on every thread. Steps are taken in chunks: the input part of a chunk's gates is one
// GEMM over all its rows, and so are dx and the weights' gradients, while the chunk is in L2. Inside a step, GEMM and cell alternate block
// by block. Samples are ordered by length, so that the rows of a step are the first ones. A sequence of one step packs no weights but a
// block's at a time.
// Floor: 8 H (I + P) operations per row and step at the FMA peak, three times that for training; for few rows, 16 H P bytes of w_hh a
// step from L2.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <numeric>
#include <tuple>

#include "../lstm_layers.h"
#include "frames.h"
#include "split.h"
#include "team.h"

namespace convfast {
namespace cpu {
namespace {

constexpr const char* kForward = "lstm_forward";
constexpr const char* kBackward = "lstm_backward";
constexpr const char* kLayers = "lstm_layers";
constexpr long kNeeds = 13;

struct Direction {
  Tensor w_ih, w_hh;
  OptionalTensor bias, peephole, w_hr, second_bias;
};

struct Inputs {
  Tensor x;
  std::vector<Direction> directions;
  OptionalTensor h0, c0, lengths;
  long layer = 0, layers = 1;  // of those that the states have rows for
};

struct Problem {
  long batch = 0, time = 0, inputs = 0, hidden = 0, size = 0;  // size: of h, P
  long directions = 1;
  std::vector<long> lengths, order;  // order: samples, the longest first

  long blocks() const { return (hidden + kBlock - 1) / kBlock; }
  long weight_row(long column) const { return gate_row(column, hidden); }
  long frame(long direction, long sample, long step) const { return direction ? lengths[sample] - 1 - step : step; }
};

Problem make_problem(const char* op, const Inputs& in) {
  Problem p;
  const Direction& first = in.directions[0];
  CONVFAST_CHECK(in.x.dim() == 3, op, "x", "[B, T, I]", shape_string(shape_of(in.x)));
  CONVFAST_CHECK(first.w_hh.dim() == 2 && first.w_hh.size(0) % 4 == 0 && first.w_hh.numel() > 0, op, "w_hh", "[4H, P]", shape_string(shape_of(first.w_hh)));
  p.batch = in.x.size(0);
  p.time = in.x.size(1);
  p.inputs = in.x.size(2);
  p.hidden = first.w_hh.size(0) / 4;
  p.size = first.w_hh.size(1);
  p.directions = in.directions.size();
  const ScalarType dtype = first.w_hh.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  CONVFAST_CHECK(p.time >= 1 && p.inputs >= 1, op, "x", "of at least one step and one feature", shape_string(shape_of(in.x)));
  check_dtype(op, "x", in.x, dtype, dtype);
  for (const Direction& d : in.directions) {
    const auto check = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
      check_shape(op, name, t, shape);
      check_dtype(op, name, t, dtype, dtype);
    };
    check("w_ih", d.w_ih, {4 * p.hidden, p.inputs});
    check("w_hh", d.w_hh, {4 * p.hidden, p.size});
    if (d.bias) check("bias", *d.bias, {4 * p.hidden});
    if (d.second_bias) check("bias", *d.second_bias, {4 * p.hidden});
    if (d.peephole) check("peephole", *d.peephole, {3, p.hidden});
    if (d.w_hr) check("w_hr", *d.w_hr, {p.size, p.hidden});
    CONVFAST_CHECK(d.w_hr || p.size == p.hidden, op, "w_hr", "given where h is not as large as c", "none");
  }
  if (in.h0) {
    check_shape(op, "h0", *in.h0, {in.layers * p.directions, p.batch, p.size});
    check_dtype(op, "h0", *in.h0, dtype, dtype);
  }
  if (in.c0) {
    check_shape(op, "c0", *in.c0, {in.layers * p.directions, p.batch, p.hidden});
    check_dtype(op, "c0", *in.c0, dtype, wide);
  }
  p.lengths = read_lengths(op, in.lengths, p.batch, p.time);
  p.order.resize(p.batch);
  std::iota(p.order.begin(), p.order.end(), 0);
  std::stable_sort(p.order.begin(), p.order.end(), [&](long a, long b) { return p.lengths[a] > p.lengths[b]; });
  return p;
}

// A linear layer on top: y is what it gives for h.
struct Head {
  OptionalTensor weight, bias;  // [O, D P], [O]
};

constexpr long kZero = 0;

// Off the powers of two, whose rows would share cache sets.
long leading(long n) { return round_up(n, 16) + 16; }

// The engine for activations A, cell arithmetic T.
template <class A>
struct Engine {
  using T = Wide<A>;
  static constexpr bool kNarrow = !std::is_same_v<A, T>;

  Problem p;
  Inputs in;
  const Kernels<T>& k = kernels<T>();
  Workspace workspace;
  SequenceOf<const A> frames;  // of x
  const long hidden, size, inputs, columns, ldz, ldx, ldh;
  const long threads = torch::stable::get_num_threads();  // asked of a thread of the pool it may be another number

  Engine(const Problem& problem, const Inputs& inputs_)
      : p(problem),
        in(inputs_),
        frames(in.x),
        hidden(p.hidden),
        size(p.size),
        inputs(p.inputs),
        columns(round_up(4 * hidden, k.lanes)),
        ldz(leading(round_up(4 * hidden, kSlab))),
        ldx(leading(inputs)),
        ldh(leading(round_up(std::max(hidden, size), kSlab))) {}

  void set_x(const Tensor& x) {
    in.x = x;
    frames = SequenceOf<const A>(x);
  }

  static const A* data(const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); }
  static A* out_data(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }
  static Runs rows_of(long length, long stride) { return {&kZero, 1, length, stride}; }

  // Members of a team share out pairs of blocks: whole panels of hidden units, too.
  long units() const { return (p.blocks() + 1) / 2; }

  // GEMMs of numbers that are split into parts of bfloat16, where there are any: by matrix tiles, or by dot products.
  const SplitKernels* const split_by = split_kernels<A>();
  bool by_tiles() const { return split_by && tile_kernels(); }
  bool by_dots() const { return split_by && !tile_kernels(); }

  long operand_bytes() const { return (inputs + size) * columns * long(sizeof(T)); }  // of both weights for GEMM

  // How the threads share the work: parts of the rows, each with a team that shares the blocks of hidden units, or the layers of a
  // pipeline.
  struct Split {
    long parts, team;
  };
  long stages = 1;  // of the pipeline
  long turn = 1;    // steps that a layer takes before the one above it does

  // Few rows, or some for a few steps, which take less time than one core takes to get the weights that the others have packed: teams as
  // large as can be. Some more, and weights that a core's L2 does not hold, so that they come from behind it at
  // every step: teams whose members' shares it holds.
  Split split() const {
    constexpr long kFewRows = 4, kSomeRows = 16, kFewOfLarge = 6, kFewSteps = 16, kRowsOfFewSteps = 12;
    if (once()) return {1, std::min(threads, units())};
    const long few = !by_dots() ? kFewRows : pass.forward && 2 * weight_bytes() > l2_bytes() ? kFewOfLarge : kFewDots;
    if (stages > 1) return {threads / stages, stages};
    long team = 1;
    if (size == hidden && !in.directions[0].w_hr) {
      const bool brief = pass.forward && p.time <= kFewSteps && p.batch <= kRowsOfFewSteps;
      if (brief || p.batch < few * threads) team = std::min(threads, units());
      else if (p.batch < kSomeRows * threads && !by_tiles() && !by_dots()) team = std::min({threads, units(), (operand_bytes() + l2_bytes() - 1) / l2_bytes()});
    }
    return {std::clamp<long>(p.batch, 1, threads / team), team};
  }

  bool shares_units() const { return stages == 1 && split().team > 1; }

  // One step of few rows: weights are read once. All threads share out the hidden units, and each packs a block's weights where it needs
  // them, in its cache.
  bool once() const {
    if (!pass.forward || p.time > 1 || p.batch > pass.most_rows || in.directions[0].w_hr) return false;
    return !by_tiles() || p.batch < kTogether * threads;
  }

  // Rows enough for whole tiles: x and h are then one operand of a step's GEMM. Fewer rows, or few against weights that L2 does not hold
  // from step to step: the input part of a chunk of steps is a GEMM of its own, over the rows of all its steps.
  bool together() const {
    if (once()) return true;
    const Split s = split();
    const long rows = most_rows(s);
    if (by_dots()) return rows >= kFewDots && !shares_units();
    return rows >= 2 * kTogether || (rows >= kTogether && (by_tiles() || 4 * operand_bytes() <= 3 * s.team * l2_bytes()));
  }

  // Whether the GEMMs are of parts of bfloat16: by tiles where rows are enough for x and h as one operand.
  static constexpr long kParts = kSplitParts<A>;
  bool by_parts() const { return by_dots() || (by_tiles() && together() && !shares_units() && !once()); }
  long split_x() const { return round_up(inputs, kSplitDepth); }
  long split_h() const { return round_up(size, kSplitDepth); }
  long split_depth() const { return split_x() + split_h(); }
  // Of a step's rows of x and h, [row][part][split_depth()], with a gap for the sets of the cache.
  long split_ld() const { return kParts * split_depth() + kSplitDepth; }

  // Rows of a part that are run together, and bytes of a chunk's gates, which stay in L2. Twice the rows read the weights half as
  // often, but what is saved of them would leave the cache.
  struct Pass {
    bool forward;
    long most_rows, bytes;
  };
  static constexpr Pass kInference = {true, 64, 256 << 10}, kTraining = {true, 32, 256 << 10}, kBackward = {false, 32, 512 << 10};
  static constexpr long kTogether = 8, kFewDots = 3;
  // Bytes of h that a stage of a pipeline may be ahead of the next one: what a busy machine takes from one, the other does not lose. More
  // than the next one's L2, which has let go of a line before it is written again.
  static constexpr long kAhead = 4 << 20;
  Pass pass = kInference;
  long most_rows(const Split& s) const { return std::clamp<long>((p.batch + s.parts - 1) / s.parts, 1, pass.most_rows); }
  long steps_of_chunk() const {
    if (pass.forward && together()) return turn;
    if (stages > 1) return std::clamp<long>(p.time / 32, 1, 16);  // the next stage begins so much later
    return std::min(p.time, std::max<long>(1, pass.bytes / (most_rows(split()) * ldz * long(sizeof(T)))));
  }

  // Rows `first + i * stride` of the order; those that take part in a step come first.
  struct Group {
    const Problem* p;
    long direction, first, stride, rows;
    long sample(long i) const { return p->order[first + i * stride]; }
    long length(long i) const { return p->lengths[sample(i)]; }
    long active(long step) const {
      long n = rows;
      while (n > 0 && length(n - 1) <= step) --n;
      return n;
    }
    long frame(long i, long step) const { return p->frame(direction, sample(i), step); }
    // Of the saved c and gates, [D][T][order][..].
    long saved_row(long step) const { return (direction * p->time + step) * p->batch + first; }
  };

  // Steps [begin, end) and where the rows of each begin.
  struct Chunk {
    long begin, end;
    std::vector<long> start;
    Chunk(const Group& g, long begin, long end) : begin(begin), end(end), start{0} {
      for (long s = begin; s < end; ++s) start.push_back(start.back() + g.active(s));
    }
    long rows() const { return start.back(); }
    long at(long step) const { return start[step - begin]; }
    long active(long step) const { return start[step - begin + 1] - start[step - begin]; }
  };

  // call(group, team, rank) on every member of every team, group after group of its part's rows.
  template <class F>
  void run(long direction, const F& call) {
    const Split s = split();
    std::vector<std::unique_ptr<Team>> teams;
    for (long i = 0; i < s.parts; ++i) teams.push_back(std::make_unique<Team>(s.team));
    parallel(s.parts * s.team, [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        const long part = task / s.team, rank = teams[part]->join(task % s.team), most = most_rows(s);
        if (rank < 0) continue;
        // Neighbours in memory; where lengths differ, each part has as many long ones as short ones.
        const long stride = in.lengths ? s.parts : 1, first = in.lengths ? part : p.batch * part / s.parts;
        const long rows = in.lengths ? (p.batch - part + s.parts - 1) / s.parts : p.batch * (part + 1) / s.parts - first;
        long turn = 0;
        for (long i = 0; i < rows; i += most)
          call(Group{&p, direction, first + i * stride, stride, std::min(most, rows - i)}, part, Member{teams[part].get(), rank, &turn});
      }
    });
  }

  struct Member {
    Team* team;
    long rank;
    long* turn;
    void wait() const { team->wait(rank, *turn); }
    // This member's share of n.
    long begin(long n) const { return n * rank / team->size(); }
    long end(long n) const { return n * (rank + 1) / team->size(); }
  };

  // What of the hidden units is a member's: blocks, channels, and columns of the gates.
  struct Share {
    long block, block_end, ch, ch_end, column, columns;
  };

  Share share(const Member& m) const {
    const long first = 2 * m.begin(units()), last = std::min(p.blocks(), 2 * m.end(units()));
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
    const long left = columns - start, width = left > k.lanes ? k.panel : k.lanes, real = std::min(4 * hidden - start, width);
    panel += first * width;
    read_columns(k, data(w), w.stride(0), w.stride(1), n, hidden, start, real, panel, width);
    for (long i = 0; real < width && i < n; ++i) std::fill(panel + i * width + real, panel + (i + 1) * width, T(0));
  }

  void pack_peephole(const Tensor& t, T* to) const {
    for (long i = 0; i < 3; ++i)
      for (long c = 0; c < hidden; ++c) to[i * hidden + c] = static_cast<T>(data(t)[i * t.stride(0) + c * t.stride(1)]);
  }

  // Room for a direction's weights.
  Packed take(const Direction& d) {
    Packed to{};
    to.bias = workspace.take<T>(round_up(4 * hidden, kSlab));
    if (d.peephole) to.peephole = workspace.take<T>(3 * hidden);
    if (d.w_hr) to.w_hr = workspace.take<T>(hidden * round_up(size, k.lanes));
    if (once()) return to;
    if (by_parts()) {
      to.split_ih = workspace.take<Part>(split_size(4 * hidden, together() ? split_depth() : split_x(), kParts));
      if (!together()) to.split_hh = workspace.take<Part>(split_size(4 * hidden, split_h(), kParts));
    } else {  // one above the other, or two buffers, which the backward will take for its own
      to.w_ih = workspace.take<T>((together() ? inputs + size : inputs) * columns);
      if (!together()) to.w_hh = workspace.take<T>(size * columns);
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
    if (d.w_hr) {
      const long s0 = d.w_hr->stride(0), s1 = d.w_hr->stride(1);
      pack_panels(k, hidden, size, to.w_hr, [&](long i, long n) { return static_cast<T>(data(*d.w_hr)[n * s0 + i * s1]); });
    }
    if (once()) return;
    if (by_parts()) {
      const auto pack_columns = [&](long depth, bool of_x, bool of_h, Part* packed) {
        pack_split<Unsplit<A>>(*split_by, 4 * hidden, depth, kParts, packed, [&](long column, Unsplit<A>* row) { read_column(d, column, depth, of_x, of_h, row); });
      };
      if (together()) return pack_columns(split_depth(), true, true, to.split_ih);
      pack_columns(split_x(), true, false, to.split_ih);
      pack_columns(split_h(), false, true, to.split_hh);
    } else {
      const long all = inputs + size;
      pack_matrix(d.w_ih, inputs, to.w_ih, 0, together() ? all : inputs);
      if (together()) pack_matrix(d.w_hh, size, to.w_ih, inputs, all);
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
    if (of_h) read_row(d.w_hh, size, to + (of_x ? split_x() : 0));
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
  bool takes_head() const { return p.directions == 1 && !shares_units(); }

  void set_head(const Head& from) { head = pack(from); }

  PackedHead pack(const Head& from) {
    const Tensor& w = *from.weight;
    const long outputs = w.size(0), n = w.size(1), s0 = w.stride(0), s1 = w.stride(1);
    T *weight = workspace.take<T>(n * round_up(outputs, k.lanes)), *bias = workspace.take<T>(round_up(outputs, k.lanes));
    pack_panels(k, n, outputs, weight, [&](long i, long o) { return static_cast<T>(data(w)[o * s0 + i * s1]); });
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
    const Split s = split();
    const long rows = most_rows(s), steps = steps_of_chunk(), at_once = together() ? 1 : steps;
    std::vector<Buffers> parts(s.parts);
    for (Buffers& b : parts) {
      b.z_rows = at_once * (by_tiles() ? round_up(rows, kTileRows) : rows);
      b.z = workspace.take<T>(b.z_rows * (ldz + s.team * leading(2 * kSlab)));
      for (long i = 0; i < s.team; ++i) b.c.push_back(workspace.take<T>(rows * ldh));
      b.split = by_parts() && together() && !once() ? workspace.take<Part>(round_up(rows, kTileRows) * split_ld()) : nullptr;
      const bool own = by_parts() && (!together() || once());
      b.slot = rows * ldh;
      b.slots = stages > 1 ? round_up(std::clamp<long>(kAhead / (b.slot * long(sizeof(T))), 2 * steps, p.time + 1), steps) : std::max(2l, turn);
      b.h = workspace.take<T>(b.slots * b.slot);
      b.m = in.directions[0].w_hr ? workspace.take<T>(rows * ldh) : nullptr;
      b.out = head.weight ? workspace.take<T>(rows * head.ld()) : nullptr;
      for (long i = 0; i < s.team; ++i) b.x.push_back(workspace.take<T>(at_once * rows * ldx));
      for (long i = 0; own && i < s.team; ++i) b.split_own.push_back(workspace.take<Part>(at_once * rows * (once() ? split_ld() : std::max(split_x(), split_h()) + kSplitDepth)));
      for (long i = 0; once() && i < s.team; ++i) b.slab.push_back(workspace.take<T>(kSlab * split_depth()));
    }
    return parts;
  }

  // A member's work on the rows of a group: start(), step() by step, finish().
  struct Task {
    const Group& g;
    const Packed& w;
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
      ld = leading((units() + n - 1) / n * 2 * kSlab);
      z += member.rank * b.z_rows * ld - share(member).column;
    }
    return {g, w, b, member, outputs, outputs.y ? SequenceOf<A>(*outputs.y) : SequenceOf<A>(), c, outputs.gates ? out_data(*outputs.gates) : nullptr, z, ld};
  }

  void forward(const Outputs& all) {
    if (p.batch == 0) return;
    pass = all.gates ? kTraining : kInference;
    const std::vector<Buffers> parts = buffers();
    for (long d = 0; d < p.directions; ++d) {
      const Packed w = take(in.directions[d]);
      pack(in.directions[d], w);
      run(d, [&](const Group& g, long part, const Member& member) {
        run_layers({this}, {task(g, w, parts[part], member, all)}, 0, 1, nullptr);
      });
    }
  }

  // Layers of a pipeline, or that take turns, so that what one gives the next one reads while it is in cache. A turn has several steps:
  // weights of all layers may be too many for L2.
  static void forward(const std::vector<Engine*>& layers, const std::vector<Outputs>& all) {
    constexpr long kMostSteps = 8;
    long turn = layers[0]->stages > 1 ? 1 : kMostSteps;
    for (const Engine* layer : layers) turn = std::min(turn, layer->pass.bytes / (layer->most_rows(layer->split()) * layer->ldh * long(sizeof(T))));
    for (Engine* layer : layers) layer->turn = std::max(1l, turn);
    std::vector<std::vector<Buffers>> parts;
    std::vector<Packed> weights;
    std::vector<std::vector<Progress>> progress;  // of each part, layer by layer
    for (Engine* layer : layers) {
      parts.push_back(layer->buffers());
      weights.push_back(layer->take(layer->in.directions[0]));
    }
    const long n = layers.size();
    const bool pipeline = layers[0]->stages > 1, own = pipeline && parts[0].size() == 1;  // own: a layer is one thread's, who packs its weights
    const auto pack = [&](long i) { layers[i]->pack(layers[i]->in.directions[0], weights[i]); };
    for (long i = 0; !own && i < n; ++i) pack(i);
    for (size_t part = 0; pipeline && part < parts[0].size(); ++part) progress.emplace_back(n);
    layers[0]->run(0, [&](const Group& g, long part, const Member& member) {
      Team alone(1);
      long turn = 0;
      const Member one{&alone, alone.join(0), &turn};
      for (long i = member.begin(n); own && i < member.end(n); ++i) pack(i);
      std::vector<Task> tasks;
      for (long i = 0; i < n; ++i) tasks.push_back(layers[i]->task(g, weights[i], parts[i][part], pipeline ? one : member, all[i]));
      if (pipeline) run_layers(layers, tasks, member.begin(n), member.end(n), progress[part].data());
      else run_layers(layers, tasks, 0, n, nullptr);
    });
  }

  // Whether these layers take turns.
  static bool takes_turns(const std::vector<Engine*>& layers) {
    for (const Engine* layer : layers)
      if (layer->p.batch == 0 || layer->p.directions > 1 || layer->split().team > 1 || !layer->together()) return false;
    return layers.size() > 1;
  }

  // Stages of a pipeline: a thread has layers of its own and runs behind the thread of those below. A step then has the rows of all
  // stages' threads, and a core's L2 holds its own layers' weights only. 1 where rows are many or go by matrix tiles, steps few or layers
  // unlike, so that nothing is gained by it. `outputs`: of a linear layer on top.
  static long pipeline_of(const std::vector<Engine*>& layers, long outputs) {
    constexpr long kMostRows = 32, kFewestSteps = 32;
    const Engine& first = *layers[0];
    const long n = layers.size();
    if (first.p.time < kFewestSteps || first.p.directions > 1) return 1;
    for (const Engine* layer : layers)
      if (layer->by_tiles() && layer->by_parts()) return 1;
    for (long stages = std::min(n, first.threads); stages > 1; --stages) {
      const long parts = first.threads / stages, rows = (first.p.batch + parts - 1) / parts;
      if (first.threads % stages || first.p.batch < parts || rows > (first.split_by ? kTogether - 1 : kMostRows)) continue;
      long work = 0, most_work = 0, most_bytes = 0;
      for (long stage = 0; stage < stages; ++stage) {
        long own = stage + 1 < stages ? 0 : layers[n - 1]->size * outputs, bytes = 0;
        for (long i = n * stage / stages; i < n * (stage + 1) / stages; ++i) {
          const Engine& layer = *layers[i];
          own += 4 * layer.hidden * (layer.inputs + layer.size) + (layer.in.directions[0].w_hr ? layer.hidden * layer.size : 0);
          bytes += layer.weight_bytes();
        }
        work += own;
        most_work = std::max(most_work, own);
        most_bytes = std::max(most_bytes, bytes);
      }
      if (20 * stages * most_work <= 21 * work && most_bytes <= l2_bytes()) return stages;
    }
    return 1;
  }

  long weight_bytes() const {
    return by_parts() ? split_size(4 * hidden, split_depth(), kParts) * long(sizeof(Part)) : operand_bytes();
  }

  // Rows of x at a step, [row][stride].
  struct RowsOfX {
    const T* data;
    long stride;
  };

  RowsOfX rows_of_x(const Task& t, const Chunk& chunk) const {
    if (together() && (t.w.split_ih ? regular() && frames.feature == 1 : reads_x_directly(t.g)))
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
    const long steps = layers[0]->steps_of_chunk(), each = layers[0]->together() ? 1 : steps, most = g.length(0);
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
    const bool whole = together();
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
      const long ld = split_x() + kSplitDepth;
      Part* own = t.b.split_own[t.member.rank];
      split_by->split({rows, inputs, kParts, x.data, x.stride, own, 0, ld});
      split_by->gemm({rows, kParts, own, 0, ld, t.w.split_ih + mine.column * split_x(), split_x(), round_up(mine.columns, kSlab), t.w.bias + mine.column,
                      t.z + mine.column, t.ldz});
    }
  }

  // A step's GEMM and cells; of x and h, or of h, where there is one.
  void step_by_parts(const Task& t, long rows, const T* before, T* z, const RowsOfX& x, const LstmCells<T>& cells) const {
    if constexpr (std::is_same_v<T, float>) {
      const long all = round_up(4 * hidden, kSlab);
      if (x.data) {
        split_rows(t.b, rows, inputs, x.data, x.stride, 0);
        split_by->lstm_step({rows, kParts, t.b.split, split_depth(), split_ld(), t.w.split_ih, split_depth(), all, t.w.bias, z, t.ldz}, cells);
      } else {
        const long ld = split_h() + kSplitDepth;
        Part* own = t.b.split_own[t.member.rank];
        split_by->split({rows, size, kParts, before, ldh, own, 0, ld});
        split_by->lstm_step({rows, kParts, own, 0, ld, t.w.split_hh, split_h(), all, nullptr, z, t.ldz}, cells);
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
      if (by_parts()) {
        Part* own = t.b.split_own[t.member.rank];
        split_by->split({rows, inputs, kParts, x.data, x.stride, own, split_depth(), split_ld()});
        split_by->split({rows, size, kParts, t.b.h_after(0), ldh, own + split_x(), split_depth(), split_ld()});
        for (long column = mine.column; column < end; column += kSlab) {
          Part* parts = reinterpret_cast<Part*>(slab);
          pack_split<Unsplit<A>>(*split_by, std::min<long>(kSlab, 4 * hidden - column), split_depth(), kParts, parts, [&](long i, Unsplit<A>* to) { read_column(d, column + i, split_depth(), true, true, to); });
          split_by->gemm({rows, kParts, own, split_depth(), split_ld(), parts, split_depth(), kSlab, t.w.bias + column, z + column, t.ldz});
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

  // What of h is a member's: all of it where a projection mixes the hidden units.
  std::pair<long, long> outputs_of(const Task& t) const {
    const Share mine = share(t.member);
    return t.w.w_hr ? std::make_pair(0l, size) : std::make_pair(mine.ch, mine.ch_end);
  }

  void split_rows(const Buffers& b, long rows, long n, const T* from, long ld, long at) const {
    split_by->split({rows, n, kParts, reinterpret_cast<const float*>(from), ld, b.split + at, split_depth(), split_ld()});
  }

  void start(const Task& t) const {
    const Share mine = share(t.member);
    const auto [out, out_end] = outputs_of(t);
    read_state(in.c0, t.g, mine.ch, mine.ch_end, t.b.c[t.member.rank], ldh);
    read_state(in.h0, t.g, out, out_end, t.b.h_after(0), ldh);
    if (t.b.split) split_rows(t.b, t.g.rows, size, t.b.h_after(0), ldh, split_x());
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
    if (before && member.team->size() > 1)  // what others wrote: all lines at once, not as the sum comes to each
      for (long i = 0; i < rows; ++i)
        for (long j = 0; j < size; j += 64 / long(sizeof(T))) __builtin_prefetch(before + i * ldh + j);
    if (once()) only_step(t, rows, z, x, cells);
    else if (w.split_ih && (before || x.data)) step_by_parts(t, rows, before, z, x, cells);
    else if (x.data) k.lstm_step({rows, {x.data, before}, {rows_of(inputs, x.stride), rows_of(size, ldh)}, w.w_ih, inputs + size, columns, w.bias, 0, z, ldz}, cells);
    else k.lstm_step({rows, {before}, {rows_of(size, ldh)}, w.w_hh, size, columns, z, ldz, z, ldz}, cells);
    if (w.w_hr) k.gemm({rows, {b.m}, {rows_of(hidden, ldh)}, w.w_hr, hidden, size, nullptr, 0, h, ldh});
    if (inside && kNarrow)
      for (long i = 0; i < rows; ++i) round_to<A>(size, h + i * ldh);
    if (head.weight) {
      apply(head, rows, h, ldh, b.out);
      for (long i = 0; i < rows; ++i) write(b.out + i * head.ld(), head.outputs, y.at(g.sample(i), g.frame(i, s)));
    }
    const auto [out, out_end] = outputs_of(t);
    for (long i = 0; !inside && !direct_y && i < rows; ++i) {
      A* to = y.at(g.sample(i), g.frame(i, s)) + g.direction * size + out;
      write(h + i * ldh + out, out_end - out, to);
      if constexpr (kNarrow) read(to, 1, out_end - out, h + i * ldh + out);
    }
    if (b.split && s + 1 < g.length(0)) split_rows(b, rows, size, h, ldh, split_x());
    member.wait();
  }

  void finish(const Task& t) const {
    const auto& [g, w, b, member, outputs, y, c, gates, all_z, ldz] = t;
    const Share mine = share(member);
    const auto [out, out_end] = outputs_of(t);
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

template <class A>
struct Backward : Engine<A> {
  using Base = Engine<A>;
  using T = typename Base::T;
  using Group = typename Base::Group;
  using Chunk = typename Base::Chunk;
  using Member = typename Base::Member;
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
    long ld_ih, ld_hh;                // 0: packed
    const Part *split_ih, *split_hh;  // splits_z(): instead of w_ih (where pays_for_x()) and w_hh
    bool need_ih, need_hh, need_bias, need_peephole, need_hr;
  };

  // Whether the products are of bfloat16, as forward; z is rounded to it. float16 and float32 would be products of several parts.
  bool splits_z() const { return std::is_same_v<A, BFloat16> && Base::by_parts() && Base::together(); }
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
    T *z, *c0, *dm, *m;
    T *dw_ih, *dw_hh, *dbias, *dpeephole, *dw_hr;  // [4H][I], [4H][P], whole vectors, [ldz], [3][H], [P][ldh]; null = not wanted
    std::vector<T*> dh, dc, x, h, dx, dy;          // of each member
    SplitBuffers split;                            // splits_z(); the sums of weights are transposed then, [I][ldz] and [P][ldz]
  };

  static const T* wide_data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

  // From row to row of a weight where it is read as it lies, else 0: few rows would take about as long as the packing.
  long reads_directly(const Tensor& w) const {
    const bool whole = hidden % kBlock == 0 && w.size(1) % k.lanes == 0 && w.stride(1) == 1;
    return !Base::kNarrow && Base::split().team > 1 && whole ? w.stride(0) : 0;
  }

  // Gradients of gates as an operand for weights with rows in the order of blocks or, unpacked, of gates.
  std::vector<long> gates_first;
  Runs gates_of(long ld) const { return ld ? Runs{gates_first.data(), long(gates_first.size()), kBlock, ldz} : rows_of(4 * hidden, ldz); }

  // w [4H, n] with its rows in the order of blocks: [panel][4H][panel columns].
  const T* pack_back(const Tensor& w, long n) {
    T* packed = workspace.template take<T>(4 * hidden * round_up(n, k.lanes));
    const A* source = data(w);
    const long s0 = w.stride(0), s1 = w.stride(1);
    std::vector<long> row(4 * hidden);
    for (long i = 0; i < 4 * hidden; ++i) row[i] = p.weight_row(i) * s0;
    parallel((n + k.panel - 1) / k.panel, [&](long begin, long end) {
      for (long first = begin * k.panel; first < std::min(n, end * k.panel); first += k.panel) {
        const long left = n - first, width = left > k.lanes ? k.panel : k.lanes, real = std::min(left, width);
        T* to = packed + first * 4 * hidden;
        for (long i = 0; i < 4 * hidden; ++i, to += width) {
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
    if (splits_z()) w.split_hh = pack_back_split(from.w_hh, size);
    else w.w_hh = w.ld_hh ? wide_data(from.w_hh) : pack_back(from.w_hh, size);
    if (from.peephole) {
      T* packed = workspace.template take<T>(3 * hidden);
      Base::pack_peephole(*from.peephole, packed);
      w.peephole = packed;
    }
    if (from.w_hr) {
      T* packed = workspace.template take<T>(size * round_up(hidden, k.lanes));
      const long s0 = from.w_hr->stride(0), s1 = from.w_hr->stride(1);
      pack_panels(k, size, hidden, packed, [&](long i, long n) { return static_cast<T>(data(*from.w_hr)[i * s0 + n * s1]); });
      w.w_hr = packed;
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

  // A part's sum of a weight's gradient, [4H][rounded up to vectors]: the gradient itself where it can be.
  bool sums_in_place(long channels) const { return !Base::kNarrow && channels % k.lanes == 0; }

  T* weight_sum(const Tensor& gradient, long channels, bool first) {
    if (splits_z()) return new_sum(round_up(channels, kTileRows) * ldz);
    if (!first || !sums_in_place(channels)) return new_sum(4 * hidden * round_up(channels, k.lanes));
    return new_sum(static_cast<T*>(gradient.mutable_data_ptr()), gradient.numel());
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

  void add_weight_gradients(const Weights& w, const Buffers& b, const Group& g, const Chunk& chunk, const SequenceOf<const A>& y, const Member& member) const {
    const auto mine = Base::share(member);
    if (w.need_ih) {
      T* x = b.x[member.rank];
      Base::read_x(g, chunk, x);
      add_weight_gradient(chunk.rows(), b.z, mine.block, mine.block_end, x, ldx, inputs, b.dw_ih);
    }
    if (w.need_hh) {
      T* h = b.h[member.rank];
      read_h(g, chunk, y, h);
      add_weight_gradient(chunk.rows(), b.z, mine.block, mine.block_end, h, ldh, size, b.dw_hh);
    }
  }

  std::vector<Tensor> backward(const Given& given, const std::vector<int64_t>& needs) {
    Base::pass = Base::kBackward;
    const ScalarType narrow = scalar_type<A>(), wide = scalar_type<T>();
    std::vector<Tensor> grads;
    for (long i = 0; i < kNeeds; ++i) grads.push_back(empty_cpu({0}, narrow));
    Tensor& dx = grads[kX];
    if (needs[kX]) {
      dx = cpu::empty_like(in.x);
      if (std::any_of(p.lengths.begin(), p.lengths.end(), [&](long n) { return n < p.time; })) torch::stable::zero_(dx);
    }
    if (needs[kH0] && in.h0) grads[kH0] = empty_cpu({p.directions, p.batch, size}, narrow);
    grads[kC0] = needs[kC0] && in.c0 ? empty_cpu({p.directions, p.batch, hidden}, in.c0->scalar_type()) : empty_cpu({0}, wide);
    // With two directions the sum of their dx, before it is rounded.
    T* dx_sum = needs[kX] && p.directions == 2 ? workspace.template take<T>(p.batch * p.time * inputs) : nullptr;

    for (long gate = 0; gate < 4; ++gate)
      for (long block = 0; block < hidden / kBlock; ++block) gates_first.push_back(block * kSlab + gate * kBlock);
    const auto s = Base::split();
    const long rows = Base::most_rows(s), steps = Base::steps_of_chunk();
    for (long d = 0; d < p.directions; ++d) {
      const Weights w = pack(d, needs);
      Tensor* to = grads.data() + (d ? kReverse - kWih : 0);
      if (w.need_ih) to[kWih] = empty_cpu({4 * hidden, inputs}, narrow);
      if (w.need_hh) to[kWhh] = empty_cpu({4 * hidden, size}, narrow);
      std::vector<Buffers> parts(s.parts);
      for (Buffers& b : parts) {
        b.z = workspace.template take<T>(steps * rows * ldz);
        b.c0 = in.c0 ? workspace.template take<T>(rows * ldh) : nullptr;
        b.dm = w.w_hr ? workspace.template take<T>(rows * ldh) : nullptr;
        b.m = w.w_hr ? workspace.template take<T>(rows * ldh) : nullptr;
        b.dw_ih = w.need_ih ? weight_sum(to[kWih], inputs, &b == parts.data()) : nullptr;
        b.dw_hh = w.need_hh ? weight_sum(to[kWhh], size, &b == parts.data()) : nullptr;
        b.dbias = w.need_bias ? new_sum(ldz) : nullptr;
        b.dpeephole = w.need_peephole ? new_sum(3 * hidden) : nullptr;
        b.dw_hr = w.need_hr ? new_sum(size * ldh) : nullptr;
        for (long i = 0; i < s.team; ++i) {
          b.dh.push_back(workspace.template take<T>(round_up(rows, kTileRows) * ldh));
          b.dc.push_back(workspace.template take<T>(rows * ldh));
          b.x.push_back(w.need_ih && !splits_z() ? workspace.template take<T>(steps * rows * ldx) : nullptr);
          b.h.push_back(w.need_hh && !splits_z() ? workspace.template take<T>(steps * rows * ldh) : nullptr);
          b.dx.push_back(needs[kX] ? workspace.template take<T>(round_up(steps * rows, kTileRows) * ld_dx()) : nullptr);
          b.dy.push_back(given.dy ? workspace.template take<T>(rows * ldh) : nullptr);
        }
        if (splits_z()) b.split = take_split(rows, steps * rows);
      }
      clear_sums();
      Base::run(d, [&](const Group& g, long part, const Member& member) { run_backward(g, w, parts[part], member, given, dx, dx_sum, grads[kH0], grads[kC0]); });
      finish(w, parts, to);
    }
    return grads;
  }

  void run_backward(const Group& g, const Weights& w, const Buffers& b, const Member& member, const Given& given, const Tensor& dx, T* dx_sum,
                    const Tensor& dh0, const Tensor& dc0) {
    const auto [first, last, ch, ch_end, column, n] = Base::share(member);
    const long h_begin = w.w_hr ? 0 : ch, h_end = w.w_hr ? size : ch_end, most = g.length(0), steps = Base::steps_of_chunk();
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
        if (w.w_hr) project_back(w, b, cells);
        k.lstm_cells_backward(cells);
        member.wait();
        const bool goes_on = s > 0 || dh0.numel();
        if (splits_z()) split_back(w, b, rows, cells.z, chunk.at(s), goes_on, rows == g.rows);
        else if (goes_on)
          k.gemm({rows, {cells.z}, {gates_of(w.ld_hh)}, w.w_hh + h_begin * (w.ld_hh ? 1 : 4 * hidden), 4 * hidden, h_end - h_begin, nullptr, 0, dh + h_begin, ldh, w.ld_hh});
      }
      if (splits_z()) add_split_weight_gradients(w, b, g, chunk, ys);
      else add_weight_gradients(w, b, g, chunk, ys, member);
      if (w.need_bias) k.outer_sum({chunk.rows(), &one, rows_of(1, 0), b.z + column, ldz, n, b.dbias + column, ldz});
      if (w.split_ih) {
        if constexpr (std::is_same_v<A, BFloat16>)
          Base::split_by->gemm({chunk.rows(), 1, b.split.z, 0, split_ldz(), w.split_ih, split_gates(), round_up(inputs, kSlab), b.split.no_bias, b.dx[0], ld_dx()});
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
      Base::split_by->split({rows, 4 * hidden, 1, z, ldz, to, 0, split_ldz()});
      if (!goes_on) return;
      T* dh = all ? b.dh[0] : b.split.dh;  // rows are written up to a whole tile, and others have theirs already
      Base::split_by->gemm({rows, 1, to, 0, split_ldz(), w.split_hh, split_gates(), round_up(size, kSlab), b.split.no_bias, dh, ldh});
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
        Base::split_by->gemm({channels, 1, split.transposed, 0, split.ld, split.z_pairs, k, round_up(4 * hidden, kSlab), nullptr, sum, ldz});
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
      if (w.need_hh) {
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
    for (long s = chunk.begin; s < chunk.end; ++s)
      for (long i = std::max<long>(0, begin - chunk.at(s)); i < std::min(chunk.active(s), end - chunk.at(s)); ++i) {
        const long sample = g.sample(i), frame = g.frame(i, s);
        T* row = const_cast<T*>(from) + (chunk.at(s) + i - begin) * ld_dx();
        if (dx_sum) {
          T* sum = dx_sum + (sample * p.time + frame) * inputs;
          if (g.direction == 0) {
            Base::write(row, inputs, sum);
            continue;
          }
          for (long j = 0; j < inputs; ++j) row[j] += sum[j];
        }
        Base::write(row, inputs, dx.at(sample, frame), dx.feature);
      }
  }

  // h = w_hr m: from the gradient of h, with dy, to that of m, which takes its place; and that of w_hr.
  void project_back(const Weights& w, const Buffers& b, LstmCells<T>& cells) const {
    for (long i = 0; cells.dy && i < cells.rows; ++i)
      for (long j = 0; j < size; ++j) b.dh[0][i * ldh + j] += cells.dy[i][j];
    cells.dy = nullptr;
    for (long i = 0; w.need_hr && i < cells.rows; ++i) {
      T* m = b.m + i * ldh;
      k.tanh(hidden, cells.c + i * cells.ldc, m);
      for (long c = 0; c < hidden; ++c) {
        const long ch = c / kBlock * kBlock, width = std::min<long>(kBlock, hidden - ch);
        m[c] *= static_cast<T>(static_cast<const A*>(cells.gates.data)[i * cells.ldg + 4 * ch + 3 * width + c - ch]);
      }
    }
    if (w.need_hr) k.outer_sum({cells.rows, b.dh[0], rows_of(size, ldh), b.m, ldh, hidden, b.dw_hr, ldh});
    k.gemm({cells.rows, {b.dh[0]}, {rows_of(size, ldh)}, w.w_hr, size, hidden, nullptr, 0, b.dm, ldh});
    cells.dh = b.dm;
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
    for (long column = 0; column < 4 * hidden; ++column) {
      T total = 0;
      for (const Buffers& b : parts) total += b.dbias[column];
      out_data(out)[p.weight_row(column)] = static_cast<A>(total);
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
    if (w.need_hr) add_parts(parts, &Buffers::dw_hr, ldh, to[kWhr] = empty_cpu({size, hidden}, scalar_type<A>()));
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_layer(const Problem& p, const Inputs& in, bool time_major, bool save) {
  constexpr ScalarType wide = scalar_type<Wide<A>>();
  Engine<A> engine(p, in);
  typename Engine<A>::Outputs out{engine.empty_output(time_major, p.directions * p.size), engine.empty_h(), engine.empty_c(), {}, {}};
  if (save) {
    out.c = engine.empty_saved(p.hidden, wide);
    out.gates = engine.empty_saved(4 * p.hidden, scalar_type<A>());
    out.stream_gates = streams<A>(*out.gates, p.hidden, kMostGates);
  }
  engine.forward(out);
  return {*out.y, out.h_n, out.c_n, out.c ? *out.c : empty_cpu({0}, wide), out.gates ? *out.gates : empty_cpu({0}, scalar_type<A>())};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> run_layers(Inputs in, const std::vector<std::vector<Direction>>& layers, const Head& head, bool time_major) {
  std::vector<std::unique_ptr<Engine<A>>> engines;
  std::vector<Engine<A>*> all;
  in.layers = layers.size();
  for (in.layer = 0; in.layer < in.layers; ++in.layer) {
    in.directions = layers[in.layer];
    engines.push_back(std::make_unique<Engine<A>>(make_problem(kLayers, in), in));
    all.push_back(engines.back().get());
    in.x = all.back()->shape_of_output();
  }
  Engine<A>& last = *all.back();
  const long channels = last.p.directions * last.size;
  if (head.weight) {
    const Tensor& w = *head.weight;
    check_shape(kLayers, "head", w, {w.size(0), channels});
    check_dtype(kLayers, "head", w, scalar_type<A>(), scalar_type<A>());
    if (head.bias) check_shape(kLayers, "head_bias", *head.bias, {w.size(0)});
    if (head.bias) check_dtype(kLayers, "head_bias", *head.bias, scalar_type<A>(), scalar_type<A>());
  }
  const long stages = Engine<A>::pipeline_of(all, head.weight ? head.weight->size(0) : 0);
  for (Engine<A>* layer : all) layer->stages = stages;
  const bool in_steps = head.weight && last.takes_head();
  if (in_steps) last.set_head(head);
  typename Engine<A>::Outputs out{{}, last.empty_h(), last.empty_c(), {}, {}};
  const Tensor y = last.empty_output(time_major, in_steps ? head.weight->size(0) : channels);
  if (stages > 1 || Engine<A>::takes_turns(all)) {
    std::vector<typename Engine<A>::Outputs> outs(all.size(), out);
    outs.back().y = y;
    Engine<A>::forward(all, outs);
  } else {
    for (size_t i = 0; i < all.size(); ++i) {
      if (i > 0) all[i]->set_x(*out.y);
      // Rows of a step lie together where the next layer reads them.
      out.y = i + 1 < all.size() ? all[i]->empty_output(true, channels) : y;
      all[i]->forward(out);
    }
  }
  if (!head.weight || in_steps) return {y, out.h_n, out.c_n};
  const Tensor through = last.empty_output(time_major, head.weight->size(0));
  last.project(y, head, through);
  return {through, out.h_n, out.c_n};
}

Inputs make_inputs(const Tensor& x, const Direction& first, const OptionalTensor& w_ih_r, const OptionalTensor& w_hh_r, const OptionalTensor& bias_r,
                   const OptionalTensor& peephole_r, const OptionalTensor& w_hr_r, const OptionalTensor& h0, const OptionalTensor& c0,
                   const OptionalTensor& lengths) {
  Inputs in{x, {first}, h0, c0, lengths};
  if (w_ih_r && w_hh_r) in.directions.push_back({*w_ih_r, *w_hh_r, bias_r, peephole_r, w_hr_r});
  return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor bias, OptionalTensor peephole, OptionalTensor w_hr, OptionalTensor w_ih_r,
    OptionalTensor w_hh_r, OptionalTensor bias_r, OptionalTensor peephole_r, OptionalTensor w_hr_r, OptionalTensor h0, OptionalTensor c0,
    OptionalTensor lengths, bool time_major, bool save) {
  const Inputs in = make_inputs(x, {w_ih, w_hh, bias, peephole, w_hr}, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r, h0, c0, lengths);
  const Problem p = make_problem(kForward, in);
  return switch_dtype(kForward, "w_hh", w_hh, [&](auto a) { return run_layer<decltype(a)>(p, in, time_major, save); });
}

std::tuple<Tensor, Tensor, Tensor> lstm_layers(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> peepholes, bool bias, bool projection,
                                               bool bidirectional, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths, OptionalTensor head, OptionalTensor head_bias,
                                               bool time_major) {
  std::vector<std::vector<Direction>> layers;
  for (const std::vector<LSTMWeights>& layer : lstm_weights(kLayers, weights, peepholes, bias, projection, bidirectional)) {
    layers.emplace_back();
    for (const LSTMWeights& w : layer) layers.back().push_back({w.w_ih, w.w_hh, w.bias_ih, w.peephole, w.w_hr, w.bias_hh});
  }
  return switch_dtype(kLayers, "weights", weights[1], [&](auto a) {
    return run_layers<decltype(a)>({x, {}, h0, c0, lengths}, layers, {head, head_bias}, time_major);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor bias, OptionalTensor peephole,
    OptionalTensor w_hr, OptionalTensor w_ih_r, OptionalTensor w_hh_r, OptionalTensor bias_r, OptionalTensor peephole_r, OptionalTensor w_hr_r,
    OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths, Tensor y, Tensor c, Tensor gates, std::vector<int64_t> needs) {
  const Inputs in = make_inputs(x, {w_ih, w_hh, bias, peephole, w_hr}, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r, h0, c0, lengths);
  const Problem p = make_problem(kBackward, in);
  CONVFAST_CHECK(long(needs.size()) == kNeeds, kBackward, "needs", "13 flags", needs.size());
  const ScalarType dtype = w_hh.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const auto check = [&](const char* name, const OptionalTensor& t, const std::vector<int64_t>& shape, ScalarType type) {
    if (!t) return;
    check_shape(kBackward, name, *t, shape);
    check_dtype(kBackward, name, *t, type, type);
  };
  check("y", y, {p.batch, p.time, p.directions * p.size}, dtype);
  CONVFAST_CHECK(y.stride(2) == 1 || y.numel() == 0, kBackward, "y", "as the forward returned it", "other strides");
  check("c", c, {p.directions, p.batch, p.time, p.hidden}, wide);
  check("gates", gates, {p.directions, p.batch, p.time, 4 * p.hidden}, dtype);
  check("dy", dy, shape_of(y), dtype);
  check("dh_n", dh_n, {p.directions, p.batch, p.size}, dtype);
  check("dc_n", dc_n, {p.directions, p.batch, p.hidden}, wide);
  return switch_dtype(kBackward, "w_hh", w_hh, [&](auto a) {
    std::vector<Tensor> g = Backward<decltype(a)>(p, in).backward({dy, dh_n, dc_n, y, c, gates}, needs);
    return std::make_tuple(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12]);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&convfast::cpu::lstm_forward));
  m.impl("lstm_layers", TORCH_BOX(&convfast::cpu::lstm_layers));
  m.impl("lstm_backward", TORCH_BOX(&convfast::cpu::lstm_backward));
}
