// ConvLSTM by Winograd F(m×m, r×r): how frames are cut into tiles and their work among threads, and the transformed weights.
#pragma once
#include <numeric>

#include "conv_lstm_problem.h"

namespace convfast {
namespace cpu {
namespace conv_lstm {

template <class T>
struct Tiling {
  const WinogradKernels<T>* kernels = nullptr;
  long down = 0, across = 0;

  Tiling(long m, long taps, const Extent& frame) {
    if (!m) return;
    kernels = cpu::kernels<T>().winograd[taps == 3 ? 0 : 1];
    down = (frame.h + m - 1) / m;
    across = (frame.w + m - 1) / m;
  }

  explicit operator bool() const { return kernels != nullptr; }

  // Tiles transformed together: few enough that a block's transforms leave room in L2. Where they do not anyway, more of them, so
  // that the weights are read less often; and more for sums, which are read and written once a block.
  long most_tiles(long channels, bool sums) const {
    constexpr long kMany = 72;
    if (leaves_cache(channels, sums)) return kMany;
    return std::min<long>(tiles_that_fit(channels, sums), sums ? 2 * kMany : 96);
  }
  bool leaves_cache(long channels, bool sums) const { return tiles_that_fit(channels, sums) < 24; }
  long tiles_that_fit(long channels, bool sums) const {
    return (sums ? 5400 << 10 : 400 << 10) / (kernels->planes * std::max<long>(1, channels) * long(sizeof(T)));
  }
  // Slabs that go through the planes together, where reading the block's transforms once for each would be reading them from afar.
  long group(long channels, bool sums) const { return !sums && leaves_cache(channels, false) ? 2 : 1; }

  // Of a thread, for inputs of any of these numbers of channels.
  long scratch_size(long samples, std::initializer_list<long> channels) const {
    long size = 0;
    for (long n : channels)
      for (bool sums : {false, true}) {
        const long block = std::min(most_tiles(n, sums), samples * down * across);
        size = std::max(size, round_up(winograd_scratch(kernels->planes, n, block, group(n, sums)), 16));
      }
    return size;
  }

  Winograd<T> problem(const Rows& rows, const WinogradInput<T>& a, const WinogradInput<T>& b, long channels, const T* weights) const {
    return {rows, down, across, 0, {a, b}, channels, weights, group(channels, !weights)};
  }

  long weights_size(long channels, long columns) const { return kernels->planes * channels * columns; }

  struct Parts {
    long tiles, slabs;
  };

  // Bytes of sums that a thread adds to in its cache.
  static constexpr long kMostSums = 4 << 20;

  // The members of a team share out the tiles, each reading all weights; and the slabs, each transforming all tiles, where tiles are too
  // few for that or every member's own sums would crowd its cache.
  Parts parts(long team, long tiles, long channels, long columns, bool sums) const {
    constexpr long kFew = 12;
    const long slabs = (columns + kSlab - 1) / kSlab;
    const bool cut = sums ? weights_size(channels, columns) * long(sizeof(T)) > kMostSums : tiles < kFew * team;
    const long by_slab = cut ? std::gcd(team, slabs) : 1;
    return {team / by_slab, by_slab};
  }

  // call(problem, range, part of the tiles) for a member's share of each part that `team` threads are to have.
  template <class F>
  void take(Pieces& pieces, long team, const Winograd<T>& problem, long columns, const F& call) const {
    const long tiles = problem.rows.samples * down * across, slabs = (columns + kSlab - 1) / kSlab;
    Parts n = parts(team, tiles, problem.k, columns, !problem.weights);
    n.tiles = std::min(n.tiles, tiles);
    const long share = (tiles + n.tiles - 1) / n.tiles, most = most_tiles(problem.k, !problem.weights), blocks = (share + most - 1) / most;
    Winograd<T> w = problem;
    w.block = (share + blocks - 1) / blocks;
    pieces.take(n.tiles * n.slabs, [&](long begin, long end) {
      for (long i = begin; i < end; ++i) {
        const long t = i / n.slabs, s = i % n.slabs;
        call(w, WinogradRange{tiles * t / n.tiles, tiles * (t + 1) / n.tiles, slabs * s / n.slabs, slabs * (s + 1) / n.slabs}, t);
      }
    });
  }

  // G g Gᵀ as [slab][plane][panel][channel][panel columns]; taps_of(channel, n, column, columns, to) puts down the r * r taps of n channels
  // to so many columns of a slab as [channel][tap][kSlab].
  template <class F>
  T* pack_filters(const Kernels<T>& k, Workspace& workspace, long channels, long columns, const F& taps_of) const {
    constexpr long kMost = 16;
    const long taps = kernels->r * kernels->r, slabs = (columns + kSlab - 1) / kSlab;
    const long together = std::clamp<long>(slabs * channels / torch::stable::get_num_threads(), 1, kMost), groups = (channels + together - 1) / together;
    T* packed = workspace.take<T>(weights_size(channels, round_up(columns, k.lanes)));
    parallel(slabs * groups, [&](long begin, long end) {
      std::vector<T> g(together * taps * kSlab);
      for (long i = begin; i < end; ++i) {
        const long first = i % groups * together, count = std::min(together, channels - first);
        const long n0 = i / groups * kSlab, n = std::min<long>(kSlab, columns - n0), ld = round_up(n, k.lanes);
        if (n < ld) std::fill(g.begin(), g.end(), T(0));
        taps_of(first, count, n0, n, g.data());
        T* slab = packed + n0 * kernels->planes * channels;
        for (long c = 0; c < count; ++c)
          for (long p = 0; p < ld; p += k.panel) {
            const long width = std::min(k.panel, ld - p);
            kernels->filter(g.data() + c * taps * kSlab + p, width, slab + p * channels + (first + c) * width, channels * ld);
          }
      }
    });
    return packed;
  }
};

}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast
