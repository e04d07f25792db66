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
  WinogradCut cut;
  Extent kernel;
  long down = 0, across = 0, tiles = 0;  // of a frame
  std::vector<long> piece;               // pixels of a bordered frame from a tile's first to each piece's

  Tiling(const WinogradCut& cut, const Extent& kernel, const Extent& frame, const Extent& padded) : cut(cut), kernel(kernel) {
    if (!cut) return;
    kernels = cpu::kernels<T>().winograd[cut.r == 3 ? 0 : 1];
    down = (frame.h + cut.m - 1) / cut.m;
    across = (frame.w + cut.m - 1) / cut.m;
    tiles = cut.tiles(frame);
    for (long d = 0; d < cut.pieces.d; ++d)
      for (long h = 0; h < cut.pieces.h; ++h)
        for (long w = 0; w < cut.pieces.w; ++w) piece.push_back((d * padded.h + h * cut.r) * padded.w + w * cut.r);
  }

  explicit operator bool() const { return kernels != nullptr; }

  // Rows of the weights as a GEMM operand: [first input, second][piece][channel].
  long pieces() const { return long(piece.size()); }
  long depth(long channels) const { return pieces() * channels; }
  long row(long channel, long piece, long first, long second) const {
    return channel < first ? piece * first + channel : pieces() * first + piece * second + channel - first;
  }

  // call(tap of the piece, tap of the kernel) for all that it has.
  template <class F>
  void each_tap(long piece, const F& call) const {
    const Extent& n = cut.pieces;
    const long d = piece / (n.h * n.w), y0 = piece / n.w % n.h * cut.r, x0 = piece % n.w * cut.r;
    for (long y = 0; y < std::min(cut.r, kernel.h - y0); ++y)
      for (long x = 0; x < std::min(cut.r, kernel.w - x0); ++x) call(y * cut.r + x, (d * kernel.h + y0 + y) * kernel.w + x0 + x);
  }

  // Tiles transformed together: few enough that a block's transforms leave room in L2. Where they do not anyway, more of them, so
  // that the weights are read less often; and more for sums, which are read and written once a block.
  long most_tiles(long k, bool sums) const {
    constexpr long kMany = 72;
    if (leaves_cache(k, sums)) return kMany;
    return std::min<long>(tiles_that_fit(k, sums), sums ? 2 * kMany : 96);
  }
  bool leaves_cache(long k, bool sums) const { return tiles_that_fit(k, sums) < 24; }
  long tiles_that_fit(long k, bool sums) const { return (sums ? 5400 << 10 : 400 << 10) / (kernels->planes * std::max<long>(1, k) * long(sizeof(T))); }
  // Slabs that go through the planes together, where reading the block's transforms once for each would be reading them from afar.
  long group(long k, bool sums) const { return !sums && leaves_cache(k, false) ? 2 : 1; }

  // Of a thread, for inputs of any of these numbers of channels.
  long scratch_size(long samples, std::initializer_list<long> channels) const {
    long size = 0;
    for (long n : channels)
      for (bool sums : {false, true}) {
        const long k = depth(n), block = std::min(most_tiles(k, sums), samples * tiles);
        size = std::max(size, round_up(winograd_scratch(kernels->planes, k, block, group(k, sums)), 16));
      }
    return size;
  }

  Winograd<T> problem(const Rows& rows, const WinogradInput<T>& a, const WinogradInput<T>& b, long channels, const T* weights) const {
    const long k = depth(channels);
    return {rows, down, across, 0, {a, b}, pieces(), piece.data(), k, weights, group(k, !weights)};
  }

  long weights_size(long channels, long columns) const { return kernels->planes * depth(channels) * columns; }

  struct Parts {
    long tiles, slabs;
  };

  // Bytes of sums that a thread adds to in its cache.
  static constexpr long kMostSums = 4 << 20;

  // The members of a team share out the tiles, each reading all weights; and the slabs, each transforming all tiles, where tiles are too
  // few for that or every member's own sums would crowd its cache.
  Parts parts(long team, long tiles, long k, long columns, bool sums) const {
    constexpr long kFew = 12, kMostCopies = 256 << 20;  // bytes of all members' sums
    const long slabs = (columns + kSlab - 1) / kSlab, bytes = kernels->planes * k * columns * long(sizeof(T));
    const bool by_slabs = sums ? bytes > kMostSums : tiles < kFew * team;
    const long even = by_slabs ? std::gcd(team, slabs) : 1;
    if (sums && bytes * (team / even) > kMostCopies) return {1, std::min(team, slabs)};
    return {team / even, even};
  }

  // call(problem, range, part of the tiles) for a member's share of each part that `team` threads are to have.
  template <class F>
  void take(Pieces& pieces, long team, const Winograd<T>& problem, long columns, const F& call) const {
    const long all = problem.rows.samples * tiles, slabs = (columns + kSlab - 1) / kSlab;
    Parts n = parts(team, all, problem.k, columns, !problem.weights);
    n.tiles = std::min(n.tiles, all);
    const long share = (all + n.tiles - 1) / n.tiles, most = most_tiles(problem.k, !problem.weights), blocks = (share + most - 1) / most;
    Winograd<T> w = problem;
    w.block = (share + blocks - 1) / blocks;
    pieces.take(n.tiles * n.slabs, [&](long begin, long end) {
      for (long i = begin; i < end; ++i) {
        const long t = i / n.slabs, s = i % n.slabs;
        call(w, WinogradRange{all * t / n.tiles, all * (t + 1) / n.tiles, slabs * s / n.slabs, slabs * (s + 1) / n.slabs}, t);
      }
    });
  }

  // G g Gᵀ as [slab][plane][panel][row][panel columns] for channels of a first input and those of a second behind them;
  // taps_of(channel, n, column, columns, to) puts down the kernel's taps of n channels to so many columns of a slab as [channel][tap][kSlab].
  template <class F>
  T* pack_filters(const Kernels<T>& k, Workspace& workspace, long first, long second, long columns, const F& taps_of) const {
    constexpr long kMost = 16;
    const long channels = first + second, rows = depth(channels), all_taps = kernel.pixels(), taps = cut.r * cut.r, slabs = (columns + kSlab - 1) / kSlab;
    const bool whole = kernel == Extent{1, cut.r, cut.r};  // the only piece
    const long together = std::clamp<long>(slabs * channels / torch::stable::get_num_threads(), 1, kMost), groups = (channels + together - 1) / together;
    T* packed = workspace.take<T>(weights_size(channels, round_up(columns, k.lanes)));
    parallel(slabs * groups, [&](long begin, long end) {
      std::vector<T> g(together * all_taps * kSlab), of_piece(taps * kSlab);
      for (long i = begin; i < end; ++i) {
        const long begin_of = i % groups * together, count = std::min(together, channels - begin_of);
        const long n0 = i / groups * kSlab, n = std::min<long>(kSlab, columns - n0), ld = round_up(n, k.lanes);
        if (n < ld) std::fill(g.begin(), g.end(), T(0));
        taps_of(begin_of, count, n0, n, g.data());
        T* slab = packed + n0 * kernels->planes * rows;
        for (long c = 0; c < count; ++c)
          for (long piece = 0; piece < pieces(); ++piece) {
            const T* const of_channel = g.data() + c * all_taps * kSlab;
            if (!whole) {
              std::fill(of_piece.begin(), of_piece.end(), T(0));
              each_tap(piece, [&](long t, long tap) { std::copy_n(of_channel + tap * kSlab, ld, of_piece.data() + t * kSlab); });
            }
            for (long p = 0; p < ld; p += k.panel) {
              const long width = std::min(k.panel, ld - p);
              kernels->filter((whole ? of_channel : of_piece.data()) + p, width, slab + p * rows + row(begin_of + c, piece, first, second) * width, rows * ld);
            }
          }
      }
    });
    return packed;
  }
};

}  // namespace conv_lstm
}  // namespace cpu
}  // namespace convfast
