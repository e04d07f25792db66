// ConvLSTM on the CPU: glue between tensors and the kernels. The contract is in ops.h.
//
// Forward, per step: x_t is packed into a bordered frame, then every row of every sample is one GEMM over the taps of x_t and h_{t-1}
// with the cell behind it; h_t goes to the output and, bordered, to the next step's frame. Backward, per step: gate gradients, then
// dgrad (GEMM over the taps of dgates), dx (one GEMM, then a gather over taps) and wgrad, all from dgates while it is in cache.
// Teams of threads have samples of their own and walk through all steps side by side, in one parallel region: what a thread writes at one
// step it reads at the next, mostly from its own caches.
// Floor: 2 * taps * (Cin + C) * 4C operations per pixel and step at the FMA peak, three times that for training.
// Winograd (conv_lstm_winograd.h) reads and writes the same frames in tiles, and takes the place of the step, of dgrad and of wgrad.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../text.h"
#include "conv_lstm_backward.h"

namespace convfast {
namespace cpu {
namespace conv_lstm {
namespace {

constexpr const char* kForward = "conv_lstm_forward";
constexpr const char* kBackward = "conv_lstm_backward";
constexpr const char* kAlgorithm = "conv_lstm_algorithm";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_lstm_forward(
    OptionalTensor x, OptionalTensor w_ih, Tensor w_hh, OptionalTensor bias, OptionalTensor peephole, OptionalTensor h0, OptionalTensor c0,
    OptionalTensor lengths, int64_t time, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    Text padding_mode, bool reverse, Text algorithm, Text save) {
  const Inputs in{x, w_ih, w_hh, bias, peephole, h0, c0, lengths};
  CONVFAST_CHECK(save == "none" || save == "fast" || save == "lean", kForward, "save", "none, fast or lean", save);
  Problem p = make_problem(kForward, in, time, stride, padding, dilation, padding_mode, reverse);
  choose_algorithm(kForward, p, w_hh.scalar_type(), algorithm);
  return switch_dtype(kForward, "w_hh", w_hh, [&](auto a) { return Engine<decltype(a)>(p, in).forward(save); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_lstm_backward(
    OptionalTensor dh, OptionalTensor dh_n, OptionalTensor dc_n, OptionalTensor x, OptionalTensor w_ih, Tensor w_hh, OptionalTensor bias,
    OptionalTensor peephole, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths, Tensor h, Tensor c, Tensor gates, int64_t time,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, Text padding_mode, bool reverse,
    Text algorithm, std::vector<int64_t> needs) {
  const Inputs in{x, w_ih, w_hh, bias, peephole, h0, c0, lengths};
  Problem p = make_problem(kBackward, in, time, stride, padding, dilation, padding_mode, reverse);
  choose_algorithm(kBackward, p, w_hh.scalar_type(), algorithm);
  CONVFAST_CHECK(needs.size() == 7, kBackward, "needs", "7 flags", needs.size());
  const auto state_shape = p.shape({p.batch, p.channels}), sequence_shape = p.shape({p.batch, p.time, p.channels});
  check_shape(kBackward, "h", h, sequence_shape);
  check_shape(kBackward, "c", c, sequence_shape);
  const bool layouts = (dense_channels_last(h, 2) && dense_channels_last(c, 2)) || h.numel() == 0;
  CONVFAST_CHECK(layouts, kBackward, "h and c", "channels-last, as the forward returned them", "other strides");
  const ScalarType dtype = w_hh.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  check_dtype(kBackward, "h", h, dtype, dtype);
  check_dtype(kBackward, "c", c, wide, wide);
  if (gates.numel()) {
    check_shape(kBackward, "gates", gates, p.shape({p.batch, p.time, 4 * p.channels}));
    check_dtype(kBackward, "gates", gates, dtype, dtype);
    CONVFAST_CHECK(dense_channels_last(gates, 2), kBackward, "gates", "channels-last, as the forward returned them", "other strides");
  }
  if (defined(dh)) {
    check_shape(kBackward, "dh", *dh, sequence_shape);
    check_dtype(kBackward, "dh", *dh, dtype, dtype);
  }
  if (defined(dh_n)) {
    check_shape(kBackward, "dh_n", *dh_n, state_shape);
    check_dtype(kBackward, "dh_n", *dh_n, dtype, dtype);
  }
  if (defined(dc_n)) {
    check_shape(kBackward, "dc_n", *dc_n, state_shape);
    check_dtype(kBackward, "dc_n", *dc_n, wide, wide);
  }
  return switch_dtype(kBackward, "w_hh", w_hh,
                      [&](auto a) { return Backward<decltype(a)>(p, in).backward(dh, dh_n, dc_n, h, c, gates, needs); });
}

std::string conv_lstm_algorithm(OptionalTensor x, OptionalTensor w_ih, Tensor w_hh, OptionalTensor h0, OptionalTensor c0, int64_t time,
                                std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                Text padding_mode, Text algorithm) {
  const Inputs in{x, w_ih, w_hh, {}, {}, h0, c0, {}};
  Problem p = make_problem(kAlgorithm, in, time, stride, padding, dilation, padding_mode, false);
  return choose_algorithm(kAlgorithm, p, w_hh.scalar_type(), algorithm);
}

}  // namespace
}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CPU, m) {
  m.impl("conv_lstm_forward", TORCH_BOX(&convfast::cpu::conv_lstm::conv_lstm_forward));
  m.impl("conv_lstm_backward", TORCH_BOX(&convfast::cpu::conv_lstm::conv_lstm_backward));
  m.impl("conv_lstm_algorithm", TORCH_BOX(&convfast::cpu::conv_lstm::conv_lstm_algorithm));
}
