// The weights of lstm_layers, taken apart.
#pragma once
#include <optional>

#include "checks.h"

namespace convfast {

struct LSTMWeights {
  Tensor w_ih, w_hh;
  std::optional<Tensor> bias_ih, bias_hh, peephole, w_hr;
};

// Of each layer those of each direction.
inline std::vector<std::vector<LSTMWeights>> lstm_weights(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& peepholes,
                                                          bool bias, bool projection, bool bidirectional) {
  const size_t directions = bidirectional ? 2 : 1, each = 2 + (bias ? 2 : 0) + (projection ? 1 : 0), layer = directions * each;
  CONVFAST_CHECK(!weights.empty() && weights.size() % layer == 0, op, "weights", "a multiple of " + std::to_string(layer), weights.size());
  CONVFAST_CHECK(peepholes.empty() || peepholes.size() == weights.size() / each, op, "peepholes", "none, or one for each of weights", peepholes.size());
  std::vector<std::vector<LSTMWeights>> found(weights.size() / layer);
  for (size_t i = 0; i < weights.size(); i += each) {
    const Tensor* w = &weights[i];
    LSTMWeights one{w[0], w[1], {}, {}, {}, {}};
    if (bias) {
      one.bias_ih = w[2];
      one.bias_hh = w[3];
    }
    if (projection) one.w_hr = w[each - 1];
    if (!peepholes.empty()) one.peephole = peepholes[i / each];
    found[i / layer].push_back(one);
  }
  return found;
}

}  // namespace convfast
