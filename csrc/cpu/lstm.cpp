// LSTM on the CPU: glue between tensors and the kernels. The contract is in ops.h.
//
// A thread owns rows (samples) and runs their whole sequence, waiting for nobody. Where rows are few, threads share out the hidden units
// instead and wait for each other once a step (team.h), half of them for each of two directions; or, without gradients, the layers, each a
// few steps behind the one below. Else layers without gradients take turns of a few steps on every thread. Steps are taken in chunks: the
// input part of a chunk's gates is one GEMM over all its rows, and so are dx and the weights' gradients, while the chunk is in L2. Inside a
// step, GEMM and cell alternate block by block. Samples are ordered by length, so that the rows of a step are the first ones. A sequence of
// one step packs no weights but a block's at a time.
// Floor: 8 H (I + P) operations per row and step at the FMA peak, three times that for training; for few rows, 16 H P bytes of w_hh a
// step from L2.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../lstm_layers.h"
#include "lstm_backward.h"

namespace convfast {
namespace cpu {
namespace lstm {
namespace {

constexpr const char* kForward = "lstm_forward";
constexpr const char* kBackward = "lstm_backward";
constexpr const char* kLayers = "lstm_layers";
constexpr long kNeeds = 13;

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
  const auto plans = Engine<A>::plans(all);
  const long stages = Plan<A>::pipeline_of(plans, head.weight ? head.weight->size(0) : 0);
  for (Engine<A>* layer : all) layer->plan.stages = stages;
  const bool in_steps = head.weight && last.takes_head();
  if (in_steps) last.set_head(head);
  typename Engine<A>::Outputs out{{}, last.empty_h(), last.empty_c(), {}, {}};
  const Tensor y = last.empty_output(time_major, in_steps ? head.weight->size(0) : channels);
  if (stages > 1 || Plan<A>::takes_turns(plans)) {
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
  CONVFAST_CHECK(y.stride(2) == 1 || y.size(2) == 1 || y.numel() == 0, kBackward, "y", "as the forward returned it", "other strides");
  check("c", c, {p.directions, p.batch, p.time, p.hidden}, wide);
  check("gates", gates, {p.directions, p.batch, p.time, 4 * p.hidden}, dtype);
  CONVFAST_CHECK(c.is_contiguous() && gates.is_contiguous(), kBackward, "c and gates", "contiguous, as the forward returned them", "other strides");
  check("dy", dy, shape_of(y), dtype);
  check("dh_n", dh_n, {p.directions, p.batch, p.size}, dtype);
  check("dc_n", dc_n, {p.directions, p.batch, p.hidden}, wide);
  return switch_dtype(kBackward, "w_hh", w_hh, [&](auto a) {
    std::vector<Tensor> g = Backward<decltype(a)>(p, in).backward({dy, dh_n, dc_n, y, c, gates}, needs);
    return std::make_tuple(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12]);
  });
}

}  // namespace

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

}  // namespace lstm
}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&convfast::cpu::lstm::lstm_forward));
  m.impl("lstm_layers", TORCH_BOX(&convfast::cpu::lstm::lstm_layers));
  m.impl("lstm_backward", TORCH_BOX(&convfast::cpu::lstm::lstm_backward));
}
