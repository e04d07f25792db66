// Who of the threads does what of an LSTM call, and by which GEMMs.
#pragma once
#include "lstm_problem.h"
#include "split.h"

namespace convfast {
namespace cpu {
namespace lstm {

template <class A>
struct Plan {
  using T = Wide<A>;

  const Problem p;
  const long threads = torch::stable::get_num_threads();  // asked of a thread of the pool it may be another number
  const long columns;                                     // of the gates, whole vectors

  explicit Plan(const Problem& problem) : p(problem), columns(round_up(4 * p.hidden, kernels<T>().lanes)) {}

  // Rows of a part that are run together, and bytes of a chunk's gates, which stay in L2. Twice the rows read the weights half as
  // often, but what is saved of them would leave the cache.
  struct Pass {
    bool forward;
    long most_rows, bytes;
  };
  static constexpr Pass kInference = {true, 64, 256 << 10}, kTraining = {true, 32, 256 << 10}, kGradients = {false, 32, 512 << 10};
  static constexpr long kTogether = 8, kFewDots = 3;

  Pass pass = kInference;
  long stages = 1;  // of the pipeline
  long turn = 1;    // steps that a layer takes before the one above it does

  // GEMMs of numbers that are split into parts of bfloat16, where there are any: by matrix tiles, or by dot products.
  const SplitKernels* const split_by = split_kernels<A>();
  bool by_tiles() const { return split_by && tile_kernels(); }
  bool by_dots() const { return split_by && !tile_kernels(); }

  // Whether the GEMMs are of parts of bfloat16: by tiles where rows are enough for x and h as one operand.
  static constexpr long kParts = kSplitParts<A>;
  bool by_parts() const { return by_dots() || (by_tiles() && together() && !shares_units() && !once()); }
  long split_x() const { return round_up(p.inputs, kSplitDepth); }
  long split_h() const { return round_up(p.size, kSplitDepth); }
  long split_depth() const { return split_x() + split_h(); }
  // Of a step's rows of x and h, [row][part][split_depth()], with a gap for the sets of the cache.
  long split_ld() const { return kParts * split_depth() + kSplitDepth; }

  // Of the weights.
  long operand_bytes() const { return ((p.inputs + p.size) * columns + (p.projected ? p.hidden * p.size : 0)) * long(sizeof(T)); }
  long weight_bytes() const { return by_parts() ? split_size(4 * p.hidden, split_depth(), kParts) * long(sizeof(Part)) : operand_bytes(); }

  // Members of a team share out pairs of blocks: whole panels of hidden units, too.
  long units() const { return (p.blocks() + 1) / 2; }

  // How the threads share the work: parts of a direction's rows, each with a team that shares the blocks of hidden units, or the layers of
  // a pipeline; and directions at once, each with as many.
  struct Sharing {
    long parts, team, abreast = 1;
  };

  // Few rows, or some for a few steps, which take less time than one core takes to get the weights that the others have packed: teams as
  // large as can be. Some more, and weights that a core's L2 does not hold, so that they come from behind it at every step: teams whose
  // members' shares it holds. Of two directions neither waits for the other: each has half of the threads where rows are few, unless that
  // leaves a core with more weights, and too many for its L2.
  Sharing sharing() const {
    constexpr long kFewRows = 4, kSomeRows = 16, kFewOfLarge = 6, kFewSteps = 16, kRowsOfFewSteps = 12;
    constexpr long kMostCopies = 256 << 20;  // bytes
    constexpr long kLeast = 96 << 10;        // weights of one step that are worth waking a thread for; eight rows through them take as long as packing them
    if (once()) return {1, std::clamp<long>(operand_bytes() / long(sizeof(T)) * (8 + p.batch) / 8 / kLeast, 1, std::min(threads, units()))};
    const long few = !by_dots() ? kFewRows : pass.forward && 2 * weight_bytes() > l2_bytes() ? kFewOfLarge : kFewDots;
    if (stages > 1) return {threads / stages, stages};
    long team = 1;
    const bool brief = pass.forward && p.time <= kFewSteps && p.batch <= kRowsOfFewSteps;
    if (brief || p.batch < few * threads) {
      team = std::min(threads, units());
      const long half = std::min(threads / 2, team);
      if (p.directions == 2 && threads % 2 == 0 && (half == team || (pass.forward ? 2 : 1) * operand_bytes() <= half * l2_bytes()))
        return {std::clamp<long>(p.batch, 1, threads / 2 / half), half, 2};
    } else if (p.batch < kSomeRows * threads && !by_tiles() && !by_dots()) {
      team = std::min({threads, units(), (operand_bytes() + l2_bytes() - 1) / l2_bytes()});
    }
    // Each part has sums of its own for the gradients of the weights. (Teams would do without the products of bfloat16.)
    const long most = std::clamp<long>(kMostCopies / operand_bytes(), 1, threads);
    if (!pass.forward && !split_by && p.batch > most) team = std::max(team, std::min(units(), threads / most));
    return {std::clamp<long>(p.batch, 1, threads / team), team};
  }

  bool shares_units() const { return stages == 1 && sharing().team > 1; }

  long most_rows(const Sharing& s) const { return std::clamp<long>((p.batch + s.parts - 1) / s.parts, 1, pass.most_rows); }

  // One step of few rows: weights are read once. All threads share out the hidden units, and each packs a block's weights where it needs
  // them, in its cache.
  bool once() const {
    if (!pass.forward || p.time > 1 || p.batch > pass.most_rows) return false;
    return !by_tiles() || p.batch < kTogether * threads;
  }

  // Rows enough for whole tiles: x and h are then one operand of a step's GEMM. Fewer rows, or few against weights that L2 does not hold
  // from step to step: the input part of a chunk of steps is a GEMM of its own, over the rows of all its steps.
  bool together() const {
    if (once()) return true;
    const Sharing s = sharing();
    const long rows = most_rows(s);
    if (by_dots()) return rows >= kFewDots && !shares_units();
    return rows >= 2 * kTogether || (rows >= kTogether && (by_tiles() || 4 * operand_bytes() <= 3 * s.team * l2_bytes()));
  }

  long steps_of_chunk() const {
    if (pass.forward && together()) return turn;
    if (stages > 1) return std::clamp<long>(p.time / 32, 1, 16);  // the next stage begins so much later
    // The weights' gradients pass through a cache that does not hold them once a chunk: the larger they are the more steps it has, as far
    // as x of a step is no larger than its gates.
    const long most = std::clamp(4 * pass.bytes * p.ldz() / std::max(p.ldz(), p.inputs), pass.bytes, 4 * pass.bytes);
    const long bytes = pass.forward ? pass.bytes : std::clamp(operand_bytes() / 4, pass.bytes, most);
    return std::min(p.time, std::max<long>(1, bytes / (most_rows(sharing()) * p.ldz() * long(sizeof(T)))));
  }

  // Whether these layers take turns.
  static bool takes_turns(const std::vector<const Plan*>& layers) {
    for (const Plan* layer : layers)
      if (layer->p.batch == 0 || layer->p.directions > 1 || layer->sharing().team > 1 || !layer->together()) return false;
    return layers.size() > 1;
  }

  // Steps of a turn: weights of all layers may be too many for L2.
  static long turn_of(const std::vector<const Plan*>& layers) {
    constexpr long kMostSteps = 8;
    long turn = layers[0]->stages > 1 ? 1 : kMostSteps;
    for (const Plan* layer : layers) turn = std::min(turn, layer->pass.bytes / (layer->most_rows(layer->sharing()) * layer->p.ldh() * long(sizeof(T))));
    return std::max(1l, turn);
  }

  // Stages of a pipeline: a thread has layers of its own and runs behind the thread of those below. A step then has the rows of all
  // stages' threads, and a core's L2 holds its own layers' weights only. 1 where rows are many or go by matrix tiles, steps few or layers
  // unlike, or where rows fill tiles without it and L2 holds the weights of all, so that nothing is gained by it. `outputs`: of a linear
  // layer on top.
  static long pipeline_of(const std::vector<const Plan*>& layers, long outputs) {
    constexpr long kMostRows = 32, kFewestSteps = 32;
    const Plan& first = *layers[0];
    const long n = layers.size();
    if (first.p.time < kFewestSteps || first.p.directions > 1) return 1;
    long all_bytes = 0;
    for (const Plan* layer : layers) {
      if (layer->by_tiles() && layer->by_parts()) return 1;
      all_bytes += layer->weight_bytes();
    }
    if (first.p.batch >= kTogether * first.threads && all_bytes <= l2_bytes()) return 1;
    for (long stages = std::min(n, first.threads); stages > 1; --stages) {
      const long parts = first.threads / stages, rows = (first.p.batch + parts - 1) / parts;
      if (first.threads % stages || first.p.batch < parts || rows > (first.split_by ? kTogether - 1 : kMostRows)) continue;
      long work = 0, most_work = 0, most_bytes = 0;
      for (long stage = 0; stage < stages; ++stage) {
        long own = stage + 1 < stages ? 0 : layers[n - 1]->p.size * outputs, bytes = 0;
        for (long i = n * stage / stages; i < n * (stage + 1) / stages; ++i) {
          const Problem& p = layers[i]->p;
          own += 4 * p.hidden * (p.inputs + p.size) + (p.projected ? p.hidden * p.size : 0);
          bytes += layers[i]->weight_bytes();
        }
        work += own;
        most_work = std::max(most_work, own);
        most_bytes = std::max(most_bytes, bytes);
      }
      if (20 * stages * most_work <= 21 * work && most_bytes <= l2_bytes()) return stages;
    }
    return 1;
  }
};

}  // namespace lstm
}  // namespace cpu
}  // namespace convfast
