// Convolutions and an LSTM on top in one call: between short ones Python takes a share of the time. The contract is in ops.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../text.h"

namespace convfast {
namespace cpu {

std::tuple<Tensor, Tensor> conv1d_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> lengths, int64_t stride,
                                          std::vector<int64_t> padding, int64_t dilation, int64_t groups, Text padding_mode,
                                          Text activation, bool time_major, bool save);

namespace lstm {

std::tuple<Tensor, Tensor, Tensor> lstm_layers(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> peepholes, bool bias, bool projection,
                                               bool bidirectional, std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> lengths,
                                               std::optional<Tensor> head, std::optional<Tensor> head_bias, bool time_major);

}  // namespace lstm

namespace {

constexpr const char* kOp = "conv1d_lstm_layers";

std::tuple<Tensor, Tensor, Tensor> conv1d_lstm_layers(Tensor x, std::vector<Tensor> convolutions, bool conv_bias, std::vector<int64_t> stride,
                                                      std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> groups,
                                                      Text padding_mode, Text activation, std::vector<Tensor> weights,
                                                      std::vector<Tensor> peepholes, bool bias, bool projection, bool bidirectional,
                                                      std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> head,
                                                      std::optional<Tensor> head_bias, bool time_major) {
  const size_t layers = stride.size(), each = conv_bias ? 2 : 1;
  const auto check_count = [](const char* name, size_t found, size_t expected) {
    CONVFAST_CHECK(found == expected, kOp, name, "a list of " + std::to_string(expected), found);
  };
  check_count("convolutions", convolutions.size(), layers * each);
  check_count("padding", padding.size(), 2 * layers);
  check_count("dilation", dilation.size(), layers);
  check_count("groups", groups.size(), layers);
  for (size_t i = 0; i < layers; ++i) {
    const Tensor* w = &convolutions[i * each];
    x = std::get<0>(conv1d_forward(x, w[0], conv_bias ? std::optional<Tensor>(w[1]) : std::nullopt, std::nullopt, stride[i],
                                   {padding[2 * i], padding[2 * i + 1]}, dilation[i], groups[i], padding_mode, activation, false, false));
  }
  return lstm::lstm_layers(x, std::move(weights), std::move(peepholes), bias, projection, bidirectional, h0, c0, std::nullopt, head, head_bias, time_major);
}

}  // namespace
}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CPU, m) { m.impl("conv1d_lstm_layers", TORCH_BOX(&convfast::cpu::conv1d_lstm_layers)); }
