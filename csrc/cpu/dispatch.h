// What the ops need: kernels for this machine, fresh outputs, and a type switch.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include "../checks.h"
#include "kernels/kernels.h"
#include "team.h"
#include "workspace.h"

namespace convfast {
namespace cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;
using OptionalTensor = std::optional<Tensor>;

// The widest instruction set that the processor has and ATEN_CPU_CAPABILITY (default, avx2, avx512) admits.
template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T>& chosen = [&]() -> const Kernels<T>& {
#if defined(__x86_64__)
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    const bool baseline = wish && std::strcmp(wish, "default") == 0, avx2 = wish && std::strcmp(wish, "avx2") == 0;
    __builtin_cpu_init();
    if (!baseline && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return *Table<T>::avx512();
    if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *Table<T>::avx2();
#endif
    return *Table<T>::baseline();
  }();
  return chosen;
}

// A core's L2 cache, or a guess where the system does not tell.
inline long l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

constexpr long kMostGates = 32l << 20;  // bytes that are kept for the backward by way of the cache

// Whether so much is written, more than `most` bytes of A, that it would only drive out of the cache what the next step needs; whole
// blocks of the channels at aligned addresses, as the kernels want it.
template <class A>
bool streams(const Tensor& t, long channels, long most) {
  return channels % kBlock == 0 && t.numel() * long(sizeof(A)) > most && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 64 == 0;
}

// Cell arithmetic of activations A.
template <class A>
using Wide = std::conditional_t<std::is_same_v<A, double>, double, float>;

template <class A>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<A, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<A, float>) return ScalarType::Float;
  else if constexpr (std::is_same_v<A, BFloat16>) return ScalarType::BFloat16;
  else return ScalarType::Half;
}

template <class A>
constexpr Format kFormat = std::is_same_v<A, BFloat16> ? kBfloat16 : std::is_same_v<A, Half> ? kHalf : kFull;

template <class A>
Kept<Wide<A>> kept(const A* data) {
  return {const_cast<A*>(data), kFormat<A>};
}

// n neighbours from one type to another.
template <class B, class C>
void convert(const B* from, long n, C* to) {
  if constexpr (std::is_same_v<B, C>) std::memcpy(static_cast<void*>(to), from, n * sizeof(C));
  else if constexpr (kFormat<B> != kFull && std::is_same_v<C, float>) kernels<float>().widen(n, reinterpret_cast<const unsigned short*>(from), kFormat<B>, to);
  else if constexpr (std::is_same_v<B, float> && kFormat<C> != kFull) kernels<float>().narrow(n, from, kFormat<C>, reinterpret_cast<unsigned short*>(to));
  else
    for (long i = 0; i < n; ++i) to[i] = static_cast<C>(from[i]);
}

// Rounds n numbers to what type A can hold.
template <class A, class T>
void round_to(long n, T* numbers) {
  constexpr long kTogether = 256;
  A rounded[kTogether];
  for (long i = 0; i < n; i += kTogether) {
    const long count = std::min(kTogether, n - i);
    convert(numbers + i, count, rounded);
    convert(rounded, count, numbers + i);
  }
}

// Calls f with a value of the activation type.
template <class F>
auto switch_dtype(const char* op, const char* argument, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(BFloat16());
    case ScalarType::Half: return f(Half());
    default: break;
  }
  CONVFAST_CHECK(false, op, argument, "float32, float64, bfloat16 or float16", torch::headeronly::toString(t.scalar_type()));
  return f(float());
}

inline bool defined(const OptionalTensor& t) { return t.has_value(); }

// A tensor [B, T, n] by its strides: asking a tensor for them takes a call each time.
template <class A>
struct SequenceOf {
  A* data = nullptr;
  long sample = 0, step = 0, feature = 0;
  SequenceOf() = default;
  explicit SequenceOf(const Tensor& t) {
    if (t.dim() != 3) return;
    if constexpr (std::is_const_v<A>) data = static_cast<A*>(t.const_data_ptr());
    else data = static_cast<A*>(t.mutable_data_ptr());
    sample = t.stride(0);
    step = t.stride(1);
    feature = t.stride(2);
  }
  A* at(long b, long t) const { return data + b * sample + t * step; }
};

// Steps of each sample: `lengths` checked, or all of them.
inline std::vector<long> read_lengths(const char* op, const OptionalTensor& lengths, long batch, long time) {
  std::vector<long> steps(batch, time);
  if (!lengths) return steps;
  check_shape(op, "lengths", *lengths, {batch});
  CONVFAST_CHECK(lengths->scalar_type() == ScalarType::Long, op, "lengths", "int64", torch::headeronly::toString(lengths->scalar_type()));
  const int64_t* n = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (long b = 0; b < batch; ++b) {
    steps[b] = n[b * lengths->stride(0)];
    CONVFAST_CHECK(steps[b] >= 0 && steps[b] <= time, op, "lengths", "between 0 and " + std::to_string(time), steps[b]);
  }
  return steps;
}

// torch_from_blob came with torch 2.11, and the library asks for 2.10: looked up, until 2.11 is the least.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, AtenTensorHandle*,
                                    int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);
inline FromBlob from_blob_function() {
  static const auto function = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
}

// Uninitialised, with strides that leave no gaps; dims may be expanded. Large tensors live in the pool, and go back to it with their last reference.
inline Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  constexpr int64_t kLarge = 1 << 17;
  int64_t elements = 1;
  for (size_t i = 0; i < shape.size(); ++i) elements *= strides[i] || shape[i] == 0 ? shape[i] : 1;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), cpu = aoti_torch_device_type_cpu();
  const int64_t bytes = elements * int64_t(aoti_torch_dtype_element_size(type));
  AtenTensorHandle handle;
  if (bytes >= kLarge && from_blob_function()) {
    const auto [data, size] = borrow(bytes);
    const auto back = [](void* data, void* size) { give_back(data, reinterpret_cast<size_t>(size)); };
    const AOTITorchError error = from_blob_function()(data, shape.size(), shape.data(), strides.data(), 0, type, cpu, -1, &handle,
                                                      aoti_torch_layout_strided(), nullptr, 0, back, reinterpret_cast<void*>(size));
    if (error != AOTI_TORCH_SUCCESS) give_back(data, size);
    TORCH_ERROR_CODE_CHECK(error);
    return Tensor(handle);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), type, cpu, 0, &handle));
  Tensor t(handle);
  if (bytes && poison_requested()) poison(t.mutable_data_ptr(), bytes);
  return t;
}

// With the strides of a contiguous tensor whose dims lie in the order `order` (outermost first).
inline Tensor empty_ordered(const std::vector<int64_t>& shape, const std::vector<int64_t>& order, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(1, shape[order[i]]);
  }
  return empty_strided(shape, strides, dtype);
}

// torch.empty_like, from the pool where t has no gaps.
inline Tensor empty_like(const Tensor& t) {
  std::vector<int64_t> dims, shape(t.dim()), strides(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) {
    shape[i] = t.size(i);
    strides[i] = t.stride(i);
    if (shape[i] != 1) dims.push_back(i);
  }
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int64_t i : dims) {
    if (strides[i] != expected) return torch::stable::empty_like(t);
    expected *= shape[i];
  }
  return empty_strided(shape, strides, t.scalar_type());
}

inline Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> order(shape.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  return empty_ordered(shape, order, dtype);
}

// `grain`: for fewer than so many of n to wake a thread takes longer.
template <class F>
void parallel(long n, const F& f, long grain = 1) {
  // torch would keep the text of a failure on another thread to itself, and the type of any.
  std::mutex mutex;
  std::exception_ptr failure;
  bool abandoned = false;  // whether it is that of a thread that waited for one that failed
  const auto keep = [&](bool follows) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!failure || (abandoned && !follows)) failure = std::current_exception(), abandoned = follows;
  };
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      f(long(begin), long(end));
    } catch (const Abandoned&) {
      keep(true);
    } catch (...) {
      keep(false);
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// call(part, member) on every member of `parts` teams of so many threads each.
template <class F>
void in_teams(long parts, long team, const F& call) {
  std::vector<std::unique_ptr<Team>> teams;
  for (long i = 0; i < parts; ++i) teams.push_back(std::make_unique<Team>(team));
  parallel(parts * team, [&](long begin, long end) {
    for (long task = begin; task < end; ++task) {
      const long part = task / team, rank = teams[part]->join(task % team);
      long turn = 0;
      if (rank < 0) continue;
      try {
        call(part, Member{teams[part].get(), rank, &turn});
      } catch (...) {  // no memory: the others are not to wait for ever
        teams[part]->fail(rank);
        throw;
      }
    }
  });
}

// Pieces of work that do not wait for each other, in a parallel region of their own: what team.h's Pieces are to a team, and shared out
// alike. A share has its thread's number, however many threads come: sums by number have one order.
class Region {
 public:
  // f(begin, end, thread) over [0, n).
  template <class F>
  void add(long n, F f) {
    if (n > 0) pieces_.emplace_back(n, std::move(f));
  }

  void run() {
    const long threads = pieces_.empty() ? 0 : torch::stable::get_num_threads();
    parallel(threads, [&](long first, long last) {
      for (long i = first; i < last; ++i) {
        long taken = 0;
        for (const auto& [n, f] : pieces_) {
          const bool all = n >= threads;
          const long turn = all ? i : (i + threads - taken % threads) % threads, shares = all ? threads : n;
          if (turn < shares) f(n * turn / shares, n * (turn + 1) / shares, i);
          if (!all) taken += n;
        }
      }
    });
    pieces_.clear();
  }

 private:
  std::vector<std::pair<long, std::function<void(long, long, long)>>> pieces_;
};

}  // namespace cpu
}  // namespace convfast
