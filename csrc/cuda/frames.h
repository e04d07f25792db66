// Copies between frames [B, T, *S, C], channels innermost: padded, shifted by a step, cleared past lengths. A thread owns one element
// of the result, or a stretch of it, and reads nothing that is written. Floor: bytes.
#pragma once
#include "device.h"

namespace convfast {
namespace cuda {

// A frame's spatial dims, brought to three by leading ones.
struct Extent {
  int d = 1, h = 1, w = 1;
  int64_t pixels() const { return int64_t(d) * h * w; }
};

enum class Padding : int { kZeros, kReflect, kReplicate, kCircular };

// The coordinate within 0 ... size - 1 that coordinate x of a padded axis shows, or -1 for a zero.
inline __host__ __device__ int shown(int x, int size, Padding mode) {
  if (x >= 0 && x < size) return x;
  if (mode == Padding::kZeros) return -1;
  if (mode == Padding::kReflect) return x < 0 ? -x : 2 * (size - 1) - x;
  if (mode == Padding::kReplicate) return x < 0 ? 0 : size - 1;
  return (x % size + size) % size;
}

template <class A>
struct PadFrames {
  const A* frames;  // [B, T, size, C]
  A* padded;        // [B, T, padded, C]
  int64_t elements;  // of the result
  int time, channels;
  Extent size, before, padded_size;
  Padding mode;
  int64_t t0;              // of the first frame, for lengths
  const int64_t* lengths;  // frames past the length of their sample are zero; null: none is
};

template <class A>
__global__ void __launch_bounds__(256) pad_frames(PadFrames<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.elements) return;
  const int64_t pixel = i / s.channels, frame = pixel / (int64_t(s.padded_size.d) * s.padded_size.h * s.padded_size.w);
  const int x = shown(pixel % s.padded_size.w - s.before.w, s.size.w, s.mode);
  const int y = shown(pixel / s.padded_size.w % s.padded_size.h - s.before.h, s.size.h, s.mode);
  const int z = shown(pixel / s.padded_size.w / s.padded_size.h % s.padded_size.d - s.before.d, s.size.d, s.mode);
  const bool kept = x >= 0 && y >= 0 && z >= 0 && !(s.lengths && s.t0 + frame % s.time >= s.lengths[frame / s.time]);
  const int64_t from = (((frame * s.size.d + z) * s.size.h + y) * s.size.w + x) * s.channels + i % s.channels;
  s.padded[i] = kept ? s.frames[from] : from_float<A>(0.f);
}

// The other way round, for gradients: the sum of what shows each element. An axis shows it at its own place and in its borders.
template <class A>
struct UnpadFrames {
  const A* padded;  // [N, padded, C]
  A* frames;        // [N, size, C]
  int64_t elements;
  int channels;
  Extent size, before, padded_size;
  Padding mode;
};

// Candidate k of before + behind + 1 places at which coordinate x may be shown.
inline __host__ __device__ int candidate(int k, int x, int size, int before) { return k < before ? k - before : k == before ? x : size + k - before - 1; }

template <class A>
__global__ void __launch_bounds__(256, 4) unpad_frames(UnpadFrames<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.elements) return;
  const int64_t pixel = i / s.channels, frame = pixel / (int64_t(s.size.d) * s.size.h * s.size.w);
  const int x = pixel % s.size.w, y = pixel / s.size.w % s.size.h, z = pixel / s.size.w / s.size.h % s.size.d;
  float sum = 0;
  for (int kz = 0; kz <= s.padded_size.d - s.size.d; ++kz) {
    const int pz = candidate(kz, z, s.size.d, s.before.d);
    if (shown(pz, s.size.d, s.mode) != z) continue;
    for (int ky = 0; ky <= s.padded_size.h - s.size.h; ++ky) {
      const int py = candidate(ky, y, s.size.h, s.before.h);
      if (shown(py, s.size.h, s.mode) != y) continue;
      for (int kx = 0; kx <= s.padded_size.w - s.size.w; ++kx) {
        const int px = candidate(kx, x, s.size.w, s.before.w);
        if (shown(px, s.size.w, s.mode) != x) continue;
        const int64_t at = ((frame * s.padded_size.d + pz + s.before.d) * s.padded_size.h + py + s.before.h) * s.padded_size.w + px + s.before.w;
        sum += to_float(s.padded[at * s.channels + i % s.channels]);
      }
    }
  }
  s.frames[i] = from_float<A>(sum);
}

// h [B, T, state] → the state that each step started from: h of the step before, or `first` [B, state] (null: zero).
template <class A>
struct PreviousFrames {
  const A* h;
  const A* first;
  A* before;
  int64_t elements, state;
  int time, step;  // step: 1, or -1 where the last frame comes first
  const int64_t* lengths;
};

template <class A>
__global__ void __launch_bounds__(256) previous_frames(PreviousFrames<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.elements) return;
  const int64_t frame = i / s.state, b = frame / s.time, t = frame % s.time - s.step;
  // Nobody has checked lengths that are on the device.
  const bool inside = t >= 0 && t < (s.lengths ? min(s.lengths[b], int64_t(s.time)) : s.time);
  s.before[i] = inside ? s.h[i - s.step * s.state] : s.first ? s.first[b * s.state + i % s.state] : from_float<A>(0.f);
}

// Clears frames of h [B, T, state] past the length of their sample.
template <class A>
struct ClearFrames {
  A* h;
  const int64_t* lengths;
  int64_t state, elements;
  int time;
};

template <class A>
__global__ void __launch_bounds__(256) clear_past_lengths(ClearFrames<A> s) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.elements) return;
  const int64_t frame = i / s.state;
  if (frame % s.time >= s.lengths[frame / s.time]) s.h[i] = from_float<A>(0.f);
}

}  // namespace cuda
}  // namespace convfast
