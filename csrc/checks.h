// Messages: op, argument, what was expected, what came.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace convfast {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline std::string shape_string(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// As STD_TORCH_CHECK, which puts the function and the folder of the sources before the message.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

#define CONVFAST_CHECK(condition, op, argument, expected, got) \
  if (!(condition)) ::convfast::refuse(op, ": ", argument, " must be ", expected, ", got ", got)

// Of strides, paddings and dilations, so that sums and products of them and of sizes fit 64 bits.
constexpr int64_t kMostOfOption = int64_t(1) << 31;

inline void check_shape(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& shape) {
  CONVFAST_CHECK(shape_of(t) == shape, op, argument, "of shape " + shape_string(shape), shape_string(shape_of(t)));
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType dtype, ScalarType or_dtype) {
  CONVFAST_CHECK(t.scalar_type() == dtype || t.scalar_type() == or_dtype, op, argument,
                 std::string("of the same dtype as the weights") + (dtype == or_dtype ? "" : ", or of the wide dtype of the cell"),
                 torch::headeronly::toString(t.scalar_type()));
}

}  // namespace convfast
