// Every schema; no kernel code. The contracts are in ops.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(convfast, m) {
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
  m.def("release_workspace() -> ()");
  m.def("cpu_capability() -> str");
}
