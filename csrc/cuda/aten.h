// Library operations through the stable dispatcher, for what has no kernel here, and small helpers on tensors.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "../checks.h"

namespace convfast {
namespace cuda {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline bool defined(const OptionalTensor& t) { return t.has_value(); }

template <class T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
// nullptr where there is none.
template <class T>
const T* pointer(const OptionalTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}
template <class T>
T* writable(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a value of the activation type.
template <class F>
auto switch_dtype(const char* op, const char* argument, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    case ScalarType::Half: return f(torch::headeronly::Half());
    default: break;
  }
  CONVFAST_CHECK(false, op, argument, "float32, bfloat16 or float16", torch::headeronly::toString(dtype));
  return f(float());
}

template <size_t kReturns, class... Args>
std::array<Tensor, kReturns> call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args), kReturns)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, kReturns> results;
  for (size_t i = 0; i < kReturns; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

// A view whose dim `from` lies at `to`.
inline Tensor movedim(const Tensor& t, int64_t from, int64_t to) { return call<1>("aten::movedim", "int", t, from, to)[0]; }

// x [N, Cin, *S], weight [Cout, Cin, *K], or [Cin, Cout, *K] where transposed; padding is the same on both sides of a dim.
inline Tensor convolution(const Tensor& x, const Tensor& weight, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                          bool transposed = false) {
  return call<1>("aten::convolution", "", x, weight, std::optional<Tensor>(), stride, padding, dilation, transposed,
                 Sizes(stride.size(), 0), int64_t(1))[0];
}

// → gradients of x and of weight; an undefined tensor where not needed.
inline std::array<Tensor, 2> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Sizes& stride,
                                                  const Sizes& padding, const Sizes& dilation, bool need_x, bool need_weight) {
  const bool needs[3] = {need_x, need_weight, false};
  const auto found = call<3>("aten::convolution_backward", "", grad, x, weight, std::optional<Sizes>(), stride, padding, dilation,
                             false, Sizes(stride.size(), 0), int64_t(1), torch::headeronly::HeaderOnlyArrayRef<bool>(needs, 3));
  return {found[0], found[1]};
}

// t with its channels innermost and no gaps: t itself where it lies so. Kernels read it in pieces of 16 bytes.
inline Tensor dense_last(const Tensor& t, int64_t channel_dim) {
  const Tensor last = torch::stable::contiguous(movedim(t, channel_dim, -1));
  return reinterpret_cast<uintptr_t>(last.const_data_ptr()) % 16 ? torch::stable::clone(last) : last;
}

inline Tensor cast(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

}  // namespace cuda
}  // namespace convfast
