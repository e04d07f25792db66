// Memory that outlives a call, for scratch and for large outputs: fresh pages cost more than many a kernel.
#pragma once
#include <cstddef>
#include <utility>
#include <vector>

namespace convfast {
namespace cpu {

// Buffers taken here go back to a process-wide pool when the object ends. Safe from several threads, and after fork.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // n elements, 64-byte aligned, with 64 readable elements behind them (a kernel's last vector may run over). Not cleared.
  template <class T>
  T* take(long n) {
    return static_cast<T*>(take_bytes((n + 64) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);
  std::vector<std::pair<void*, size_t>> taken_;
};

void release_workspace();

// The pool itself. A buffer has at least `bytes` bytes; what it really has goes back with it.
std::pair<void*, size_t> borrow(size_t bytes);
void give_back(void* data, size_t bytes);

// CONVFAST_POISON=1: fresh memory is filled with NaN, so that a test sees whoever reads it unwritten.
bool poison_requested();
void poison(void* data, size_t bytes);

}  // namespace cpu
}  // namespace convfast
