// One LSTM call in plain numbers: its checked arguments, the rows of a thread and the steps that it takes together.
#pragma once
#include <numeric>

#include "frames.h"

namespace convfast {
namespace cpu {
namespace lstm {

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

// Off the powers of two, whose rows would share cache sets.
inline long leading(long n) { return round_up(n, 16) + 16; }

struct Problem {
  long batch = 0, time = 0, inputs = 0, hidden = 0, size = 0;  // size: of h, P
  long directions = 1;
  bool projected = false;  // h = w_hr m
  std::vector<long> lengths, order;  // order: samples, the longest first

  long blocks() const { return (hidden + kBlock - 1) / kBlock; }
  long weight_row(long column) const { return gate_row(column, hidden); }
  // Elements from row to row of gates and of h.
  long ldz() const { return leading(round_up(4 * hidden, kSlab)); }
  long ldh() const { return leading(round_up(std::max(hidden, size), kSlab)); }
  long frame(long direction, long sample, long step) const { return direction ? lengths[sample] - 1 - step : step; }
};

inline Problem make_problem(const char* op, const Inputs& in) {
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
  p.projected = first.w_hr.has_value();
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
    CONVFAST_CHECK(d.w_hr.has_value() == first.w_hr.has_value(), op, "w_hr", "given for both directions or none", "one");
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

}  // namespace lstm
}  // namespace cpu
}  // namespace convfast
