// Checks of the emulator itself and of DeviceMath: runs the one that is named and says what is wrong; without a name, lists them.
#include <cstdio>
#include <map>

#include "../cuda/mma.h"

using namespace convfast;
using namespace convfast::cuda;

namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

template <class F>
void require_error(const std::string& text, const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return require(std::string(error.what()).find(text) != std::string::npos, "expected '" + text + "', got '" + error.what() + "'");
  }
  throw std::runtime_error("expected an error with '" + text + "'");
}

// Whether f() is true with every seed, with some, or with none.
template <class F>
std::string over_seeds(const F& f) {
  int good = 0;
  for (int seed = 0; seed < 16; ++seed) {
    setenv("CONVFAST_EMULATE_SEED", std::to_string(seed).c_str(), 1);
    good += f();
  }
  unsetenv("CONVFAST_EMULATE_SEED");
  return good == 16 ? "always" : good ? "sometimes" : "never";
}

void require_over_seeds(const std::string& expected, const std::string& found) {
  require(found == expected, "expected to be right " + expected + ", was " + found);
}

template <class A>
struct Product {
  const A *a, *b;  // [16, 16], [16, 8]
  float* d;        // [16, 8]
};

// A by ldmatrix, B by ldmatrix.trans, both from row-major shared memory.
template <class A>
void product_kernel(Product<A> p) {
  A* a = reinterpret_cast<A*>(shared_memory());
  A* b = a + 16 * 16;
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  for (int i = lane; i < 16 * 16; i += 32) a[i] = p.a[i];
  for (int i = lane; i < 16 * 8; i += 32) b[i] = p.b[i];
  __syncthreads();
  uint32_t x[4], y[2], y_by_hand[2];
  float d[4];
  ldmatrix_x4(x, a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2_trans(y, b + lane % 16 * 8);
  for (int i = 0; i < 2; ++i) y_by_hand[i] = pack<A>(to_float(b[(8 * i + 2 * q) * 8 + g]), to_float(b[(8 * i + 2 * q + 1) * 8 + g]));
  if (y[0] != y_by_hand[0] || y[1] != y_by_hand[1]) simt::fail("ldmatrix.trans and the fragment of mma differ");
  for (int i = 0; i < 4; ++i) d[i] = p.d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2];
  mma_16816<A>(d, x, y);
  for (int i = 0; i < 4; ++i) p.d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
}

void product_tf32_kernel(Product<float> p) {  // a [16, 8], b [8, 8]
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  uint32_t x[4], y[2];
  float d[4];
  for (int i = 0; i < 4; ++i) x[i] = to_tf32(p.a[(g + 8 * (i % 2)) * 8 + q + 4 * (i / 2)]);
  for (int i = 0; i < 2; ++i) y[i] = to_tf32(p.b[(q + 4 * i) * 8 + g]);
  for (int i = 0; i < 4; ++i) d[i] = p.d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2];
  mma_1688_tf32(d, x, y);
  for (int i = 0; i < 4; ++i) p.d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
}

// Small whole numbers: exact in every type and in any order.
template <class A>
void check_product(int depth, void (*kernel)(Product<A>)) {
  std::vector<A> a(16 * depth), b(depth * 8);
  std::vector<float> d(16 * 8), exact(16 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = A(float(int(i * 7 % 11) - 5));
  for (size_t i = 0; i < b.size(); ++i) b[i] = A(float(int(i * 5 % 13) - 6));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      exact[i * 8 + j] = d[i * 8 + j] = float(i - j);
      for (int k = 0; k < depth; ++k) exact[i * 8 + j] += float(a[i * depth + k]) * float(b[k * 8 + j]);
    }
  launch(kernel, dim3(1), 32, 1024, nullptr, Product<A>{a.data(), b.data(), d.data()});
  require(d == exact, "the product is wrong");
}

// Where element (row, k) of a matrix with rows of 64 bytes lies for wgmma, in bytes.
int swizzled_at(int row, int k) { return swizzled(row, k / 8) + k % 8 * 2; }

template <class A>
struct WarpgroupProduct {
  const A *a, *b;  // [128, 32], [64, 32]
  float* d;        // [128, 64]
  int mode;        // 1: sums are taken without a wait, 2: b is written over while it may be read, 3: the thread ends without a wait
};

// Two warpgroups, 64 rows each; k in two products.
template <class A>
void warpgroup_kernel(WarpgroupProduct<A> p) {
  char *a = shared_memory(), *b = a + 128 * 64;
  for (int i = threadIdx.x; i < 128 * 32; i += 256) *reinterpret_cast<A*>(a + swizzled_at(i / 32, i % 32)) = p.a[i];
  for (int i = threadIdx.x; i < 64 * 32; i += 256) *reinterpret_cast<A*>(b + swizzled_at(i / 32, i % 32)) = p.b[i];
  fence_async_proxy();
  __syncthreads();
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const auto at = [&](int tile, int i) { return (row + 8 * (i / 2)) * 64 + 8 * tile + 2 * (lane % 4) + i % 2; };
  float d[1][8][4];
  for (int tile = 0; tile < 8; ++tile)
    for (int i = 0; i < 4; ++i) d[0][tile][i] = p.d[at(tile, i)];
  wgmma_fence();
  for (int half = 0; half < 2; ++half) {
    wgmma<A>(d, matrix_at(a + threadIdx.x / 128 * 64 * 64 + half * 32), matrix_at(b + half * 32));
    wgmma_commit();
  }
  if (p.mode == 3) return;
  if (p.mode == 2) b[threadIdx.x] = 0;
  if (p.mode == 1) wgmma_wait<1>();
  const float early = d[0][0][0];
  wgmma_wait<0>();
  if (p.mode == 1) d[0][0][0] = early;
  for (int tile = 0; tile < 8; ++tile)
    for (int i = 0; i < 4; ++i) p.d[at(tile, i)] = d[0][tile][i];
}

template <class A>
bool warpgroup_product(int mode) {
  std::vector<A> a(128 * 32), b(64 * 32);
  std::vector<float> d(128 * 64), exact(128 * 64);
  for (size_t i = 0; i < a.size(); ++i) a[i] = A(float(int(i * 7 % 11) - 5));
  for (size_t i = 0; i < b.size(); ++i) b[i] = A(float(int(i * 5 % 13) - 6));
  for (int i = 0; i < 128; ++i)
    for (int j = 0; j < 64; ++j) {
      exact[i * 64 + j] = d[i * 64 + j] = float(i - j);
      for (int k = 0; k < 32; ++k) exact[i * 64 + j] += float(a[i * 32 + k]) * float(b[j * 32 + k]);
    }
  launch(warpgroup_kernel<A>, dim3(1), 256, 192 * 64, nullptr, WarpgroupProduct<A>{a.data(), b.data(), d.data(), mode});
  return d == exact;
}

struct Numbers {
  const float* in;
  float* out;
  int mode = 0;
};

// out[i] = in[i + 1] through shared memory, 128 threads; mode 1: without the barrier.
void neighbour_kernel(Numbers p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = p.in[threadIdx.x];
  if (p.mode == 0) __syncthreads();
  p.out[threadIdx.x] = shared[(threadIdx.x + 1) % 128];
}

// The same by asynchronous copies; mode 1: no wait, 2: no commit, 3: no barrier, 4: a stage is filled again while others read it.
void copy_kernel(Numbers p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  cp_async4(shared + threadIdx.x, p.in + threadIdx.x);
  if (p.mode != 2) cp_async_commit();
  if (p.mode != 1) cp_async_wait<0>();
  if (p.mode != 3) __syncthreads();
  const float found = shared[(threadIdx.x + 1) % 128];
  if (p.mode == 4) cp_async4(shared + threadIdx.x, p.in + threadIdx.x);
  p.out[threadIdx.x] = found;
}

// out of block r = in of block r + 1, through its shared memory; mode 1: no barrier before the reading, 2: none before the end.
void cluster_kernel(Numbers p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned rank = cluster_rank(), next = (rank + 1) % cluster_size();
  shared[threadIdx.x] = p.in[rank * 32 + threadIdx.x];
  if (p.mode != 1) cluster_sync();
  p.out[rank * 32 + threadIdx.x] = cluster_map(shared, next)[threadIdx.x];
  if (p.mode != 2) cluster_sync();
}

// The same through global memory.
void grid_kernel(Numbers p) {
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  p.out[blockIdx.x * 32 + threadIdx.x] = p.in[blockIdx.x * 32 + threadIdx.x];
  if (p.mode == 0) grid_sync();
  const float found = p.out[next * 32 + threadIdx.x];
  if (p.mode == 0) grid_sync();
  p.out[blockIdx.x * 32 + threadIdx.x] = found;
}

// mode 0: sums over the warp; 1: half of the threads leave before a barrier; 2: lanes at different operations; 3: too much is
// written; 4: an address that is not aligned; 5: of another block
void misuse_kernel(Numbers p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (p.mode == 0) {
    float x = p.in[threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    p.out[threadIdx.x] = x + __shfl_sync(~0u, p.in[threadIdx.x], 3) + __shfl_down_sync(~0u, p.in[threadIdx.x], 1);
  }
  if (p.mode == 1 && threadIdx.x < 16) return;
  if (p.mode == 1) __syncthreads();
  if (p.mode == 2 && threadIdx.x < 16) __syncwarp();
  else if (p.mode == 2) __shfl_sync(~0u, 1, 0);
  if (p.mode == 3) shared[threadIdx.x + 1] = 0.f;
  if (p.mode == 4) cp_async16(shared, p.in + 1);
  if (p.mode == 5) cluster_map(shared, 1);
}

std::vector<float> numbers(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = float(i + 1);
  return x;
}

// Whether each of `n` numbers becomes the one `by` further on.
bool moves(void (*kernel)(Numbers), int n, int by, int mode, int blocks, int together) {
  const std::vector<float> in = numbers(n);
  std::vector<float> out(n, NAN);
  simt::run(kernel, dim3(blocks), dim3(n / blocks), size_t(n / blocks) * 4, together, Numbers{in.data(), out.data(), mode});
  for (int i = 0; i < n; ++i)
    if (out[i] != in[(i + by) % n]) return false;
  return true;
}

void misuse(int mode) {
  const std::vector<float> in = numbers(64);
  std::vector<float> out(64);
  launch(misuse_kernel, dim3(1), 32, 128, nullptr, Numbers{in.data(), out.data(), mode});
  if (mode) return;
  for (int i = 0; i < 32; ++i) require(out[i] == 32 * 33 / 2 + 4 + in[i < 31 ? i + 1 : i], "a shuffle is wrong");
}

void device_math() {
  double sigmoid = 0, tanh = 0, relative = 0;
  for (int i = -2000000; i <= 2000000; ++i) {
    const float x = float(i) * 1e-4f;
    const double exact = std::tanh(double(x)), found = DeviceMath::tanh(x);
    sigmoid = std::max(sigmoid, std::abs(DeviceMath::sigmoid(x) - 1 / (1 + std::exp(-double(x)))));
    tanh = std::max(tanh, std::abs(found - exact));
    if (i) relative = std::max(relative, std::abs(found - exact) / std::abs(exact));
  }
  const auto shown = [](double x) { return std::to_string(x * 1e7) + "e-7"; };
  require(sigmoid < 1e-7 && tanh < 2e-7 && relative < 3e-7,
          "errors of sigmoid " + shown(sigmoid) + ", of tanh " + shown(tanh) + ", relative " + shown(relative));
  require(std::isnan(DeviceMath::sigmoid(NAN)) && std::isnan(DeviceMath::tanh(NAN)), "NaN is lost");
  require(DeviceMath::tanh(INFINITY) == 1 && DeviceMath::tanh(-INFINITY) == -1 && DeviceMath::sigmoid(-INFINITY) == 0, "infinity");
}

const std::map<std::string, void (*)()> kChecks{
    {"mma_bfloat16", [] { check_product(16, product_kernel<BFloat16>); }},
    {"mma_float16", [] { check_product(16, product_kernel<Half>); }},
    {"mma_tf32", [] { check_product(8, product_tf32_kernel); }},
    {"barrier", [] { require_over_seeds("always", over_seeds([] { return moves(neighbour_kernel, 128, 1, 0, 1, 1); })); }},
    {"missing_barrier", [] { require(over_seeds([] { return moves(neighbour_kernel, 128, 1, 1, 1, 1); }) != "always", "race not seen"); }},
    {"copy", [] { require_over_seeds("always", over_seeds([] { return moves(copy_kernel, 128, 1, 0, 1, 1); })); }},
    {"copy_without_wait", [] { require_over_seeds("never", over_seeds([] { return moves(copy_kernel, 128, 1, 1, 1, 1); })); }},
    {"copy_without_commit", [] { require_over_seeds("never", over_seeds([] { return moves(copy_kernel, 128, 1, 2, 1, 1); })); }},
    {"copy_without_barrier", [] { require(over_seeds([] { return moves(copy_kernel, 128, 1, 3, 1, 1); }) != "always", "race not seen"); }},
    {"copy_over_what_others_read", [] { require(over_seeds([] { return moves(copy_kernel, 128, 1, 4, 1, 1); }) != "always", "race not seen"); }},
    {"cluster", [] { require_over_seeds("always", over_seeds([] { return moves(cluster_kernel, 128, 32, 0, 4, 4); })); }},
    {"cluster_without_barrier", [] { require(over_seeds([] { return moves(cluster_kernel, 128, 32, 1, 4, 4); }) != "always", "race not seen"); }},
    {"cluster_left_early", [] { require(over_seeds([] { return moves(cluster_kernel, 128, 32, 2, 4, 4); }) != "always", "race not seen"); }},
    {"grid", [] { require_over_seeds("always", over_seeds([] { return moves(grid_kernel, 128, 32, 0, 4, 0); })); }},
    {"grid_without_barrier", [] { require(over_seeds([] { return moves(grid_kernel, 128, 32, 1, 4, 0); }) != "always", "race not seen"); }},
    {"shuffles", [] { misuse(0); }},
    {"barrier_left",
     [] { require_error("deadlock at __syncthreads (of the block's 32 threads 16 have ended), block (0, 0, 0)", [] { misuse(1); }); }},
    {"lanes_apart", [] { require_error("lanes of one warp are at", [] { misuse(2); }); }},
    {"shared_overrun", [] { require_error("wrote past its 128 bytes of shared memory", [] { misuse(3); }); }},
    {"misaligned_copy", [] { require_error("global address is not aligned to 16 bytes", [] { misuse(4); }); }},
    {"no_such_block", [] { require_error("cluster_map: no such rank", [] { misuse(5); }); }},
    {"device_math", device_math},
    {"wgmma_bfloat16", [] { require_over_seeds("always", over_seeds([] { return warpgroup_product<BFloat16>(0); })); }},
    {"wgmma_float16", [] { require_over_seeds("always", over_seeds([] { return warpgroup_product<Half>(0); })); }},
    {"wgmma_left", [] { require_error("the thread ends before its products are waited for", [] { warpgroup_product<Half>(3); }); }},
    {"wgmma_over_what_is_read", [] { require_over_seeds("never", over_seeds([] { return warpgroup_product<Half>(2); })); }},
    {"wgmma_without_wait", [] { require_over_seeds("never", over_seeds([] { return warpgroup_product<Half>(1); })); }},
};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& [name, check] : kChecks) {
    if (count == 1) {
      std::puts(name.c_str());
      continue;
    }
    if (name != arguments[1]) continue;
    try {
      check();
      return 0;
    } catch (const std::exception& error) {
      std::puts(error.what());
      return 1;
    }
  }
  return count == 1 ? 0 : 2;
}
