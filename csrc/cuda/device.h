// What every kernel and its launch need: the CUDA language (or its emulation), launches, storage types, vector loads, math.
//
// Compiled by nvcc for a GPU, and by a C++ compiler with -DCONVFAST_EMULATE for tests on the CPU (csrc/testing/simt.h).
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "../checks.h"
#include "../common/cell.h"

#ifdef CONVFAST_EMULATE
#include "../testing/simt.h"
#define CONVFAST_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(convfast_emulated, CPU, m)
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#define CONVFAST_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(convfast, CUDA, m)
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);  // of libtorch_cuda
#endif

#define CONVFAST_DEVICE __device__ __forceinline__

namespace convfast {
namespace cuda {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Dynamic shared memory of the block, aligned to 1 KiB: what swizzles by address needs 512 bytes.
#ifdef CONVFAST_EMULATE
inline char* shared_memory() { return simt::self().block->memory.get(); }
#else
CONVFAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
#endif

// Whether what is compiled may use instructions of warpgroups: sm_90a alone has them, neither older nor newer architectures.
#if defined(CONVFAST_EMULATE) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// The device: what a launch has to know of it.

struct DeviceLimits {
  int sm_count = 0, shared = 0, major = 0, minor = 0;
  bool warpgroups = false;  // and the library is compiled for them
};

#ifdef CONVFAST_EMULATE
inline DeviceLimits device_limits() { return {132, 227 * 1024, 9, 0, true}; }  // an H200's
#else
// Never launched: its limit says for which architecture the device has it.
static __global__ void __launch_bounds__(kHasWarpgroups ? 64 : 32) warpgroup_probe() {}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // told here, and not again by whoever asks next
  STD_TORCH_CHECK(error == cudaSuccess, "convfast: ", what, ": ", cudaGetErrorString(error));
}

// Of the current device; asked for once.
inline const DeviceLimits& device_limits() {
  constexpr int kDevices = 64;
  struct Limits : DeviceLimits {
    explicit Limits(int device) {
      check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "device attribute");
      check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device attribute");
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device attribute");
      check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device attribute");
      cudaFuncAttributes probe{};
      check_cuda(cudaFuncGetAttributes(&probe, warpgroup_probe), "kernel attributes");
      warpgroups = probe.maxThreadsPerBlock > 32;
    }
  };
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  static thread_local DeviceLimits known[kDevices];
  STD_TORCH_CHECK(device < kDevices, "convfast: more than ", kDevices, " GPUs");
  if (known[device].sm_count == 0) known[device] = Limits(device);
  return known[device];
}
#endif

// For tests, which lead a call to the tiles and kernels of smaller devices: the environment may say less than there is.
inline int at_most(const char* name, int there) {
  const char* given = getenv(name);
  return given && *given ? std::min(int(strtol(given, nullptr, 10)), there) : there;
}
inline int sm_count() { return at_most("CONVFAST_CUDA_SM_COUNT", device_limits().sm_count); }
// Bytes of shared memory that one block can have.
inline size_t shared_limit() { return at_most("CONVFAST_CUDA_SHARED", device_limits().shared); }
// 90 for 9.0.
inline int compute_capability() { return at_most("CONVFAST_CUDA_CAPABILITY", 10 * device_limits().major + device_limits().minor); }

inline bool warpgroups() { return device_limits().warpgroups && compute_capability() == 90; }

// Inside an op there is nothing to differentiate, also where it is called without an autograd of ours around it.
struct NoGrad {
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;
  const bool before = aoti_torch_grad_mode_is_enabled();
};

// Makes the device of a tensor the current one while it lives, and has its current stream.
struct Device {
  NoGrad no_grad;
#ifdef CONVFAST_EMULATE
  explicit Device(const Tensor&) {}
  cudaStream_t stream = nullptr;
#else
  explicit Device(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
#endif
};

// Launches of kernel(params) on a grid, which does nothing where it is empty. `shared_bytes` is at most shared_limit().
// launch_cluster: blocks of `cluster_size` neighbouring x, a divisor of grid.x, at most 8, run together and reach each other's
// shared memory. launch_cooperative: all blocks run together; the grid is at most resident_blocks().

#ifdef CONVFAST_EMULATE
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, const Params& params) {
  simt::run(kernel, grid, dim3(threads), shared_bytes, 1, params);
}
template <class Params>
void launch_cluster(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, int cluster_size, const Params& params) {
  simt::run(kernel, grid, dim3(threads), shared_bytes, cluster_size, params);
}
template <class Params>
void launch_cooperative(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, const Params& params) {
  simt::run(kernel, grid, dim3(threads), shared_bytes, 0, params);
}
template <class Params>
int resident_blocks(void (*)(Params), int, size_t) {
  return sm_count();
}
template <class Params>
int resident_clusters(void (*)(Params), int, size_t, int cluster_size) {
  return compute_capability() < 90 ? 0 : sm_count() / cluster_size;
}
#else
template <class Params>
void allow_shared(void (*kernel)(Params), size_t bytes) {
  // All that there is: threads that launch it with different sizes would undo each other's.
  if (bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits().shared), "dynamic shared memory");
}
template <class Params>
void launch_with(const cudaLaunchAttribute* attributes, int count, void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes,
                 cudaStream_t stream, const Params& params) {
  if (size_t(grid.x) * grid.y * grid.z == 0) return;
  allow_shared(kernel, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = const_cast<cudaLaunchAttribute*>(attributes);
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "launch");
}
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  launch_with(nullptr, 0, kernel, grid, threads, shared_bytes, stream, params);
}
inline cudaLaunchAttribute cluster_attribute(int cluster_size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster_size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}
template <class Params>
void launch_cluster(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, int cluster_size,
                    const Params& params) {
  const cudaLaunchAttribute attribute = cluster_attribute(cluster_size);
  launch_with(&attribute, 1, kernel, grid, threads, shared_bytes, stream, params);
}
template <class Params>
void launch_cooperative(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  launch_with(&attribute, 1, kernel, grid, threads, shared_bytes, stream, params);
}
// Blocks that the whole device can run at the same time.
template <class Params>
int resident_blocks(void (*kernel)(Params), int threads, size_t shared_bytes) {
  allow_shared(kernel, shared_bytes);
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "occupancy");
  return blocks * sm_count();
}
// Clusters that the whole device can run at the same time; 0 where it knows none.
template <class Params>
int resident_clusters(void (*kernel)(Params), int threads, size_t shared_bytes, int cluster_size) {
  if (compute_capability() < 90) return 0;
  // A kernel compiled for an older GPU knows no clusters (mma.h), whatever it runs on.
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "kernel attributes");
  if (attributes.ptxVersion < 90) return 0;
  allow_shared(kernel, shared_bytes);
  cudaLaunchAttribute attribute = cluster_attribute(cluster_size);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster_size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "occupancy of clusters");
  return sm_count() < device_limits().sm_count ? std::min(clusters, sm_count() / cluster_size) : clusters;
}
#endif

// Storage types: float, Half, BFloat16. Arithmetic is float.

template <class A>
CONVFAST_DEVICE float to_float(A x) {
  return static_cast<float>(x);
}
template <class A>
CONVFAST_DEVICE A from_float(float x) {
  return static_cast<A>(x);
}

// Two 16-bit values in one register, `low` at the lower address: what mma takes.
template <class A>
CONVFAST_DEVICE uint32_t pack(float low, float high) {
  static_assert(sizeof(A) == 2, "of 16-bit types");
#ifdef CONVFAST_EMULATE
  return uint32_t(from_float<A>(low).x) | uint32_t(from_float<A>(high).x) << 16;
#else
  using Pair = std::conditional_t<std::is_same_v<A, Half>, __half2, __nv_bfloat162>;
  Pair pair;
  if constexpr (std::is_same_v<A, Half>) pair = __floats2half2_rn(low, high);
  else pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#endif
}

template <class A>
CONVFAST_DEVICE float2 unpack(uint32_t word) {
  static_assert(sizeof(A) == 2, "of 16-bit types");
#ifdef CONVFAST_EMULATE
  return {to_float(A(uint16_t(word), A::from_bits())), to_float(A(uint16_t(word >> 16), A::from_bits()))};
#else
  if constexpr (std::is_same_v<A, Half>) return __half22float2(*reinterpret_cast<const __half2*>(&word));
  else return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#endif
}

// N neighbouring elements, read and written by accesses of up to 16 bytes.
template <class A, int N>
struct alignas(N * sizeof(A) < 16 ? N * sizeof(A) : 16) Vec {
  A v[N];
};

template <int kBytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

template <class V>
CONVFAST_DEVICE void copy_words(V* to, const V* from) {
  using Word = typename WordOf<alignof(V)>::type;
#ifdef CONVFAST_EMULATE
  if ((uintptr_t(to) | uintptr_t(from)) % alignof(V)) simt::fail("vector access is not aligned to " + std::to_string(alignof(V)) + " bytes");
#endif
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / sizeof(Word)); ++i) reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
}

// p is aligned to the size of the vector, or to 16 bytes where that is less.
template <int N, class A>
CONVFAST_DEVICE Vec<A, N> load_vec(const A* p) {
  Vec<A, N> r;
  copy_words(&r, reinterpret_cast<const Vec<A, N>*>(p));
  return r;
}
#ifndef CONVFAST_EMULATE
CONVFAST_DEVICE void store_word(uint4* p, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
CONVFAST_DEVICE void store_word(uint2* p, uint2 x) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory"); }
CONVFAST_DEVICE void store_word(uint32_t* p, uint32_t x) { *p = x; }
CONVFAST_DEVICE void store_word(uint16_t* p, uint16_t x) { *p = x; }
#endif

// To global memory, aligned likewise.
template <class A, int N>
CONVFAST_DEVICE void store_vec(A* p, const Vec<A, N>& v) {
#ifdef CONVFAST_EMULATE
  copy_words(reinterpret_cast<Vec<A, N>*>(p), &v);
#else
  // By instruction: nvcc takes assignments apart into words, and leaves some so.
  using Word = typename WordOf<alignof(Vec<A, N>)>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / sizeof(Word)); ++i) store_word(reinterpret_cast<Word*>(p) + i, reinterpret_cast<const Word*>(&v)[i]);
#endif
}

// Math policy of common/cell.h. Absolute error of sigmoid and tanh below 4e-7, relative error of tanh too (ex2.approx errs by
// 2 ulp, and 1.2 |x| ulp come from rounding its argument; where that is large the result no longer feels it). NaN stays NaN.
struct DeviceMath {
  using Number = float;
  static CONVFAST_DEVICE float one() { return 1.f; }
  static CONVFAST_DEVICE float zero() { return 0.f; }
  static CONVFAST_DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
  static CONVFAST_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
  static CONVFAST_DEVICE float tanh(float x) {
    // 1 - 2 / (e^2x + 1) cancels near zero; the odd polynomial (Cephes tanhf) is good to 1.3e-7 below 0.625.
    const float u = x * x;
    float p = -5.70498872745e-3f;
    p = p * u + 2.06390887954e-2f;
    p = p * u - 5.37397155531e-2f;
    p = p * u + 1.33314422036e-1f;
    p = p * u - 3.33332819422e-1f;
    const float near = p * u * x + x, far = 1.f - __fdividef(2.f, __expf(2.f * x) + 1.f);
    return fabsf(x) < 0.625f ? near : far;
  }
};

}  // namespace cuda
}  // namespace convfast
