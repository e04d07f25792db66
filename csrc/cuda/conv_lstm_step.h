// The kernels of one ConvLSTM step: implicit GEMM with the cell in its epilogue, or the cell alone.
//
// A block owns BM pixels x BC channels with all four gates of one step (backward: the dh of BC channels), so that gates reach
// memory only to be saved. K runs over taps and channels in steps of 32: cp.async brings BM rows of the frame before, each tap shifted,
// zero outside the frame, and the packed weights; where channels are whole steps, all taps of some of them follow each other, and L1 has
// the rows of all but the first; kStages steps are in flight; mma adds up in float. Weights' columns are ordered
// so that the accumulators of a thread hold 2G neighbouring channels of a pixel, of every gate: the epilogue runs the cell in
// registers and moves 16 bytes at a time. Nothing that a launch reads is written by it but c, dc, carry and dpeephole, whose
// elements belong to one thread each. The launch before, on the same stream, is what orders a step after the one before.
// Floor: 8 taps C C FLOPs a pixel, forward and backward, on the tensor cores; without the GEMM, bytes: (4C + 4C) gates, c twice, h.
#pragma once
#include "../common/cell.h"
#include "device.h"
#include "frames.h"
#include "mma.h"

namespace convfast {
namespace cuda {
namespace conv_lstm {  // short names: other ops have theirs

// WM x WN warps; a warp owns 16 MT pixels and P parts of 8G columns: forward, the gates of its channels; backward, channels. Warpgroups
// (sm_90a) are WM warps, of which each owns 16 pixels and all WN times P parts.
template <int MT_, int P_, int G_, int WM_, int WN_, int kBlocks_, bool kWarpgroups_ = false>
struct Tile {
  static constexpr int MT = MT_, P = P_, G = G_, WM = WM_, WN = WN_, kMinBlocks = kBlocks_;
  static constexpr bool kWarpgroups = kWarpgroups_;
  static_assert(!kWarpgroups || (MT == 1 && WM % 4 == 0), "four warps of 16 pixels are a warpgroup");
  static constexpr int kThreads = 32 * WM * (kWarpgroups ? 1 : WN);
  static constexpr int kBound = kWarpgroups && !kHasWarpgroups ? 32 : kThreads;  // an empty kernel's, too few to be launched by mistake
  static constexpr int kPixels = 16 * MT * WM, kWarpColumns = 8 * G * P, kColumns = kWarpColumns * WN;
  static constexpr int kTiles = kWarpgroups ? WN : MT;    // of P parts, that a warp owns
  static constexpr int kDepth = 32, kStages = kWarpgroups ? 6 : 4;  // of K, in elements
  static constexpr int kChunks = kDepth / 8;              // 16 bytes each
  static constexpr int kRows = kPixels * kDepth * 2, kWeights = kColumns * kDepth * 2;  // bytes of a K step
  static constexpr int kShared = kStages * (kRows + kWeights);
  // Of a step of K on an H200: products, or what L2 gives; most rows come from L1, tap after tap. Operations a cycle are the peak of wgmma
  // and 62 % of it, which mma.sync is said to reach; bytes a cycle are an estimate. Nothing was measured.
  static constexpr int kOperations = kWarpgroups ? 4096 : 2540, kBytes = 28;
  static constexpr int kCycles = std::max(kPixels * kColumns * kDepth * 2 / kOperations, (kRows / 4 + kWeights) / kBytes);
  static constexpr int kNeighbours = 2 * G;               // channels of a thread, of each part
};

// What is packed at column n of a block: part p of the warp's columns, and a channel relative to the first of the warp and part.
struct Column {
  int warp, part, channel;
};
template <int P, int G>
inline __host__ __device__ Column column_at(int n) {
  const int r = n % (8 * G * P), column = r % 8, tile = r / 8;
  return {n / (8 * G * P), tile / G, column / 2 * 2 * G + tile % G * 2 + column % 2};
}

// The convolution that a step's GEMM computes. Tap (z, y, x) of pixel q reads q + origin + sign * tap.
struct Convolution {
  Extent space, kernel, origin;
  int sign, channels, k_blocks;  // channels of the source
  bool taps_inner;               // order of K: (32 channels, tap, channel), else (tap, channel)
  int64_t sample;                // elements from one sample's frame to the next
};

// Copies one K step at a time to shared memory, the same chunk of the same rows each time.
template <class A, class T>
struct Loader {
  static constexpr int kRowStep = T::kThreads / T::kChunks, kRows = T::kPixels / kRowStep;
  static constexpr int kWeights = T::kColumns * T::kChunks / T::kThreads;
  static_assert(kRowStep % 8 == 0, "rows of a thread are swizzled alike");
  const A* source;
  const A* weights;
  int64_t at[kRows];  // elements from source to what the first tap reads
  int z[kRows], y[kRows], x[kRows];
  int to, chunk, tap_z = 0, tap_y = 0, tap_x = 0;
  int offset;           // of the tap's pixel
  unsigned inside = 0;  // bit i: the tap of row i lies within the frame

  __device__ Loader(const Convolution& c, const A* source, const A* weights, int m0, int pixels)
      : source(source), weights(weights + threadIdx.x * 8), to(swizzled(threadIdx.x / T::kChunks, threadIdx.x % T::kChunks)),
        chunk(threadIdx.x % T::kChunks) {
    const int area = c.space.d * c.space.h * c.space.w;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = m0 + threadIdx.x / T::kChunks + i * kRowStep, b = m / area, p = m % area;
      z[i] = p / (c.space.h * c.space.w) + c.origin.d;
      y[i] = p / c.space.w % c.space.h + c.origin.h;
      x[i] = p % c.space.w + c.origin.w;
      at[i] = b * c.sample + ((int64_t(z[i]) * c.space.h + y[i]) * c.space.w + x[i]) * c.channels;
      if (m >= pixels) z[i] = -0x40000000;  // outside whatever the tap
    }
    skip_channels(c);
    place(c);
  }

  // To the tap that has the chunk, where a step of K goes on into the next.
  __device__ __forceinline__ void skip_channels(const Convolution& c) {
    for (; chunk >= c.channels / 8; chunk -= c.channels / 8) next_tap(c);
  }

  __device__ __forceinline__ void next_tap(const Convolution& c) {
    if (++tap_x < c.kernel.w) return;
    tap_x = 0;
    if (++tap_y < c.kernel.h) return;
    tap_y = 0;
    ++tap_z;
  }

  __device__ __forceinline__ void place(const Convolution& c) {
    const int dz = c.sign * tap_z, dy = c.sign * tap_y, dx = c.sign * tap_x;
    offset = ((dz * c.space.h + dy) * c.space.w + dx) * c.channels;
    inside = 0;
    if (tap_z >= c.kernel.d) return;  // K is rounded up to whole steps
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      inside |= unsigned(unsigned(z[i] + dz) < unsigned(c.space.d) && unsigned(y[i] + dy) < unsigned(c.space.h) &&
                         unsigned(x[i] + dx) < unsigned(c.space.w))
                << i;
  }

  __device__ __forceinline__ void load_weights(char* columns) {
#pragma unroll
    for (int i = 0; i < kWeights; ++i) cp_async16(columns + to + i * kRowStep * 64, weights + i * T::kThreads * 8, true);
    weights += T::kColumns * T::kDepth;
  }

  __device__ __forceinline__ void load_rows(const Convolution& c, char* rows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      cp_async16_again(rows + to + i * kRowStep * 64, source + (at[i] + offset + chunk * 8), inside >> i & 1);
    if (c.taps_inner) {
      next_tap(c);
      if (tap_z == c.kernel.d) tap_z = 0, chunk += T::kChunks;
    } else {
      chunk += T::kChunks;
      if (chunk < c.channels / 8) return;
      skip_channels(c);
    }
    place(c);
  }
};

template <class T>
using Sums = float[T::kTiles][T::P * T::G][4];

// Rows and channel, relative to the block's, of which a thread has sums in its tile-th tile.
template <class T>
__device__ __forceinline__ int row_of_tile(int tile) {
  return (threadIdx.x / 32 % T::WM * T::MT + (T::kWarpgroups ? 0 : tile)) * 16 + threadIdx.x % 32 / 4;
}
template <class T>
__device__ __forceinline__ int group_of_tile(int tile) {
  return T::kWarpgroups ? tile : int(threadIdx.x / 32 / T::WM);
}

// acc[tile][part * G + n8 tile][of mma's four] += the convolution of `source` at the block's pixels and columns. kResident: all
// K steps of the weights lie in shared memory, behind the stages.
template <class A, class T, bool kResident>
__device__ __forceinline__ void implicit_gemm(const Convolution& c, const A* source, const A* weights, int m0, int pixels, Sums<T>& acc) {
  constexpr int kStage = kResident ? T::kRows : T::kRows + T::kWeights;
  char* shared = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Rows 16 m and columns 8 n further on are swizzled alike; the second 16 of K are two chunks on.
  const int a_at = swizzled(warp % T::WM * 16 * T::MT + lane % 16, lane / 16);
  const int b_at = swizzled(warp / T::WM * T::kWarpColumns + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  Loader<A, T> loader(c, source, weights, m0, pixels);
  const auto load = [&](int k) {
    char* stage = shared + k % T::kStages * kStage;
    loader.load_rows(c, stage);
    if (!kResident) loader.load_weights(stage + T::kRows);
  };
  for (int k = 0; k < T::kStages - 1; ++k) {
    if (k < c.k_blocks) load(k);
    cp_async_commit();
  }
  for (int k = 0; k < c.k_blocks; ++k) {
    cp_async_wait<T::kStages - 2>();
    __syncthreads();  // step k has come for all, and all are done with step k - 1, whose place is filled next
    if (k + T::kStages - 1 < c.k_blocks) load(k + T::kStages - 1);
    cp_async_commit();
    const char* rows = shared + k % T::kStages * kStage;
    const char* columns = kResident ? shared + T::kStages * kStage + k * T::kWeights : rows + T::kRows;
#pragma unroll
    for (int half = 0; half < T::kDepth / 16; ++half) {
      uint32_t a[T::MT][4];
#pragma unroll
      for (int m = 0; m < T::MT; ++m) ldmatrix_x4(a[m], rows + (a_at ^ half << 5) + m * 16 * 64);
#pragma unroll
      for (int n = 0; n < T::P * T::G; n += 2) {
        uint32_t pair[4];
        ldmatrix_x4(pair, columns + (b_at ^ half << 5) + n * 8 * 64);
        const uint32_t b0[2] = {pair[0], pair[1]}, b1[2] = {pair[2], pair[3]};
#pragma unroll
        for (int m = 0; m < T::MT; ++m) {
          mma_16816<A>(acc[m][n], a[m], b0);
          mma_16816<A>(acc[m][n + 1], a[m], b1);
        }
      }
    }
  }
}

// The same by warpgroups: a step of K is multiplied while the next is waited for and the one kStages - 2 on is fetched.
template <class A, class T>
__device__ __forceinline__ void implicit_gemm_async(const Convolution& c, const A* source, const A* weights, int m0, int pixels, Sums<T>& acc) {
  constexpr int kStage = T::kRows + T::kWeights;
  char* shared = shared_memory();
  Loader<A, T> loader(c, source, weights, m0, pixels);
  const auto load = [&](int k) {
    char* stage = shared + k % T::kStages * kStage;
    loader.load_rows(c, stage);
    loader.load_weights(stage + T::kRows);
  };
  for (int k = 0; k < T::kStages - 2; ++k) {
    if (k < c.k_blocks) load(k);
    cp_async_commit();
  }
  for (int k = 0; k < c.k_blocks; ++k) {
    cp_async_wait<T::kStages - 3>();
    fence_async_proxy();
    __syncthreads();  // step k has come for all, and all are done with step k - 2, whose place is filled next
    const char* stage = shared + k % T::kStages * kStage;
    const char* rows = stage + threadIdx.x / 128 * 64 * 64;
    hold(acc);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < T::kDepth / 16; ++half) wgmma<A>(acc, matrix_at(rows + half * 32), matrix_at(stage + T::kRows + half * 32));
    wgmma_commit();
    if (k + T::kStages - 2 < c.k_blocks) load(k + T::kStages - 2);
    cp_async_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  hold(acc);
}

template <class A, class T>
__device__ __forceinline__ void convolve(const Convolution& c, const A* source, const A* weights, int m0, int pixels, Sums<T>& acc) {
  if constexpr (T::kWarpgroups) implicit_gemm_async<A, T>(c, source, weights, m0, pixels, acc);
  else implicit_gemm<A, T, false>(c, source, weights, m0, pixels, acc);
}

// One step forward. Frames are channels-last; `.._sample` are elements from one sample's frame to the next.
template <class A>
struct ForwardStep {
  Convolution conv;
  const A* weights;        // packed; null: no recurrent GEMM
  const A* h_before;       // null: zero
  int64_t pixels;          // of all samples
  int area, channels;      // pixels of a frame, C
  int64_t t;
  const A* gates_h;        // [B, area, 4C]: the recurrent convolution where the library computes it; null: none
  const A* gates_x;        // the input convolution; null: none
  int64_t gates_x_sample;
  const A* bias;           // [4C] or null
  const float* peephole;   // [3, area, C] or null
  const float* c_before;   // null: zero
  int64_t c_before_sample;
  const int64_t* lengths;  // a sample past its length keeps its state; null: none is
  A* h;                    // null: only gates are wanted
  int64_t h_sample;
  float* c;
  int64_t c_sample;
  A* gates;                // activated, or null
  int64_t gates_sample;
};

template <int N, class V>
__device__ __forceinline__ void load(const V* p, float (&v)[N]) {
  const Vec<V, N> loaded = load_vec<N>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(loaded.v[i]);
}

template <int N, class V>
__device__ __forceinline__ void add(const V* p, float (&v)[N]) {
  float more[N];
  load(p, more);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] += more[i];
}

template <int N, class V>
__device__ __forceinline__ void store(V* p, const float (&v)[N]) {
  Vec<V, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) rounded.v[i] = from_float<V>(v[i]);
  store_vec(p, rounded);
}

// N channels of pixel p of sample b, from their recurrent pre-activations z.
template <class A, int N>
__device__ __forceinline__ void forward_cells(const ForwardStep<A>& s, int64_t b, int64_t p, int channel, float (&z)[4][N]) {
  const int64_t at = p * s.channels + channel, at4 = 4 * p * s.channels + channel;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    if (s.gates_h) add(s.gates_h + 4 * b * s.area * s.channels + at4 + g * s.channels, z[g]);
    if (s.gates_x) add(s.gates_x + b * s.gates_x_sample + at4 + g * s.channels, z[g]);
    if (s.bias) add(s.bias + g * s.channels + channel, z[g]);
  }
  float c_old[N] = {}, c[N], h[N];
  if (s.c_before) load(s.c_before + b * s.c_before_sample + at, c_old);
  float w[3][N] = {};
  const auto cells = [&](auto with_peephole) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto r = lstm_cell_forward<DeviceMath, decltype(with_peephole)::value>(z[0][i], z[1][i], z[2][i], z[3][i], c_old[i],
                                                                                   Peephole<float>{w[0][i], w[1][i], w[2][i]});
      z[0][i] = r.i, z[1][i] = r.f, z[2][i] = r.g, z[3][i] = r.o, c[i] = r.c, h[i] = r.h;
    }
  };
  if (s.peephole) {
#pragma unroll
    for (int g = 0; g < 3; ++g) load(s.peephole + int64_t(g) * s.area * s.channels + at, w[g]);
    cells(std::true_type());
  } else {
    cells(std::false_type());  // peepholes of zero would make NaN of an infinite c
  }
  if (s.gates) {
#pragma unroll
    for (int g = 0; g < 4; ++g) store(s.gates + b * s.gates_sample + at4 + g * s.channels, z[g]);
  }
  if (!s.h) return;
  if (s.lengths && s.t >= s.lengths[b]) {
#pragma unroll
    for (int i = 0; i < N; ++i) c[i] = c_old[i], h[i] = 0;
    if (s.h_before) load(s.h_before + b * s.conv.sample + at, h);
  }
  store(s.h + b * s.h_sample + at, h);
  store(s.c + b * s.c_sample + at, c);
}

// Channels of a block, and what a launch covers: block i has channel block i % across and pixel tile i / across.
template <class T>
constexpr int kForwardChannels = T::kColumns / 4;

template <class A, class T>
__device__ __forceinline__ void forward_epilogue(const ForwardStep<A>& s, int block, int m0, const Sums<T>& acc) {
  constexpr int N = T::kNeighbours;
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = m0 + row_of_tile<T>(tile) + 8 * half;
      const int channel = block * kForwardChannels<T> + group_of_tile<T>(tile) * 8 * T::G + threadIdx.x % 4 * N;
      float z[4][N];
#pragma unroll
      for (int g = 0; g < 4; ++g)
#pragma unroll
        for (int i = 0; i < N; ++i) z[g][i] = acc[tile][g * T::G + i / 2][2 * half + i % 2];
      if (m < s.pixels && channel < s.channels) forward_cells<A, N>(s, m / s.area, m % s.area, channel, z);
    }
}

template <class A, class T>
__global__ void __launch_bounds__(T::kBound, T::kMinBlocks) forward_step(ForwardStep<A> s) {
  if constexpr (T::kWarpgroups && !kHasWarpgroups) return;
  const int across = (s.channels + kForwardChannels<T> - 1) / kForwardChannels<T>;
  const int block = blockIdx.x % across, m0 = blockIdx.x / across * T::kPixels;
  Sums<T> acc = {};
  convolve<A, T>(s.conv, s.h_before, s.weights + int64_t(block) * s.conv.k_blocks * T::kColumns * T::kDepth, m0, int(s.pixels), acc);
  forward_epilogue<A, T>(s, block, m0, acc);
}

// All steps in one cooperative launch, for maps whose tiles all run at the same time: each block keeps its weights in shared memory
// and its tile through time; a barrier of the grid orders a step after the one before. Saves a launch and the weights' way a step.
template <class A>
struct ForwardSequence {
  ForwardStep<A> step;  // the first
  int64_t steps, direction;
  int64_t gates_x_next, h_next, c_next, gates_next;  // elements to the frame of the next step
};

template <class T>
constexpr int sequence_shared(int k_blocks) {
  return T::kStages * T::kRows + k_blocks * T::kWeights;
}

// The weights of all K steps, behind the stages, on their way to shared memory.
template <class A, class T>
__device__ __forceinline__ void load_resident(const Convolution& c, const A* weights, int m0, int pixels) {
  Loader<A, T> loader(c, nullptr, weights, m0, pixels);
  for (int k = 0; k < c.k_blocks; ++k) loader.load_weights(shared_memory() + T::kStages * T::kRows + k * T::kWeights);
  cp_async_commit();
}

template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, 1) forward_sequence(ForwardSequence<A> p) {
  ForwardStep<A> s = p.step;
  const int across = (s.channels + kForwardChannels<T> - 1) / kForwardChannels<T>;
  const int block = blockIdx.x % across, m0 = blockIdx.x / across * T::kPixels;
  const A* weights = s.weights + int64_t(block) * s.conv.k_blocks * T::kColumns * T::kDepth;
  load_resident<A, T>(s.conv, weights, m0, int(s.pixels));
  for (int64_t i = 0; i < p.steps; ++i) {
    Sums<T> acc = {};
    if (s.h_before) implicit_gemm<A, T, true>(s.conv, s.h_before, weights, m0, int(s.pixels), acc);
    forward_epilogue<A, T>(s, block, m0, acc);
    s.t += p.direction;
    s.h_before = s.h;
    s.conv.sample = s.h_sample;
    s.c_before = s.c;
    s.c_before_sample = s.c_sample;
    s.h += p.h_next;
    s.c += p.c_next;
    if (s.gates) s.gates += p.gates_next;
    if (s.gates_x) s.gates_x += p.gates_x_next;
    if (i + 1 < p.steps) grid_sync();
  }
}

// The cell alone: a thread owns N channels of a pixel.
template <class A, int N>
__global__ void __launch_bounds__(256) forward_cell(ForwardStep<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, pieces = s.channels / N;
  float z[4][N] = {};
  if (i < s.pixels * pieces) forward_cells<A, N>(s, i / pieces / s.area, i / pieces % s.area, i % pieces * N, z);
}

// One step backward: gradients of step t, whose successor in time is done. dh is the GEMM over the successor's dgates, or dh_after.
template <class A>
struct BackwardStep {
  Convolution conv;
  const A* weights;       // packed for dgrad; null: no GEMM
  const A* dgates_after;
  int64_t pixels;
  int area, channels;
  int64_t t, t_after;     // t_after: frame of the successor, -1 where there is none
  const A* dh_after;      // [B, area, C] or null
  const float* dc_after;  // [B, area, C] or null; may be dc
  const A* dh;            // gradient of the step's output, or null
  int64_t dh_sample;
  const A* gates;         // activated
  int64_t gates_sample;
  const float* c;
  int64_t c_sample;
  const float* c_before;  // null: zero
  int64_t c_before_sample;
  const float* peephole;
  const int64_t* lengths;
  float* carry;           // [B, area, C]: dh of samples past their length at t; with lengths
  A* dgates;
  int64_t dgates_sample;
  float* dc;              // [B, area, C]
  float* dpeephole;       // [B, 3, area, C], added to; or null
  A* dh0;                 // given: dh before the first step goes there, and nothing else is done
};

template <class A, int N>
__device__ __forceinline__ void backward_cells(const BackwardStep<A>& s, int64_t b, int64_t p, int channel, float (&dh)[N]) {
  const int64_t at = p * s.channels + channel, state = b * s.area * s.channels + at;
  const int64_t length = s.lengths ? s.lengths[b] : INT64_MAX, plane = int64_t(s.area) * s.channels;
  if (s.dh_after) add(s.dh_after + state, dh);
  if (s.t_after >= length) load(s.carry + state, dh);
  if (s.dh0) return store(s.dh0 + state, dh);
  const bool active = s.t < length;
  if (!active) store(s.carry + state, dh);
  float dc[N] = {}, dz[4][N] = {};
  if (s.dc_after) load(s.dc_after + state, dc);
  if (active) {
    if (s.dh) add(s.dh + b * s.dh_sample + at, dh);
    float c[N], c_old[N] = {};
    load(s.c + b * s.c_sample + at, c);
    if (s.c_before) load(s.c_before + b * s.c_before_sample + at, c_old);
#pragma unroll
    for (int g = 0; g < 4; ++g) load(s.gates + b * s.gates_sample + 4 * p * s.channels + g * s.channels + channel, dz[g]);
    float w[3][N] = {};
    if (s.peephole) {
#pragma unroll
      for (int g = 0; g < 3; ++g) load(s.peephole + g * plane + at, w[g]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto r = lstm_cell_backward<DeviceMath, true>(dz[0][i], dz[1][i], dz[2][i], dz[3][i], c_old[i], c[i], dh[i], dc[i],
                                                          Peephole<float>{w[0][i], w[1][i], w[2][i]});
      dz[0][i] = r.di, dz[1][i] = r.df, dz[2][i] = r.dg, dz[3][i] = r.d_o, dc[i] = r.dc;
    }
    if (s.dpeephole) {
      float* sums = s.dpeephole + 3 * b * plane + at;
#pragma unroll
      for (int g = 0; g < 3; ++g) {
        float sum[N];
        load(sums + g * plane, sum);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += g == 2 ? dz[3][i] * c[i] : dz[g][i] * c_old[i];
        store(sums + g * plane, sum);
      }
    }
  }
  store(s.dc + state, dc);
#pragma unroll
  for (int g = 0; g < 4; ++g) store(s.dgates + b * s.dgates_sample + 4 * p * s.channels + g * s.channels + channel, dz[g]);
}

template <class A, class T>
__device__ __forceinline__ void backward_epilogue(const BackwardStep<A>& s, int block, int m0, const Sums<T>& acc) {
  constexpr int N = T::kNeighbours;
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile)
#pragma unroll
    for (int part = 0; part < T::P; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = m0 + row_of_tile<T>(tile) + 8 * half;
        const int channel = block * T::kColumns + group_of_tile<T>(tile) * T::kWarpColumns + part * 8 * T::G + threadIdx.x % 4 * N;
        float dh[N];
#pragma unroll
        for (int i = 0; i < N; ++i) dh[i] = acc[tile][part * T::G + i / 2][2 * half + i % 2];
        if (m < s.pixels && channel < s.channels) backward_cells<A, N>(s, m / s.area, m % s.area, channel, dh);
      }
}

template <class A, class T>
__global__ void __launch_bounds__(T::kBound, T::kMinBlocks) backward_step(BackwardStep<A> s) {
  if constexpr (T::kWarpgroups && !kHasWarpgroups) return;
  const int across = (s.channels + T::kColumns - 1) / T::kColumns;
  const int block = blockIdx.x % across, m0 = blockIdx.x / across * T::kPixels;
  Sums<T> acc = {};
  convolve<A, T>(s.conv, s.dgates_after, s.weights + int64_t(block) * s.conv.k_blocks * T::kColumns * T::kDepth, m0, int(s.pixels), acc);
  backward_epilogue<A, T>(s, block, m0, acc);
}

// All steps in one cooperative launch, as forward_sequence; dh before the first step follows where it is wanted.
template <class A>
struct BackwardSequence {
  BackwardStep<A> step;  // the last in time
  int64_t steps, direction;
  int64_t next, gates_next;  // elements to the frame of the step before; of gates and their gradients
  const float* c0;           // before the first step, frames dense; null: zero
  A* dh0;                    // null: not wanted
};

template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, 1) backward_sequence(BackwardSequence<A> p) {
  BackwardStep<A> s = p.step;
  const int across = (s.channels + T::kColumns - 1) / T::kColumns;
  const int block = blockIdx.x % across, m0 = blockIdx.x / across * T::kPixels;
  const A* weights = s.weights + int64_t(block) * s.conv.k_blocks * T::kColumns * T::kDepth;
  load_resident<A, T>(s.conv, weights, m0, int(s.pixels));
  const int64_t turns = p.steps + (p.dh0 ? 1 : 0);
  for (int64_t i = 0; i < turns; ++i) {
    if (i == p.steps - 1) s.c_before = p.c0, s.c_before_sample = int64_t(s.area) * s.channels;
    if (i == p.steps) s.dh0 = p.dh0;
    Sums<T> acc = {};
    if (i > 0) implicit_gemm<A, T, true>(s.conv, s.dgates_after, weights, m0, int(s.pixels), acc);
    backward_epilogue<A, T>(s, block, m0, acc);
    s.t_after = s.t;
    s.t += p.direction;
    s.dgates_after = s.dgates;
    s.dgates += p.gates_next;
    s.gates += p.gates_next;
    s.dh_after = nullptr;
    s.dc_after = s.dc;
    if (s.dh) s.dh += p.next;
    s.c = s.c_before;
    s.c_before += p.next;
    if (i + 1 < turns) grid_sync();
  }
}

template <class A, int N>
__global__ void __launch_bounds__(256) backward_cell(BackwardStep<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, pieces = s.channels / N;
  float dh[N] = {};
  if (i < s.pixels * pieces) backward_cells<A, N>(s, i / pieces / s.area, i / pieces % s.area, i % pieces * N, dh);
}

// w_hh [4C, C, taps] as the GEMM reads it: [block of columns][K step][column][32], zero where there is nothing.
// Forward, columns are gates of output channels and k is of taps and input channels; backward, columns are input channels, k is of taps and
// rows.
template <class A>
struct PackWeights {
  const A* w;
  A* packed;
  int64_t total;
  int channels, taps, k_blocks;
  bool taps_inner;
};

template <class A, class T, bool kBackward>
__global__ void __launch_bounds__(256) pack_weights(PackWeights<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.total) return;
  const int n = i / T::kDepth % T::kColumns, source = kBackward ? 4 * s.channels : s.channels;
  const int64_t steps = i / (T::kDepth * T::kColumns), block = steps / s.k_blocks, step = steps % s.k_blocks, within = i % T::kDepth;
  const int64_t k = step * T::kDepth + within;
  const int64_t tap = s.taps_inner ? step % s.taps : k / source, from = s.taps_inner ? step / s.taps * T::kDepth + within : k % source;
  const Column column = column_at<T::P, T::G>(n);
  const int64_t channel = block * (kBackward ? T::kColumns : T::WN * 8 * T::G) + column.channel +
                          (kBackward ? column.warp * T::kWarpColumns + column.part * 8 * T::G : column.warp * 8 * T::G);
  const int64_t row = kBackward ? from : column.part * s.channels + channel, input = kBackward ? channel : from;
  const bool inside = channel < s.channels && tap < s.taps;
  s.packed[i] = inside ? s.w[(row * s.channels + input) * s.taps + tap] : from_float<A>(0.f);
}

}  // namespace conv_lstm
}  // namespace cuda
}  // namespace convfast
