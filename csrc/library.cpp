// Every schema; no kernel code. The contracts are in ops.h.
#include <torch/csrc/stable/library.h>

// The emulated CUDA library of the tests has the same schemas in a namespace of its own.
#ifdef CONVFAST_EMULATE
#define CONVFAST_LIBRARY(m) STABLE_TORCH_LIBRARY(convfast_emulated, m)
#else
#define CONVFAST_LIBRARY(m) STABLE_TORCH_LIBRARY(convfast, m)
#endif

CONVFAST_LIBRARY(m) {
  m.def(
      "lstm_gates_forward(Tensor gates, Tensor? c, Tensor? peephole, bool save)"
      " -> (Tensor h, Tensor c_out, Tensor activated)");
  m.def(
      "lstm_gates_backward(Tensor activated, Tensor? c, Tensor c_out, Tensor? peephole, Tensor? dh, Tensor? dc_out,"
      " int[] needs) -> (Tensor dgates, Tensor dc, Tensor dpeephole)");
  m.def(
      "conv_lstm_forward(Tensor? x, Tensor? w_ih, Tensor w_hh, Tensor? bias, Tensor? peephole, Tensor? h0, Tensor? c0,"
      " Tensor? lengths, SymInt time, int[] stride, int[] padding, int[] dilation, str padding_mode, bool reverse,"
      " str algorithm, str save) -> (Tensor h, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)");
  m.def(
      "conv_lstm_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor? x, Tensor? w_ih, Tensor w_hh, Tensor? bias,"
      " Tensor? peephole, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor h, Tensor c, Tensor gates, SymInt time,"
      " int[] stride, int[] padding, int[] dilation, str padding_mode, bool reverse,"
      " str algorithm, int[] needs)"
      " -> (Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dpeephole, Tensor dh0, Tensor dc0)");
  m.def(
      "conv_lstm_algorithm(Tensor? x, Tensor? w_ih, Tensor w_hh, Tensor? h0, Tensor? c0, SymInt time, int[] stride,"
      " int[] padding, int[] dilation, str padding_mode, str algorithm) -> str");
  m.def(
      "conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, int stride, int[] padding, int dilation,"
      " int groups, str padding_mode, str activation, bool time_major, bool save) -> (Tensor y, Tensor pre)");
  m.def(
      "conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, Tensor y, Tensor pre, int stride,"
      " int[] padding, int dilation, int groups, str padding_mode, str activation, int[] needs)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "lstm_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? bias, Tensor? peephole, Tensor? w_hr, Tensor? w_ih_r,"
      " Tensor? w_hh_r, Tensor? bias_r, Tensor? peephole_r, Tensor? w_hr_r, Tensor? h0, Tensor? c0, Tensor? lengths,"
      " bool time_major, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)");
  m.def(
      "lstm_layers(Tensor x, Tensor[] weights, Tensor[] peepholes, bool bias, bool projection, bool bidirectional, Tensor? h0, Tensor? c0,"
      " Tensor? lengths, Tensor? head, Tensor? head_bias, bool time_major) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "conv1d_lstm_layers(Tensor x, Tensor[] convolutions, bool conv_bias, int[] stride, int[] padding, int[] dilation, int[] groups,"
      " str padding_mode, str activation, Tensor[] weights, Tensor[] peepholes, bool bias, bool projection, bool bidirectional,"
      " Tensor? h0, Tensor? c0, Tensor? head, Tensor? head_bias, bool time_major) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor w_ih, Tensor w_hh, Tensor? bias,"
      " Tensor? peephole, Tensor? w_hr, Tensor? w_ih_r, Tensor? w_hh_r, Tensor? bias_r, Tensor? peephole_r,"
      " Tensor? w_hr_r, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor y, Tensor c, Tensor gates, int[] needs)"
      " -> (Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dpeephole, Tensor dw_hr, Tensor dw_ih_r,"
      " Tensor dw_hh_r, Tensor dbias_r, Tensor dpeephole_r, Tensor dw_hr_r, Tensor dh0, Tensor dc0)");
  m.def("release_workspace() -> ()");
  m.def("cpu_capability() -> str");
}
