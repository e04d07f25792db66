// Winograd F(m, r) along time, for conv1d: the weights of each plane as a GEMM operand, and the GEMMs between the transforms.
#pragma once
#include "frames.h"

namespace convfast {
namespace cpu {

// A convolution in one direction, from features to channels and, for gradients of x, back: the kernels' tiles are here rows of time.
template <class T>
class TimeTiling {
 public:
  // None: the convolution is not done this way.
  TimeTiling() = default;
  // From `features` to `channels`, of `rows` rows in all.
  TimeTiling(const Kernels<T>& kernels, long taps, long features, long channels, long rows)
      : kernels_(&kernels), by_(kernels.winograd_1d[taps == 3 ? 0 : 1]), features_(features), channels_(channels), most_(std::clamp(tiles(rows), 16l, 64l)) {}

  explicit operator bool() const { return by_ != nullptr; }
  const Winograd1d<T>& kernels() const { return *by_; }

  // Weights from `depth` to `columns` channels, [plane][panel][depth][panel columns]; taps_of(first, n, width, to) puts down those of columns
  // [first, first + n) as [depth][tap][width].
  template <class F>
  const T* pack(Workspace& workspace, long depth, long columns, const F& taps_of) const {
    T* packed = workspace.take<T>(by_->planes * plane_size(depth, columns));
    for_panels(*kernels_, workspace, by_->r * depth, columns, [=, *this, &taps_of](long first, long n, long width, T* taps) {
      taps_of(first, n, width, taps);
      for (long i = 0; i < depth; ++i)
        by_->filter(width, taps + i * by_->r * width, width, packed + first * depth + i * width, plane_size(depth, columns));
    });
    return packed;
  }

  // Elements of scratch that the functions below need.
  long scratch() const { return by_->planes * (plane(features_) + plane(channels_)); }

  // out[row, :] = bias + the convolution of rows [row, row + r) of x, from `depth` to `columns` channels, or its relu. Whole vectors are written.
  void convolve(long rows, const T* x, long ldx, long depth, long columns, const T* weights, const T* bias, bool relu, T* out, long ldo, T* scratch) const {
    T* products = scratch + by_->planes * plane(depth);
    for (long row = 0; row < rows; row += most_ * by_->m) {
      const long n = std::min(rows - row, most_ * by_->m);
      by_->input(n, depth, x + row * ldx, ldx, scratch, plane(depth), ld(depth));
      for (long p = 0; p < by_->planes; ++p)
        kernels_->gemm({tiles(n), {scratch + p * plane(depth)}, {{&kNone, 1, depth, ld(depth)}}, weights + p * plane_size(depth, columns), depth, columns, nullptr, 0,
                        products + p * plane(columns), ld(columns)});
      by_->output(n, columns, products, plane(columns), ld(columns), bias, relu, out + row * ldo, ldo);
    }
  }

  // Gradients of weights, as sums [plane][feature][ld_sums] over the tiles of rows of x and gradients g of their results: collected in
  // scratch, where `taken` tiles are, until they are enough for a GEMM.
  long collect(long rows, const T* x, long ldx, const T* g, long ldg, T* scratch, long taken, T* sums, long ld_sums) const {
    T* gradients = scratch + by_->planes * plane(features_);
    if (taken + tiles(rows) > most_) {
      add_products(taken, scratch, sums, ld_sums);
      taken = 0;
    }
    by_->input(rows, features_, x, ldx, scratch + taken * ld(features_), plane(features_), ld(features_));
    by_->output_gradient(rows, channels_, g, ldg, gradients + taken * ld(channels_), plane(channels_), ld(channels_));
    return taken + tiles(rows);
  }

  void add_products(long taken, const T* scratch, T* sums, long ld_sums) const {
    const T* gradients = scratch + by_->planes * plane(features_);
    for (long p = 0; p < by_->planes; ++p)
      kernels_->outer_sum({taken, scratch + p * plane(features_), {&kNone, 1, features_, ld(features_)}, gradients + p * plane(channels_), ld(channels_), channels_,
                           sums + p * features_ * ld_sums, ld_sums});
  }

 private:
  static constexpr long kNone = 0;

  long tiles(long rows) const { return (rows + by_->m - 1) / by_->m; }
  // A tile's channels in a plane, off the powers of two that would share cache sets.
  static long ld(long channels) { return winograd_ld(round_up(channels, 16)); }
  long plane(long channels) const { return winograd_plane(most_, ld(channels)); }
  long plane_size(long depth, long columns) const { return depth * round_up(columns, kernels_->lanes) + 16; }

  const Kernels<T>* kernels_ = nullptr;
  const Winograd1d<T>* by_ = nullptr;
  long features_ = 0, channels_ = 0;
  long most_ = 0;  // tiles that are transformed together
};

}  // namespace cpu
}  // namespace convfast
