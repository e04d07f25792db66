// Threads that take the same steps together and wait for each other, at each step or as one follows another.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace convfast {
namespace cpu {

inline void pause() {
#if defined(__SSE2__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

template <class F>
void spin_until(const F& reached) {
  constexpr long kSpins = 100, kPauses = 100;  // a pause takes some 50 ns
  for (long spins = 0; !reached(); ++spins) {
    if (spins < kSpins) continue;
    if (spins < kSpins + kPauses) pause();
    else std::this_thread::yield();  // the other one may want this core
  }
}

// Only threads that run are ever waited for: the first to come gives the others a moment, then starts with those that are there. So
// a pool that grants fewer threads than asked for, or runs them one after another, cannot hang it.
class Team {
 public:
  explicit Team(long wanted) : wanted_(wanted), slots_(wanted) {}

  // → this thread's rank, or -1 where the others have begun without it; the work is theirs then.
  long join() {
    long seen = members_.load();
    do {
      if (seen & kClosed) return -1;
    } while (!members_.compare_exchange_weak(seen, seen + 1));
    if (seen == 0) {
      for (long spins = 0; members_.load() < wanted_ && spins < kMoment; ++spins) pause();
      members_.fetch_or(kClosed);
    } else {
      while (!(members_.load() & kClosed)) pause();
    }
    return seen;
  }

  long size() const { return members_.load(std::memory_order_relaxed) & ~kClosed; }

  // Until every member has come here as often as the one of this rank: `turn` is its own count, zero at first.
  void wait(long rank, long& turn) {
    slots_[rank].turn.store(++turn, std::memory_order_release);
    for (long i = 0, all = size(); i < all; ++i) spin_until([&] { return slots_[i].turn.load(std::memory_order_acquire) >= turn; });
  }

 private:
  static constexpr long kClosed = 1l << 40, kMoment = 4000;  // kMoment in pauses

  // A line of its own: who comes must not wait for the others' caches.
  struct alignas(64) Slot {
    std::atomic<long> turn{0};
  };

  const long wanted_;
  alignas(64) std::atomic<long> members_{0};
  std::vector<Slot> slots_;
};

// How many steps a thread has behind it, for those that follow it.
class Progress {
 public:
  void reach(long steps) { steps_.store(steps, std::memory_order_release); }
  void wait(long steps) const {
    spin_until([&] { return steps_.load(std::memory_order_acquire) >= steps; });
  }

 private:
  alignas(64) std::atomic<long> steps_{0};
};

}  // namespace cpu
}  // namespace convfast
