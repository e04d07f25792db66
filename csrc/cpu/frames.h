// Between tensors of any strides and the kernels' dense channels-last frames.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "dispatch.h"

namespace convfast {
namespace cpu {

// Spatial dims, brought to three by leading ones: depth, height, width.
struct Extent {
  long d = 1, h = 1, w = 1;
  long pixels() const { return d * h * w; }
  long rows() const { return d * h; }
};

// A tensor [.., C, *S] seen as frames of pixels; the start of each frame is the caller's.
struct FrameStrides {
  long c, d, h, w;
};

// From a coordinate of a padded frame to the coordinate it shows, or -1 for a zero.
inline std::vector<long> padding_map(long size, long before, long behind, const std::string& mode) {
  std::vector<long> map(before + size + behind);
  for (long i = 0; i < long(map.size()); ++i) {
    long x = i - before;
    if (x < 0 || x >= size) {
      if (mode == "zeros") x = -1;
      else if (mode == "reflect") x = x < 0 ? -x : 2 * (size - 1) - x;
      else if (mode == "replicate") x = x < 0 ? 0 : size - 1;
      else x = (x % size + size) % size;
    }
    map[i] = x;
  }
  return map;
}

inline long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

struct PaddingMaps {
  std::vector<long> d, h, w;
  Extent extent() const { return {long(d.size()), long(h.size()), long(w.size())}; }
};

// One row of a padded frame: dst [width][ld], channels of it written.
template <class K, class A, class T>
void pack_row(const Kernels<K>& kernels, const A* frame, const FrameStrides& strides, const PaddingMaps& maps, long row, long channels, long ld,
              T* dst) {
  const long height = maps.h.size(), width = maps.w.size();
  const long d = maps.d[row / height], y = maps.h[row % height];
  const bool outside = d < 0 || y < 0;
  for (long x = 0; x < width; ++x)
    if (outside || maps.w[x] < 0) std::memset(static_cast<void*>(dst + x * ld), 0, channels * sizeof(T));
  if (outside) return;
  const A* src = frame + d * strides.d + y * strides.h;
  if constexpr (std::is_same_v<A, T> && std::is_same_v<T, K>) {
    // Whole lines of neighbouring pixels, where the map is one stretch of them.
    const auto shown = [](long x) { return x >= 0; };
    const long first = std::find_if(maps.w.begin(), maps.w.end(), shown) - maps.w.begin(), n = std::count_if(maps.w.begin(), maps.w.end(), shown);
    if (strides.w == 1 && strides.c != 1 && n > 0 && maps.w[first + n - 1] == maps.w[first] + n - 1) {
      kernels.transpose(channels, n, src + maps.w[first], strides.c, dst + first * ld, ld);
      return;
    }
  }
  // Sixteen channels at a time: where pixels lie innermost, their writes share a cache line.
  const long together = strides.c == 1 ? channels : 16;
  for (long c0 = 0; c0 < channels; c0 += together)
    for (long x = 0; x < width; ++x) {
      if (maps.w[x] < 0) continue;
      const A* p = src + c0 * strides.c + maps.w[x] * strides.w;
      T* q = dst + x * ld + c0;
      const long n = std::min(together, channels - c0);
      if (strides.c == 1) convert(p, n, q);
      else
        for (long c = 0; c < n; ++c) q[c] = static_cast<T>(p[c * strides.c]);
    }
}

// A dense row [pixels][ld] of T into activations of any strides, rounding.
template <class K, class A, class T>
void unpack_row(const Kernels<K>& kernels, const T* src, long ld, long pixels, long channels, A* dst, long stride_w, long stride_c) {
  if constexpr (std::is_same_v<A, T> && std::is_same_v<T, K>) {
    if (stride_w == 1 && stride_c != 1) return kernels.transpose(pixels, channels, src, ld, dst, stride_c);
  }
  for (long x = 0; x < pixels; ++x) {
    if (stride_c == 1) convert(src + x * ld, channels, dst + x * stride_w);
    else
      for (long c = 0; c < channels; ++c) dst[x * stride_w + c * stride_c] = static_cast<A>(src[x * ld + c]);
  }
}

constexpr long kPackGrain = 4096;  // numbers that are packed while a thread wakes, and some

// Of the panel of a packed operand that `left` columns are to go into: the last one is one vector wide where that is enough.
template <class T>
long panel_width(const Kernels<T>& kernels, long left) {
  return left > kernels.lanes ? kernels.panel : kernels.lanes;
}

// A GEMM operand of k rows, packed [panel][k][panel columns].
template <class T, class F>
void pack_panels(const Kernels<T>& kernels, long k, long columns, T* dst, const F& value) {
  parallel((columns + kernels.panel - 1) / kernels.panel, [&](long begin, long end) {
    for (long p = begin; p < end; ++p) {
      const long n0 = p * kernels.panel, left = columns - n0;
      const long width = panel_width(kernels, left), real = std::min(left, width);
      T* q = dst + n0 * k;
      for (long i = 0; i < k; ++i, q += width) {
        for (long n = 0; n < real; ++n) q[n] = value(i, n0 + n);
        for (long n = real; n < width; ++n) q[n] = T(0);
      }
    }
  });
}

// f(first, n, width, buffer) for the n columns of each panel, of the operand as pack_panels lays it out; with a buffer of k rows. `alone`: by
// this thread, whose cache then has them.
template <class T, class F>
void for_panels(const Kernels<T>& kernels, Workspace& workspace, long k, long columns, const F& f, bool alone = false) {
  const long panels = (columns + kernels.panel - 1) / kernels.panel, size = round_up(k * kernels.panel, 16);
  T* buffers = workspace.take<T>(std::min<long>(panels, torch::stable::get_num_threads()) * size);
  const auto pack = [=, &kernels](long begin, long end, long thread) {
    for (long first = begin * kernels.panel; first < std::min(columns, end * kernels.panel); first += kernels.panel) {
      const long left = columns - first, width = panel_width(kernels, left);
      f(first, std::min(left, width), width, buffers + thread * size);
    }
  };
  if (alone || k * columns < 2 * kPackGrain) return pack(0, panels, 0);
  Region region;
  region.add(panels, pack);
  region.run();
}

// Row of a weight [4C, ..] whose gates lie in a column: columns are [block][gate][channel of the block], rows [gate][channel].
inline long gate_row(long column, long channels) {
  const long block = column / kSlab, n = std::min<long>(kBlock, channels - block * kBlock), j = column % kSlab;
  if (n == kBlock) return j / kBlock * channels + block * kBlock + j % kBlock;  // no division at run time
  return j / n * channels + block * kBlock + j % n;
}

// to[i][j], rows ld_to apart, = the i-th of n numbers, s1 apart, of the j-th of `rows` rows of w, s0 apart. `wide` is scratch.
template <class A, class T>
void turn_rows(const Kernels<T>& kernels, const A* w, long s0, long s1, long n, long rows, T* to, long ld_to, std::vector<T>& wide) {
  if constexpr (std::is_same_v<A, T>) {
    if (s1 == 1) return kernels.transpose(rows, n, w, s0, to, ld_to);
  } else if (s1 == 1) {
    wide.resize(rows * n);
    for (long q = 0; q < rows; ++q) convert(w + q * s0, n, wide.data() + q * n);
    return kernels.transpose(rows, n, wide.data(), n, to, ld_to);
  }
  for (long i = 0; i < n; ++i)
    for (long q = 0; q < rows; ++q) to[i * ld_to + q] = static_cast<T>(w[q * s0 + i * s1]);
}

// The same for `columns` columns of gates from `first` on, each of them a row of w.
template <class A, class T>
void read_columns(const Kernels<T>& kernels, const A* w, long s0, long s1, long n, long channels, long first, long columns, T* to, long ld_to) {
  std::vector<T> wide;
  for (long j = 0, same; j < columns; j += same) {
    // Neighbouring columns are neighbouring rows of w, as far as a gate's channels of a block go.
    const long row = gate_row(first + j, channels);
    for (same = 1; j + same < columns && gate_row(first + j + same, channels) == row + same;) ++same;
    if (s1 == 1) {
      // The next rows are those of another gate: the processor does not foresee them.
      const A* ahead = w + gate_row(std::min(first + j + same, 4 * channels - 1), channels) * s0;
      for (long q = 0; q < same; ++q)
        for (long i = 0; i < n; i += 64 / long(sizeof(A))) __builtin_prefetch(ahead + q * s0 + i);
    }
    turn_rows(kernels, w + row * s0, s0, s1, n, same, to + j, ld_to, wide);
  }
}

}  // namespace cpu
}  // namespace convfast
