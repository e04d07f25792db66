// Threads that take the same steps together, and wait for each other at each.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace convfast {
namespace cpu {

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
    for (long i = 0, all = size(); i < all; ++i)
      for (long spins = 0; slots_[i].turn.load(std::memory_order_acquire) < turn; ++spins) {
        if (spins < kSpins) continue;
        if (spins < kSpins + kStep) pause();
        else std::this_thread::yield();  // the other one may want this core
      }
  }

 private:
  static constexpr long kClosed = 1l << 40, kMoment = 4000, kStep = 100, kSpins = 100;  // kMoment and kStep in pauses, some 50 ns each

  // A line of its own: who comes must not wait for the others' caches.
  struct alignas(64) Slot {
    std::atomic<long> turn{0};
  };

  static void pause() {
#if defined(__SSE2__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  const long wanted_;
  alignas(64) std::atomic<long> members_{0};
  std::vector<Slot> slots_;
};

}  // namespace cpu
}  // namespace convfast
