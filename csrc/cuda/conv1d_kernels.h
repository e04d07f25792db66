// Kernels of the convolution over time; the ops are in conv1d.cu.
//
// Time is padded: position p of a sample of `length` frames reads frame source(p, length). Output step t reads the positions
// t * stride - before + tap * dilation. Past a sample's own output length, y is zero. The gradient of the input at stride 1 is such
// a convolution too, with before, behind and dilation negated.
#pragma once
#include "device.h"
#include "mma.h"

namespace convfast {
namespace cuda {

enum class Mode { kZeros, kReflect, kReplicate, kCircular };
enum class Activation { kNone, kRelu, kTanh, kSigmoid, kGelu, kSilu, kLeakyRelu };

constexpr int kThreads = 256;

struct Walk {
  int64_t batch = 0;
  int time = 0, out_time = 0, taps = 0, stride = 1, before = 0, behind = 0, dilation = 1;
  Mode mode = Mode::kZeros;
  const int64_t* lengths = nullptr;  // [B]; nullptr: time

  __host__ __device__ int slack() const { return before + behind - dilation * (taps - 1) - 1; }
};

// Held to what there is: nobody has checked lengths that are on the device.
CONVFAST_DEVICE int length_of(const Walk& w, int64_t sample) {
  return w.lengths ? int(min(max(w.lengths[sample], int64_t(0)), int64_t(w.time))) : w.time;
}

// Whether the sample has so many output steps.
CONVFAST_DEVICE bool has_step(const Walk& w, int length, int step) { return length > 0 && step * w.stride <= length + w.slack(); }

// The frame that a position reads; -1: none, a zero. A sample too short for its padding never leads outside.
CONVFAST_DEVICE int source(int position, int length, Mode mode) {
  if (position >= 0 && position < length) return position;
  if (mode == Mode::kZeros || length <= 0) return -1;
  if (mode == Mode::kReplicate) return position < 0 ? 0 : length - 1;
  if (mode == Mode::kCircular) return (position % length + length) % length;
  const int frame = length - 1 - abs(length - 1 - abs(position));
  return frame < 0 ? 0 : frame;
}

// Comparisons, not fmaxf, which would lose a NaN.
CONVFAST_DEVICE float activate(float x, Activation name) {
  switch (name) {
    case Activation::kRelu: return x < 0.f ? 0.f : x;
    case Activation::kLeakyRelu: return x < 0.f ? 0.01f * x : x;
    case Activation::kTanh: return DeviceMath::tanh(x);
    case Activation::kSigmoid: return DeviceMath::sigmoid(x);
    case Activation::kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case Activation::kSilu: return x * DeviceMath::sigmoid(x);
    default: return x;
  }
}

// Of the activation, from its result, or from its argument for gelu and silu.
CONVFAST_DEVICE float derivative(float y, Activation name) {
  switch (name) {
    case Activation::kRelu: return y > 0.f ? 1.f : 0.f;
    case Activation::kLeakyRelu: return y > 0.f ? 1.f : 0.01f;
    case Activation::kTanh: return 1.f - y * y;
    case Activation::kSigmoid: return y * (1.f - y);
    case Activation::kGelu: return 0.5f * (1.f + erff(y * 0.70710678f)) + y * __expf(-0.5f * y * y) * 0.39894228f;
    case Activation::kSilu: {
      const float s = DeviceMath::sigmoid(y);
      return s * (1.f + y * (1.f - s));
    }
    default: return 1.f;
  }
}

// A tensor [B, T, n] with features innermost.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t sample = 0, step = 0;
};

template <class A>
struct Conv1dGemm {
  Walk walk;
  Rows<const A> x;
  const A* weight;  // [channels, taps, features]
  const A* bias;    // [channels]
  Rows<A> y, pre;   // pre has the strides of y
  int channels, features;  // features of x in memory: a multiple of 8
  Activation activation;
};

// The convolution as an implicit GEMM: rows are (sample, output step), the summed axis is (tap, feature), and no im2col is in memory.
// A block alone writes a tile of BM rows x BN channels of y and pre; it reads x and weights only, so nothing has to come before.
// Its 8 warps own BM / 4 x BN / 2 each. A stage is 64 columns of both operands in shared memory, rows of 128 bytes whose 16-byte
// chunks are permuted by the row so that ldmatrix meets no bank twice; a barrier a stage tells that all have read the one before last.
// Floor: 2 rows channels taps features FLOPs of the tensor cores; for few channels the bytes of x (taps read it again from the
// caches) and y.
constexpr int kDepth = 64, kStages = 3;

struct RowOf {
  int64_t x, y;  // offset of the sample in x; of the row in y, -1 past the last row
  int start, length;  // position that the first tap reads; frames that may be read: 0 past the sample's output length
};

template <int BM, int BN>
constexpr size_t conv1d_shared() {
  return kStages * (BM + BN) * kDepth * 2 + BM * sizeof(RowOf);
}

template <class A, int BM, int BN>
__global__ void __launch_bounds__(kThreads, 2) conv1d_kernel(Conv1dGemm<A> p) {
  constexpr int kRows = BM / 4, kColumns = BN / 2, kTilesM = kRows / 16, kTilesN = kColumns / 8, kStage = (BM + BN) * kDepth;
  A* const stages = reinterpret_cast<A*>(shared_memory());
  RowOf* const rows = reinterpret_cast<RowOf*>(stages + kStages * kStage);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int tiles = (p.channels + BN - 1) / BN, n0 = int(blockIdx.x % tiles) * BN;
  const int64_t m0 = int64_t(blockIdx.x / tiles) * BM, all_rows = p.walk.batch * p.walk.out_time;

  for (int r = thread; r < BM; r += kThreads) {
    RowOf row{0, -1, 0, 0};
    if (m0 + r < all_rows) {
      const int64_t sample = (m0 + r) / p.walk.out_time;
      const int step = int(m0 + r - sample * p.walk.out_time), length = length_of(p.walk, sample);
      row = {sample * p.x.sample, sample * p.y.sample + step * p.y.step, step * p.walk.stride - p.walk.before,
             has_step(p.walk, length, step) ? length : 0};
    }
    rows[r] = row;
  }
  __syncthreads();

  // A thread loads the same 16-byte chunk of every 32nd row.
  const int chunk = thread % 8, first = thread / 8, place = (chunk ^ (first % 8)) * 8;
  const int of_tap = p.features / 8, total = p.walk.taps * of_tap;
  const auto load = [&](int block) {
    A* const to = stages + block % kStages * kStage + first * kDepth + place;
    const int k = block * 8 + chunk, tap = k / of_tap, feature = (k - tap * of_tap) * 8;
#pragma unroll
    for (int i = 0; i < BM / 32; ++i) {
      const RowOf& row = rows[first + 32 * i];
      const int frame = k < total ? source(row.start + tap * p.walk.dilation, row.length, p.walk.mode) : -1;
      cp_async16(to + 32 * i * kDepth, frame < 0 ? p.x.data : p.x.data + row.x + frame * p.x.step + feature, frame >= 0);
    }
#pragma unroll
    for (int i = 0; i < BN / 32; ++i) {
      const int n = n0 + first + 32 * i;
      const bool there = k < total && n < p.channels;
      cp_async16(to + (BM + 32 * i) * kDepth, there ? p.weight + (int64_t(n) * total + k) * 8 : p.weight, there);
    }
  };

  float acc[kTilesM][kTilesN][4] = {};
  const int blocks = (total + 7) / 8, row0 = warp % 4 * kRows, column0 = warp / 4 * kColumns;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < blocks) load(i);
    cp_async_commit();
  }
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (block + kStages - 1 < blocks) load(block + kStages - 1);
    cp_async_commit();
    const A* const a = stages + block % kStages * kStage;
    const A* const b = a + BM * kDepth;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t x[kTilesM][4], w[kTilesN][2];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const int row = row0 + i * 16 + lane % 16;
        ldmatrix_x4(x[i], a + row * kDepth + ((2 * k + lane / 16) ^ (row % 8)) * 8);
      }
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        const int row = column0 + j * 8 + lane / 16 * 8 + lane % 8;
        uint32_t both[4];
        ldmatrix_x4(both, b + row * kDepth + ((2 * k + lane / 8 % 2) ^ (row % 8)) * 8);
        w[j][0] = both[0];
        w[j][1] = both[1];
        w[j + 1][0] = both[2];
        w[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) mma_16816<A>(acc[i][j], x[i], w[j]);
    }
  }

  // Through shared memory, so that a row of the tile goes out in pieces of 16 bytes. Rows 16 bytes longer than the tile: no bank twice.
  constexpr int kLine = BN + 8;
  const int g = lane / 4, q = lane % 4;
  const auto write = [&](const Rows<A>& to, Activation activation, bool zero_past_length) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int n = column0 + j * 8 + 2 * q;
      const float bias0 = p.bias && n0 + n < p.channels ? to_float(p.bias[n0 + n]) : 0.f;
      const float bias1 = p.bias && n0 + n + 1 < p.channels ? to_float(p.bias[n0 + n + 1]) : 0.f;
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(stages + (row0 + i * 16 + half * 8 + g) * kLine + n) =
              pack<A>(activate(acc[i][j][2 * half] + bias0, activation), activate(acc[i][j][2 * half + 1] + bias1, activation));
    }
    __syncthreads();
    for (int i = thread; i < BM * BN / 8; i += kThreads) {
      const int r = i / (BN / 8), n = i % (BN / 8) * 8;
      if (rows[r].y < 0 || n0 + n >= p.channels) continue;
      Vec<A, 8> out = load_vec<8>(stages + r * kLine + n);
      if (zero_past_length && rows[r].length == 0)
#pragma unroll
        for (int e = 0; e < 8; ++e) out.v[e] = from_float<A>(0.f);
      A* const y = to.data + rows[r].y + n0 + n;
      if (p.channels % 8 == 0) {
        store_vec<A, 8>(y, out);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (n0 + n + e < p.channels) y[e] = out.v[e];
      }
    }
  };
  if (p.pre.data) write(p.pre, Activation::kNone, false);
  write(p.y, p.activation, true);
}

template <class A>
struct PaddedCopy {
  Walk walk;
  const A* x;
  int64_t x_sample, x_step, x_feature;
  A* out;  // [B, before + time + behind, out_features]; features past those of x are zero
  int features, out_features;
};

// Time padded in memory, features innermost. A thread owns N neighbouring features of one position and alone writes them.
// Floor: x read, out written once.
template <class A, int N>
__global__ void __launch_bounds__(kThreads, 4) padded_copy_kernel(PaddedCopy<A> p) {
  const int positions = p.walk.before + p.walk.time + p.walk.behind, pieces = p.out_features / N;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = index / pieces, sample = row / positions;
  if (sample >= p.walk.batch) return;
  const int feature = int(index - row * pieces) * N, position = int(row - sample * positions) - p.walk.before;
  const int length = length_of(p.walk, sample);
  const int frame = position < length + p.walk.behind ? source(position, length, p.walk.mode) : -1;
  const A* const from = p.x + sample * p.x_sample + (frame < 0 ? 0 : frame) * p.x_step;
  Vec<A, N> out;
  if constexpr (N > 1) {
    if (frame >= 0) {
      out = load_vec<N>(from + feature);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) out.v[i] = from_float<A>(0.f);
    }
  } else {
    out.v[0] = frame >= 0 && feature < p.features ? from[feature * p.x_feature] : from_float<A>(0.f);
  }
  store_vec<A, N>(p.out + row * p.out_features + feature, out);
}

template <class A>
struct Fold {
  Walk walk;
  const A* padded;  // gradient of padded time [B, before + time + behind, F]
  int64_t p_sample, p_step, p_feature;
  A* dx;  // [B, T, F]
  int64_t x_sample, x_step, x_feature;
  int features;
};

// Gradient of padded time -> of time: a frame is read by its own position and by padding. A thread owns one number of dx and alone
// writes it. Floor: padded read, dx written once.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) fold_kernel(Fold<A> p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = index / p.features, sample = row / p.walk.time;
  if (sample >= p.walk.batch) return;
  const int feature = int(index - row * p.features), frame = int(row - sample * p.walk.time), length = length_of(p.walk, sample);
  const A* const from = p.padded + sample * p.p_sample + feature * p.p_feature;
  float sum = frame < length ? to_float(from[(frame + p.walk.before) * p.p_step]) : 0.f;
  const int padding = p.walk.mode == Mode::kZeros ? 0 : p.walk.before + p.walk.behind;
  for (int i = 0; i < padding; ++i) {
    const int position = i < p.walk.before ? i - p.walk.before : length + i - p.walk.before;
    if (source(position, length, p.walk.mode) == frame) sum += to_float(from[(position + p.walk.before) * p.p_step]);
  }
  p.dx[sample * p.x_sample + frame * p.x_step + feature * p.x_feature] = from_float<A>(sum);
}

template <class A>
struct Derivative {
  Walk walk;
  Rows<const A> dy;
  int64_t dy_feature;
  Rows<const A> saved;  // y or pre
  A* out;               // [B, positions, columns], at least T' and C; zero past them
  int channels, positions, columns;
  Activation activation;
};

// dy times the derivative of the activation, zero past a sample's output length. A thread owns N neighbouring columns of a row and
// alone writes them. Floor: dy and what was saved read, out written once.
template <class A, int N>
__global__ void __launch_bounds__(kThreads, 4) derivative_kernel(Derivative<A> p) {
  const int pieces = p.columns / N;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = index / pieces, sample = row / p.positions;
  if (sample >= p.walk.batch) return;
  const int channel = int(index - row * pieces) * N, step = int(row - sample * p.positions);
  Vec<A, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_float<A>(0.f);
  if (step < p.walk.out_time && channel < p.channels && has_step(p.walk, length_of(p.walk, sample), step)) {
    out = load_vec<N>(p.dy.data + sample * p.dy.sample + step * p.dy.step + channel * p.dy_feature);
    if (p.activation != Activation::kNone) {
      const Vec<A, N> saved = load_vec<N>(p.saved.data + sample * p.saved.sample + step * p.saved.step + channel);
#pragma unroll
      for (int i = 0; i < N; ++i) out.v[i] = from_float<A>(to_float(out.v[i]) * derivative(to_float(saved.v[i]), p.activation));
    }
  }
  store_vec<A, N>(p.out + row * p.columns + channel, out);
}

template <class A>
struct Finish {
  Walk walk;
  const A* z;  // [B, C, T'], of the library, with bias
  int64_t z_sample, z_channel, z_step;
  Rows<A> y, pre;  // pre has the strides of y
  int channels;
  Activation activation;
};

// Activation and the layout of y, after a convolution of the library. A block alone writes a tile of 32 steps x 32 channels of one
// sample; through shared memory, so that it reads along the steps where they are innermost and writes along the channels.
// Floor: z read, y and pre written once.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) finish_kernel(Finish<A> p) {
  float* const tile = reinterpret_cast<float*>(shared_memory());  // [32][33]
  const int tiles_t = (p.walk.out_time + 31) / 32, tiles_c = (p.channels + 31) / 32;
  const int64_t rest = blockIdx.x / tiles_c, sample = rest / tiles_t;
  const int c0 = int(blockIdx.x % tiles_c) * 32, t0 = int(rest - sample * tiles_t) * 32, along = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32) {
    const int t = p.z_channel == 1 ? i : along, c = p.z_channel == 1 ? along : i;
    if (t0 + t < p.walk.out_time && c0 + c < p.channels)
      tile[t * 33 + c] = to_float(p.z[sample * p.z_sample + (c0 + c) * p.z_channel + (t0 + t) * p.z_step]);
  }
  __syncthreads();
  const int length = length_of(p.walk, sample), c = c0 + along;
  if (c >= p.channels) return;
  for (int i = threadIdx.x / 32; i < 32 && t0 + i < p.walk.out_time; i += kThreads / 32) {
    const int64_t at = sample * p.y.sample + (t0 + i) * p.y.step + c;
    const float pre = tile[i * 33 + along];
    if (p.pre.data) p.pre.data[at] = from_float<A>(pre);
    p.y.data[at] = from_float<A>(has_step(p.walk, length, t0 + i) ? activate(pre, p.activation) : 0.f);
  }
}

}  // namespace cuda
}  // namespace convfast
