// Threads that take the same steps together and wait for each other, at each step or as one follows another.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <stdexcept>
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
#elif defined(__aarch64__)
  asm volatile("isb");  // some tens of cycles; `yield` takes none on most processors
#else
  std::this_thread::yield();
#endif
}

// A thread waited for one that has failed.
struct Abandoned : std::runtime_error {
  Abandoned() : std::runtime_error("convfast: another thread failed") {}
};

// Where threads wait for what another one does. They look for about as long as going to sleep takes, then sleep: the other one may need
// this core, and who gives it away by yielding gets it back only after a whole time slice of whoever else wants it.
class Bell {
 public:
  template <class F>
  void wait(const F& reached) {
    using Clock = std::chrono::steady_clock;
    constexpr long kSpins = 100, kPauses = 16;
    constexpr std::chrono::microseconds kPatience(50);
    for (long i = 0; i < kSpins; ++i)
      if (reached()) return;
    const auto end = Clock::now() + kPatience;
    do {
      for (long i = 0; i < kPauses; ++i) {
        if (reached()) return;
        pause();
      }
    } while (Clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // either this thread sees what ring() follows, or ring() sees a sleeper
    rung_.wait(lock, reached);
    sleepers_.fetch_sub(1);
  }

  // After every change that a thread may wait for.
  void ring() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_relaxed) == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    rung_.notify_all();
  }

 private:
  alignas(64) std::atomic<long> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable rung_;
};

// What a thread has behind it. In a line of its own: who counts must not wait for the others' caches.
class alignas(64) Count {
 public:
  static constexpr long kFailed = std::numeric_limits<long>::max();

  void reach(long n) { n_.store(n, std::memory_order_release); }

  // Throws where the thread has failed, which is not to be waited for.
  void wait(Bell& bell, long n) const {
    long seen;
    bell.wait([&] { return (seen = n_.load(std::memory_order_acquire)) >= n; });
    if (seen == kFailed) throw Abandoned();
  }

 private:
  std::atomic<long> n_{0};
};

// Only threads that run are ever waited for: the first to come gives the others a moment, then starts with those that are there. So
// a pool that grants fewer threads than asked for, or runs them one after another, cannot hang it.
class Team {
 public:
  explicit Team(long wanted) : wanted_(wanted), slots_(wanted) {}

  // → this thread's rank, or -1 where the others have begun without it; the work is theirs then. `own` where all have come, so that a
  // thread finds the same work call after call, and what it takes in its caches; else by who came first.
  long join(long own) {
    long seen = members_.load();
    do {
      if (seen & kClosed) return -1;
    } while (!members_.compare_exchange_weak(seen, seen + 1));
    if (seen == 0) {
      for (long spins = 0; members_.load() < wanted_ && spins < kMoment; ++spins) pause();
      members_.fetch_or(kClosed);
    } else {
      while (!(members_.load() & kClosed)) pause();  // it keeps its core: a team is not to have more members than cores
    }
    return size() == wanted_ ? own : seen;
  }

  long size() const { return members_.load(std::memory_order_relaxed) & ~kClosed; }

  // Until every member has come here as often as the one of this rank: `turn` is its own count, zero at first. Throws where one has failed.
  void wait(long rank, long& turn) {
    const long all = size();
    if (all == 1) return;
    slots_[rank].reach(++turn);
    bell_.ring();
    for (long i = 0; i < all; ++i) slots_[i].wait(bell_, turn);
  }

  // The member of this rank comes no more.
  void fail(long rank) {
    slots_[rank].reach(Count::kFailed);
    bell_.ring();
  }

 private:
  static constexpr long kClosed = 1l << 40, kMoment = 4000;  // kMoment in pauses

  const long wanted_;
  alignas(64) std::atomic<long> members_{0};
  std::vector<Count> slots_;
  Bell bell_;
};

// A thread as one of a team: what they all walk through side by side, each doing its share.
struct Member {
  Team* team;
  long rank;
  long* turn;
  long size() const { return team->size(); }
  void wait() const { team->wait(rank, *turn); }
  // This member's share of n.
  long begin(long n) const { return n * rank / size(); }
  long end(long n) const { return n * (rank + 1) / size(); }
};

// A member's shares of pieces of work that do not wait for each other. Pieces too small for all members go to one after another.
class Pieces {
 public:
  const Member member;

  explicit Pieces(const Member& member) : member(member) {}

  // f(begin, end) for what is this member's of [0, n).
  template <class F>
  void take(long n, const F& f) {
    const long all = member.size();
    if (n >= all) return f(member.begin(n), member.end(n));
    const long turn = (member.rank + all - taken_ % all) % all;
    if (turn < n) f(turn, turn + 1);
    taken_ += n;
  }

  // Until all members have done theirs.
  void wait() const { member.wait(); }

 private:
  long taken_ = 0;
};

// How many steps a thread has behind it, for those that follow it.
class Progress {
 public:
  void reach(long steps) {
    steps_.reach(steps);
    bell_.ring();
  }
  void wait(long steps) { steps_.wait(bell_, steps); }
  void fail() { reach(Count::kFailed); }

 private:
  Count steps_;
  Bell bell_;
};

}  // namespace cpu
}  // namespace convfast
